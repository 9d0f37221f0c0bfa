"""Columns of blocks give what rows give: the same files, counts, remarks and errors."""

import gzip
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2rec.data.raw import batches, tally, text_blocks, token_counts
from m2rec.data.raw.options import PreparationOptions
from tests.raw_reference import assert_same


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Blocks of a few lines, so that a small file has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_blocks, "LARGE_BLOCK_BYTES", 400)
        patch.setattr(text_blocks, "SMALL_BLOCK_BYTES", 80)
        patch.setattr(token_counts, "_MIN_MERGED", 5)
        patch.setattr(batches, "BATCH_ROWS", 3)
        patch.setattr(tally, "MIN_LINES_BEFORE_STOP", 10)
        yield


ids = st.sampled_from(["u1", "u2", "u3", "007", "7", "é", "A B", "N/A", "x'y"])
odd_ids = st.sampled_from(
    [" u1", "u1 ", "\xa0u2", "", " ", "u\x85", "a\x00b", "u\u2028", '"', 'a"b', "\ufeffu1"]
)
ratings = st.sampled_from(["5", "4.0", "1", "0", "", "3.5"])
odd_ratings = st.sampled_from(["good", "1e1", "+2", " 4 ", "nan", "-0", "007", "1e99"])
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
odd_times = st.sampled_from(
    ["1e5", "+1", "-5", "007", "NaN", "", "2020-01-01", "0", "1.50", "soon", " 17", "12/31/2014", "9" * 30,
     "0000-01-01", "2020-02-30", "2020-01-01 24:00:00", "1_000", "٣", "99999999999", "100000000000"]
)  # fmt: skip
broken_lines = st.sampled_from(
    ["", " ", "u1", "u1,i1", "u,i,3,1,x,y", '"u1,i1,3,5,x', 'u"1",i1,3,5,x', "\x00", "u1,i1,3,5\rx",
     "\t\t\t\t", '"a\nb",i,3,5,x', '"u""1",i1,3,5,x', '"u1","i1","3","5","x"', '"u1" ,i1,3,5,x',
     '"",i,1,2,3', "u,i,4,5,LATIN-1"]
)  # fmt: skip


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """The content of a table and how it is laid out."""
    oddness = draw(st.sampled_from([0, 0, 0.02, 0.2]))
    separator = draw(st.sampled_from([",", ",", ";", "\t", "|", "::", " "]))
    times = TIMES[draw(st.sampled_from(list(TIMES)))]
    lines = []
    for _ in range(draw(st.integers(0, 60))):
        odd = [draw(st.floats(0, 1)) < oddness for _ in range(5)]
        cells = [
            draw(odd_ids if odd[0] else ids),
            draw(odd_ids if odd[1] else ids),
            draw(odd_ratings if odd[2] else ratings),
            draw(odd_times if odd[3] else times),
            draw(st.sampled_from(["view", "buy", "0", "1", ""])),
        ]
        line = separator.join(cells)
        lines.append(draw(broken_lines).replace(",", separator) if odd[4] else line)
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


conditions = st.lists(
    st.sampled_from(["LABEL!=view", "LABEL=", "LABEL in 0,1,buy", "rating>=3", "user!=u1", "time>5"]),
    max_size=2,
)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(table=files(), values=option_values(), keep=conditions, is_zipped=st.booleans())
def test_columns_and_rows_agree(
    table: dict[str, Any],
    values: dict[str, Any],
    keep: list[str],
    is_zipped: bool,
    tmp_path_factory: pytest.TempPathFactory,
):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "clicks.csv"
    path.write_bytes(gzip.compress(table["data"]) if is_zipped else table["data"])
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
