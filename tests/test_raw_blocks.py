"""Columns of blocks give what rows give: the same files, counts, remarks and errors."""

import gzip
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2rec.data.raw import text_blocks, token_counts
from m2rec.data.raw.interactions import InteractionParser
from m2rec.data.raw.options import PreparationOptions
from m2rec.data.raw.prepare import prepare_dataset
from m2rec.data.raw.text_blocks import are_plain_quotes
from tests.raw_reference import assert_same, prepare, use_small_blocks


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    sizes = [(text_blocks, "LARGE_BLOCK_BYTES", 400), (text_blocks, "SMALL_BLOCK_BYTES", 80)]
    with use_small_blocks(*sizes, (token_counts, "_MIN_MERGED", 5)):
        yield


ids = st.sampled_from(["u1", "u2", "u3", "007", "7", "é", "A B", "N/A", "x'y"])
ODD_IDS = [" u1", "u1 ", "\xa0u2", "", " ", "u\x85", "a\x00b", "u\u2028", '"', 'a"b', "\ufeffu1"]
ODD_RATINGS = ["good", "1e1", "+2", " 4 ", "nan", "-0", "007", "1e99"]
ratings = st.sampled_from(["5", "4.0", "1", "0", "", "3.5"])
TIMES = {
    "s": st.integers(1_300_000_000, 1_700_000_000).map(str),
    "few": st.integers(0, 12).map(str),
    "ms": st.integers(1_300_000_000_000, 1_300_000_002_000).map(str),
    "us": st.integers(1_300_000_000_000_000, 1_300_000_000_002_000).map(str),
    "ns": st.integers(10**17, 10**17 + 10**4).map(str),
    "decimals": st.decimals(0, 10**9, places=3).map(str),
    "long": st.decimals(0, 10**17, places=10).map(str),
    "dates": st.datetimes().map(lambda moment: moment.replace(microsecond=0).isoformat(" ")),
    "dates UTC": st.datetimes().map(lambda moment: f"{moment.isoformat(' ')} UTC"),
    "days": st.dates().map(str),
}
ODD_TIMES = [
    "1e5", "+1", "-5", "007", "NaN", "", "2020-01-01", "0", "1.50", "soon", " 17", "12/31/2014", "9" * 30,
    "0000-01-01", "2020-02-30", "2020-01-01 24:00:00", "1_000", "\u0663", "99999999999", "100000000000",
]  # fmt: skip
BROKEN = [
    "", " ", "u1", "u1,i1", "u,i,3,1,x,y", '"u1,i1,3,5,x', 'u"1",i1,3,5,x', "\x00", "u1,i1,3,5\rx,x",
    "\t\t\t\t", '"a\nb",i,3,5,x', '"u""1",i1,3,5,x', '"u1","i1","3","5","x"', '"u1" ,i1,3,5,x',
    '"",i,1,2,3', "u,i,4,5,LATIN-1", "\ufeffu1,i1,3,5,x",
]  # fmt: skip


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """The content of a table and how it is laid out."""
    oddness = draw(st.sampled_from([0, 0, 0.02, 0.2]))
    missing = draw(st.sampled_from([0, 0, 0.1]))
    separator = draw(st.sampled_from([",", ",", ";", "\t", "|", "::", " "]))
    times = TIMES[draw(st.sampled_from(list(TIMES)))]
    lines = []
    for _ in range(draw(st.integers(0, 60))):
        odd = [draw(st.floats(0, 1)) < oddness for _ in range(5)]
        cells = [
            draw(st.sampled_from(ODD_IDS) if odd[0] else ids),
            draw(st.sampled_from(ODD_IDS) if odd[1] else ids),
            draw(st.sampled_from(ODD_RATINGS) if odd[2] else ratings),
            draw(st.sampled_from(ODD_TIMES) if odd[3] else times),
            draw(st.sampled_from(["view", "buy", "0", "1", ""])),
        ]
        cells = ["" if draw(st.floats(0, 1)) < missing else cell for cell in cells]
        line = separator.join(cells)
        lines.append(draw(st.sampled_from(BROKEN)).replace(",", separator) if odd[4] else line)
    header = draw(st.booleans())
    if header:
        label = draw(st.sampled_from(["event", "label"]))
        lines.insert(0, separator.join(["user", "item", "rating", "time", label]))
    end = draw(st.sampled_from(["\n", "\n", "\r\n"]))
    text = end.join(lines) + draw(st.sampled_from(["", end, end]))
    data = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"])) + text.encode().replace(
        "\xff".encode(), b"\xff"
    )
    return {"data": data, "separator": separator, "header": header, "label": label if header else "event"}


@st.composite
def option_values(draw: st.DrawFn) -> dict[str, Any]:
    """Options of the preparation."""
    values: dict[str, Any] = {"max_bad": draw(st.sampled_from([1, 1, 1, 0.3, 0.05]))}
    if draw(st.booleans()):
        values["rating"] = "rating"
        values["min_rating"] = draw(st.sampled_from([None, None, 4.0]))
        values["no_rating"] = draw(st.booleans())
    if draw(st.sampled_from([True, True, True, False])):
        values["time"] = "time"
        values["time_unit"] = draw(st.sampled_from([None, None, None, "s", "ms", "ns"]))
        values["drop_repeats"] = draw(st.sampled_from([False, False, True]))
        values["relative_times"] = draw(st.sampled_from([False, False, True]))
        if values["time_unit"] is None:
            values["time_format"] = draw(st.sampled_from([None, None, None, "%Y-%m-%d"]))
    values["by_user"] = draw(st.sampled_from([False, False, True]))
    values["core"] = draw(st.sampled_from([0, 0, 2, 3]))
    return values


PACKINGS = ("plain", "plain", "zipped", "cut")


def pack(data: bytes, packing: str) -> bytes:
    """The bytes of a file."""
    if packing == "plain":
        return data
    return gzip.compress(data) if packing == "zipped" else gzip.compress(data)[:-9]


conditions = st.lists(
    st.sampled_from(["LABEL!=view", "LABEL=", "LABEL in 0,1,buy", "rating>=3", "user!=u1", "time>5"]),
    max_size=2,
)


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(table=files(), values=option_values(), keep=conditions, packing=st.sampled_from(PACKINGS))
def test_columns_and_rows_agree(
    table: dict[str, Any],
    values: dict[str, Any],
    keep: list[str],
    packing: str,
    tmp_path_factory: pytest.TempPathFactory,
):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "clicks.csv"
    path.write_bytes(pack(table["data"], packing))
    if not table["header"]:
        values["columns"] = ["user", "item", "rating", "time", "event"]
    assert_same(
        PreparationOptions(
            "csv",
            path,
            "x",
            data_path=folder,
            user="user",
            item="item",
            separator=table["separator"],
            keep=[condition.replace("LABEL", table["label"]) for condition in keep],
            **values,
        )
    )


def build_options(path: Path, **values: Any) -> PreparationOptions:
    return PreparationOptions(
        "csv", path, "x", data_path=path.parent, user="user", item="item", time="time", **values
    )


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["1588687728", "1588687729"], ["1588687728", "1588687729"]),
        (["1588687728923", "1588687728000"], ["1588687728.923", "1588687728"]),
        (["1588687728.50", "7"], ["1588687728.5", "7"]),
        (["1588687728923001", "1588687728923000"], ["1588687728.923001", "1588687728.923"]),
        (["2020-01-01", "1969-12-31"], ["1577836800", "-86400"]),
        (["2020-01-01 00:00:01 UTC", "2020-01-01T00:00:01.25Z"], ["1577836801", "1577836801.25"]),
        (['"Jan 1, 2020"', '"Jan 2, 2020"'], ["1577836800", "1577923200"]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_plain_lines_are_never_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: list[str], expected: list[str], end: str
):
    """Quotes around cells, blanks around ids and conditions are read as columns, too."""
    monkeypatch.setattr(InteractionParser, "read_rows", None)
    path = tmp_path / "clicks.csv"
    lines = [f'u{n}, i{n % 3},{times[n % 2]},"say, ""{n}""",{n % 2}' for n in range(100)]
    path.write_text(end.join(["user,item,time,note,label", *lines]) + end, newline="")
    outcome = prepare(build_options(path, keep=['note!=say, "7"']))
    found = [line.split("\t") for line in outcome.lines[1:-1]]
    assert found == [[f"u{n}", f"i{n % 3}", expected[n % 2]] for n in range(100) if n != 7]
    assert any(
        "blanks around ids were removed: 99, the first from ' i0' in line 2" in x for x in outcome.remarks
    )
    assert any("column 'label' is 0 in 50 lines" in remark for remark in outcome.remarks)


@pytest.mark.parametrize(
    ("data", "is_plain"),
    [
        (b'"a","b"\n', True),
        (b'"a;b",c\r\n', True),
        (b'"",""""\n"say ""x""",""', True),
        (b'a"b,c\n', False),
        (b'"a"b,c\n', False),
        (b'"a" ,c\n', False),
        (b'"a\nb",c\n', False),
        (b'"a,b\n', False),
        (b'""x"",c\n', False),
    ],
)
def test_plain_quotes(data: bytes, is_plain: bool):
    ends = np.array([place for place, character in enumerate(data) if character == ord("\n")])
    assert are_plain_quotes(data, b",", ends) == is_plain


def test_a_broken_line_far_away_is_named(tmp_path: Path):
    path = tmp_path / "clicks.csv"
    lines = [f"u{n % 7},i{n % 5},{n}" for n in range(1000)]
    lines[876] = "u1,i1"
    path.write_text("\n".join(["user,item,time", *lines]))
    outcome = assert_same(build_options(path, max_bad=0.01))
    assert (
        "1 of 1,001 lines are malformed and left out: line 878: 2 columns, the header" in outcome.remarks[0]
    )
    lines[876] = "u1,i1,2020-01-01"
    path.write_text("\n".join(["user,item,time", *lines]))
    error = assert_same(build_options(path, max_bad=0.01)).error
    assert "line 2 has the time '0', which reads as seconds, and line 878 has the time '2020-01-01'" in error


def test_a_full_disk_leaves_no_data_set(tmp_path: Path):
    """And no temporary file."""
    path = tmp_path / "clicks.csv"
    path.write_text("user,item,time\n" + "u,i,1\n" * 1000)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            prepare_dataset(build_options(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, action)
    assert [found.name for found in tmp_path.iterdir()] == ["clicks.csv"]


ODD_LINES = [
    *[f"{text},i1,3,5,x" for text in ODD_IDS],
    *[f"u1,i1,{text},5,x" for text in ODD_RATINGS],
    *[f"u1,i1,3,{text},x" for text in ODD_TIMES],
    *BROKEN,
]


@pytest.mark.parametrize("line", ODD_LINES)
def test_one_odd_line(line: str, tmp_path: Path):
    path = tmp_path / "clicks.csv"
    good = [f"u{n % 7},i{n % 5},{n % 3},{n},x" for n in range(60)]
    text = "\n".join(["user,item,rating,time,event", *good[:37], line, *good[37:]])
    path.write_bytes(text.encode().replace(b"LATIN-1", b"\xff"))
    assert_same(build_options(path, max_bad=1, rating="rating"))


def test_missing_ids_and_times_are_rejected_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The lines around them are columns."""
    path = tmp_path / "clicks.csv"
    lines = [f"u{n}, i{n % 3},{n}" for n in range(200)]
    lines[50], lines[60], lines[70] = ",i1,50", "u1,,60", "u1, i1,"
    path.write_text("\n".join(["user,item,time", *lines]))
    monkeypatch.setattr(InteractionParser, "read_rows", None)
    outcome = prepare(build_options(path, max_bad=0.1))
    assert [int(line.split("\t")[2]) for line in outcome.lines[1:-1]] == [
        n for n in range(200) if n not in (50, 60, 70)
    ]
    assert "3 of 201 lines are malformed and left out: line 52: 'user' is empty; " in outcome.remarks[0]
    assert outcome.remarks[0].endswith("line 62: 'item' is empty; line 72: 'time' is empty")
    assert "blanks around ids were removed: 198, the first from ' i0' in line 2" in outcome.remarks[-1]


def test_times_with_many_decimals_are_arranged(tmp_path: Path):
    path = tmp_path / "clicks.csv"
    path.write_text("user,item,time\n" + "".join(f"u,i{n},{10**9 - n}.{n:010}\n" for n in range(50)))
    assert_same(build_options(path, time_unit="ns", by_user=True, relative_times=True, drop_repeats=True))


def test_the_first_user_of_a_core_is_the_first_that_is_left(tmp_path: Path):
    path = tmp_path / "clicks.csv"
    path.write_text("user,item,time\na,rare,1\nb,x,2\na,x,9\nb,y,4\na,y,5\n")
    outcome = assert_same(build_options(path, core=2, by_user=True))
    assert [line.split("\t")[0] for line in outcome.lines[1:-1]] == ["b", "b", "a", "a"]
