"""Broken and hostile input to everything that reads a file, a setting or a history: our errors or none.

Right files with a few bytes changed, cut out or put in, and bytes without any sense. A ValueError of
ours is one line; anything else than it or an OSError is a bug. M2REC_FUZZ says how many inputs each
reader gets.
"""

import hashlib
import io
import json
import os
import string
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2rec.commands import prepare_data
from m2rec.data import inter_file
from m2rec.data.item_file import read_item_titles, read_item_tokens
from m2rec.errors import UserError
from m2rec.experiments.sweep_plan import Sweep
from m2rec.nn.encoder import Encoder
from m2rec.serving import saved_model
from m2rec.serving.dialogue import Dialogue
from m2rec.serving.recommender import Recommender
from m2rec.settings import ModelSettings, RunSettings
from m2rec.tensor_files import read_tensors, write_tensors
from m2rec.text import vector_file
from m2rec.text.imported import ImportedVectors
from m2rec.text.item_text import parse_template, read_item_texts
from m2rec.training.configuration import build_config, collect_known_keys
from m2rec.yaml_values import parse_arguments, read_yaml

ROOT = Path(__file__).parent.parent
EXAMPLES = int(os.environ.get("M2REC_FUZZ", "25"))
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

INTER = b"user_id:token\titem_id:token\ttimestamp:float\n" + b"".join(
    b"u%d\ti%d\t%d.5\n" % (k % 3, k % 7, 978300000 + k) for k in range(20)
)
ITEM = "item_id:token\ttitle:token_seq\tyear:token\n1\tToy Story\t1995\n2\tHeat\t\n3\té😀\t7\n".encode()
CSV = b"id,0,1,2\na,0.5,1,2\nb,1e3,-4,.25\n"
YAML = b"title: Toys\ndatasets: [toy]\nseeds: [1, 2]\nvariants:\n  M2Rec: {}\n  b: {filter: none}\n"
JSON = b'{"user": "a", "item": 3, "time": "2024-01-31T10:00:00Z", "title": ["x", null]}\n' * 3


@st.composite
def broken(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with up to four changes."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from([0, 1, 1, 8, 10**6])))
        content[start:stop] = draw(st.one_of(st.binary(max_size=4), st.sampled_from(ODD)))
    return bytes(content)


ODD = [b"\t", b"\n", b"\r\n", b'"', b"\0", b"\xff\xfe", b"nan", b"inf", b"-", b"1e999", b"\xef\xbb\xbf", b" ",
       b"[PAD]", b",", b":", b"{", b"\xf0\x9f\x98\x80", b"\x80\x04cos\nsystem\n", b"9" * 400]  # fmt: skip


def only_our_errors(call: Callable[[], Any]) -> None:
    """Whatever goes wrong is a ValueError of ours, in one line, or the system's."""
    try:
        call()
    except OSError:
        pass
    except ValueError as error:
        assert type(error) is UserError, error
        assert str(error) and "\n" not in str(error), error
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        assert raised_in.is_relative_to(ROOT / "m2rec") or raised_in.is_relative_to(ROOT / "scripts"), error


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


@fuzzed
@given(content=broken(INTER) | st.binary(max_size=80))
def test_interactions(path: Path, content: bytes):
    path.write_bytes(content)

    def read() -> None:
        header = inter_file.read_header(path, "\t")
        for key, column, kind in (
            ("USER_ID_FIELD", "user_id", "token"),
            ("TIME_FIELD", "timestamp", "float"),
        ):
            inter_file.require_column(path, header, key, column, kind)
        inter_file.read_interactions(path, "\t", header, list(header), "timestamp")

    only_our_errors(read)


@fuzzed
@given(content=broken(ITEM) | st.binary(max_size=80), template=st.text(max_size=12))
def test_item_files(path: Path, content: bytes, template: str):
    path.write_bytes(content)
    only_our_errors(lambda: read_item_texts(path, "item_id", None))
    only_our_errors(lambda: read_item_texts(path, "item_id", None, "{title}; {year}"))
    only_our_errors(lambda: read_item_titles(path, "item_id"))
    only_our_errors(lambda: read_item_tokens(path, "item_id"))
    only_our_errors(lambda: parse_template(template))


@fuzzed
@given(data=st.data())
def test_text_vectors_and_checkpoints(path: Path, data: st.DataObject):
    vector_file.write_text_vectors(path, ["a", "b", "é"], np.ones((3, 4)), {"model": "m"})
    path.write_bytes(data.draw(broken(path.read_bytes()) | st.binary(max_size=80)))
    only_our_errors(lambda: vector_file.load_item_vectors(path, ["[PAD]", "a", "b"]))
    write_tensors(path, {"a": torch.ones(3, 2), "b": torch.zeros(())}, {"numbers": "{}"})
    whole = path.read_bytes()
    path.write_bytes(content := data.draw(broken(whole) | st.binary(max_size=80)))
    if content != whole:
        with pytest.raises(ValueError):
            read_tensors(path)


@fuzzed
@given(csv=broken(CSV), npy=st.data(), ids=st.binary(max_size=12))
def test_imported_vectors(tmp_path: Path, csv: bytes, npy: st.DataObject, ids: bytes):
    files = {name: tmp_path / name for name in ("v.csv", "v.npy", "ids.txt", "v.parquet")}
    files["v.csv"].write_bytes(csv)
    np.save(files["v.npy"], np.ones((2, 3)))
    files["v.npy"].write_bytes(npy.draw(broken(files["v.npy"].read_bytes())))
    files["ids.txt"].write_bytes(npy.draw(st.sampled_from([b"a\nb\n", ids])))
    files["v.parquet"].write_bytes(ids)
    for name, tokens in (("v.csv", None), ("v.npy", files["ids.txt"]), ("v.parquet", None)):
        only_our_errors(
            lambda name=name, tokens=tokens: ImportedVectors(files[name], tokens, "id", "").read()
        )


@fuzzed
@given(clicks=broken(b"who,what,when\na,1,2024-01-01\nb,2,3\n" * 3), lines=broken(JSON))
def test_raw_files(tmp_path: Path, clicks: bytes, lines: bytes):
    """The command itself, which says what is wrong and leaves nothing half-written."""
    (tmp_path / "clicks.csv").write_bytes(clicks)
    (tmp_path / "items.jsonl").write_bytes(lines)
    out = f"--data-path={tmp_path / 'out'}"
    for kind, arguments in (
        ("csv", ["--user=who", "--item=what", "--time=when", f"--interactions={tmp_path / 'clicks.csv'}"]),
        (
            "jsonl",
            ["--user=user", "--item=item", "--time=time", f"--interactions={tmp_path / 'items.jsonl'}"],
        ),
    ):
        status = prepare_data.main([kind, *arguments, "--dataset=shop", "--max-bad=0.5", out])
        assert status in (0, 2)
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left <= {"shop.inter", "shop.item"}, left


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@fuzzed
@given(key=st.sampled_from(sorted({*ModelSettings.keys(), *RunSettings.keys()})), value=values)
def test_settings(key: str, value: Any):
    for kind in (ModelSettings, RunSettings):
        only_our_errors(lambda kind=kind: kind.read({key: value}))


@fuzzed
@given(key=st.sampled_from(sorted(collect_known_keys() - {"data_path", "runs_dir"})), value=values)
def test_configs(key: str, value: Any):
    """Any key with any value becomes a config or one of our errors."""
    only_our_errors(lambda: build_config({"dataset": "ml-100k", "model": "M2Rec", key: value}))


@fuzzed
@given(content=broken(YAML) | st.binary(max_size=60), argument=st.text(string.printable, max_size=20))
def test_yaml_and_arguments(path: Path, content: bytes, argument: str):
    path.write_bytes(content)
    only_our_errors(lambda: read_yaml(path))
    only_our_errors(lambda: Sweep.read(path))
    only_our_errors(lambda: parse_arguments([argument, f"--a={argument}"]))


FOLDER = ["config.yaml", "items.json", "titles.json", "text.json", "counts.json"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved recommender of random weights, of five items with text."""
    folder = tmp_path_factory.mktemp("run")
    own = {"hidden_size": 8, "inner_size": 8, "head_dim": 8, "d_state": 2, "n_layers": 1}
    config = {"model": "M2Rec", "MAX_ITEM_LIST_LENGTH": 5, **own}
    vectors = torch.randn(6, 3)
    vectors[0] = 0
    encoder = Encoder(ModelSettings.read(config), 6, 5, vectors)
    tokens = ["[PAD]", "a", "b", "c", "d", "😀"]
    model = saved_model.build_saved_model(
        encoder,
        tokens,
        titles={"a": "A"},
        counts=[0, 4, 3, 2, 1, 0],
        config=config,
        text_mean=torch.zeros(3),
        text_basis=torch.eye(3),
        text_source={"model": "m"},
    )
    saved_model.write_saved_model(model, folder)
    return folder


@fuzzed
@given(
    history=st.lists(st.sampled_from(["a", "b", "😀", "[PAD]", "", "x\ty", None, 3, []]), max_size=9),
    k=values,
)
def test_histories(run_folder: Path, history: Sequence[Any], k: Any):
    recommender = Recommender.load(run_folder)
    only_our_errors(lambda: recommender.recommend(history, k))
    only_our_errors(lambda: recommender.recommend(history, skip_unknown=True))
    only_our_errors(lambda: recommender.recommend(["a"], candidates=history, exclude=history))
    only_our_errors(lambda: recommender.session(history).recommend())
    only_our_errors(lambda: recommender.add_items(["new"], [[1.0, 2.0, 3.0]], {"new": k}))


@fuzzed
@given(
    data=st.data(),
    name=st.sampled_from(["config.yaml", "items.json", "titles.json", "text.json", "counts.json"]),
)
def test_run_folders(run_folder: Path, tmp_path: Path, data: st.DataObject, name: str):
    for path in run_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (run_folder / name).read_bytes()
    other = st.builds(lambda value: json.dumps(value).encode(), values)
    (tmp_path / name).write_bytes(data.draw(broken(whole) | other))
    only_our_errors(lambda: Recommender.load(tmp_path).recommend(["a"], 3))
    only_our_errors(lambda: Recommender.load(tmp_path).recommend([], 3))


@fuzzed
@given(data=st.data(), signed=st.booleans())
def test_saved_sessions(run_folder: Path, data: st.DataObject, signed: bool):
    """Signed as anybody can, too."""
    recommender = Recommender.load(run_folder)
    content = data.draw(broken(recommender.session(["a", "b"]).to_bytes()[32:]))
    digest = hashlib.sha256(content if signed else b"").digest()
    only_our_errors(lambda: recommender.restore_session(digest + content).recommend())


@fuzzed
@given(rows=broken(b'user,history\nanna,a b c\nbert,\n"c","[""a"", ""b""]"\n'))
def test_files_of_histories(run_folder: Path, tmp_path: Path, rows: bytes):
    (tmp_path / "in.csv").write_bytes(rows)
    recommender = Recommender.load(run_folder)
    out = tmp_path / "out.parquet"
    only_our_errors(lambda: recommender.recommend_file(tmp_path / "in.csv", out, skip_unknown=True))
    assert {path.name for path in tmp_path.iterdir()} <= {"in.csv", "out.parquet"}


@fuzzed
@given(lines=st.lists(st.text(max_size=40) | st.sampled_from(["a", "A", "1", "why", "undo", "new"])))
def test_conversations(run_folder: Path, lines: list[str]):
    only_our_errors(lambda: Dialogue(Recommender.load(run_folder), 3, io.StringIO()).run(lines))
