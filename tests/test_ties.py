"""Ties in a random order: permuted within ties only, the same in every run, and said."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2rec.commands.evaluate import evaluate_run
from m2rec.data.dataset import HistoryDataset
from m2rec.data.ties import Ties
from m2rec.serving.recommender import Recommender
from m2rec.training.configuration import build_config
from m2rec.training.provenance import describe_caveats, describe_data, hash_training_data
from m2rec.training.run import load_data, run_experiment
from tests.conftest import Rows, random_rows, small, write_inter

Histories = dict[str, list[str]]


def load(data_path: Path, **others: Any) -> Any:
    """The data set and its loaders; ties shuffled unless `others` say it."""
    return load_data(build_config(small(data_path, **{"ties": "shuffled", **others})))


def read_histories(dataset: HistoryDataset) -> Histories:
    """Each user's items in order, in the tokens of the file."""
    histories: Histories = {}
    assert dataset.histories is not None
    for user, item in zip(dataset.histories.owner, dataset.histories.items, strict=True):
        own = histories.setdefault(str(dataset.field2id_token["user_id"][user]), [])
        own.append(dataset.item_tokens[item])
    return histories


def group_by_time(rows: Rows, round_time: Any) -> dict[str, list[Counter[str]]]:
    """The items of each user's moments, in the order of time."""
    moments: dict[str, dict[float, Counter[str]]] = {}
    for user, item, time in rows:
        moments.setdefault(str(user), {}).setdefault(round_time(time), Counter())[str(item)] += 1
    return {user: [own[time] for time in sorted(own)] for user, own in moments.items()}


def write_sorted_ties(folder: Path, n_users: int = 40) -> Rows:
    """Each user has eight items at one time, in the order of item ids, and one later."""
    rng = np.random.default_rng(1)
    rows: list[tuple[object, object, object]] = []
    for user in range(n_users):
        items = sorted(rng.choice(30, size=8, replace=False))
        rows += [(f"u{user}", f"i{item:02}", 5) for item in items] + [(f"u{user}", "i99", 6)]
    write_inter(folder, "toy", rows)
    return rows


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
@pytest.mark.parametrize(("time_order", "round_time"), [("exact", float), ("recbole", np.float32)])
def test_only_ties_are_permuted(toy: Path, split: str, time_order: str, round_time: Any):
    """Rows in are rows out; `recbole` rounds first, so that more is tied."""
    start = 978300000
    rows = [(user, item, start + 40 * (int(str(time)) - start)) for user, item, time in random_rows()]
    write_inter(toy, "toy", rows)
    given = {"split": split, "time_order": time_order}
    dataset, _ = load(toy, **given)
    histories = read_histories(dataset)
    expected = group_by_time(rows, round_time)
    assert {user: Counter(own) for user, own in histories.items()} == {
        user: sum(own, Counter()) for user, own in expected.items()
    }
    for user, moments in expected.items():
        rest = histories[user]
        for moment in moments:
            n = moment.total()
            assert Counter(rest[:n]) == moment
            rest = rest[n:]
    as_in_file = read_histories(load(toy, ties="file", **given)[0])
    assert histories != as_in_file
    n_tied = sum(moment.total() for own in expected.values() for moment in own if moment.total() > 1)
    assert dataset.n_tied == n_tied > 0


def test_targets_are_those_of_the_shuffled_histories(toy: Path):
    dataset, (_, valid, test) = load(toy)
    histories = read_histories(dataset)
    for loader, place in ((valid, -2), (test, -1)):
        rows = loader.dataset.inter_feat
        users = dataset.field2id_token["user_id"][rows["user_id"]]
        targets = dataset.field2id_token["item_id"][rows["item_id"]]
        assert len(users) > 10
        for user, target in zip(users, targets, strict=True):
            assert histories[user][place] == target


def test_every_run_sees_the_same(toy: Path, tmp_path: Path):
    """Whatever the seed, the model, the rows and the order of the file."""
    expected = read_histories(load(toy)[0])
    others: list[dict[str, Any]] = [{"seed": 7}, {"model": "Popularity"}, {"rows": "prefix"}]
    for other in others:
        assert read_histories(load(toy, **other)[0]) == expected
    write_inter(tmp_path / "reversed", "toy", random_rows()[::-1])
    assert read_histories(load(tmp_path / "reversed")[0]) == expected
    as_in_file = read_histories(load(tmp_path / "reversed", ties="file")[0])
    assert as_in_file != read_histories(load(toy, ties="file")[0])


def test_the_order_stays_the_same_between_versions(tmp_path: Path):
    """Results with shuffled ties are of this order; a change of the hash makes them another protocol."""
    write_inter(tmp_path, "toy", [(user, f"i{k}", 1) for user in ("a", "b") for k in range(6)])
    histories = read_histories(load(tmp_path)[0])
    assert histories == {"a": ["i3", "i1", "i0", "i4", "i5", "i2"], "b": ["i2", "i3", "i4", "i0", "i5", "i1"]}


def test_the_order_of_item_ids_is_gone(tmp_path: Path):
    """Half of the neighbours ascend, and no two items have an order that holds for all users."""
    write_sorted_ties(tmp_path)
    in_file, shuffled = load(tmp_path, ties="file")[0], load(tmp_path)[0]
    assert in_file.ascending_ties == 1
    assert 0.4 < shuffled.ascending_ties < 0.6
    ahead: dict[tuple[str, str], set[bool]] = {}
    for own in read_histories(shuffled).values():
        for k, first in enumerate(own[:8]):
            for second in own[k + 1 : 8]:
                low, high = sorted((first, second))
                ahead.setdefault((low, high), set()).add(first == low)
    assert sum(len(orders) == 2 for orders in ahead.values()) > len(ahead) / 3


def test_without_ties_nothing_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [(f"u{k % 4}", f"i{k * 7 % 5}", k) for k in range(40)]
    write_inter(tmp_path, "toy", rows)
    expected = read_histories(load(tmp_path, ties="file")[0])
    assert "ties:" not in caplog.text
    assert read_histories(load(tmp_path)[0]) == expected
    assert "ties: shuffled changes nothing: no user has two interactions at the same time" in caplog.text


def test_the_hash_of_the_data_knows_the_order(toy: Path):
    """A run is not resumed on the same data in another order; without the key, the order is the file's."""
    in_file = hash_training_data(*load(toy, ties="file"))
    shuffled = hash_training_data(*load(toy))
    assert in_file != shuffled == hash_training_data(*load(toy, seed=3))
    assert hash_training_data(*load_data(build_config(small(toy)))) == in_file


@pytest.mark.parametrize(
    ("tokens", "items", "share"),
    [
        (["[PAD]", "9", "10", "11"], [1, 2, 3], 1.0),  # as numbers
        (["[PAD]", "9", "10", "x"], [1, 2, 3], 0.5),  # as texts
        (["[PAD]", "c", "b", "a"], [1, 2, 3], 0.0),
        (["[PAD]", "a", "b", "c"], [2, 2, 3], 1.0),  # a repeat is in no order
        (["[PAD]", "a", "b", "c"], [2, 2, 2], None),
    ],
)
def test_ascending_item_ids(tokens: list[str], items: list[int], share: float | None):
    ties = Ties.find(np.zeros(3, int), np.zeros(3))
    assert ties.n_tied == 3
    assert ties.measure_ascending_share(np.array(items), tokens) == share


def test_ties_by_hand():
    users = np.array([1, 1, 1, 1, 2, 2, 3])
    ties = Ties.find(users, np.array([0, 5, 5, 7, 7, 7, 9]))
    assert ties.with_previous.tolist() == [False, False, True, False, False, True, False]
    assert ties.n_tied == 4


def describe(data_path: Path, **others: Any) -> tuple[dict[str, int], dict[str, str]]:
    dataset, loaders = load(data_path, **others)
    counts = describe_data(dataset, *loaders)
    return counts, describe_caveats(counts, dataset)


ORDER = "360 of 360 interactions (100%) share their time with another one of the same user; their order is "
TARGETS = "40 of 40 test targets (100%) share their time with the item before"


@pytest.mark.parametrize(
    ("tied", "order", "consequence"),
    [
        (0, "that of the file, and 100% of tied neighbours ascend by item id", "the largest item id"),
        (1, "that of the file, and 98% of tied neighbours ascend by item id", "mostly the largest item id"),
        (20, "that of the file, and 50% of tied neighbours ascend by item id", None),
        (39, "that of the file, and 2% of tied neighbours ascend by item id", "mostly the smallest item id"),
        (40, "that of the file, and 0% of tied neighbours ascend by item id", "the smallest item id"),
    ],
)
def test_what_the_order_gives_away_is_said(tmp_path: Path, tied: int, order: str, consequence: str | None):
    """So many of 40 users have their nine items in descending order, the others in ascending order."""
    rows = [(f"u{u}", f"i{k if u >= tied else 8 - k}", 5) for u in range(40) for k in range(9)]
    write_inter(tmp_path, "toy", rows)
    counts, caveats = describe(tmp_path, ties="file")
    assert counts["tied"] == 360 and counts["test_tied"] == 40
    assert caveats["ties"] == ORDER + order
    end = f"; such a target is {consequence} of its time, which models learn; "
    end += "ties: shuffled takes this order away"
    assert caveats["tied_targets"] == (TARGETS + end if consequence else TARGETS)
    counts, caveats = describe(tmp_path)
    assert counts["tied"] == 360 and counts["test_tied"] == 40
    assert caveats["ties"] == ORDER + "random, the same in every run (ties: shuffled)"
    assert caveats["tied_targets"] == TARGETS


def test_a_target_after_the_ties_is_not_tied(tmp_path: Path):
    write_sorted_ties(tmp_path)
    counts, caveats = describe(tmp_path, ties="file")
    assert counts["tied"] == 320 and counts["test_tied"] == 0
    assert caveats["tied_targets"].startswith("0 of 40 test targets (0%)")


def test_a_run_with_shuffled_ties(toy: Path, tmp_path: Path):
    """The run says so; evaluated again it has the same histories, unless another order is asked for."""
    keys = small(toy, epochs=1, runs_dir=str(tmp_path / "runs"), text_vectors="none", ties="shuffled")
    result = run_experiment(build_config(keys))
    protocol = result.metrics["protocol"]
    assert protocol["tie_order"] == "shuffled" and "their order is random" in protocol["ties"]
    stored = json.loads((result.folder / "metrics.json").read_text())
    for part in ("valid", "test"):
        found = evaluate_run(result.folder, part)
        assert found["metrics"][f"{part}_unseen"] == pytest.approx(stored[f"{part}_unseen"], abs=1e-6)
    in_file = evaluate_run(result.folder, ties="file")
    assert in_file["metrics"]["test_unseen"] != stored["test_unseen"]
    assert Recommender.load(result.folder).recommend(["i1", "i2"], 3)
    other = run_experiment(build_config({**keys, "ties": "file"}))
    assert other.metrics["protocol"]["tie_order"] == "file"
    assert other.metrics["test_unseen"] != result.metrics["test_unseen"]
