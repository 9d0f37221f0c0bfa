"""Evaluation under both protocols, checkpoints, and honest stops."""

import copy
import csv
import math
import os
import signal
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from m2rec.compat import Trainer, data_preparation, init_seed
from m2rec.data.dataset import HistoryDataset
from m2rec.evaluation.metrics import METRICS
from m2rec.evaluation.protocols import Protocol
from m2rec.evaluation.ranking import sample_rows
from m2rec.models.m2rec import M2Rec
from m2rec.storage import write_atomically, write_text
from m2rec.tensor_files import read_tensors, write_tensors
from m2rec.training.configuration import build_config
from m2rec.training.signals import RunInterrupted
from m2rec.training.trainer import RunTrainer
from tests.conftest import random_rows, small


def made(data_path: Path, folder: Path, **others: Any) -> tuple[RunTrainer, list[Any]]:
    config = build_config(small(data_path, **others))
    init_seed(config["seed"], True)
    loaders = list(data_preparation(config, HistoryDataset(config)))
    folder.mkdir(exist_ok=True)
    trainer = RunTrainer(config, M2Rec(config, loaders[0].dataset), folder)
    return trainer, loaders


def histories() -> dict[str, list[str]]:
    """Each user's items in exact order, straight from the rows."""
    ordered: dict[str, list[str]] = {}
    for user, item, _ in sorted(random_rows(), key=lambda row: row[2]):
        ordered.setdefault(str(user), []).append(str(item))
    return ordered


@pytest.mark.parametrize(("part", "n_last"), [(1, 2), (2, 1)])
def test_both_protocols_by_hand(toy: Path, tmp_path: Path, part: int, n_last: int):
    """Hit, NDCG and MRR computed from ranks, user by user, with items as tokens; some targets return."""
    trainer, loaders = made(toy, tmp_path / "run")
    dataset = loaders[part].dataset
    interaction = dataset.inter_feat
    users = dataset.field2id_token["user_id"][interaction["user_id"].numpy()]
    ids = dataset.field2token_id["item_id"]
    with torch.no_grad():
        scores = trainer.model.eval().full_sort_predict(interaction)
    scores[:, 0] = -math.inf
    sums = {protocol: [0.0] * 3 for protocol in Protocol}
    counts = {Protocol.ALL: len(users), Protocol.UNSEEN: len(users), Protocol.NEW: 0}
    for row, user in enumerate(users):
        ordered = histories()[user]
        target = ids[ordered[-n_last]]
        assert target == interaction["item_id"][row]
        seen = {ids[item] for item in ordered[:-n_last]}
        counts[Protocol.NEW] += target not in seen
        for protocol in Protocol:
            removed = set() if protocol is Protocol.ALL else seen
            left = [i for i in range(1, dataset.item_num) if i not in removed]
            if target not in left:
                continue  # a miss, and under `new` not counted
            rank = 1 + sum(bool(scores[row, i] > scores[row, target]) for i in left)
            if rank <= 5:
                for k, value in enumerate((1.0, 1 / math.log2(rank + 1), 1 / rank)):
                    sums[protocol][k] += value
    assert 0 < counts[Protocol.NEW] < len(users)
    assert dataset.n_returning == len(users) - counts[Protocol.NEW]
    result = trainer.evaluate_protocols(loaders[part]).metrics
    name = ("train", "valid", "test")[part]
    for protocol, values in sums.items():
        metrics = result[protocol.get_name(name)]
        actual = [metrics[f"{metric}@5"] for metric in ("hit", "ndcg", "mrr")]
        assert actual == pytest.approx([value / counts[protocol] for value in values], abs=1e-5)
    assert result[f"{name}_unseen"] != result[name]


def test_validation_on_a_sample_is_the_mean_over_its_users(toy: Path, tmp_path: Path):
    trainer, loaders = made(toy, tmp_path / "run", valid_users=7)
    _, valid, test = loaders
    rows = sample_rows(len(valid.dataset), 7)
    assert len(rows) == len(set(rows)) == 7 < len(valid.dataset)
    ranks = trainer.evaluate_protocols(valid).rows["valid"].to_numpy()[rows]
    hits = ((ranks > 0) & (ranks <= 10)).mean()
    score, result = trainer._valid_epoch(valid)
    assert (result["hit@10"], score) == (pytest.approx(hits, abs=1e-6), result["ndcg@10"])
    assert len(trainer.evaluate_protocols(test).rows) == len(test.dataset)
    everybody = made(toy, tmp_path / "other", valid_users=len(valid.dataset))[0]
    assert everybody._valid_epoch(valid)[1] == dict(everybody.evaluate(valid))


def test_a_sample_is_the_same_in_every_run_and_in_order():
    assert (
        sample_rows(5, 0).tolist()
        == sample_rows(5, 5).tolist()
        == sample_rows(5, 9).tolist()
        == [0, 1, 2, 3, 4]
    )
    assert sample_rows(0, 3).tolist() == []
    sample = sample_rows(1000, 100)
    assert sample.tolist() == sorted(set(sample_rows(1000, 100).tolist()))
    assert 400 < sample.mean() < 600 and set(np.diff(sample)) > {1, 2, 3}


def test_scores_of_large_catalogues_are_held_for_few_rows(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The batch is cut so that its scores fit, and the metrics stay."""
    trainer, (_, valid, _) = made(toy, tmp_path / "run")
    expected = trainer.evaluate_protocols(valid).metrics
    monkeypatch.setattr("m2rec.evaluation.ranking._MAX_SCORES", 3 * valid.dataset.item_num + 1)
    sizes = []
    score = trainer.score
    monkeypatch.setattr(trainer, "score", lambda rows: sizes.append(len(rows)) or score(rows))
    assert trainer.evaluate_protocols(valid).metrics == expected
    assert max(sizes) == 3


def test_all_equals_recboles_own_evaluation(toy: Path, tmp_path: Path):
    """By RecBole's own trainer, on its own batches; metrics that it can measure today."""
    names = ["Hit", "NDCG", "MRR", "Recall", "Precision", "MAP"]
    trainer, loaders = made(toy, tmp_path / "run", metrics=names, eval_batch_size=7)
    stock = Trainer(trainer.config, trainer.model)
    stock.eval_collector.data_collect(loaders[0])
    expected = stock.evaluate(loaders[2], load_best_model=False)
    assert (
        trainer.evaluate_protocols(loaders[2]).metrics["test"]
        == dict(expected)
        == trainer.evaluate(loaders[2])
    )


def test_histories_are_taken_out_last(toy: Path, tmp_path: Path):
    trainer, loaders = made(toy, tmp_path / "run")
    alone = trainer._rank_rows(loaders[2], False, (Protocol.ALL,)).items
    both = trainer._rank_rows(loaders[2], False).items
    assert set(alone) == {Protocol.ALL} and (alone[Protocol.ALL] == both[Protocol.ALL]).all()
    assert (both[Protocol.ALL] != both[Protocol.UNSEEN]).any()


def test_metrics_over_the_whole_list(toy: Path, tmp_path: Path):
    """Those for which RecBole 1.2.1 fails, by the textbook and by RecBole, against counts by hand."""
    trainer, loaders = made(toy, tmp_path / "run", metrics=list(METRICS))
    shown: Counter[int] = Counter()
    with torch.no_grad():
        scores = trainer.model.eval().full_sort_predict(loaders[2].dataset.inter_feat)
    for row in scores[:, 1:]:
        shown.update((row.topk(5).indices + 1).tolist())
    textbook = trainer.evaluate(loaders[2])
    assert set(textbook) == {f"{metric.lower()}@{k}" for metric in METRICS for k in (5, 10)}
    items = loaders[2].dataset.item_num - 1
    total = sum(shown.values())
    entropy = -sum(n / total * math.log(n / total) for n in shown.values())
    counts = [shown[item] for item in range(1, items + 1)]
    gini = sum(abs(a - b) for a in counts for b in counts) / (2 * items * total)
    assert textbook["itemcoverage@5"] == pytest.approx(len(shown) / items, abs=1e-6)
    assert textbook["shannonentropy@5"] == pytest.approx(entropy, abs=1e-6)
    assert textbook["giniindex@5"] == pytest.approx(gini, abs=1e-6)
    trainer.config["metric_definitions"] = "recbole"
    recbole = trainer.evaluate(loaders[2])
    assert recbole["itemcoverage@5"] == pytest.approx(len(shown) / (items + 1), abs=1e-6)
    assert recbole["shannonentropy@5"] == pytest.approx(entropy / len(shown), abs=1e-6)
    others = set(METRICS) - {"ItemCoverage", "ShannonEntropy", "GiniIndex"}
    assert all(recbole[f"{m.lower()}@10"] == textbook[f"{m.lower()}@10"] for m in others)


def test_best_weights_and_history(toy: Path, tmp_path: Path):
    folder = tmp_path / "run"
    trainer, loaders = made(toy, folder, epochs=4, learning_rate=0.01)
    trainer.fit(loaders[0], loaders[1], show_progress=False)
    with (folder / "history.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["epoch"] for line in lines] == ["0", "1", "2", "3"]
    scores = [float(line["valid.ndcg@10"]) for line in lines]
    assert scores[trainer.best_epoch] == max(scores)
    trainer.model.encoder.norm.weight.data.fill_(0)
    trainer.load_best_weights()
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    assert trainer.evaluate(loaders[1])["ndcg@10"] == pytest.approx(max(scores))
    assert {p.name for p in folder.iterdir()} == {
        "checkpoint.safetensors", "history.csv", "model.safetensors",
    }  # fmt: skip
    trainer.remove_checkpoint()
    assert {p.name for p in folder.iterdir()} == {"history.csv", "model.safetensors"}


def test_the_average_is_what_is_validated_and_kept(toy: Path, tmp_path: Path):
    trainer, loaders = made(toy, tmp_path / "run", epochs=1, average_epochs=100.0, learning_rate=0.05)
    trainer.fit(loaders[0], loaders[1], show_progress=False)
    kept, raw = load_file(tmp_path / "run" / "model.safetensors"), trainer.model.state_dict()
    for name, value in trainer.ema.averages.items():
        assert torch.equal(kept[name], value), name
    assert not torch.equal(kept["encoder.norm.weight"], raw["encoder.norm.weight"])
    with (tmp_path / "run" / "history.csv").open() as file:
        (line,) = csv.DictReader(file)
    of_raw = trainer.evaluate(loaders[1])["ndcg@10"]
    trainer.load_best_weights()
    assert trainer.evaluate(loaders[1])["ndcg@10"] == float(line["valid.ndcg@10"]) != of_raw


def test_without_validation_rows_the_last_epoch_is_kept(toy: Path, tmp_path: Path):
    trainer, loaders = made(toy, tmp_path / "run", epochs=2)
    trainer.fit(loaders[0], None, show_progress=False)
    last = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.best_epoch == 1
    trainer.load_best_weights()
    assert all(torch.equal(value, last[name]) for name, value in trainer.model.state_dict().items())


def test_a_stop_before_the_first_batch(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The signal ended the data-loader workers, too; the resumed epoch has its rows in the same order."""
    trainer, loaders = made(toy, tmp_path / "run")
    state = loaders[0].generator.get_state()

    def fail(loader: Any) -> Iterator[Any]:
        torch.rand(1, generator=loader.generator)
        raise RuntimeError("a worker is gone")
        yield

    monkeypatch.setattr(type(loaders[0]), "__iter__", fail)
    with pytest.raises(RuntimeError, match="a worker is gone"):
        trainer.fit(loaders[0], loaders[1])
    loaders[0].generator.set_state(state)
    trainer._stop_request.signal = signal.SIGTERM
    with pytest.raises(RunInterrupted):
        trainer.fit(loaders[0], loaders[1])
    tensors, _ = read_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert torch.equal(tensors["loader"], state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_training(toy: Path, tmp_path: Path, value: float):
    trainer, loaders = made(toy, tmp_path / "run")
    trainer.model.calculate_loss = lambda interaction: torch.tensor(value, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"training loss became .* in epoch 0, step 1; lower learning_rate \(now"
    ):
        trainer.fit(loaders[0], loaders[1], show_progress=False)


def test_weight_decay_spares_what_is_marked(toy: Path, tmp_path: Path):
    """mamba_ssm marks A_log, D and dt_bias, and so do we; with a huge decay and no gradient they stay."""
    trainer, _ = made(toy, tmp_path / "run", weight_decay=10.0)
    groups = trainer.optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [10.0, 0.0, 0.0]
    spared = {id(p) for group in groups[1:] for p in group["params"]}
    names = {n.split(".")[-1] for n, p in trainer.model.named_parameters() if id(p) in spared}
    assert names == {"A_log", "D", "dt_bias", "repeat_bias"}
    assert sum(len(g["params"]) for g in groups) == len(list(trainer.model.parameters()))


@pytest.mark.parametrize(("learner", "multiplier"), [("adam", 100), ("rmsprop", 100), ("sgd", 1)])
def test_the_repeat_bias_moves_at_its_own_rate(toy: Path, tmp_path: Path, learner: str, multiplier: int):
    """A step of plain gradient descent is as large as the gradient says."""
    trainer, _ = made(toy, tmp_path / "run", learner=learner, learning_rate=0.01)
    bias = trainer.model.encoder.repeat_bias
    (group,) = (g for g in trainer.optimizer.param_groups if any(p is bias for p in g["params"]))
    assert group["lr"] == pytest.approx(0.01 * multiplier)
    assert {g["lr"] for g in trainer.optimizer.param_groups} == {0.01, group["lr"]}


@pytest.mark.parametrize("learner", ["adam", "adamw"])
def test_adam_is_fused_on_a_cpu_and_takes_the_same_step(learner: str, toy: Path, tmp_path: Path):
    trainer, loaders = made(toy, tmp_path / "run", learner=learner, use_gpu=False)
    assert all(group["fused"] for group in trainer.optimizer.param_groups)
    batch = next(iter(loaders[0]))
    before = copy.deepcopy(trainer.model.state_dict())
    results = []
    for fused in (True, False):
        for group in trainer.optimizer.param_groups:
            group["fused"] = fused
        trainer.model.load_state_dict(before)
        trainer.optimizer.state.clear()
        for _ in range(3):
            torch.manual_seed(1)
            trainer._train_step(batch, True)
        results.append(copy.deepcopy(trainer.model.state_dict()))
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-4) for name in before)
    assert not torch.equal(results[0]["encoder.id_embedding.weight"], before["encoder.id_embedding.weight"])


def test_the_weights_of_another_file_are_not_evaluated(toy: Path, tmp_path: Path):
    trainer, loaders = made(toy, tmp_path / "run")
    with pytest.raises(ValueError, match=r"model_file: 'other\.pth' is not of this run"):
        trainer.evaluate(loaders[2], load_best_model=True, model_file="other.pth")


@pytest.mark.skipif(os.name != "posix", reason="no umask here")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_a_file_is_as_the_umask_says(tmp_path: Path, mask: int, mode: int):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "text", "")
        write_tensors(tmp_path / "tensors", {"one": torch.ones(1)})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(target: Path) -> None:
        target.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
