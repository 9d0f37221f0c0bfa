"""JSON lines: columns give what rows give, where pyarrow and Python's json differ, too."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2rec.data.raw import json_blocks, text_blocks
from m2rec.data.raw.interactions import InteractionParser
from m2rec.data.raw.options import PreparationOptions
from tests.raw_reference import assert_same, prepare, use_small_blocks


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    sizes = [(text_blocks, "LARGE_BLOCK_BYTES", 800), (text_blocks, "SMALL_BLOCK_BYTES", 200)]
    with use_small_blocks(*sizes, (json_blocks, "SMALL_BLOCK_BYTES", 200)):
        yield


IDS: list[st.SearchStrategy[Any]] = [
    st.sampled_from(["u1", "u2", "é", "\U0001f600"]),
    st.sampled_from(["u1", " u2", "u2 ", "u1\x00", "", None, "\t"]),
    st.integers(0, 3),
    st.sampled_from([1, 2, 2**53 + 1, 2**64 + 1, None]),
    st.sampled_from([1.0, 2, 2.5, 2**53 + 1, 1e20]),
    st.sampled_from(["2020-01-01", "2020-01-02"]),
    st.sampled_from(["u1", 7]),
    st.sampled_from([True, False]),
    st.sampled_from([["u1"], {"a": 1}]),
]
TIMES: list[st.SearchStrategy[Any]] = [
    st.integers(0, 20),
    st.integers(1_300_000_000_000, 1_300_000_000_999),
    st.sampled_from([1.5e9, 1.6e9, 7]),
    st.sampled_from([1.5, 1.25, 1e-7, float("nan"), float("inf")]),
    st.sampled_from(["2018-07-07 22:09:11", "2018-07-08 00:00:00"]),
    st.sampled_from(["5", "6"]),
    st.sampled_from([5, "soon", None, 10**12, -5]),
]
RATINGS: list[st.SearchStrategy[Any]] = [
    st.sampled_from([1, 2.5, 5.0, None]),
    st.sampled_from(["1", "2.50"]),
    st.sampled_from([True, False]),
    st.sampled_from([1, "good"]),
    st.none(),
]
OTHERS: list[st.SearchStrategy[Any]] = [
    st.text(max_size=8),
    st.sampled_from([None, {"a": 1}, {"a": 2, "b": [1, 2]}]),
    st.sampled_from([[], [{"x": 1}], [{"x": 2}, {"x": 3}]]),
    st.sampled_from([1, "a", None]),
]
GOOD = '{"user":"u1","item":"i","time":1}'
BROKEN = [
    "", " ", "{", "[1]", "5", "{}", "\ufeff{}", "\x00", "{'user':'u1'}", '{"a":{"b":1,"b":2}}',
    f"{GOOD} {GOOD}", f" {GOOD}", '{"user":"u1",', '"item":"i","time":1}', GOOD.replace("u1", "LATIN-1"),
    GOOD.replace("}", ',"user":"u2"}'), GOOD.replace("}", ",}"), GOOD.replace('"user', '"\\u0075ser'),
    GOOD.replace("u1", "\\ud83d"), GOOD.replace("1}", "01}"), GOOD.replace("1}", "1e400}"),
    GOOD.replace("}", ',"x":Inf}'), GOOD.replace("}", ',"x": -NaN}'), GOOD.replace("}", ',"x":-Infinity}'),
    GOOD.replace("}", ',"x":' + "[" * 5000 + "]" * 5000 + "}"),
    f"{GOOD} {GOOD}\n" + GOOD.replace(",", "\n,", 1), GOOD.replace('"u1"', "9007199254740993.0"),
    GOOD.replace('"u1"', "12345678901234567890"),
]  # fmt: skip
broken_lines = st.sampled_from(BROKEN)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    oddness = draw(st.sampled_from([0, 0, 0.03, 0.2]))
    columns = {
        "user": draw(st.sampled_from(IDS)),
        "item": draw(st.sampled_from(IDS[:3])),
        "time": draw(st.sampled_from(TIMES)),
        "stars": draw(st.sampled_from(RATINGS)),
        "click": st.integers(0, 1),
        "other": draw(st.sampled_from(OTHERS)),
    }
    if draw(st.booleans()):
        columns["parent"] = draw(st.sampled_from([IDS[0], IDS[1]]))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    is_ascii = draw(st.booleans())
    lines = []
    for _ in range(draw(st.integers(0, 40))):
        row = {name: draw(values) for name, values in columns.items() if draw(st.floats(0, 1)) >= oddness / 4}
        line = json.dumps(row, separators=separators, ensure_ascii=is_ascii)
        lines.append(draw(broken_lines) if draw(st.floats(0, 1)) < oddness else line)
    end = draw(st.sampled_from(["\n", "\n", "\r\n"]))
    text = end.join(lines) + draw(st.sampled_from(["", end]))
    mark = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"]))
    return mark + text.encode(errors="surrogatepass").replace(b"LATIN-1", b"\xff")


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(
    data=files(),
    rating=st.sampled_from([None, "stars"]),
    time=st.sampled_from(["time", "time", None]),
    keep=st.sampled_from([[], [], ["click=1"], ["stars>=1"], ["other!=a"], ["none=1"]]),
    max_bad=st.sampled_from([1, 1, 0.2]),
)
def test_columns_and_rows_agree(
    data: bytes,
    rating: str | None,
    time: str | None,
    keep: list[str],
    max_bad: float,
    tmp_path_factory: pytest.TempPathFactory,
):
    path = tmp_path_factory.getbasetemp() / "clicks.jsonl"
    path.write_bytes(data)
    assert_same(
        PreparationOptions(
            "jsonl",
            path,
            "x",
            data_path=path.parent,
            user="user",
            item="item",
            time=time,
            rating=rating,
            keep=keep,
            max_bad=max_bad,
        )
    )


def test_most_lines_are_never_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only those of the first block."""
    path = tmp_path / "reviews.jsonl"
    rows: list[dict[str, Any]] = [
        {"user_id": f"u{n}", "parent_asin": f"B{n % 9}", "rating": 5.0 if n % 2 else None,
         "timestamp": 10**12 + n, "images": [{"a": "x"}] * (n % 3), "title": "2020-01-01" if n % 5 else "{a}"}
        for n in range(200)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    lines_of_rows = []
    read_rows = InteractionParser.read_rows

    def count_rows(self: InteractionParser, rows: Any) -> Iterator[Any]:
        return read_rows(self, (lines_of_rows.append(line) or (line, row) for line, row in rows))

    monkeypatch.setattr(InteractionParser, "read_rows", count_rows)
    outcome = prepare(PreparationOptions("amazon-2023", path, "x", data_path=tmp_path))
    assert lines_of_rows == [1]
    assert outcome.lines[1:3] == ["u0\tB0\t\t1000000000", "u1\tB1\t5\t1000000000.001"]
    assert len(outcome.lines) == 202


@pytest.mark.parametrize("line", BROKEN)
def test_one_odd_line(line: str, tmp_path: Path):
    path = tmp_path / "clicks.jsonl"
    good = [json.dumps({"user": f"u{n}", "item": "i", "time": n}) for n in range(30)]
    text = "\n".join([*good[:14], line, *good[14:]])
    path.write_bytes(text.encode().replace(b"LATIN-1", b"\xff"))
    assert_same(
        PreparationOptions(
            "jsonl", path, "x", data_path=tmp_path, user="user", item="item", time="time", max_bad=1
        )
    )
