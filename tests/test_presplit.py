"""Rows that come split into files: the same as rows made from whole histories, under every protocol."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from m2rec.compat import data_preparation
from m2rec.data.dataset import HistoryDataset
from m2rec.data.presplit import PresplitDataset
from m2rec.evaluation.ranking import mask_history_scores
from m2rec.training.configuration import build_config
from m2rec.training.run import run_experiment
from tests.conftest import random_rows, small, write_inter

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token"
FILES = {"benchmark_filename": ["train", "valid", "test"], "rows": "prefix"}
Row = tuple[str, tuple[str, ...], str]


def write_part(data_path: Path, part: str, rows: list[Row], header: str = HEADER) -> None:
    path = data_path / "toy" / f"toy.{part}.inter"
    path.write_text("\n".join([header, *(f"{u}\t{' '.join(past)}\t{item}" for u, past, item in rows)]) + "\n")


def split_by_hand() -> dict[str, list[Row]]:
    """Every target with all that its user did before: the last one tested, the one before it validated."""
    past: dict[str, list[str]] = {}
    for user, item, _ in sorted(random_rows(), key=lambda row: row[2]):
        past.setdefault(str(user), []).append(str(item))
    parts: dict[str, list[Row]] = {"train": [], "valid": [], "test": []}
    for user, items in past.items():
        for k in range(1, len(items)):
            left = len(items) - k
            part = "test" if left == 1 and k > 1 else "valid" if left == 2 and k > 1 else "train"
            parts[part].append((user, tuple(items[:k]), items[k]))
    return parts


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The toy data set as one file, as three, and no trace of times in those."""
    write_inter(tmp_path, "toy", random_rows())
    for part, rows in split_by_hand().items():
        write_part(tmp_path, part, rows)
    return tmp_path


def load(kind: type[HistoryDataset], data_path: Path, **others: object) -> tuple[HistoryDataset, Any]:
    config = build_config({**small(data_path, rows="prefix"), "MAX_ITEM_LIST_LENGTH": 4, **others})
    dataset = kind(config)
    return dataset, data_preparation(config, dataset)


def in_tokens(dataset: HistoryDataset) -> Counter[Row]:
    users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    rows = dataset.inter_feat
    shown = [
        tuple(items[past[:n]])
        for past, n in zip(rows["item_id_list"].numpy(), rows["item_length"].tolist(), strict=True)
    ]
    return Counter(zip(users[rows["user_id"]], shown, items[rows["item_id"]], strict=True))


def test_rows_are_those_of_whole_histories(data: Path):
    whole, parts = load(HistoryDataset, data)
    given, own = load(PresplitDataset, data, **FILES)
    by_hand = split_by_hand()
    for name, part, expected in zip(by_hand, own, parts, strict=True):
        assert in_tokens(part.dataset) == in_tokens(expected.dataset), name
        assert in_tokens(part.dataset) == Counter((u, past[-4:], item) for u, past, item in by_hand[name])
        assert part.dataset.n_returning == expected.dataset.n_returning if name != "train" else True
    assert given.counts["interactions"] == sum(map(len, by_hand.values()))
    assert given.histories and whole.histories
    counts = [
        dict(zip(d.field2id_token["item_id"], d.histories.training_counts(d.item_num), strict=True))
        for d in (whole, given)
    ]
    assert counts[0] == counts[1]
    for loader, dataset in ((own[0], given), (parts[0], whole)):
        targets = dataset.histories.count_training_targets(dataset.item_num)
        assert {i: n for i, n in enumerate(targets) if n} == loader.dataset.item_counter


def test_unseen_takes_each_rows_own_whole_history_out(data: Path):
    """Also where a user has several rows, and where the history is longer than what the model sees."""
    rows = [
        ("u9", ("i1", "i2", "i3", "i4", "i5", "i6"), "i7"),
        ("u9", ("i2",), "i2"),
        ("u3", ("i1", "i8"), "i9"),
    ]
    write_part(data, "test", rows)
    dataset, (_, _, test) = load(PresplitDataset, data, **FILES)
    batch = test.dataset.inter_feat[torch.tensor([2, 0, 1])]
    scores = torch.zeros(3, dataset.item_num)
    mask_history_scores(scores, batch, test.dataset)
    tokens = dataset.field2id_token["item_id"]
    gone = [{str(token) for token in tokens[row == -torch.inf]} for row in scores]
    assert gone == [{"i1", "i8"}, {"i1", "i2", "i3", "i4", "i5", "i6"}, {"i2"}]
    assert test.dataset.n_returning == 1


@pytest.mark.parametrize("model", ["M2Rec", "SASRec", "Popularity", "TransitionGraph"])
def test_a_run_without_validation(data: Path, model: str, caplog: pytest.LogCaptureFixture):
    """RecBole's example of sessions names two files."""
    others = {"n_heads": 1} if model == "SASRec" else {}
    values = small(
        data, model=model, runs_dir=str(data / "runs"), benchmark_filename=["train", "test"], **others
    )
    metrics = run_experiment(build_config(values)).metrics
    assert metrics["protocol"]["split"] == "files" and metrics["valid"] == {}
    assert (
        metrics["data"]["test_rows"] == len(split_by_hand()["test"]) and metrics["test_unseen"]["hit@10"] > 0
    )
    assert "no validation rows (no file of them is named)" in caplog.text


def test_rows_that_say_nothing_are_counted(data: Path, caplog: pytest.LogCaptureFixture):
    write_part(data, "valid", [("u1", (), "i1"), ("u2", ("i1",), "i2"), ("u3", ("i1",), "")])
    _, (_, valid, _) = load(PresplitDataset, data, **FILES)
    assert len(valid.dataset) == 1
    assert "2 of 3 rows have no user, item or history and are dropped" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"benchmark_filename": "train"},
            "benchmark_filename: expected [train, valid, test] or [train, test]",
        ),
        ({"benchmark_filename": ["train", "x"]}, "toy.x.inter; put it there, or leave x out"),
        ({"rows": "dense"}, "rows: dense needs complete user histories"),
        ({"split": "global_time"}, "split: 'global_time' contradicts benchmark_filename"),
        ({"ties": "shuffled"}, "ties: 'shuffled' has no effect on the files of benchmark_filename"),
        ({"user_inter_num_interval": "[5,inf)"}, "user_inter_num_interval: '[5,inf)' has no effect"),
        ({"rm_dup_inter": "first"}, "rm_dup_inter: 'first' has no effect"),
        ({"alias_of_item_id": ["x"]}, "alias_of_item_id: add item_id_list"),
        ({"load_col": {"inter": ["user_id", "item_id"]}}, "load_col: 'item_id_list' is left out"),
    ],
)
def test_what_does_not_go_with_it_is_said(data: Path, given: dict[str, object], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(PresplitDataset, data, **{**FILES, **given})


def test_files_without_histories_are_refused(data: Path):
    write_part(data, "valid", [("u2", ("i1",), "i2")], HEADER.replace("item_id_list", "others"))
    with pytest.raises(ValueError, match=r"toy\.valid\.inter has no column item_id_list:token_seq"):
        load(PresplitDataset, data, **FILES)
    with pytest.raises(ValueError, match=r"benchmark_filename: HistoryDataset reads NAME\.inter"):
        load(HistoryDataset, data, **FILES)
