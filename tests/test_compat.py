"""RecBole as it is patched: its reader of features loses no rows to quotation marks and knows empty cells."""

from pathlib import Path

import pytest

from m2rec.compat import data_preparation
from m2rec.data.dataset import HistoryDataset
from m2rec.training.configuration import build_config
from tests.conftest import small, write_inter

CLASSES = ["a b", '"Heroes', "", 'b "c"', 'Remix 12"', "c"]  # of item i0, i1, and so on
N = len(CLASSES)


def read(data_path: Path, **others: object) -> HistoryDataset:
    config = build_config(small(data_path, "shop", **others))
    dataset = HistoryDataset(config)
    data_preparation(config, dataset)
    return dataset


def words(dataset: HistoryDataset, rows: object, column: str) -> list[str]:
    """A sequence column's cells, put together again."""
    names = dataset.field2id_token[column]
    return [" ".join(names[row[row > 0]]) for row in rows[column].numpy()]  # type: ignore[index]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six users with the items i0 to i5 in turn; each interaction has tags and weights."""
    header = "user_id:token\titem_id:token\ttimestamp:float\ttags:token_seq\tweights:float_seq"
    rows = [
        (f"u{u}", f"i{k}", f"{k}\t{CLASSES[(u + k) % N]}", "1.5 2" if k % 2 else "")
        for u in range(N) for k in range(N)
    ]  # fmt: skip
    write_inter(tmp_path, "shop", rows, header)  # type: ignore[arg-type]
    lines = [f"i{k}\t{cell}\t{k}.5" for k, cell in enumerate(CLASSES)]
    items = "\n".join(["item_id:token\tclass:token_seq\tprice:float", *lines])
    (tmp_path / "shop" / "shop.item").write_text(items + "\n")
    return tmp_path


def test_quotation_marks_in_an_item_file(data: Path):
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class", "price"]}
    dataset = read(data, load_col=load)
    assert dataset.counts == {"users": N, "items": N, "interactions": N * N}
    tokens = dataset.field2id_token["item_id"][1:]
    found = dict(zip(tokens, words(dataset, dataset.item_feat, "class")[1:], strict=True))
    assert found == {f"i{k}": cell for k, cell in enumerate(CLASSES)}
    assert dataset.item_feat["price"][1:].tolist() == [float(token[1:]) + 0.5 for token in tokens]


def test_quotation_marks_in_interactions_with_sequences(data: Path):
    load = {"inter": ["user_id", "item_id", "timestamp", "tags", "weights"]}
    dataset = read(data, load_col=load)
    assert dataset.counts == {"users": N, "items": N, "interactions": N * N}
    users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    rows = dataset.inter_feat  # one per target
    found = words(dataset, rows, "tags")
    for user, item, tags, weights in zip(
        users[rows["user_id"]], items[rows["item_id"]], found, rows["weights"].tolist(), strict=True
    ):
        assert tags == CLASSES[(int(user[1:]) + int(item[1:])) % N]
        assert weights == ([1.5, 2.0] if int(item[1:]) % 2 else [0.0, 0.0])


def test_an_item_called_na_keeps_its_features(tmp_path: Path):
    """Where a number is missing NA still is none."""
    write_inter(tmp_path, "shop", [(f"u{u}", item, k) for u in range(4) for k, item in enumerate("ab")])
    inter, items = tmp_path / "shop" / "shop.inter", tmp_path / "shop" / "shop.item"
    inter.write_text(inter.read_text() + "".join(f"u{u}\tNA\t9\n" for u in range(4)))
    items.write_text("item_id:token\tkind:token\tprice:float\na\tNone\t1\nb\tnull\t<NA>\nNA\ttea\tNA\n")
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "kind", "price"]}
    dataset = read(tmp_path, load_col=load)
    kinds = dataset.field2id_token["kind"][dataset.item_feat["kind"][1:]]
    found = dict(zip(dataset.field2id_token["item_id"][1:], kinds, strict=True))
    assert found == {"a": "None", "b": "null", "NA": "tea"}
    prices = dict(zip(dataset.field2id_token["item_id"], dataset.item_feat["price"].tolist(), strict=True))
    assert prices == {"[PAD]": 1, "a": 1, "b": 1, "NA": 1}  # the mean, as RecBole fills it


def numbers(dataset: HistoryDataset, column: str) -> list[tuple[int, list[float]]]:
    """Each row's item, by its number, with the column's sequence."""
    rows, items = dataset.inter_feat, dataset.field2id_token["item_id"]
    return [
        (int(item[1:]), own) for item, own in zip(items[rows["item_id"]], rows[column].tolist(), strict=True)
    ]


def test_sequences_of_numbers_are_normalised(data: Path):
    """Row by row: those of items with odd numbers are 1.5 and 2, the smallest and the largest."""
    load = {"inter": ["user_id", "item_id", "timestamp", "weights"]}
    dataset = read(data, load_col=load, normalize_field=["weights"])
    for item, own in numbers(dataset, "weights"):
        assert own == ([0.0, 1.0] if item % 2 else [0.0, 0.0])


def test_sequences_of_numbers_go_into_buckets(data: Path):
    load = {"inter": ["user_id", "item_id", "timestamp", "weights"]}
    buckets = {"weights": {"method": "ED", "bucket": 2}}
    dataset = read(data, load_col=load, numerical_features=["weights"], discretization=buckets)
    for item, own in numbers(dataset, "weights"):
        assert own == ([[1.0, 1.0], [1.0, 2.0]] if item % 2 else [[0.0, 0.0], [0.0, 0.0]])
    dataset = read(data, load_col=load, numerical_features=["weights"])
    assert {len(own) for _, own in numbers(dataset, "weights")} == {2}
    import pandas as pd

    assert pd.Series([[1, 2], [3]]).agg(len) in (2, [2, 1])  # pandas itself is as it was


@pytest.mark.parametrize("item", ["item_id", "asin"])
def test_recboles_own_data_set_knows_each_rows_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: str
):
    """SequentialDataset on files that come split, whatever the column of items is called."""
    from m2rec.compat import Config, SequentialDataset
    from m2rec.models.m2rec import M2Rec

    monkeypatch.setattr("sys.argv", ["run.py"])
    (tmp_path / "pre").mkdir()
    for part in ("train", "valid", "test"):
        lines = [f"user_id:token\t{item}_list:token_seq\t{item}:token", "u\ta b c\td", "v\tb\tc", "w\tc d\ta"]
        (tmp_path / "pre" / f"pre.{part}.inter").write_text("\n".join(lines) + "\n")
    values = {
        "dataset": "pre", "data_path": str(tmp_path), "ITEM_ID_FIELD": item,
        "load_col": {"inter": ["user_id", item, f"{item}_list"]}, "alias_of_item_id": [f"{item}_list"],
        "benchmark_filename": ["train", "valid", "test"],
    }  # fmt: skip
    parts = SequentialDataset(Config(model=M2Rec, config_dict=values)).build()
    assert [part.inter_feat["item_length"].tolist() for part in parts] == [[3, 1, 2]] * 3


def test_features_between_bars(data: Path):
    for path in (data / "shop").iterdir():
        path.write_text(path.read_text().replace("\t", "||"))
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class", "price"]}
    dataset = read(data, load_col=load, field_separator="||")
    assert dataset.counts["interactions"] == N * N and len(dataset.item_feat["price"]) == N + 1
