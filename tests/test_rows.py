"""Raw files as rows: what is read, what is skipped and counted, and how little is held."""

import gzip
import itertools
import re
import sys
import tracemalloc
from pathlib import Path

import pytest

from m2rec import rows
from m2rec.rows import Tally


def written(tmp_path: Path, content: str | bytes, name: str = "raw.json") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_json_lines_with_what_is_wrong_in_them(tmp_path: Path):
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n[1]\n{"a": \n{"a": "\xe9"}\n"x"\n' + b"[" * 100_000 + b'\n{"a": 2}'
    tally = Tally(written(tmp_path, content), max_bad=1)
    assert list(rows.json_rows(tally)) == [(1, {"a": 1}), (8, {"a": 2})]
    assert (tally.lines, tally.bad, len(tally.examples)) == (8, 5, 3)
    assert tally.examples[0] == "line 3: not an object with names and values"
    assert tally.examples[1].startswith("line 4: not JSON (")
    assert tally.examples[2] == "line 5: not UTF-8"


def test_python_dicts_are_read_and_never_run(tmp_path: Path):
    lines = [
        r"""{'asin': 'B1', 'title': "Women's \"best\"", 'categories': [['A', 'B'], ['C \u00e9']]}""",
        r"""{u'id': u'7', u'name': u'caf\xe9', u'free': False, u'path': 'C:\data', u'none': None}""",
        '{"id": "8", "free": false}',
        f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()",
        "{'id': __import__('os').getpid()}",
        "-" * 200_000 + "1",
        "(" * 200_000,
        "+".join(["1j"] * 200_000),
        "{'a': '" + "x" * rows.LITERAL_LIMIT + "'}",
        "{[]: 1}",
    ]
    tally = Tally(written(tmp_path, "\n".join(lines)), max_bad=1)
    found = [row for _, row in rows.loose_rows(tally)]
    assert found == [
        {"asin": "B1", "title": 'Women\'s "best"', "categories": [["A", "B"], ["C é"]]},
        {"id": "7", "name": "café", "free": False, "path": r"C:\data", "none": None},
        {"id": "8", "free": False},
    ]
    assert tally.bad == 7 and not (tmp_path / "ran").exists()


def test_a_line_that_is_too_long_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "LINE_LIMIT", 2**20)
    content = b'{"a": 1}\n{"a": "' + b"x" * 2**24 + b'"}\n{"a": 2}\n'
    tally = Tally(written(tmp_path, gzip.compress(content)), max_bad=1)
    tracemalloc.start()
    assert [row["a"] for _, row in rows.json_rows(tally)] == [1, 2]
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    assert tally.examples == ["line 2: longer than 1 MiB"]


def test_reading_is_lazy(tmp_path: Path):
    count = 200_000
    path = written(tmp_path, gzip.compress(b'{"a": "some text that takes room"}\n' * count))
    tally = Tally(path)
    tracemalloc.start()
    reader = rows.json_rows(tally)
    assert tally.lines == 0
    assert len(list(itertools.islice(reader, 10))) == 10 and tally.lines == 10
    assert sum(1 for _ in reader) == count - 10
    assert tracemalloc.get_traced_memory()[1] < 2**20  # the text has 7 MB
    tracemalloc.stop()
    assert tally.position == path.stat().st_size


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_csv_of_any_separator(tmp_path: Path, separator: str):
    lines = [
        ["user ", "the time", "text"],
        ["u1", "1", '"a, b\t; | ""c"" \nd"'],
        ["u2", "2", 'plain 5" nail'],
    ]
    content = "\r\n".join(separator.join(cells) for cells in lines)
    found = list(rows.csv_rows(Tally(written(tmp_path, content)), ["the time", "user"]))
    assert found == [
        (2, {"user": "u1", "the time": "1", "text": 'a, b\t; | "c" \nd'}),
        (4, {"user": "u2", "the time": "2", "text": 'plain 5" nail'}),
    ]


def test_csv_goes_on_after_what_is_wrong(tmp_path: Path):
    content = b'a,b\n1,2\n3\n\n4,\xff\n"5" x,6\n7,8,9\n10,"11\n12,13\n'
    tally = Tally(written(tmp_path, content), max_bad=1)
    assert list(rows.csv_rows(tally, ["a"])) == [(2, {"a": "1", "b": "2"})]
    assert tally.examples[:2] == ["line 3: 1 columns, the header has 2", "line 5: not UTF-8"]
    assert tally.bad == 6  # the quote that is left open takes two lines with it


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"user,item\n1,2\n", "column 'when' is missing, the file has user, item; name one of them"),
        (b"user;item,x\n", "column 'when' is missing, the file has user"),
        (b"\xff\xfeu\x00", "the file is UTF-16; save it as UTF-8 first"),
        (b"PK\x03\x04 and so on", "the file is a zip archive; unpack it first"),
        (b"caf\xe9,when\n", "line 1: not UTF-8; save it as UTF-8"),
    ],
)
def test_unusable_csv_files(tmp_path: Path, content: bytes, message: str):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        list(rows.csv_rows(Tally(path), ["when"]))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("damage", ["cut off", "a byte", "garbage behind"])
def test_damaged_gzip_files(tmp_path: Path, damage: str):
    whole = gzip.compress("".join(f'{{"a": {n * n}}}\n' for n in range(10_000)).encode())
    broken = {
        "cut off": whole[: len(whole) // 2],
        "a byte": whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:],
        "garbage behind": whole + b"garbage",
    }
    tally = Tally(written(tmp_path, broken[damage]), max_bad=1)
    message = r"the gzip file is cut off or damaged after line [\d,]+ \(.*\); download it again"
    with pytest.raises(ValueError, match=message):
        list(rows.json_rows(tally))


def test_delimited_files_are_utf8_or_latin1(tmp_path: Path):
    content = "1::Misérables, Les::War\r\n".encode("latin-1") + "2::Amélie::War\n3::x\n".encode()
    tally = Tally(written(tmp_path, content), max_bad=1)
    found = list(rows.delimited_rows(tally, "::", ("id", "title", "genres")))
    assert [row["title"] for _, row in found] == ["Misérables, Les", "Amélie"]
    assert found[0][1]["genres"] == "War" and tally.examples == ["line 3: 2 columns instead of 3"]


def test_a_file_is_given_up_when_too_much_is_malformed(tmp_path: Path):
    tally = Tally(written(tmp_path, '{"a": 1}\n' * 98 + "x\nx\n"), max_bad=0.02)
    list(rows.json_rows(tally))
    tally.finish()
    tally.max_bad = 0.01
    with pytest.raises(
        ValueError, match=r"2 of 100 lines are malformed, more than --max-bad=0\.01; .*line 99"
    ):
        tally.finish()
    path = written(tmp_path, "x\n" * 50_000)
    early = Tally(path, max_bad=0.01)
    with pytest.raises(ValueError, match="101 of 101 lines are malformed"):
        list(rows.json_rows(early))
    with pytest.raises(ValueError, match="the file is empty"):
        Tally(path).finish()


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(rows, "BATCH", 3)
    path = tmp_path / "x.parquet"
    table = {"user": ["a", "b", None, "d"], "tags": [["x"], [], None, ["y", "z"]], "other": [1, 2, 3, 4]}
    parquet.write_table(pyarrow.table(table), path)
    tally = Tally(path)
    reader = rows.parquet_rows(tally, ["tags", "user", "user"])
    assert next(reader) == (1, {"tags": ["x"], "user": "a"})
    assert [row for _, row in reader][-1] == {"tags": ["y", "z"], "user": "d"}
    assert tally.lines == 4 and tally.position == path.stat().st_size
    with pytest.raises(ValueError, match="column 'when' is missing, the file has user, tags, other"):
        list(rows.parquet_rows(Tally(path), ["when"]))
    parquet.write_table(pyarrow.table(table).slice(0, 0), path)
    assert list(rows.parquet_rows(Tally(path), ["user"])) == []
    for content in (b"user,item\n", b"", path.read_bytes()[:-10]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole Parquet file"):
            list(rows.parquet_rows(Tally(path), ["user"]))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="reading Parquet needs pyarrow; run: pip install pyarrow"):
        list(rows.parquet_rows(Tally(tmp_path / "x.parquet"), ["user"]))
