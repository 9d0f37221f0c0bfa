"""Rows and their order: dense targets exactly once, validation and test rows those of RecBole."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from m2rec.compat import data_preparation
from m2rec.data.dataset import HistoryDataset
from m2rec.data.histories import shift_targets
from m2rec.training.configuration import build_config
from m2rec.yaml_values import parse_arguments
from tests.conftest import Rows, built, random_rows, write_inter


def tokens(dataset: Any) -> list[tuple[Any, ...]]:
    """Rows as (user, history, target) in the tokens of the file."""
    feat, names = dataset.inter_feat, dataset.field2id_token
    users, items = (names[key][feat[key].numpy()] for key in ("user_id", "item_id"))
    histories = [
        tuple(names["item_id"][row[:n]])
        for row, n in zip(feat["item_id_list"].numpy(), feat["item_length"], strict=True)
    ]
    return list(zip(users, histories, items, strict=True))


def targets(dataset: Any) -> Counter[tuple[int, int]]:
    """The multiset of (user, training target) in the rows."""
    feat = dataset.inter_feat
    users, last = feat["user_id"], feat["item_id"]
    if dataset.rows == "prefix":
        return Counter(zip(users.tolist(), last.tolist(), strict=True))
    at = shift_targets(feat["item_id_list"], feat["item_length"], last)
    users = users[:, None].expand_as(at)
    return Counter(zip(users[at > 0].tolist(), at[at > 0].tolist(), strict=True))


@pytest.mark.parametrize("longest", [1, 7, 10, 300])
def test_dense_targets_are_each_there_once(toy: Path, longest: int):
    dense = built(toy, MAX_ITEM_LIST_LENGTH=longest)[0]
    prefix = built(toy, MAX_ITEM_LIST_LENGTH=longest, rows="prefix")[0]
    assert targets(dense) == targets(prefix)
    assert dense.n_targets == prefix.n_targets == len(prefix)
    assert dense.item_counter == prefix.item_counter
    assert len(dense) <= len(prefix) and (longest == 1) == (len(dense) == len(prefix))


@pytest.mark.parametrize("time_order", ["exact", "recbole"])
@pytest.mark.parametrize("rows", ["dense", "prefix"])
@pytest.mark.parametrize("longest", [1, 10, 300])
def test_validation_and_test_rows_are_those_of_recbole(
    tmp_path: Path, rows: str, longest: int, time_order: str
):
    """Bit for bit; for the exact order, stock RecBole gets the file in that order and small times."""
    made = random_rows()
    if time_order == "exact":
        frame = pd.DataFrame(made).sort_values(2, kind="stable")
        frame[2] -= 978300000
        made = list(frame.itertuples(index=False))
    write_inter(tmp_path, "toy", made)
    ours = built(tmp_path, rows=rows, time_order=time_order, MAX_ITEM_LIST_LENGTH=longest)
    stock = built(tmp_path, stock=True, MAX_ITEM_LIST_LENGTH=longest)
    for part in (0, 1, 2) if rows == "prefix" else (1, 2):
        a, b = ours[part].inter_feat, stock[part].inter_feat
        assert set(a) == set(b)
        assert len(a) > 10
        for field in b:
            assert a[field].dtype == b[field].dtype and torch.equal(a[field], b[field]), field


def test_exact_order_is_the_stable_order_of_full_precision(tmp_path: Path):
    """Times 1 s apart fall together in float32 at 9.8e8; ties keep the file's order."""
    rows = [("u", f"i{k}", 978300000 + 5 - k) for k in range(5)] + [
        ("u", "j", 978300005),
        ("u", "k", 978300005),
    ]
    write_inter(tmp_path, "toy", rows)
    exact = tokens(built(tmp_path, time_order="exact")[2])
    assert exact == [("u", ("i4", "i3", "i2", "i1", "i0", "j"), "k")]
    recbole = tokens(built(tmp_path, time_order="recbole")[2])
    assert recbole == [("u", ("i0", "i1", "i2", "i3", "i4", "j"), "k")]


def test_short_histories(tmp_path: Path):
    """One interaction: no row. Two: training only. Three: no validation. As stock RecBole."""
    rows = [(f"u{n}", f"i{k}", k) for n in (1, 2, 3, 4) for k in range(n)]
    write_inter(tmp_path, "toy", rows)
    for kind in ("dense", "prefix"):
        train, valid, test = (tokens(part) for part in built(tmp_path, rows=kind))
        assert sorted(row[0] for row in train) == ["u2", "u3", "u4"]
        assert [row[0] for row in valid] == ["u4"]
        assert sorted(row[0] for row in test) == ["u3", "u4"]
        assert ("u4", ("i0", "i1", "i2"), "i3") in test


def test_no_training_position_sees_or_asks_for_a_held_out_item(toy: Path):
    train, valid, test = (tokens(part) for part in built(toy))
    held = {(user, len(history)): item for user, history, item in test + valid}
    assert held
    ordered = {}
    for user, item, _ in sorted(random_rows(), key=lambda row: row[2]):
        ordered.setdefault(user, []).append(item)
    for user, history, item in train:
        used = [*history, item]
        allowed = ordered[user] if len(ordered[user]) < 3 else ordered[user][:-1]
        allowed = allowed if len(ordered[user]) < 4 else ordered[user][:-2]
        windows = [allowed[k : k + len(used)] for k in range(len(allowed))]
        assert used in windows


def test_global_time_split_by_hand(tmp_path: Path):
    """Ten interactions: the moments are the times of the eighth and the ninth, which begin the next part."""
    rows = [("a", "i0", 0), ("a", "i1", 1), ("a", "i2", 2), ("b", "i3", 3), ("b", "i4", 4), ("c", "i5", 5),
            ("a", "i6", 6), ("c", "i7", 7), ("c", "i8", 7), ("a", "i9", 9)]  # fmt: skip
    write_inter(tmp_path, "toy", rows)
    given = {"split": "global_time", "valid_from": 0.6, "test_from": 0.7}
    for kind in ("dense", "prefix"):
        train, valid, test = built(tmp_path, rows=kind, **given)
        trained = [("a", ("i0", "i1"), "i2"), ("b", ("i3",), "i4")]
        assert tokens(train) == (trained if kind == "dense" else [("a", ("i0",), "i1"), *trained])
        assert tokens(valid) == [("a", ("i0", "i1", "i2"), "i6")]
        assert tokens(test) == [("a", ("i0", "i1", "i2", "i6"), "i9"), ("c", ("i5", "i7"), "i8")]
        assert train.part == "train" and test.part == "test"


@pytest.mark.parametrize("time_order", ["exact", "recbole"])
def test_nothing_after_the_moment_is_trained(tmp_path: Path, time_order: str):
    made = [(user, item, time + 50 * (time - 978300000)) for user, item, time in random_rows()]
    write_inter(tmp_path, "toy", made)
    train, valid, test = built(tmp_path, split="global_time", time_order=time_order)
    as_read = np.float64 if time_order == "exact" else np.float32
    times = [(user, item, as_read(time)) for user, item, time in made]
    first, second = (sorted(time for *_, time in times)[int(share * len(made))] for share in (0.8, 0.9))
    early = Counter((user, item) for user, item, time in times if time < first)
    for user, history, target in tokens(train):
        assert not Counter((user, item) for item in [*history, target]) - early
    assert train.n_targets == sum(early.values()) - len({user for user, _ in early})
    late = {user for user, _, time in times if time >= second}
    owners = Counter(user for user, *_ in made)
    assert sorted(row[0] for row in tokens(test)) == sorted(user for user in late if owners[user] > 1)
    between = {user for user, _, time in times if first <= time < second}
    assert {row[0] for row in tokens(valid)} <= between and len(valid) > 0


def test_a_time_split_that_leaves_nothing_to_train_says_so(tmp_path: Path):
    write_inter(tmp_path, "toy", [(f"u{u}", f"i{k}", 5) for u in range(3) for k in range(4)])
    with pytest.raises(ValueError, match="split: 'global_time' leaves no training target in 'toy'"):
        built(tmp_path, split="global_time")


def test_a_time_split_without_test_rows_says_so(tmp_path: Path):
    """After the second moment there are newcomers only, each with a single item."""
    rows = [(f"u{u}", f"i{k}", k) for u in range(4) for k in range(8)]
    rows += [(f"new{k}", "i0", 100 + k) for k in range(4)]
    write_inter(tmp_path, "toy", rows)
    with pytest.raises(ValueError, match="split: 'global_time' leaves no test target in 'toy': no user has"):
        built(tmp_path, split="global_time")


def test_two_interactions_are_enough_for_a_time_split(tmp_path: Path):
    write_inter(tmp_path, "toy", [(f"u{u}", f"i{k}", 10 * u + k) for u in range(20) for k in range(2)])
    train, valid, test = built(tmp_path, split="global_time")
    assert (len(train), len(valid), len(test)) == (16, 2, 2)


def test_other_columns_travel_with_the_items(tmp_path: Path):
    rows = [(f"u{u}\ti{k}", k, k / 2) for u in range(3) for k in range(6)]
    header = "user_id:token\titem_id:token\ttimestamp:float\trating:float"
    write_inter(tmp_path, "toy", rows, header)
    load = {"inter": ["user_id", "item_id", "timestamp", "rating"]}
    for kind in ("dense", "prefix"):
        feat = built(tmp_path, rows=kind, load_col=load)[2].inter_feat
        assert torch.equal(feat["rating"], torch.full((3,), 2.5))
        assert feat["rating_list"][0, :5].tolist() == [0, 0.5, 1, 1.5, 2]


def test_rows_are_cut_in_parts(toy: Path, monkeypatch: pytest.MonkeyPatch):
    """Of any size; the last one may be smaller."""
    parts = built(toy, rows="prefix")
    whole = [dict(part.inter_feat.interaction) for part in parts]
    monkeypatch.setattr("m2rec.data.lazy_rows._ROWS_AT_ONCE", 7)
    for part, expected in zip(parts, whole, strict=True):
        for column in part.inter_feat.columns:
            assert torch.equal(part.inter_feat[column], expected[column])


@pytest.mark.parametrize(
    ("rows", "others", "message"),
    [
        ([], {}, "dataset: 'toy' has no interactions, only a header"),
        (
            [("u", f"i{k}", k) for k in range(4)],
            {"user_inter_num_interval": "[5,inf)"},
            "nothing of 'toy' is left after filtering (1 users, 4 items, 4 interactions before, 0 users, "
            "0 items, 0 interactions after); loosen user_inter_num_interval",
        ),
        (
            [("a", "i", 1), ("a", "j", 2), ("b", "i", 1)],
            {},
            "no user in 'toy' has three interactions (the most is 2; ",
        ),
        (
            [("a", "i", 1), ("a", "j", "x"), ("b", "i", 1)],
            {},
            "toy.inter: column 'timestamp' has 'x' in line 3",
        ),
    ],
)
def test_data_that_cannot_be_used_says_why(tmp_path: Path, rows: Rows, others: dict[str, Any], message: str):
    import re

    write_inter(tmp_path, "toy", rows)
    with pytest.raises(ValueError, match=re.escape(message)):
        built(tmp_path, **others)


def test_missing_columns_and_files(tmp_path: Path):
    write_inter(tmp_path, "toy", [("a", "b")], "user_id:token\titem_id:token")
    with pytest.raises(ValueError, match=r"column 'timestamp' \(TIME_FIELD\) is missing"):
        built(tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"dataset: 'bare' has no file .*bare\.inter; put it there"):
        built(tmp_path, dataset="bare")
    with pytest.raises(ValueError, match=r"dataset: 'gone' not found: there is no .*gone\.inter"):
        built(tmp_path, dataset="gone")


def test_ml_100k_orders():
    """The time order changes 149 test targets when time is not normalised, 4 when it is."""
    sizes = {"dataset": "ml-100k", "MAX_ITEM_LIST_LENGTH": 50}
    exact = {row[0]: row[2] for row in tokens(built(Path(), **sizes)[2])}
    plain = {
        row[0]: row[2] for row in tokens(built(Path(), **sizes, time_order="recbole", normalize_all=False)[2])
    }
    scaled = {row[0]: row[2] for row in tokens(built(Path(), **sizes, time_order="recbole")[2])}
    assert len(exact) == 943
    assert sum(exact[u] != plain[u] for u in exact) == 149
    assert sum(exact[u] != scaled[u] for u in exact) == 4


@pytest.mark.skipif("M2REC_DATA" not in os.environ, reason="M2REC_DATA names no folder with ml-1m")
def test_ml_1m_counts_and_orders():
    """The published counts; 8,617 windows hold all targets; float32 changes 1,190 last items."""
    given = {"dataset": "ml-1m", "data_path": os.environ["M2REC_DATA"]}
    ends = {}
    for time_order in ("exact", "recbole"):
        config = build_config({**given, "time_order": time_order})
        train, _, test = (part.dataset for part in data_preparation(config, HistoryDataset(config)))
        assert train.counts == {"users": 6040, "items": 3416, "interactions": 999611}
        assert len(train) == 8617 and train.n_targets == 999611 - 3 * 6040
        ends[time_order] = {row[0]: row[2] for row in tokens(test)}
    assert sum(ends["exact"][user] != ends["recbole"][user] for user in ends["exact"]) == 1190


@pytest.mark.parametrize("keep", ["first", "last"])
def test_of_repeated_items_one_is_kept_in_the_order_of_the_file(tmp_path: Path, keep: str):
    """Each user at one time, so that a sort that is not stable shows."""
    rows = [
        (f"u{u}", f"i{(u + k) % 20 if k < 20 else (u + 3) % 20}", 1000 - u)
        for u in range(60)
        for k in range(21)
    ]
    write_inter(tmp_path, "toy", rows)
    test = tokens(built(tmp_path, rm_dup_inter=keep, MAX_ITEM_LIST_LENGTH=30)[2])
    for user, history, target in test:
        u = int(user[1:])
        own = [f"i{(u + k) % 20}" for k in range(20)]
        if keep == "last":
            own = [*own[:3], *own[4:], own[3]]
        assert [*history, target] == own


def test_rows_without_user_or_item_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = random_rows()
    gaps = {1: ("", "i1", 1), 4: ("u1", "", 2), 9: ("", "", 3)}
    with_gaps = list(rows)
    for place, row in gaps.items():
        with_gaps.insert(place, row)
    write_inter(tmp_path / "whole", "toy", rows)
    write_inter(tmp_path / "gaps", "toy", with_gaps)
    for ours, expected in zip(built(tmp_path / "gaps"), built(tmp_path / "whole"), strict=True):
        assert tokens(ours) == tokens(expected)
    lost = f"3 of {len(with_gaps)} rows have no user or item and are dropped; the first is row 2"
    assert lost in caplog.text


def test_tied_times_are_counted(tmp_path: Path):
    """By hand; and as float32, which RecBole sorts by, more are tied."""
    times = {"a": [1, 1, 2, 1], "b": [1, 5, 6], "c": [978300000, 978300001, 978300064, 978300128]}
    rows = [(user, f"i{k}", time) for user, own in times.items() for k, time in enumerate(own)]
    write_inter(tmp_path, "toy", rows)
    assert built(tmp_path)[0].n_tied == 3
    as_float32 = [np.float32(time) for time in times["c"]]
    assert built(tmp_path, time_order="recbole")[0].n_tied == 3 + sum(
        as_float32.count(time) > 1 for time in as_float32
    )


def test_targets_that_return_are_counted(toy: Path):
    own: dict[object, list[object]] = {}
    for user, item, _ in sorted(random_rows(), key=lambda row: row[2]):  # type: ignore[arg-type, return-value]
        own.setdefault(user, []).append(item)
    tests = sum(len(items) >= 3 and items[-1] in items[:-1] for items in own.values())
    valids = sum(len(items) >= 4 and items[-2] in items[:-2] for items in own.values())
    _, valid, test = built(toy)
    assert (valid.n_returning, test.n_returning) == (valids, tests) and min(valids, tests) > 0


def test_nanoseconds_are_not_tied(tmp_path: Path):
    """Though a double can't tell them apart; also in a file with a column of sequences."""
    rows = [(f"u{k % 3}", f"i{k % 5}", 1_600_000_000_000_000_000 + k) for k in reversed(range(30))]
    write_inter(tmp_path, "toy", rows)
    ordered = [f"i{k % 5}" for k in range(30) if k % 3 == 0]
    header = "user_id:token\titem_id:token\ttimestamp:float\ttags:token_seq"
    for others in ({}, {"load_col": {"inter": ["user_id", "item_id", "timestamp", "tags"]}}):
        parts = built(tmp_path, MAX_ITEM_LIST_LENGTH=50, **others)
        assert parts[0].n_tied == 0
        (history,) = [history for user, history, _ in tokens(parts[2]) if user == "u0"]
        assert list(history) == ordered[:-1]
        write_inter(tmp_path, "toy", [(*row[:2], f"{row[2]}\tx y") for row in rows], header)


LABELLED = "user_id:token\titem_id:token\ttimestamp:float\tlabel:float"


@pytest.mark.parametrize("sequences", [False, True])
def test_what_is_odd_about_a_file_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, sequences: bool):
    """A label that is 0, ids with blanks, a user that stands for nobody; whoever reads the file."""
    rows = [(f"u{k % 4}", f"i{k % 5}", k, int(k % 3 > 0)) for k in range(30)]
    rows += [("NA", f"i{k % 5}", k, 1) for k in range(20)] + [("u0", " i1", 99, 1)]
    load = ["user_id", "item_id", "timestamp"]
    if sequences:
        write_inter(
            tmp_path, "toy", [(*row[:3], f"{row[3]}\tx y") for row in rows], f"{LABELLED}\ttags:token_seq"
        )
        built(tmp_path, load_col={"inter": [*load, "tags"]})
    else:
        write_inter(tmp_path, "toy", rows, LABELLED)
        built(tmp_path)
    said = caplog.text
    assert "10 interactions have label 0 and are treated as positive interactions" in said
    assert "--val_interval=\"{label: '[1,1]'}\" --load_col=" in said
    assert "1 ids in column item_id have blanks around them, such as ' i1'" in said
    assert "user 'NA' has 20 of 51 interactions (39.2%) and is named like a missing value" in said


@pytest.mark.parametrize("kind", ["float", "token"])
def test_labels_that_are_filtered_are_not_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str):
    """With the keys that the warning gives."""
    rows = [(f"u{k % 4}", f"i{k % 5}", k, int(k % 3 > 0)) for k in range(30)]
    write_inter(tmp_path, "toy", rows, LABELLED.replace("label:float", f"label:{kind}"))
    built(tmp_path)
    given = re.search(r'--val_interval="(.*)" --load_col="(.*)"', caplog.text)
    assert given is not None
    caplog.clear()
    keys = parse_arguments([f"--val_interval={given[1]}", f"--load_col={given[2]}"])
    train, _, _ = built(tmp_path, **keys)
    assert train.counts["interactions"] == 20 and "label" not in caplog.text


@pytest.mark.parametrize(
    "asked",
    [{"split": {"RS": [0.3, 0.3, 0.4]}}, {"split": {"LS": "test_only"}}, {"order": "RO"}, {"group_by": None}],
)
def test_eval_args_of_a_plain_config_are_not_ignored(
    toy: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, object]
):
    from recbole.config import Config

    from m2rec.models.m2rec import M2Rec

    monkeypatch.setattr("sys.argv", ["run.py"])
    columns = {"inter": ["user_id", "item_id", "timestamp"]}
    own = {"dataset": "toy", "data_path": str(toy), "load_col": columns, "gpu_id": ""}
    kept = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}
    HistoryDataset(Config(model=M2Rec, config_dict={**own, "eval_args": dict(kept)}))
    with pytest.raises(ValueError, match="eval_args: HistoryDataset does not support"):
        HistoryDataset(Config(model=M2Rec, config_dict={**own, "eval_args": {**kept, **asked}}))
