"""Lists in rows are taken apart, and rows are kept by their values; no element is lost unsaid."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2rec.data.raw import formats
from m2rec.data.raw.filters import RowCondition, RowFilter, explode_lists
from m2rec.data.raw.tally import RawRow, Tally


def rows_of(rows: list[RawRow], tally: Tally) -> Iterator[tuple[int, RawRow]]:
    for line, row in enumerate(rows, 1):
        tally.lines = line
        yield line, row


def apart(rows: list[RawRow], *paths: str) -> tuple[list[tuple[Any, ...]], Tally]:
    """The values of the paths, row by row."""
    tally = Tally(Path("x"), max_bad=1)
    found = explode_lists(rows_of(rows, tally), paths, tally)
    return [tuple(row.get(path) for path in paths) for _, row in found], tally


def test_paths():
    row = {
        "user": {"id": 7, "a.b": 8},
        "x.y": 9,
        "orders": [
            {"at": 1, "lines": [{"sku": "a"}, {"sku": "b"}]},
            {"at": 2, "lines": []},
            {"at": 3, "lines": [{"sku": "c"}]},
        ],
        "items": ["p", None],
        "times": "[4, 5]",
    }
    assert apart([row], "user.id", "x.y", "user.none", "none.id")[0] == [(7, 9, None, None)]
    lines, tally = apart([row], "user.id", "orders[].at", "orders[].lines[].sku")
    assert lines == [(7, 1, "a"), (7, 1, "b"), (7, 3, "c")]
    assert tally.rows == 3 + 1 and tally.notes == ["empty lists, skipped: 1"]
    assert apart([row], "items[]", "times[]")[0] == [("p", 4), (None, 5)]
    found, tally = apart([row], "items[]", "orders[].at")
    assert found == []
    assert tally.examples == ["line 1: lists of several lengths: 'items' has 2, 'orders' has 3"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [(None, "'items' is empty"), ("", "'items' is empty"), ("1 2", "'items' is not a list: '1 2'"),
     (7, "'items' is not a list: 7"), ("[1", "neither JSON nor a Python dict"),
     ({"a": 1}, "'items' is not a list")],
)  # fmt: skip
def test_what_is_no_list(value: object, reason: str):
    found, tally = apart([{"items": value}, {"items": [3]}], "items[]")
    assert found == [(3,)] and tally.malformed_count == 1 and reason in tally.examples[0]


elements = st.lists(st.fixed_dictionaries({"i": st.sampled_from(["a", "b", "", "x\ty"])}), max_size=4)


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(lists=st.lists(elements | st.none(), min_size=1, max_size=6))
def test_every_element_is_an_interaction_or_is_said(
    lists: list[list[dict[str, str]] | None], tmp_path_factory: pytest.TempPathFactory
):
    """Lines and the further elements in them = interactions + malformed + empty lists."""
    path = tmp_path_factory.mktemp("x") / "x.jsonl"
    path.write_text("\n".join(json.dumps({"u": n, "events": value}) for n, value in enumerate(lists)))
    tally = Tally(path, max_bad=1)
    found = list(formats.build_table_format("jsonl", "u", "events[].i").interactions(tally))
    elements = [(str(n), element["i"]) for n, value in enumerate(lists) for element in value or []]
    expected = [(user, item) for user, item in elements if item in ("a", "b")]
    assert [(user, item) for user, item, *_ in found] == expected
    assert [int(record.time) for record in found] == list(range(1, len(found) + 1))
    empty = sum(value == [] for value in lists)
    assert tally.rows == sum(len(value or "x") for value in lists)
    assert tally.rows == len(found) + tally.malformed_count + empty
    said = [f"empty lists, skipped: {empty}"] if empty else []
    assert tally.notes[: len(said)] == said


def test_malformed_elements_are_a_share_of_all(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"u": 1, "items": ["a"] * 98 + ["", None]}))
    assert (
        len(list(formats.build_table_format("jsonl", "u", "items[]").interactions(Tally(path, max_bad=0.02))))
        == 98
    )
    with pytest.raises(ValueError, match=r"2 of 100 rows are malformed, more than max_bad=0\.01; "):
        list(formats.build_table_format("jsonl", "u", "items[]").interactions(Tally(path, max_bad=0.01)))


@pytest.mark.parametrize("kind", formats.TABLE_KINDS)
def test_lists_in_tables(tmp_path: Path, kind: str):
    lines: list[dict[str, Any]] = [
        {"user": "u", "items": ["a", "b"], "times": [5, 6], "label": 0},
        {"user": "v", "items": ["c"], "times": [7], "label": 1},
    ]
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        __import__("pyarrow.parquet").parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    elif kind == "jsonl":
        path.write_text(json.dumps(lines))
    else:  # as JSON has lists, and as pandas writes them
        path.write_text('user;items;times;label\nu;"[""a"", ""b""]";[5, 6];0\nv;[\'c\'];[7];1\n')
    tally = Tally(path)
    found = formats.build_table_format(kind, "user", "items[]", "times[]").interactions(tally)
    assert [(user, item, int(time)) for user, item, time, _ in found] == [
        ("u", "a", 5), ("u", "b", 6), ("v", "c", 7),
    ]  # fmt: skip
    assert any("column 'label' is 0 in 2 lines" in note for note in tally.notes)


def test_values_in_objects_of_parquet(tmp_path: Path):
    """A struct column is read for a path into it; a column with a dot in its name stays one."""
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    row = {"user": {"id": "u", "age": 7}, "item.id": "i", "events": [{"at": 5}]}
    __import__("pyarrow.parquet").parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    table = formats.build_table_format("parquet", "user.id", "item.id", "events[].at")
    assert [tuple(map(str, found[:3])) for found in table.interactions(Tally(path))] == [("u", "i", "5")]


@pytest.mark.parametrize(
    ("text", "kept", "left_out"),
    [
        ("a=b", ["b", " b "], ["B", "", None, 1]),
        ("a==1", [1, 1.0, "1", "1.00"], ["x", 2, None, "1 2", True]),
        ("a = true", [True, "true"], [False, "True", 1]),
        ("a != b", ["c", None], ["b"]),
        ("a=", [None, "", " ", float("nan")], ["b", 0]),
        ("a>=4", [4, "4.0", 4.5], [3.99, None, ""]),
        ("a>4", ["5"], [4]),
        ("a<4", [-1], [4]),
        ("a <= -0.5", ["-0.5"], [0]),
        ("a in x, y z,3", ["x", "y z", 3.0], ["y", "x, y z", None]),
        ("b c=d=e", ["d=e"], ["d"]),
    ],
)
def test_conditions(text: str, kept: list[object], left_out: list[object]):
    condition = RowCondition.parse(text)
    assert condition.column == ("b c" if text[0] == "b" else "a")
    assert [value for value in kept if not condition.holds(value)] == []
    assert [value for value in left_out if condition.holds(value)] == []


def test_what_can_not_be_compared_is_malformed():
    tally = Tally(Path("x"), max_bad=1)
    rows: list[RawRow] = [{"a": "good"}, {"a": [1]}, {"a": 5}, {"a": None}]
    row_filter = RowFilter([RowCondition.parse("a>=4")], tally)
    found = list(row_filter.select(rows_of(rows, tally)))
    row_filter.finish()
    assert found == [(3, {"a": 5})] and tally.malformed_count == 2
    assert tally.examples == ["line 1: keep: 'good' is not a number", "line 2: keep: [1] can't be compared"]
    assert tally.notes == ["removed by keep='a>=4': 1 rows"]


@pytest.mark.parametrize("text", ["", "a", "=b", "a in", "in b", "a>b", "a>=", "a<1,2"])
def test_no_conditions(text: str):
    with pytest.raises(ValueError, match=r"^keep: '.*'( is not a valid condition|: [<>]=? needs a number)"):
        RowCondition.parse(text)
