"""Raw files as rows: what is read, what is skipped and counted, and how little is held."""

import csv
import gzip
import io
import itertools
import json
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2rec.data.raw import json_rows, lines
from m2rec.data.raw.delimited import CsvLayout, read_csv_records, read_delimited_rows, read_sequence_rows
from m2rec.data.raw.json_rows import read_json_or_literal_rows, read_json_rows
from m2rec.data.raw.parquet import read_parquet_rows
from m2rec.data.raw.tally import NumberedRows, Tally

random_files = settings(
    max_examples=150, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def written(tmp_path: Path, content: str | bytes, name: str = "raw.json") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_json_lines_with_what_is_wrong_in_them(tmp_path: Path):
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n[1]\n{"a": \n{"a": "\xe9"}\n"x"\n' + b"[" * 100_000 + b'\n{"a": 2}'
    tally = Tally(written(tmp_path, content), max_bad=1)
    assert list(read_json_rows(tally)) == [(1, {"a": 1}), (8, {"a": 2})]
    assert (tally.lines, tally.malformed_count, len(tally.examples)) == (8, 5, 3)
    assert tally.examples[0] == "line 3: expected a JSON object"
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
        "{'a': '" + "x" * json_rows.MAX_LITERAL_CHARACTERS + "'}",
        "{[]: 1}",
    ]
    tally = Tally(written(tmp_path, "\n".join(lines)), max_bad=1)
    found = [row for _, row in read_json_or_literal_rows(tally)]
    assert found == [
        {"asin": "B1", "title": 'Women\'s "best"', "categories": [["A", "B"], ["C é"]]},
        {"id": "7", "name": "café", "free": False, "path": r"C:\data", "none": None},
        {"id": "8", "free": False},
    ]
    assert tally.malformed_count == 7 and not (tmp_path / "ran").exists()


def test_a_line_that_is_too_long_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 2**20)
    content = b'{"a": 1}\n{"a": "' + b"x" * 2**24 + b'"}\n{"a": 2}\n'
    tally = Tally(written(tmp_path, gzip.compress(content)), max_bad=1)
    tracemalloc.start()
    assert [row["a"] for _, row in read_json_rows(tally)] == [1, 2]
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    assert tally.examples == ["line 2: longer than 1 MiB"]


def test_reading_is_lazy(tmp_path: Path):
    count = 50_000
    path = written(tmp_path, gzip.compress(b'{"a": "some text that takes room"}\n' * count))
    tally = Tally(path)
    tracemalloc.start()
    reader = read_json_rows(tally)
    assert tally.lines == 0
    assert len(list(itertools.islice(reader, 10))) == 10 and tally.lines == 10
    assert sum(1 for _ in reader) == count - 10
    assert tracemalloc.get_traced_memory()[1] < 2**20  # the text has 1.7 MB
    tracemalloc.stop()
    assert tally.position == path.stat().st_size


@pytest.mark.parametrize("separator", [",", ";"])
def test_csv_with_quoted_cells(tmp_path: Path, separator: str):
    lines = [
        ["user ", "the time", "text"],
        ["u1", "1", '"a, b\t; | ""c"" \nd"'],
        ["u2", "2", 'plain 5" nail'],
    ]
    content = "\r\n".join(separator.join(cells) for cells in lines)
    tally = Tally(written(tmp_path, content))
    assert list(read_csv_records(tally, ["the time", "user"])) == [
        (2, {"user": "u1", "the time": "1", "text": 'a, b\t; | "c" \nd'}),
        (4, {"user": "u2", "the time": "2", "text": 'plain 5" nail'}),
    ]
    assert tally.remarks() == [
        "1 records span several lines (longest: 2 lines, from line 2); "
        "an unclosed quotation mark there would explain it"
    ]


@pytest.mark.parametrize("separator", ["\t", "|"])
def test_quotation_marks_are_text_between_tabs_and_bars(tmp_path: Path, separator: str):
    cells = ['"Heroes', '"Heroes"', 'Remix 12"', '""', '"', 'a "b" c']
    lines = [["user", "track"], *([f"u{n}", cell] for n, cell in enumerate(cells))]
    content = "\r\n".join(separator.join(line) for line in lines)
    tally = Tally(written(tmp_path, content))
    assert [row["track"] for _, row in read_csv_records(tally, ["user"])] == cells
    assert tally.remarks() == []


def test_quoted_names_between_tabs(tmp_path: Path):
    path = written(tmp_path, '"user"\t"item"\n"u"\t"i"\n')
    with pytest.raises(ValueError, match="its column names are in quotation marks, which are text between"):
        list(read_csv_records(Tally(path), ["item", "user"]))
    found = list(read_csv_records(Tally(path), ['"user"']))  # as they are called
    assert found == [(2, {'"user"': '"u"', '"item"': '"i"'})]


# of lines, # for the separator: whole ones, and those that open, hold and close a quoted cell
PIECES = ["a#b", '"a#b"#c', 'a#"b', 'b#""', 'b"', '"#"', '"a', 'a"#b', 'a"#"b', '"a"b#c']


@random_files
@given(
    lines=st.lists(st.sampled_from(PIECES) | st.text('ab,;"" \t', min_size=1), max_size=12),
    separator=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
    closed=st.booleans(),
)
def test_every_line_is_a_row_or_is_said(
    tmp_path: Path, lines: list[str], separator: str, end: str, closed: bool
):
    """Lines of the file = header + rows + continuation lines + malformed lines, whatever the quotes do."""
    lines = [line.replace("#", separator) for line in lines]
    content = end.join([f"x{separator}y", *lines]) + (end if closed else "")
    tally = Tally(written(tmp_path, content), max_bad=1)
    found = list(read_csv_records(tally, ["x", "y"]))
    assert tally.lines == len(lines) + 1 == 1 + len(found) + tally.continuation_lines + tally.malformed_count
    if separator in "\t|":
        whole = [tuple(line.split(separator)) for line in lines if line.count(separator) == 1]
        assert [(row["x"], row["y"]) for _, row in found] == whole
        assert not tally.continuation_lines


@random_files
@given(
    table=st.lists(st.tuples(*[st.text('ab,;"\n\t', max_size=6)] * 2), max_size=8),
    separator=st.sampled_from(",;"),
)
def test_what_csv_writes_comes_back(tmp_path: Path, table: list[tuple[str, str]], separator: str):
    file = io.StringIO()
    csv.writer(file, delimiter=separator).writerows([("x", "y"), *table])
    tally = Tally(written(tmp_path, file.getvalue()))
    found = list(read_csv_records(tally, ["x", "y"]))
    assert [(row["x"], row["y"]) for _, row in found] == table
    breaks = ["".join(cells).count("\n") for cells in table]
    assert (tally.malformed_count, tally.continuation_lines, tally.multiline_records) == (
        0,
        sum(breaks),
        sum(n > 0 for n in breaks),
    )
    assert tally.longest_record[0] == (max(breaks) + 1 if any(breaks) else 0)


def test_a_long_text_passes_and_an_open_quote_stops(tmp_path: Path):
    review = "x\n" * 998 + "x"
    content = f'a,b\n1,"{review}\n"\n2,y\n'  # a record of 1,000 lines
    tally = Tally(written(tmp_path, content))
    assert [number for number, _ in read_csv_records(tally, ["a"])] == [2, 1002]
    assert tally.longest_record == (1000, 2)
    rest = "".join(f"{n},z\n" for n in range(3000))
    for start, line in (('1,"Heroes\n', 2), ('1,"two\nlines","Heroes\n', 2), ('1,y\n\n2,"two\n""lines\n', 4)):
        path = written(tmp_path, f"a,b\n{start}{rest}")
        message = f"{path}: the record that begins in line {line} has more than 1,000 lines"
        with pytest.raises(ValueError, match=re.escape(message)):
            list(read_csv_records(Tally(path, max_bad=1), ["a"]))


LAYOUTS = [  # lines, names of the columns, the separator if it is said, cells
    (["1 6393", "1 13504", "2 6393"], ("user", "item"), " ", [["1", "6393"], ["1", "13504"], ["2", "6393"]]),
    (
        ["A3,02,5.0,13", "A4,05,3.0,14"],
        ("u", "", "r", "t"),
        "",
        [["A3", "02", "5.0", "13"], ["A4", "05", "3.0", "14"]],
    ),
    (['u\t"a', 'v\tb"'], ("x", "y"), "", [["u", '"a'], ["v", 'b"']]),
    (['u;"a;', 'b"', "v;c"], ("x", "y"), "", [["u", "a;\nb"], ["v", "c"]]),
    (['1::"a', "2::b:c", ""], ("x", "y"), "::", [["1", '"a'], ["2", "b:c"]]),
    (["1, 2", "a b, c"], ("x", "y"), ", ", [["1", "2"], ["a b", "c"]]),
    (["1:a b", "2:c,d"], ("x", "y"), ":", [["1", "a b"], ["2", "c,d"]]),
]


@pytest.mark.parametrize(("lines", "names", "separator", "cells"), LAYOUTS)
def test_columns_by_position(
    tmp_path: Path, lines: list[str], names: tuple[str, ...], separator: str, cells: list[list[str]]
):
    path = written(tmp_path, "\n".join(lines))
    tally = Tally(path)
    found = list(read_csv_records(tally, names[:1], CsvLayout(names, separator)))
    expected = [dict(zip(names, row, strict=True)) for row in cells]
    assert [row for _, row in found] == expected
    assert (
        tally.lines == len(found) + tally.continuation_lines + ("" in lines[:-1])
        and tally.malformed_count == 0
    )


def test_a_separator_with_a_header(tmp_path: Path):
    path = written(tmp_path, "user item\n1 a\n2  b\n")
    tally = Tally(path, max_bad=1)
    found = read_csv_records(tally, ["user", "item"], CsvLayout(separator=" "))
    assert list(found) == [(2, {"user": "1", "item": "a"})]
    assert tally.examples == ["line 3: 3 columns, the header has 2"]
    path = written(tmp_path, "user::item\n1::a\n")
    found = read_csv_records(Tally(path), ["item"], CsvLayout(separator="::"))
    assert list(found) == [(2, {"user": "1", "item": "a"})]


def test_a_separator_is_found_or_asked_for(tmp_path: Path):
    """Without a header only the number of columns speaks, and only where one separator alone fits."""
    names = ("user", "item")
    for line, separator in (("a b,c d", ","), ("a\tb;", "\t;"), ("a|b\tc", "|\t")):
        path = written(tmp_path, f"{line}\n")
        if len(separator) == 1:
            row = next(read_csv_records(Tally(path), names, CsvLayout(names)))[1]
            assert list(row.values()) == line.split(separator)
            continue
        with pytest.raises(ValueError, match=r"2 columns are named, line 1 has .*separator=' '"):
            list(read_csv_records(Tally(path), names, CsvLayout(names)))
    with pytest.raises(ValueError, match=r"line 1 has 1 with ',', 1 with '\\t', 1 with ';', 1 with"):
        list(read_csv_records(Tally(written(tmp_path, "1 2\n")), names, CsvLayout(names)))
    with pytest.raises(ValueError, match="column 'time' is missing, the file has user, item; name one"):
        list(read_csv_records(Tally(path), ["time"], CsvLayout((*names, ""))))


def test_a_header_where_none_is_expected_is_data(tmp_path: Path):
    tally = Tally(written(tmp_path, "user,item\n1,2\n3\n"), max_bad=1)
    found = [row for _, row in read_csv_records(tally, ["user"], CsvLayout(("user", "item")))]
    assert found == [{"user": "user", "item": "item"}, {"user": "1", "item": "2"}]
    assert tally.examples == ["line 3: 1 columns, 2 are named"]


def test_sequences(tmp_path: Path):
    tally = Tally(written(tmp_path, "1 7 8  7\n\n2\t9\t10 \r\n3\n é \xa0 x\n"))
    assert list(read_sequence_rows(tally)) == [
        (1, {"user": "1", "items": ["7", "8", "7"]}),
        (3, {"user": "2", "items": ["9", "10"]}),
        (4, {"user": "3", "items": []}),
        (5, {"user": "é", "items": ["\xa0", "x"]}),
    ]


@random_files
@given(
    objects=st.lists(
        st.dictionaries(st.text(max_size=3), st.integers() | st.text('a[]{},"\\ é', max_size=9), max_size=3)
        | st.integers() | st.just([{"a": "]"}]),
        max_size=8,
    ),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
)  # fmt: skip
def test_a_json_array(tmp_path: Path, objects: list[object], indent: int | None, ascii_only: bool):
    """Objects come back in their order, whatever else is in it is counted."""
    content = json.dumps(objects, indent=indent, ensure_ascii=ascii_only)
    tally = Tally(written(tmp_path, content + "\n"), max_bad=1)
    found = list(read_json_rows(tally))
    assert found == [(n, row) for n, row in enumerate(objects, 1) if isinstance(row, dict)]
    assert tally.lines == len(objects) == len(found) + tally.malformed_count
    assert tally.position == len(content.encode()) + 1


@pytest.mark.parametrize(
    "content",
    [
        b'[{"a": 1}, {"a": 2}',
        b'[{"a": 1}, {"a": 2},',
        b'[{"a": 1}, {"a": 2} {"a": 3}]',
        b'[{"a": 1}]\n[{"a": 2}]\n',
        b"[{'a': 1}]",
        b'[{"a": "\xe9"}]',
        b'[{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
    ],
)
def test_a_broken_json_array(tmp_path: Path, content: bytes):
    with pytest.raises(ValueError, match=r"begins as a JSON array, which is broken \(.*object in each line"):
        list(read_json_rows(Tally(written(tmp_path, content), max_bad=1)))


def test_a_json_array_that_is_gzipped_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = gzip.compress(json.dumps([{"a": n} for n in range(1000)]).encode())
    path = written(tmp_path, content)
    assert len(list(read_json_rows(Tally(path)))) == 1000
    path.write_bytes(content[:-20])
    with pytest.raises(ValueError, match=r"the gzip file is cut off or damaged after line 0 \("):
        list(read_json_rows(Tally(path)))
    monkeypatch.setattr(json_rows, "MAX_ARRAY_BYTES", 2**12)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a JSON array of more than 0 MiB; write one object in each line"):
        list(read_json_rows(Tally(path)))


def test_archives_are_refused(tmp_path: Path):
    path = tmp_path / "clicks.csv"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "x")
    for read in (lambda tally: read_csv_records(tally, ["a"]), read_json_rows):
        with pytest.raises(ValueError, match="a zip archive or a spreadsheet; unpack it or save it as CSV"):
            list(read(Tally(path)))


def test_what_an_open_quote_swallows_is_counted(tmp_path: Path):
    """Up to the end of the file, to a wrong character behind a closing one, or to the largest cell."""
    limit = csv.field_size_limit(131_072)
    try:
        for lines, first in (
            (['5,"Heroes', "6,x", "7,x"], "lines 3 to 5: a quotation mark is never closed"),
            (['5,"Heroes', "6,x", '7,"x"'], "lines 3 to 5: ',' expected after '\"'"),
            (['5,"Heroes', "6," + "x" * 70_000, "7," + "x" * 70_000], "lines 3 to 5: field larger"),
            (['5,"He', '6,x",x', "7,x"], "lines 3 to 4: 3 columns, the header has 2"),
        ):
            tally = Tally(written(tmp_path, "\n".join(["a,b", "1,2", *lines])), max_bad=1)
            found = list(read_csv_records(tally, ["a"]))
            assert len(found) + tally.malformed_count == 4 and tally.examples[0].startswith(first), (
                tally.examples
            )
            assert [row["a"] for _, row in found] == ["1", "7"][: 4 - tally.malformed_count]
    finally:
        csv.field_size_limit(limit)


def test_blank_lines_are_no_rows(tmp_path: Path):
    tally = Tally(written(tmp_path, 'a,b\n\n1,"2\n\n3"\n\r\n4,5\n\n'))
    assert [number for number, _ in read_csv_records(tally, ["a"])] == [3, 7]
    assert (tally.lines, tally.continuation_lines, tally.malformed_count) == (8, 2, 0)


def test_a_column_that_comes_twice(tmp_path: Path):
    path = written(tmp_path, "user,item,note,user ,note\nu,i,1,v,2\n")
    with pytest.raises(ValueError, match="column 'user' occurs 2 times; rename all but one"):
        list(read_csv_records(Tally(path), ["item", "user"]))
    assert [number for number, _ in read_csv_records(Tally(path), ["item"])] == [2]


def test_csv_goes_on_after_what_is_wrong(tmp_path: Path):
    content = b'a,b\n1,2\n3\n\n4,\xff\n"5" x,6\n7,8,9\n10,"11\n12,13\n'
    tally = Tally(written(tmp_path, content), max_bad=1)
    assert list(read_csv_records(tally, ["a"])) == [(2, {"a": "1", "b": "2"})]
    assert tally.examples[:2] == ["line 3: 1 columns, the header has 2", "line 5: not UTF-8"]
    assert tally.remarks()[0].startswith("6 of 9 lines are malformed and left out: line 3: 1 columns")
    assert tally.malformed_count == 6  # the quote that is left open takes two lines with it


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"user,item\n1,2\n", "column 'when' is missing, the file has user, item; name one of them"),
        (b"user;item,x\n", "column 'when' is missing, the file has user"),
        (b"user,item,When \n", "the file has user, item, When; name one of them; did you mean 'When'?"),
        (b"\xd0\xcf\x11\xe0 and so on", "the file is a spreadsheet; save it as CSV first"),
        (b"\xff\xfeu\x00", "the file is UTF-16; save it as UTF-8 first"),
        (b"caf\xe9,when\n", "line 1: not UTF-8; save it as UTF-8"),
    ],
)
def test_unusable_csv_files(tmp_path: Path, content: bytes, message: str):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        list(read_csv_records(Tally(path), ["when"]))
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
        list(read_json_rows(tally))


def test_delimited_files_are_utf8_or_latin1(tmp_path: Path):
    content = "1::Misérables, Les::War\r\n".encode("latin-1") + "2::Amélie::War\n3::x\n".encode()
    tally = Tally(written(tmp_path, content), max_bad=1)
    found = list(read_delimited_rows(tally, "::", ("id", "title", "genres")))
    assert [row["title"] for _, row in found] == ["Misérables, Les", "Amélie"]
    assert found[0][1]["genres"] == "War" and tally.examples == ["line 3: 2 columns instead of 3"]


def test_a_file_is_given_up_when_too_much_is_malformed(tmp_path: Path):
    tally = Tally(written(tmp_path, '{"a": 1}\n' * 98 + "x\nx\n"), max_bad=0.02)
    list(read_json_rows(tally))
    tally.finish()
    tally.max_bad = 0.01
    with pytest.raises(ValueError, match=r"2 of 100 lines are malformed, more than max_bad=0\.01; .*line 99"):
        tally.finish()
    path = written(tmp_path, "x\n" * 50_000)
    early = Tally(path, max_bad=0.01)
    with pytest.raises(ValueError, match="101 of 101 lines are malformed"):
        list(read_json_rows(early))
    with pytest.raises(ValueError, match="the file is empty"):
        Tally(path).finish()


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr("m2rec.data.raw.parquet.ROWS_AT_ONCE", 3)
    path = tmp_path / "x.parquet"
    table = {"user": ["a", "b", None, "d"], "tags": [["x"], [], None, ["y", "z"]], "other": [1, 2, 3, 4]}
    parquet.write_table(pyarrow.table(table), path)
    tally = Tally(path)
    reader = read_parquet_rows(tally, ["tags", "user", "user"])
    assert next(reader) == (1, {"tags": ["x"], "user": "a"})
    assert [row for _, row in reader][-1] == {"tags": ["y", "z"], "user": "d"}
    assert tally.lines == 4 and tally.position == path.stat().st_size
    with pytest.raises(ValueError, match="column 'when' is missing, the file has user, tags, other"):
        list(read_parquet_rows(Tally(path), ["when"]))
    optional = read_parquet_rows(Tally(path), ["user"], optional={"other", "tags", "more"})
    assert next(optional) == (1, {"user": "a", "tags": ["x"], "other": 1})
    double = pyarrow.table([["a"], ["b"], ["c"]], names=["user", "item", "user"])
    parquet.write_table(double, tmp_path / "double.parquet")
    with pytest.raises(
        ValueError, match=r"double\.parquet: column 'user' occurs 2 times; rename all but one"
    ):
        list(read_parquet_rows(Tally(tmp_path / "double.parquet"), ["user"]))
    assert list(read_parquet_rows(Tally(tmp_path / "double.parquet"), ["item"])) == [(1, {"item": "b"})]
    parquet.write_table(pyarrow.table(table).slice(0, 0), path)
    assert list(read_parquet_rows(Tally(path), ["user"])) == []
    for content in (b"user,item\n", b"", path.read_bytes()[:-10]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a complete Parquet file"):
            list(read_parquet_rows(Tally(path), ["user"]))


def test_a_label_column_that_comes_twice(tmp_path: Path):
    """It is not asked for, and yet which of the two says what was not clicked would be a guess."""
    path = tmp_path / "clicks.csv"
    path.write_text("user,item,label,label\na,b,0,1\n")
    with pytest.raises(ValueError, match="column 'label' occurs 2 times; rename all but one"):
        list(read_csv_records(Tally(path), ["user", "item"]))


@pytest.mark.parametrize("read", [read_json_rows, read_json_or_literal_rows])
def test_a_name_that_comes_twice_in_an_object(tmp_path: Path, read: Callable[[Tally], NumberedRows]):
    path = tmp_path / "x.json"
    path.write_text('{"user": "a", "item": "i"}\n{"user": "a", "item": "i", "item": "j"}\n')
    tally = Tally(path, max_bad=1.0)
    assert [row for _, row in read(tally)] == [{"user": "a", "item": "i"}]
    assert (
        tally.malformed_count == 1
        and "line 2: " in tally.examples[0]
        and "'item' is duplicated" in tally.examples[0]
    )


def test_a_name_that_comes_twice_in_an_array(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text('[{"user": "a", "item": "i"}, {"user": "a", "item": "i", "item": "j"}]')
    with pytest.raises(ValueError, match=r"x\.json"):
        list(read_json_rows(Tally(path)))
