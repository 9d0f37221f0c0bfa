"""Histories and where their targets lie."""

import numpy as np
import pytest

from m2rec.data import histories as histories_module
from m2rec.data.histories import (
    Histories,
    concatenate_ranges,
    split_by_time,
    split_leave_one_out,
)


@pytest.fixture(autouse=True)
def _few_users_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histories_module, "_USERS_AT_ONCE", 7)


def test_leave_one_out_by_length():
    """One interaction: nothing. Two: one to train. Three: no validation. Four and more: all."""
    end = np.cumsum([1, 2, 3, 4, 6])
    start = np.r_[0, end[:-1]]
    split = split_leave_one_out(start, end)
    assert (split.train_stop - start).tolist() == [1, 2, 2, 2, 4]
    assert split.targets["valid"].tolist() == [-1, -1, -1, 8, 14]
    assert split.targets["test"].tolist() == [-1, -1, 5, 9, 15]


def test_by_time():
    """(training, validation, test) counts: all; nothing before; only a first item; no test."""
    start, end = np.array([0, 6, 8, 9]), np.array([6, 8, 9, 12])
    split = split_by_time(start, end, np.array([3, 0, 0, 2]), np.array([2, 1, 0, 1]))
    assert split.train_stop.tolist() == [3, 6, 8, 11]
    assert split.targets["valid"].tolist() == [4, -1, -1, 11]
    assert split.targets["test"].tolist() == [5, 7, -1, -1]


def made() -> Histories:
    owner = np.array([3, 3, 3, 3, 5, 7, 7, 7])
    return Histories(owner, np.array([10, 11, 12, 13, 20, 10, 31, 32]))


def test_pairs_and_returns_of_training():
    """The last item is for the test, the one before it for validation; user 4 returns to 20 twice."""
    histories = Histories(
        np.array([3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 5]),
        np.array([10, 11, 12, 13, 14, 20, 21, 20, 20, 9, 9, 1]),
    )
    pairs = [list(zip(*histories.training_pairs(gap), strict=True)) for gap in (1, 2, 3, 4)]
    assert pairs == [
        [(10, 11), (11, 12), (20, 21), (21, 20), (20, 20)], [(10, 12), (20, 20), (21, 20)], [(20, 20)], [],
    ]  # fmt: skip
    assert histories.training_returns() == 2 / 5
    assert Histories(np.array([1]), np.array([7])).training_returns() == 0


def test_before():
    histories = made()
    owner, items = histories.items_before_target(np.array([7, 3]), "test")
    assert list(zip(owner, items, strict=True)) == [(0, 10), (0, 31), (1, 10), (1, 11), (1, 12)]
    assert histories.items_before_target(np.array([3]), "valid")[1].tolist() == [10, 11]
    assert histories.lengths_before_target(np.array([7, 3]), "test").tolist() == [2, 3]
    assert histories.items_before_target(np.array([], dtype=int), "test")[1].tolist() == []


def test_trained_counts_inputs_and_targets_but_no_lone_item():
    counts = made().training_counts(33)
    assert {item: int(counts[item]) for item in counts.nonzero()[0]} == {10: 2, 11: 1, 31: 1}


def test_ranges_are_concatenated():
    start, lengths = np.array([5, 2, 9, 0]), np.array([2, 0, 1, 3])
    assert concatenate_ranges(start, lengths).tolist() == [5, 6, 9, 0, 1, 2]
    assert concatenate_ranges(start[:0], lengths[:0]).tolist() == []


def test_targets_that_return_are_those_of_a_loop():
    """In blocks of users, for another order of them, and anew for another split."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 200)
    histories = Histories(np.repeat(3 * np.arange(200), lengths), rng.integers(1, 6, lengths.sum()))
    start, end = histories.start, histories.end
    splits = [histories.split, split_by_time(start, end, lengths // 2, lengths // 4)]
    for histories.split in splits:
        for part, targets in histories.split.targets.items():
            index = rng.permutation(np.flatnonzero(targets != -1))
            expected = [histories.items[targets[i]] in histories.items[start[i] : targets[i]] for i in index]
            for _ in range(2):
                assert histories.target_returns(3 * index, part).tolist() == expected
            assert 0 < sum(expected) < len(expected)


def test_training_counts_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 9, 100)
    histories = Histories(np.repeat(np.arange(100), lengths), rng.integers(1, 30, lengths.sum()))
    counts, targets = np.zeros((2, 30), dtype=int)
    for start, stop in zip(histories.start, histories.split.train_stop, strict=True):
        for position in range(start, stop):
            counts[histories.items[position]] += stop - start >= 2
            targets[histories.items[position]] += position > start
    assert histories.training_counts(30).tolist() == counts.tolist()
    assert histories.count_training_targets(30).tolist() == targets.tolist()
