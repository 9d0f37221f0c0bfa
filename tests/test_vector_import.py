"""Vectors made elsewhere: every kind of file, what is wrong with it in one line, and no pickle."""

import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2rec.text.imported import ImportedVectors

TOKENS = ["a", "b b", "é"]
VECTORS = np.array([[3.0, 4], [0, 1], [1e6, -2]])


def npy(folder: Path, vectors: Any = VECTORS, ids: str = "a\nb b\né\n") -> ImportedVectors:
    np.save(folder / "v.npy", vectors)
    (folder / "ids.txt").write_text(ids, encoding="utf-8")
    return ImportedVectors(folder / "v.npy", folder / "ids.txt", "item_id", "")


def text(folder: Path, content: str) -> ImportedVectors:
    (folder / "v.csv").write_text(content, encoding="utf-8")
    return ImportedVectors(folder / "v.csv", None, "item_id", "")


def parquet(folder: Path, columns: dict[str, Any], **types: Any) -> ImportedVectors:
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    write_table(table, folder / "v.parquet", row_group_size=2)
    return ImportedVectors(folder / "v.parquet", None, "item_id", "")


def same(source: ImportedVectors, tokens: list[str] = TOKENS) -> None:
    found, vectors = source.read()
    assert found == tokens
    assert vectors.dtype == np.float32 and np.allclose(vectors, VECTORS)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_npy(tmp_path: Path, dtype: type):
    vectors = np.minimum(VECTORS, 500).astype(dtype)
    tokens, found = npy(tmp_path, vectors).read()
    assert tokens == TOKENS
    assert np.array_equal(found, vectors)
    same(npy(tmp_path, VECTORS, ids="\ufeffa\r\nb b\r\né"))


@pytest.mark.parametrize("head", ["", "item_id,x,y\n", ",0,1\n", "item_id,1,2\n"])
def test_csv(tmp_path: Path, head: str):
    same(text(tmp_path, f'{head}a,3,4\n"b b",0,1\né,1e6,-2\n'))
    quoted = ['5" nail', 'say "hi"', "a, b"]
    same(text(tmp_path, f'{head}5" nail,3,4\n"say ""hi""",0,1\r\n\n"a, b",1e6,-2'), quoted)


def test_parquet(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    rows = VECTORS.tolist()
    same(parquet(tmp_path, {"item_id": TOKENS, "vector": rows}))
    same(parquet(tmp_path, {"vector": rows, "item_id": TOKENS}, vector=pa.list_(pa.float64(), 2)))
    same(parquet(tmp_path, {"item_id": TOKENS, "v0": VECTORS[:, 0], "v1": VECTORS[:, 1]}))
    same(parquet(tmp_path, {"item_id": [7, 8, 9], "vector": rows}), ["7", "8", "9"])
    same(parquet(tmp_path, {"item_id": TOKENS, "vector": rows}, vector=pa.large_list(pa.float32())))


def test_the_fingerprint_knows_both_files(tmp_path: Path):
    before = npy(tmp_path).fingerprint_fields
    assert npy(tmp_path).fingerprint_fields == before and before["model"] == "v.npy"
    assert npy(tmp_path, ids="a\nb b\nc\n").fingerprint_fields != before
    assert npy(tmp_path, VECTORS + 1).fingerprint_fields != before


NAN = [[1.0, 2], [3, float("nan")], [5, 6]]


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (npy, (VECTORS, "a\nb\n"), "ids.txt: 2 tokens for the 3 vectors of"),
        (npy, (VECTORS, "a\n\nc\n"), "ids.txt: the token of vector 2 is empty"),
        (npy, (VECTORS, "a\nb\na\n"), "ids.txt: duplicate token 'a'"),
        (npy, (NAN,), "v.npy: the vector of 'b b' has missing, NaN or infinite values (1 such vectors)"),
        (npy, (np.ones(3),), "v.npy: has shape (3,); it must be (items, width)"),
        (npy, (np.ones((0, 3)), ""), "v.npy: has shape (0, 3); it must be (items, width)"),
        (npy, (np.zeros((3, 2)),), "v.npy: its vectors have a mean length of 0.0; scale them"),
        (npy, (np.array([["x"], ["y"], ["z"]]),), "v.npy: not an array of real numbers"),
        (text, ("a,1,2\nb,1\n",), "v.csv: the vector of 'b' has missing, NaN or"),
        (text, ("a,1\nb,1,2\n",), "v.csv: not a valid CSV file in UTF-8 (Expected 2 fields in line 2"),
        (text, ("a,1,2\nb,1,x\n",), "v.csv: the vector of 'b' has 'x', not a number"),
        (text, ("a,1,true\nb,1,true\n",), "v.csv: the vector of 'a' has 'True', not a number"),
        (text, ("a,,\nb,1,2\n",), "v.csv: the vector of 'a' has missing, NaN or"),
        (text, ("a,1,2\nb,1,inf\n",), "v.csv: the vector of 'b' has missing, NaN or infinite"),
        (text, ("a,1\na,2\n",), "v.csv: duplicate token 'a'"),
        (text, (",1\nb,2\n",), "v.csv: the token of vector 1 is empty"),
        (text, ("",), "v.csv: not a valid CSV file in UTF-8 (No columns to parse"),
        (text, ('a,1,2\n"He,3,4\nb,5,6\nc"",7,8\nd",9,0\ne,1,2\n',), "csv: the token of vector 2 has a line "
         "break, 'He,3,4\\nb,5,6\\nc\",7,8\\nd'; if a quotation mark joins the lines, remove it, or quote"),
        (text, ('a,1,2\n\n"b,3,4\nc,5,6\n',), "not a valid CSV file in UTF-8 (EOF inside string starting at"),
        (text, ('item_id,"x\ny",z\na,1,2\nb,1\n',), "v.csv: the vector of 'b' has missing"),
        (parquet, ({"id": TOKENS, "v": NAN},), "has no column 'item_id', only id, v; name one"),
        (parquet, ({"item_id": TOKENS, "v": NAN},), "the vector of 'b b' has missing, NaN"),
        (parquet, ({"item_id": TOKENS, "v": [[1.0], [1.0, 2], [3]]},), "of 'b b' has 2 numbers"),
        (parquet, ({"item_id": TOKENS, "v": [[1.0], None, [3]]},), "the vector of 'b b' has 0 numbers"),
        (parquet, ({"item_id": TOKENS, "v": [[1.0], [None], [3.0]]},), "the vector of 'b b' has missing"),
        (parquet, ({"item_id": TOKENS, "v": ["x", "y", "z"]},), "column 'v' must hold lists of numbers"),
        (parquet, ({"item_id": TOKENS, "v0": [1, 2, 3], "price": [1, 2, 3]},), "column 'price' is not part"),
        (parquet, ({"item_id": TOKENS},), "v.parquet: has shape (3, 0); it must be"),
        (parquet, ({"item_id": [1.5, 2, 3], "v": NAN},), "column 'item_id' has 1.5; tokens must be"),
        (parquet, ({"item_id": ["a", None, "c"], "v": NAN},), "the token of vector 2 is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, kind: Any, given: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(tmp_path, *given).read()


@pytest.mark.parametrize("name", ["v.parquet", "v.csv", "v.npy"])
def test_files_that_are_something_else(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe\x00 nothing of the kind")
    (tmp_path / "ids.txt").write_text("a\n")
    ids = tmp_path / "ids.txt" if name == "v.npy" else None
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a ")):
        ImportedVectors(path, ids, "item_id", "").read()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["object array", "bare pickle"])
def test_no_pickle_in_an_npy_is_executed(tmp_path: Path, kind: str):
    ran, path = tmp_path / "ran", tmp_path / "v.npy"
    if kind == "object array":
        np.save(path, np.array([Trap(ran)], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Trap(ran)))
    (tmp_path / "ids.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"v\.npy: not a numeric array"):
        ImportedVectors(path, tmp_path / "ids.txt", "item_id", "").read()
    assert not ran.exists()
    if kind == "bare pickle":
        pickle.loads(path.read_bytes())  # the trap is real
        assert ran.exists()


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pt", "pth", "bin", "joblib", "PKL"])
def test_files_that_can_hold_a_pickle_are_not_opened(tmp_path: Path, suffix: str):
    path = tmp_path / f"v.{suffix}"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"^vectors: .* can hold a pickle, which is never read; give \.npy"):
        ImportedVectors(path, None, "item_id", "")
    assert not (tmp_path / "ran").exists()


def test_options_that_do_not_fit(tmp_path: Path):
    path = tmp_path / "v.npy"
    with pytest.raises(ValueError, match=r"^vectors: no file .*v\.npy"):
        ImportedVectors(path, None, "item_id", "")
    path.touch()
    with pytest.raises(ValueError, match=r"^ids: .*v\.npy has no tokens"):
        ImportedVectors(path, None, "item_id", "")
    with pytest.raises(ValueError, match=r"^ids: no file .*gone"):
        ImportedVectors(path, tmp_path / "gone", "item_id", "")
    (tmp_path / "v.csv").touch()
    with pytest.raises(ValueError, match=r"^ids: .* is only for \.npy"):
        ImportedVectors(tmp_path / "v.csv", path, "item_id", "")
    with pytest.raises(ValueError, match=r"^vectors: the format of v\.xlsx is not supported"):
        ImportedVectors(Path("v.xlsx"), None, "item_id", "")


def test_without_pyarrow_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "v.parquet").touch()
    with pytest.raises(ValueError, match=r"v\.parquet needs pyarrow; pip install pyarrow"):
        ImportedVectors(tmp_path / "v.parquet", None, "item_id", "").read()
