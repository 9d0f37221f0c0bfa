"""Columns of interactions are the same to the last bit, whoever reads them and in whatever parts."""

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from m2rec.compat import SequentialDataset, data_preparation
from m2rec.data import columns, inter_file, parquet_file, plain_file
from m2rec.data.columns import filter_by_counts, separate_close_times
from m2rec.data.dataset import HistoryDataset
from m2rec.errors import UserError
from m2rec.training.configuration import build_config
from tests.conftest import random_rows, small, write_inter

HEADER = {"user_id": "token", "item_id": "token", "timestamp": "float", "rating": "float", "kind": "token"}
COLUMNS = [["user_id", "item_id", "timestamp"], ["item_id", "user_id", "timestamp", "rating"], list(HEADER)]
FIRST = "\t".join(f"{name}:{kind}" for name, kind in HEADER.items())

N_FILES = 200

TOKENS = ["a", "b", "u1", "u2", "007", "NA", "nan", '"q', "a\\", "É😀", " a", "a b", "\ufeffa", "x" * 300]
ODD_TOKENS = ["", "a\0b", "\0", "\x1a", "\x85", "\u2028"]
RATINGS = ["1", "4.0", "4.5", "0", "3"]
ODD_RATINGS = [
    "",
    "-1",
    "+2",
    " 3",
    "4 ",
    "1e3",
    "1E-2",
    "inf",
    "-0",
    "-0.0",
    ".5",
    "1.",
    "3e300",
    "1e400",
    "007",
]
BAD_NUMBERS = ["nan", "x", "1_0", "0x10", "1,0", "1 2", "٣", "True", "-", ".", "1\0", "9" * 400]
TIMES = {
    "seconds": lambda draw: str(1_600_000_000 + draw.randrange(50)),
    "small": lambda draw: str(draw.randrange(9)),
    "milliseconds": lambda draw: str(1_600_000_000_000 + draw.randrange(9)),
    "nanoseconds": lambda draw: str(1_600_000_000_000_000_000 + draw.randrange(300)),
    "decimals": lambda draw: f"{1_600_000_000 + draw.randrange(3)}.{draw.randrange(1000):03d}",
    "microseconds": lambda draw: f"1600000000.{draw.randrange(10**6):06d}",
    "exact": lambda draw: f"1600000000.{draw.randrange(300):09d}",
    "any": lambda draw: f"{draw.uniform(-1, 1) * 10 ** draw.randrange(20):.{draw.randrange(18)}f}",
    "long": lambda draw: f"{draw.randrange(10**19)}",
    "large": lambda draw: f"{9_223_372_036_854_775_807 + draw.randrange(9)}",
}


def read_reference(path: Path, columns: list[str], exact: bool) -> pd.DataFrame:
    """Every cell as a Python string, numbers by pandas."""
    frame = inter_file.read_text_columns(path, "\t", HEADER)[columns].astype(object)
    texts = frame["timestamp"]
    for column in columns:
        if HEADER[column] == "float":
            values = pd.to_numeric(frame[column], errors="coerce").astype(np.float64)
            is_bad = values.isna() & frame[column].notna()
            if column == "timestamp":
                is_bad = ~np.isfinite(values)
            if is_bad.any():
                first = int(is_bad.to_numpy().argmax())
                text = frame[column].iloc[first]
                shown = repr(text) if isinstance(text, str) else "nothing"
                raise UserError(
                    f"{path}: column {column!r} has {shown} in line {frame.index[first] + 2}, not a number "
                    f"({int(is_bad.sum()):,} such lines); repair or remove them"
                )
            frame[column] = values
    if exact and (texts.str.len() > 15).any():
        frame["timestamp"] = separate_close_times(texts, frame["timestamp"].to_numpy())
    return frame.reset_index(drop=True)


def draw_file(draw: random.Random) -> bytes:
    """A file that is right, or odd, or broken, in the ways that files are."""
    time = TIMES[draw.choice(list(TIMES))]
    rating_kinds = draw.choice([RATINGS, RATINGS, RATINGS + ODD_RATINGS])
    oddity = draw.choice([0.0, 0.0, 0.05])
    lines = []
    for _ in range(draw.choice([0, 1, 2, 30, 30, 200])):
        row = [
            draw.choice(TOKENS),
            draw.choice(TOKENS),
            time(draw),
            draw.choice(rating_kinds),
            draw.choice(TOKENS),
        ]
        if draw.random() < oddity:
            row[draw.choice([0, 1, 4])] = draw.choice(ODD_TOKENS)
        lines.append("\t".join(row))
    end = draw.choice(["\n", "\n", "\r\n", "\r"])
    for _ in range(draw.choice([0, 0, 1, 2])):
        breakage = draw.choice(BREAKAGES)
        lines.insert(draw.choice([draw.randint(0, len(lines)), 0]), breakage(draw, time))
    text = end.join([FIRST, *lines]) + draw.choice([end, end, "", end * 3])
    content = draw.choice(["", "", "\ufeff"]).encode() + text.encode()
    if draw.random() < 0.05:
        place = draw.randint(len(FIRST) + 5, len(content) + 6)
        content = (
            content[:place]
            + draw.choice([b"\xe9", b"\xff\xfe", b"\r", b"\n", b"\t", b"\0"])
            + content[place:]
        )
    return content


BREAKAGES = [
    lambda draw, time: "",
    lambda draw, time: "  ",
    lambda draw, time: "\t\t\t\t",
    lambda draw, time: f"a\tb\t{time(draw)}",
    lambda draw, time: f"a\tb\t{time(draw)}\t\t",
    lambda draw, time: "\t\t\t4\t",
    lambda draw, time: f"a\tb\t{time(draw)}\t4\tk\tsurplus",
    lambda draw, time: f"a\tb\t{time(draw)}\t4\tk\t\t\t",
    lambda draw, time: f"a\tb\t{draw.choice(BAD_NUMBERS)}\t4\tk",
    lambda draw, time: f"a\tb\t{time(draw)}\t{draw.choice(BAD_NUMBERS)}\tk",
    lambda draw, time: f"a\tb\t{TIMES[draw.choice(list(TIMES))](draw)}\t5\tk",
]  # fmt: skip


def read_outcome(read: Callable[..., pd.DataFrame], *arguments: object) -> tuple[str, pd.DataFrame | None]:
    """An error's message, or what was read."""
    try:
        return "", read(*arguments)
    except UserError as error:
        return str(error), None


def assert_same_columns(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """The bits of numbers; tokens and the order of their first appearance."""
    assert list(found) == list(expected)
    for column in expected:
        if HEADER[column] == "float":
            ours, reference = (frame[column].to_numpy().view(np.int64) for frame in (found, expected))
            assert ours.tolist() == reference.tolist()
        else:
            codes, tokens = pd.factorize(expected[column])
            assert found[column].cat.codes.tolist() == codes.tolist()
            assert list(found[column].cat.categories) == list(tokens)


@pytest.mark.parametrize("parts", ["whole", "small"])
def test_the_same_as_every_cell_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: str):
    """On random files, right and wrong ones; pandas is asked again only for those that are odd."""
    iterate_text_columns = inter_file.iterate_text_columns
    by_pandas, wrong = [], 0

    def watched(path: Path, *arguments: object):
        by_pandas.append(path)
        return iterate_text_columns(path, *arguments)

    for seed in range(N_FILES):
        draw = random.Random(f"{parts} {seed}")
        path = tmp_path / f"{seed}.inter"
        path.write_bytes(draw_file(draw))
        columns, exact = draw.choice(COLUMNS), draw.random() < 0.7
        message, expected = read_outcome(read_reference, path, columns, exact)
        with monkeypatch.context() as patch:
            patch.setattr(inter_file, "iterate_text_columns", watched)
            if parts == "small":
                patch.setattr(plain_file, "BLOCK_BYTES", 700)
                patch.setattr(inter_file, "CHUNK_ROWS", 7)
            ours, found = read_outcome(
                inter_file.read_interactions, path, "\t", HEADER, columns, "timestamp", exact
            )
        assert ours == message, seed
        wrong += bool(message)
        if expected is not None and found is not None:
            assert_same_columns(found, expected)
    assert min(N_FILES - len(by_pandas), len(by_pandas), wrong) > N_FILES / 5


def filter_by_loop(rows: list[tuple[int, int]], is_right: list[Callable[[int], bool]]) -> list[int]:
    """The rows that are left, by the rule's own words."""
    left = list(range(len(rows)))
    while True:
        counts = [Counter(rows[row][side] for row in left) for side in (0, 1)]
        kept = [row for row in left if all(is_right[k](counts[k][rows[row][k]]) for k in (0, 1))]
        if kept == left:
            return left
        left = kept


def test_rows_are_dropped_until_all_counts_are_right():
    """Lower bounds are a k-core; with upper bounds a user that lost rows may be right again."""
    rng = np.random.default_rng(0)
    sizes = []
    for trial in range(60):
        codes = [rng.integers(0, n, size=120) for n in (25, 30)]
        low, high = trial % 5, 4 + trial % 11
        checks = [
            lambda count, low=low: count >= low,
            lambda count, high=high: (count >= 2) & (count <= high),
        ]
        rows = list(zip(*(column.tolist() for column in codes), strict=True))
        kept = filter_by_counts(codes, checks).is_kept
        assert np.flatnonzero(kept).tolist() == filter_by_loop(rows, checks)
        sizes.append(int(kept.sum()))
    assert len(set(sizes)) > 10


def write_parquet(path: Path, columns: dict[str, pa.Array]) -> Path:
    """Write folder/name/name.inter.parquet; names with types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path


PARQUET_TYPES = {
    "text": (pa.string(), pa.string(), pa.int64()),
    "large": (pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.float64()),
    "numbers": (pa.int32(), pa.int64(), pa.int32()),
    "small": (pa.int16(), pa.dictionary(pa.int8(), pa.large_string()), pa.uint32()),
}


@pytest.mark.parametrize("types", PARQUET_TYPES.values(), ids=list(PARQUET_TYPES))
@pytest.mark.parametrize("batch_rows", [13, 1000])
def test_parquet_is_read_as_text_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, types: tuple[pa.DataType, ...], batch_rows: int
):
    """The same rows in both forms, ids that are missing among them, are the same data set."""
    monkeypatch.setattr(parquet_file, "BATCH_ROWS", batch_rows)
    rng = np.random.default_rng(0)
    users, items = (rng.integers(1, 9, 200).tolist() for _ in range(2))
    users[7], items[50], items[51] = None, None, None
    times = rng.integers(1_600_000_000, 1_600_000_300, 200).tolist()
    write_inter(tmp_path / "text", "toy", [
        ("" if user is None else user, "" if item is None else item, time)
        for user, item, time in zip(users, items, times, strict=True)
    ])  # fmt: skip
    columns = {}
    for name, values, kind in zip(
        ("user_id:token", "item_id:token", "timestamp:float"), (users, items, times), types, strict=True
    ):
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        own = values if is_number else [None if value is None else str(value) for value in values]
        columns[name] = pa.array(own).cast(kind)
    write_parquet(tmp_path / "table" / "toy" / "toy.inter.parquet", columns)
    parts = [
        data_preparation(config, HistoryDataset(config))
        for config in (build_config(small(tmp_path / form)) for form in ("text", "table"))
    ]
    for text, table in zip(*parts, strict=True):
        ours, expected = table.dataset, text.dataset
        assert ours.field2id_token["item_id"].tolist() == expected.field2id_token["item_id"].tolist()
        for column in expected.inter_feat.columns:
            assert torch.equal(ours.inter_feat[column], expected.inter_feat[column])


TOY = {
    "user_id:token": pa.array(["a", "b"]),
    "item_id:token": pa.array([1, 2]),
    "timestamp:float": pa.array([1, 2]),
}


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("item_id:token", [1.0, 2.0], "column 'item_id:token' has values of type double; write tokens as"),
        ("timestamp:float", ["1", "2"], "column 'timestamp:float' has values of type string; write numbers"),
        ("timestamp:float", [1, None], "column 'timestamp' has nothing in row 2, not a number (1 such rows)"),
        ("timestamp:float", [np.inf, 1], "column 'timestamp' has 'inf' in row 1, not a number"),
        ("rating", [1, 2], "'rating' in the first line is not a column header; expected NAME:TYPE"),
        ("tags:token_seq", [["x"], []], "column 'tags' has sequences, which only a NAME.inter may have"),
    ],
)
def test_what_is_wrong_in_parquet_is_named(tmp_path: Path, column: str, values: list[Any], message: str):
    write_parquet(tmp_path / "toy" / "toy.inter.parquet", {**TOY, column: pa.array(values)})
    load = {"inter": ["user_id", "item_id", "timestamp", *(["tags"] if column == "tags:token_seq" else [])]}
    with pytest.raises(UserError, match=re.escape(message)):
        HistoryDataset(build_config(small(tmp_path, load_col=load)))


def test_a_file_that_is_not_parquet_or_one_too_many(tmp_path: Path):
    path = write_parquet(tmp_path / "toy" / "toy.inter.parquet", TOY)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"toy\.inter\.parquet: not a complete Parquet file"):
        HistoryDataset(build_config(small(tmp_path)))
    write_inter(tmp_path, "toy", [("a", "b", 1)])
    with pytest.raises(UserError, match=r"dataset: 'toy' has two files of interactions, .*; remove one"):
        HistoryDataset(build_config(small(tmp_path)))


class PlainDataset(HistoryDataset):
    """Tokens as Python strings until RecBole numbers them, after RecBole's own filter."""

    _filter_by_inter_num = SequentialDataset._filter_by_inter_num

    def _remap(self, remap_list: list[Any]) -> None:
        plain = []
        for feat, column, kind in remap_list:
            feat[column] = feat[column].astype(object)
            plain.append((feat, column, kind))
        SequentialDataset._remap(self, plain)


@pytest.mark.parametrize(
    "others",
    [
        {"user_inter_num_interval": "[4,inf)", "item_inter_num_interval": "[15,inf)"},
        {"user_inter_num_interval": "(3,20]", "item_inter_num_interval": "(0,14]"},
        {"item_inter_num_interval": "[10,inf)", "rm_dup_inter": "last"},
        {"alias_of_item_id": ["before"], "user_inter_num_interval": "[3,inf)"},
    ],
)
def test_ids_and_filters_are_those_of_recbole(tmp_path: Path, others: dict[str, Any]):
    rng = np.random.default_rng(1)
    rows = [(*row, f"i{rng.integers(25)}", rng.choice(["x", "y", ""])) for row in random_rows()]
    header = "user_id:token\titem_id:token\ttimestamp:float\tbefore:token\tkind:token"
    write_inter(tmp_path, "toy", rows, header)
    config = build_config(small(tmp_path, load_col={"inter": "*"}, **others))
    ours, expected = HistoryDataset(config), PlainDataset(config)
    assert 0 < len(ours) < len(rows)
    for column in ("user_id", "item_id", "before", "kind"):
        assert ours.field2id_token[column].tolist() == expected.field2id_token[column].tolist()
        assert ours.field2token_id[column] == expected.field2token_id[column]
        assert ours.inter_feat[column].tolist() == expected.inter_feat[column].tolist()
    ours.build()
    expected.build()
    assert (ours.counts, ours.gap_quartiles) == (expected.counts, expected.gap_quartiles)


@pytest.mark.parametrize(
    ("text", "makes_strings"), [("1600000000.357", False), ("1600000000.123456789", True)]
)
def test_fractions_of_seconds_make_no_string_of_each_cell(
    monkeypatch: pytest.MonkeyPatch, text: str, makes_strings: bool
):
    """A hundred million of them took 18 GB; only times beyond double precision are compared as texts."""
    formatted, format_texts = [], columns._format_texts
    monkeypatch.setattr(
        columns, "_format_texts", lambda chunk: formatted.append(chunk) or format_texts(chunk)
    )
    numbers = columns.NumberColumn()
    numbers.append(pa.array([text, "1600000001.5"]))
    times = numbers.build()
    formatted.clear()
    assert numbers.separate_ties(times).tolist() == [float(text), 1600000001.5]
    assert bool(formatted) == makes_strings
