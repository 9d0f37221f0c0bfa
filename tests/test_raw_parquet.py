"""Parquet files and folders of parts: columns give what rows give."""

from collections.abc import Iterator, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from m2rec.data.raw import parquet
from m2rec.data.raw.interactions import InteractionParser
from m2rec.data.raw.options import PreparationOptions
from tests.raw_reference import assert_same, prepare, use_small_blocks


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    sizes = [(parquet, "LARGE_BLOCK_ROWS", 12), (parquet, "SMALL_BLOCK_ROWS", 4)]
    with use_small_blocks(*sizes, (parquet, "ROWS_AT_ONCE", 5)):
        yield


MOMENTS = st.datetimes(datetime(1960, 1, 1), datetime(2100, 1, 1))
IDS: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.string(), st.sampled_from(["u1", "u2", "7", "é"])),
    (pa.string(), st.sampled_from(["u1", " u2", "u1 ", "", "a\tb", None])),
    (pa.large_string(), st.sampled_from(["u1", "u2"])),
    (pa.dictionary(pa.int8(), pa.string()), st.sampled_from(["u1", "u2", " u2", None])),
    (pa.int32(), st.integers(-3, 3)),
    (pa.int64(), st.sampled_from([1, 2, 3, None])),
    (pa.float64(), st.sampled_from([1.0, 2.0, 2.5, 1e20, float("nan"), None])),
    (pa.bool_(), st.booleans()),
    (pa.binary(), st.sampled_from([b"u1", b"u2"])),
    (pa.list_(pa.int64()), st.sampled_from([[1], [2]])),
    (pa.decimal128(20, 2), st.sampled_from([Decimal("1.00"), Decimal("2.50")])),
]
TIMES: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.int64(), st.integers(0, 20)),
    (pa.int64(), st.integers(1_300_000_000_000, 1_300_000_000_999)),
    (pa.int64(), st.sampled_from([5, -5, 10**12, None])),
    (pa.uint64(), st.sampled_from([1, 2**63])),
    (pa.float64(), st.sampled_from([1.5e9, 1.6e9])),
    (pa.float64(), st.sampled_from([1.5e9, 1.5, -0.0, None, float("nan"), float("inf"), 1e22])),
    (pa.float32(), st.sampled_from([1.5e9, 7.0])),
    (pa.string(), st.sampled_from(["5", "6", "7.50"])),
    (pa.string(), st.sampled_from(["5", "2020-01-01", "soon"])),
    (pa.date32(), st.dates()),
    (pa.timestamp("s"), MOMENTS),
    (pa.timestamp("ms", "UTC"), MOMENTS),
    (pa.timestamp("us", "Europe/Berlin"), MOMENTS),
    (pa.timestamp("us"), st.one_of(MOMENTS, st.none())),
    (pa.timestamp("ns"), MOMENTS),
    (pa.decimal128(20, 3), st.sampled_from([Decimal("1.500"), Decimal("7.000")])),
]
RATINGS: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.float64(), st.sampled_from([1.0, 4.5, None, float("nan")])),
    (pa.float32(), st.sampled_from([1.0, 0.1])),
    (pa.int64(), st.integers(0, 5)),
    (pa.bool_(), st.sampled_from([True, False, None])),
    (pa.string(), st.sampled_from(["1", "good", ""])),
]


def draw_column(
    draw: st.DrawFn, kinds: Sequence[tuple[pa.DataType, st.SearchStrategy[Any]]], n_rows: int
) -> pa.Array:
    kind, values = draw(st.sampled_from(kinds))
    column = draw(st.lists(values, min_size=n_rows, max_size=n_rows))
    if pa.types.is_timestamp(kind):
        column = [value and value.replace(microsecond=0) for value in column]
    return pa.array(column, kind)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    n_rows = draw(st.integers(0, 40))
    columns = {
        "user": draw_column(draw, IDS, n_rows),
        "item": draw_column(draw, IDS[:6], n_rows),
        "time": draw_column(draw, TIMES, n_rows),
        "rating": draw_column(draw, RATINGS, n_rows),
        "click": pa.array(draw(st.lists(st.integers(0, 1), min_size=n_rows, max_size=n_rows)), pa.int8()),
    }
    return pa.table(columns)


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(
    parts=st.lists(tables(), min_size=1, max_size=3),
    rating=st.sampled_from([None, "rating"]),
    time=st.sampled_from(["time", "time", None]),
    unit=st.sampled_from([None, None, "ms"]),
    keep=st.sampled_from([[], [], ["click=1"], ["rating>=1"], ["user!=u1"]]),
    max_bad=st.sampled_from([1, 1, 0.2]),
    by_user=st.booleans(),
)
def test_columns_and_rows_agree(
    parts: list[pa.Table],
    rating: str | None,
    time: str | None,
    unit: str | None,
    keep: list[str],
    max_bad: float,
    by_user: bool,
    tmp_path_factory: pytest.TempPathFactory,
):
    folder = tmp_path_factory.mktemp("x")
    for number, part in enumerate(parts):
        path = folder / "raw" / f"day={number}" / f"part-{number}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(part, path, row_group_size=17)
    assert_same(
        PreparationOptions(
            "parquet",
            path if len(parts) == 1 else folder / "raw",
            "x",
            data_path=folder,
            user="user",
            item="item",
            time=time,
            time_unit=unit if time else None,
            rating=rating,
            keep=keep,
            max_bad=max_bad,
            by_user=by_user,
        )
    )


@pytest.fixture
def spark_folder(tmp_path: Path) -> Path:
    """Two days of clicks, as Spark writes them."""
    folder = tmp_path / "clicks"
    for day in (1, 2):
        for number in range(2):
            path = folder / f"day=2020-01-0{day}" / f"part-0000{number}-c000.snappy.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            users = [f"u{day}", f"v{number}", "w"]
            pq.write_table(pa.table({"user": users, "item": ["a", "b", f"c{number}"]}), path)
            path.with_name(f".{path.name}.crc").write_bytes(b"crc")
    (folder / "_SUCCESS").touch()
    return folder


def build_options(path: Path, **values: Any) -> PreparationOptions:
    return PreparationOptions(
        "parquet", path, "x", data_path=path.parent / "data", user="user", item="item", **values
    )


def test_a_folder_is_one_data_set(spark_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Its parts in the order of their names, with the columns that the folders' names hold."""
    monkeypatch.setattr(InteractionParser, "read_rows", None)  # no row is read alone
    outcome = prepare(build_options(spark_folder, time="day"))
    times = [line.split("\t")[2] for line in outcome.lines[1:-1]]
    assert times == ["1577836800"] * 6 + ["1577923200"] * 6
    assert outcome.users == {"u1": 2, "v0": 2, "w": 4, "v1": 2, "u2": 2}
    assert prepare(build_options(spark_folder, time="day", keep=["day=2020-01-02"])).users["w"] == 2


def test_a_row_of_a_folder_is_named_by_its_file(spark_folder: Path):
    part = spark_folder / "day=2020-01-02" / "part-00001-c000.snappy.parquet"
    pq.write_table(pa.table({"user": ["u", None, "v "], "item": ["a", "b", "c"]}), part)
    outcome = assert_same(build_options(spark_folder, max_bad=0.2))
    name = "day=2020-01-02/part-00001-c000.snappy.parquet"
    assert (
        f"1 of 12 lines are malformed and left out: line 2 of {name}: 'user' is empty" in outcome.remarks[0]
    )
    assert outcome.remarks[-1].endswith(f"the first from 'v ' in line 3 of {name}")
    part.write_bytes(part.read_bytes()[:-9])
    outcome = prepare(build_options(spark_folder))
    assert outcome.error.startswith(f"{part}: not a complete Parquet file (")
    pq.write_table(pa.table({"user": ["u"], "itm": ["a"]}), part)
    assert (
        f"{part}: column 'item' is missing, the file has user, itm"
        in prepare(build_options(spark_folder)).error
    )


def test_a_folder_without_parts(tmp_path: Path):
    (tmp_path / "clicks").mkdir()
    (tmp_path / "clicks" / "_SUCCESS").touch()
    assert prepare(build_options(tmp_path / "clicks")).error.endswith(
        "clicks: the folder has no files; give the folder of the Parquet parts"
    )


def test_dates_of_one_day(tmp_path: Path):
    path = tmp_path / "clicks.parquet"
    pq.write_table(pa.table({"user": [1], "item": [2], "time": [date(2020, 1, 1)]}), path)
    assert prepare(build_options(path, time="time")).lines[1] == "1\t2\t1577836800"
