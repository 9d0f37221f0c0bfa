"""A run that continues another: what it takes over, which rows it trains, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2rec.compat import init_seed
from m2rec.data.dataset import HistoryDataset
from m2rec.data.extent import TrainingExtent, count_trained_targets, find_new_rows
from m2rec.models.m2rec import M2Rec
from m2rec.run_folder import RunFolder
from m2rec.serving.recommender import Recommender
from m2rec.settings import RunSettings
from m2rec.text import vector_file
from m2rec.text.continued import continue_text_vectors
from m2rec.text.vector_file import load_item_vectors
from m2rec.training.configuration import build_config
from m2rec.training.continued_run import average_neighbors, build_run_config, scale_to_data
from m2rec.training.replay import ReplayLoader
from m2rec.training.run import PreparedRun, load_data, prepare_run, run_experiment
from m2rec.training.settling import resolve_scale_free_keys
from tests.conftest import as_arguments, small, write_inter
from tests.test_checkpoint import outcome, stopped_in_an_epoch

Command = Callable[..., tuple[int, str, str]]
Rows = list[tuple[object, object, object]]

N_ITEMS = 30


def make_rows(last: int, n_items: int = N_ITEMS, users: range = range(40)) -> Rows:
    """Up to this time each user has an item at each time from one on, of ever more items."""
    random, rows = np.random.default_rng(0), []
    for time in range(12):
        for user in range(40):
            item = int(random.integers(n_items - 5 + time // 2))
            if user in users and user % 8 <= time <= last and not (user % 5 == 0 and time > 6):
                rows.append((f"u{user}", f"i{item}", time))
    return rows


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with the data set `shop` up to time 7; returns what data_path should be."""
    write_inter(tmp_path / "data", "shop", make_rows(7))
    return tmp_path / "data"


def values(data: Path, **others: object) -> dict[str, Any]:
    own = {"text_vectors": "none", "neighbors": True, "train_batch_size": 4, "dataset": "shop"}
    return small(data, **{**own, "runs_dir": str(data.parent / "runs"), **others})


def train(data: Path, **others: object) -> Path:
    return run_experiment(build_run_config(values(data, **others))).folder


def append(data: Path, last: int = 11) -> None:
    """The same interactions and those up to a later time, users in another order, so that ids differ."""
    write_inter(data, "shop", make_rows(last)[::-1])


def prepare_further(data: Path, run: Path, **others: object) -> PreparedRun:
    return prepare_run(build_run_config({"continue_from": str(run), **others}))


def load_histories(data: Path, **others: object) -> tuple[HistoryDataset, HistoryDataset]:
    dataset, loaders = load_data(build_config(values(data, **others)))
    return dataset, loaders.train.dataset


@pytest.mark.parametrize("rows", ["dense", "prefix"])
def test_rows_are_new_where_their_target_is(tmp_path: Path, rows: str):
    histories = {"a": "pqrst", "b": "pqr", "c": "qrs", "gone": "pq"}
    later = {"a": "pqrstpqr", "b": "pqr", "c": "qrsp", "new": "rstp", "one": "pqrstq"}
    for name, of_users in (("early", histories), ("shop", later)):
        write_inter(tmp_path, name, [(u, i, t) for u, items in of_users.items() for t, i in enumerate(items)])
    keys = {"rows": rows, "MAX_ITEM_LIST_LENGTH": 2}
    extent = TrainingExtent.measure(load_histories(tmp_path, **keys, dataset="early")[0])
    extent = TrainingExtent.from_tensors(extent.to_tensors())
    dataset, train_part = load_histories(tmp_path, **keys)
    is_new = find_new_rows(train_part, extent)
    assert count_trained_targets(dataset, extent) == 0
    users, items = (train_part.inter_feat[name].tolist() for name in ("user_id", "item_id"))
    named = [(dataset.user_tokens[u], dataset.item_tokens[i]) for u, i in zip(users, items, strict=True)]
    found = {row: bool(new) for row, new in zip(named, is_new, strict=True)}
    # of a, training had pqr and now has pqrstp; of c and b, qr and pq as before; of the others nothing
    expected = {("a", "r"): False, ("a", "t"): True, ("a", "s"): True, ("a", "p"): True, ("a", "q"): False,
                ("b", "q"): False, ("c", "r"): False, ("new", "s"): True, ("one", "q"): True,
                ("one", "r"): True, ("one", "s"): True}  # fmt: skip
    if rows == "dense":  # windows of two targets from the end
        dense = {
            ("a", "p"): True,
            ("a", "s"): True,
            ("a", "q"): False,
            ("one", "q"): True,
            ("one", "s"): True,
        }
        expected = {**{row: new for row, new in expected.items() if row[0] not in ("a", "one")}, **dense}
    assert found == expected


def test_users_that_training_did_not_have():
    extent = TrainingExtent(np.array([3, 2**64 - 1], dtype=np.uint64), np.array([5, 7]))
    again = TrainingExtent.from_tensors(extent.to_tensors())
    assert again.look_up(np.array([2**64 - 1, 4, 3, 0], dtype=np.uint64)).tolist() == [7, 0, 5, 0]
    assert TrainingExtent(np.array([], dtype=np.uint64), np.array([])).look_up(extent.users).tolist() == [
        0,
        0,
    ]


def seed_again(prepared: PreparedRun) -> HistoryDataset:
    """The training part; PyTorch then draws what it drew for the model of this run."""
    init_seed(prepared.config["seed"], prepared.config["reproducibility"])
    part: HistoryDataset = prepared.loaders.train.dataset
    return part


def test_a_run_begins_with_what_the_other_had(shop: Path):
    run = train(shop, average_epochs=0.5)
    old, _ = RunFolder(run).read_weights()
    old_tokens = RunFolder(run).read_tokens()
    append(shop)
    prepared = prepare_further(shop, run)
    tokens = prepared.dataset.item_tokens
    state = prepared.trainer.model.state_dict()
    table, old_table = (weights["encoder.id_embedding.weight"] for weights in (state, old))
    kept = set(tokens[1:]) & set(old_tokens[1:])
    assert len(kept) == len(old_tokens) - 1 < len(tokens) - 1
    assert any(tokens.index(token) != old_tokens.index(token) for token in kept)
    for token in kept:
        assert torch.equal(table[tokens.index(token)], old_table[old_tokens.index(token)])
    facts = prepared.continued.facts if prepared.continued else {}
    kept_share = facts["rows_old"] / (facts["rows_old"] + facts["rows_new"])
    assert 0.1 < kept_share < 0.9
    fresh = M2Rec(prepared.config, seed_again(prepared)).state_dict()
    for name in state.keys() - {"encoder.id_embedding.weight"}:
        share = kept_share if name.startswith("encoder.layers.") else 1.0
        assert torch.allclose(state[name], share * old[name] + (1 - share) * fresh[name], atol=1e-6), name
    new = [i for i, token in enumerate(tokens) if i and token not in kept]
    assert table[new].any(1).all() and table[new].norm(dim=1).max() <= table[1:].norm(dim=1).max()
    assert not table[0].any() and prepared.trainer.model.encoder.neighbors is None


def test_a_new_item_starts_from_its_neighbours(tmp_path: Path):
    """`n` came after p, and before q; `m` is only like r by its text; `o` has nothing."""
    histories = {"a": "pnqpqr", "b": "prqqm", "c": "rpqqmo"}
    write_inter(tmp_path, "shop", [(u, i, t) for u, items in histories.items() for t, i in enumerate(items)])
    dataset, _ = load_histories(tmp_path)
    ids = {token: i for i, token in enumerate(dataset.item_tokens)}
    table = torch.zeros(len(ids), 2)
    table[[ids["p"], ids["q"], ids["r"]]] = torch.tensor([[1.0, 0], [0, 1], [5, 5]])
    is_new = torch.zeros(len(ids), dtype=torch.bool)
    new = sorted([ids["n"], ids["m"], ids["o"]])
    is_new[new] = True
    vectors = torch.zeros(len(ids), 3)
    vectors[[ids["m"], ids["r"], ids["p"]]] = torch.tensor([[1.0, 0, 0], [2, 0.1, 0], [0, 3, 0]])
    rows = dict(zip(new, average_neighbors(table, is_new, dataset, vectors), strict=True))
    p, q = rows[ids["n"]]  # once after p in training, and before q, p; backward pairs count less
    assert 0 < p < q < 1 and torch.allclose(p + q, torch.tensor(1.0))
    of_old = torch.tensor([2.0, 2.0])  # the mean of p, q and r, which are all near where there are only three
    assert torch.allclose(rows[ids["m"]], of_old) and torch.allclose(rows[ids["o"]], of_old)
    without = average_neighbors(table, is_new, dataset, None)
    assert torch.equal(without[new.index(ids["n"])], rows[ids["n"]])


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_an_epoch_has_all_new_rows_and_some_old(shop: Path, share: float):
    _, loaders = load_data(build_config(values(shop)))
    n_rows = len(loaders.train.dataset)
    is_new = np.arange(n_rows) % 3 == 0
    loader, twin = (ReplayLoader(loaders.train, is_new, share) for _ in range(2))
    n_old = round(share * (~is_new).sum())
    assert len(loader) == -(-(is_new.sum() + n_old) // 4)
    epochs = []
    for _ in range(3):
        assert sum(len(batch) for batch in loader) == is_new.sum() + n_old
        epochs.append(loader._rows)
        assert len(np.unique(loader._rows)) == len(loader._rows)
        assert set(np.flatnonzero(is_new)) <= set(loader._rows.tolist())
    assert (share == 0.4) == (epochs[0].tolist() != epochs[1].tolist())
    users = torch.cat([batch["user_id"] for batch in twin])
    expected = loaders.train.dataset.inter_feat["user_id"][twin._rows]
    assert twin._rows.tolist() == epochs[0].tolist() and sorted(users.tolist()) == sorted(expected.tolist())


def write_file(path: Path, tokens: list[str], vectors: np.ndarray) -> Path:
    vector_file.write_text_vectors(path, tokens, vectors, {"model": "m"})
    return path


def test_text_of_new_items_comes_into_the_space_of_the_old(tmp_path: Path):
    random = np.random.default_rng(0)
    raw = random.normal(size=(80, 6)) * np.array([5, 4, 3, 2, 1, 1]) + 1
    tokens = [f"i{i}" for i in range(80)]
    ids = ["[PAD]", *tokens, "unknown"]
    first = load_item_vectors(write_file(tmp_path / "old", tokens[:70], raw[:70]), ids[:71])
    old = torch.zeros(82, first.vectors.shape[1])
    old[1:71] = first.vectors[1:]
    old[5] = 0  # had no text
    rotated = raw @ np.linalg.qr(random.normal(size=(6, 6)))[0] * 3 - 2
    wanted = (torch.from_numpy(raw).float() - first.mean) @ first.basis
    for vectors, tolerance in ((raw, 0.01), (rotated, 0.05)):
        found = continue_text_vectors(
            write_file(tmp_path / "new", tokens, vectors), ids, old, first.mean, first.basis
        )
        assert torch.equal(found.vectors[1:5], old[1:5]) and torch.equal(found.vectors[6:71], old[6:71])
        assert torch.allclose(found.vectors[71:81], wanted[70:], atol=tolerance)
        assert torch.allclose(found.vectors[5], wanted[4], atol=tolerance)
        assert found.missing == ("unknown",) and not found.vectors[81].any()
        stored = vector_file.read_text_vectors(tmp_path / "new").vectors
        assert torch.allclose((stored[70:] - found.mean) @ found.basis, found.vectors[71:81], atol=1e-4)
    for other in (random.normal(size=(80, 6)), random.normal(size=(80, 3))):
        with pytest.raises(ValueError, match=r"text_vectors: .* does not fit the vectors that the run was"):
            path = write_file(tmp_path / "other", tokens, other)
            continue_text_vectors(path, ids, old, first.mean, first.basis)


def test_a_whole_run(command: Command, shop: Path, write_vectors: Callable[..., Path]):
    keys = {key: value for key, value in values(shop).items() if key != "text_vectors"}
    tokens = sorted({str(item) for _, item, _ in make_rows(11)})
    known = sorted({str(item) for _, item, _ in make_rows(7)})
    assert len(known) < len(tokens)
    write_vectors(shop, "shop", known)
    status, out, err = command(*as_arguments(keys))
    assert status == 0, err
    first = Path(out.splitlines()[-1])
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    append(shop, 9)
    write_vectors(shop, "shop", tokens)  # the same vectors, and those of more items
    own = ["--seed=3", "--replay_share=0.5", "--epochs=2"]
    status, out, err = command(f"--continue_from={first}", *own, runs_dir=False)
    assert status == 0, err
    folder = Path(out.splitlines()[-1])
    metrics = json.loads((folder / "metrics.json").read_text())
    facts = metrics["continued_from"]
    assert facts["run"] == str(first) and facts["items_gone"] == 0
    assert facts["items_kept"] == len(known) and facts["items_new"] == metrics["data"]["items"] - len(known)
    assert facts["rows_new"] + facts["rows_old"] == metrics["data"]["train_rows"]
    assert facts["rows_replayed"] == round(0.5 * facts["rows_old"]) > 0
    assert f"continued from {first}: {len(known)} items kept" in err
    assert before == {path.name: path.read_bytes() for path in first.iterdir()}
    shutil.rmtree(first)  # a finished run needs it no more
    recommender = Recommender.load(folder)
    assert len(recommender.recommend([tokens[0]], k=3)) == 3
    assert set(recommender.tokens[1:]) == {str(item) for _, item, _ in make_rows(9)}
    append(shop)
    again = run_experiment(build_run_config({"continue_from": str(folder), "epochs": 1}))
    assert again.metrics["continued_from"]["run"] == str(folder) and again.metrics["epochs"] == 1
    assert "continued_from" not in json.loads(before["metrics.json"])


def test_stopped_and_resumed(shop: Path, command: Command, monkeypatch: pytest.MonkeyPatch):
    run = train(shop)
    append(shop)
    keys = {"continue_from": str(run), "replay_share": 0.5, "epochs": 3, "train_batch_size": 4}
    whole = run_experiment(build_run_config(keys))
    facts = whole.metrics["continued_from"]
    n_steps = -(-(facts["rows_new"] + facts["rows_replayed"]) // 4)
    assert n_steps > 3 and facts["rows_replayed"] < facts["rows_old"]
    repeated = {"config_files": [str(whole.folder / "config.yaml")]}
    folder = stopped_in_an_epoch(repeated, n_steps + 2, monkeypatch)
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 0 and "resumed after epoch 0, step 2" in err
    one, other = outcome(whole.folder), outcome(folder)
    assert other[:3] == one[:3]
    for name, value in one[3].items():
        assert torch.equal(other[3][name], value), name


def test_keys_of_the_old_run_hold_unless_the_user_sets_them(shop: Path):
    run = train(shop, learning_rate=0.007, weight_decay=0.5, learner="adamw", seed=5)
    config = build_run_config({"continue_from": str(run), "decay_per_epoch": 0.1})
    assert config["weight_decay"] == RunSettings().weight_decay and config["targets_per_step"] > 0
    assert config["learning_rate"] == 0.007 and config["seed"] == 5 and config["hidden_size"] == 16
    assert config["epochs"] == 8 and config["decay_per_epoch"] == 0.1 and not config.open_keys
    assert build_run_config({"continue_from": str(run), "epochs": 9, "hidden_size": 16})["epochs"] == 9
    assert build_run_config({"continue_from": "none", **values(shop)})["epochs"] == 2


def test_settings_are_scaled_to_the_data():
    """For the same data they are the same; for twice as much, a step takes half as much of the weights."""
    run = {"train_batch_size": 12, "learner": "adamw", "weight_decay": 0.8, "learning_rate": 0.01,
           "average_epochs": 1.5, "stopping_step": 6}  # fmt: skip
    scaled = scale_to_data(run, {"train_rows": 100, "train_targets": 500})
    assert scaled["targets_per_step"] == 60 and scaled["learning_rate"] == 0.01
    assert not {"train_batch_size", "weight_decay", "average_epochs"} & set(scaled)
    same = resolve_scale_free_keys(RunSettings.read(scaled), 100, 500)
    assert {key: pytest.approx(value) for key, value in run.items() if key in same} == same and len(same) == 4
    twice = resolve_scale_free_keys(RunSettings.read(scaled), 200, 1_000)
    assert twice["train_batch_size"] == 12 and twice["weight_decay"] == pytest.approx(0.4 * 18 / 17, rel=0.01)
    assert twice["average_epochs"] == 0.75
    plain = {**run, "learner": "adam", "average_epochs": 0.0}
    scaled = scale_to_data(plain, {"train_rows": 100, "train_targets": 500})
    assert scaled == {**{k: v for k, v in plain.items() if k != "train_batch_size"}, "targets_per_step": 60}


def make_unfinished(run: Path) -> None:
    (run / "metrics.json").unlink()


def make_old(run: Path) -> None:
    (run / "trained.safetensors").unlink()


def keep(run: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (keep, {"continue_from": "nowhere"}, "'nowhere' is not a run folder: it has no config.yaml"),
        (make_unfinished, {}, "is not a finished run; finish it with --resume="),
        (make_old, {}, "has no trained.safetensors, which says what it was trained on"),
        (keep, {"model": "SASRec"}, "model: 'SASRec', but .* was trained with 'M2Rec'; leave model out"),
        (keep, {"hidden_size": 32}, "hidden_size: 32, but .* was trained with 16; leave hidden_size out"),
        (keep, {"text_vectors": "auto"}, "text_vectors: 'auto', but .* was trained with no text; leave"),
        (keep, {"benchmark_filename": ["a", "b"]}, "benchmark_filename: continue_from needs whole histories"),
        (keep, {"replay_share": 2}, r"replay_share: expected a number in \[0, 1\], got 2"),
        (keep, {"dataset": "shop"}, "was trained on all training targets of this data; append new"),
        (keep, {"dataset": "other"}, "no item of .* is in this data set"),
        (keep, {"split": "global_time"}, "was trained on [0-9]+ of the validation and test targets; split"),
    ],
)  # fmt: skip
def test_what_is_refused(shop: Path, change: Callable[[Path], None], given: dict[str, Any], message: str):
    run = train(shop, epochs=1)
    change(run)
    write_inter(shop, "other", [(u, f"other{i}", t) for u, i, t in make_rows(9)])
    with pytest.raises(ValueError, match=message) as error:
        prepare_run(build_run_config({"continue_from": str(run), **given}))
    assert "\n" not in str(error.value)


def test_a_search_and_other_models_are_refused(shop: Path, command: Command):
    status, _, err = command("--continue_from=runs/x", "--search=3", runs_dir=False)
    assert status == 2 and "search: a run that continues another keeps its settings" in err
    keys = {
        key: shop_value for key, shop_value in values(shop).items() if key in ("auto", "dataset", "data_path")
    }
    run = run_experiment(build_config({**keys, "model": "Popularity", "runs_dir": str(shop.parent / "runs")}))
    status, _, err = command(f"--continue_from={run.folder}", runs_dir=False)
    assert status == 2 and "Popularity is not made of M2Rec's parts" in err
