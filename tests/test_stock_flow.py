"""RecBole's own flow with this model and the shipped config.yaml, as a script of RecBole's users has it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import init_seed
from safetensors import safe_open

from m2rec.models.m2rec import M2Rec
from m2rec.tensor_files import load_state, save_state
from m2rec.training.configuration import build_config
from m2rec.training.run import prepare_run
from tests.conftest import small

Make = Callable[..., Config]
CONFIG = Path(__file__).parent.parent / "config.yaml"
METRICS = [
    "Hit",
    "NDCG",
    "ItemCoverage",
    "AveragePopularity",
    "ShannonEntropy",
    "GiniIndex",
    "TailPercentage",
]


@pytest.fixture
def plain(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes RecBole's Config of M2Rec from config.yaml and keys for a quick run."""
    monkeypatch.setattr(sys, "argv", ["run.py"])
    columns = {"inter": ["user_id", "item_id", "timestamp"]}
    own = {"load_col": columns, "checkpoint_dir": str(tmp_path / "saved"), "train_batch_size": 64}

    def make(**others: object) -> Config:
        values = {**small(toy), **own, "epochs": 3, "learning_rate": 0.01, **others}
        return Config(model=M2Rec, config_file_list=[str(CONFIG)], config_dict=values)

    return make


def load(config: Config) -> tuple[Trainer, Any, Any, Any]:
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])  # as run_recbole does
    model = M2Rec(config, train.dataset).to(config["device"])
    torch.manual_seed(config["seed"])  # as the harness does
    return Trainer(config, model), train, valid, test


def test_the_flow_ends_with_the_best_epochs_metrics(plain: Make):
    trainer, train, valid, test = load(plain(metrics=METRICS, epochs=5, learning_rate=0.05))
    kept: list[tuple[float, dict[str, torch.Tensor]]] = []

    def keep(epoch: int, score: float) -> None:
        kept.append((score, {name: value.clone() for name, value in trainer.model.state_dict().items()}))
        if epoch == 3:  # so that the last epoch is not the best one
            for parameter in trainer.model.parameters():
                parameter.data.normal_()

    trainer.fit(train, valid, callback_fn=keep)
    best = max(range(5), key=lambda epoch: (kept[epoch][0], epoch))
    assert best != 4
    found = trainer.evaluate(test)
    trainer.model.load_state_dict(kept[best][1])
    assert found == trainer.evaluate(test, load_best_model=False)
    assert set(found) == {f"{metric.lower()}@{k}" for metric in METRICS for k in (5, 10)}
    trainer.model.load_state_dict(kept[4][1])
    assert found != trainer.evaluate(test, load_best_model=False)


def test_its_rows_are_recboles_own(plain: Make):
    """No row has a random item as if it had been taken, which is what RecBole's default comes to."""
    for loss in ("CE", "sampled", "gBCE", "BPR"):
        _, train, _, _ = load(plain(loss_type=loss))
        assert sum(len(batch) for batch in train) == len(train.dataset)
        assert "neg_item_id" not in next(iter(train))
    negatives = {"distribution": "uniform", "sample_num": 1}
    _, train, _, _ = load(plain(loss_type="BPR", train_neg_sample_args=negatives))
    batch = next(iter(train))
    assert (batch["neg_item_id"] != batch["item_id"]).all() and len(batch) == 64
    with pytest.raises(ValueError, match="train_neg_sample_args: M2Rec draws the negatives of loss_type: CE"):
        plain(train_neg_sample_args=negatives)


def test_its_losses_are_those_of_the_harness(plain: Make, toy: Path, tmp_path: Path):
    """With the same keys and rows; the repeat bias has its pace there too."""
    same = {"rows": "prefix", "time_order": "recbole", "train_batch_size": 64}
    trainer, train, valid, _ = load(plain(**same, epochs=2, learning_rate=0.001))
    score, result = trainer.fit(train, valid)
    prepared = prepare_run(build_config({**small(toy), **same, "runs_dir": str(tmp_path / "runs")}, CONFIG))
    prepared.train()
    ours = prepared.trainer
    assert ours.train_loss_dict == pytest.approx(trainer.train_loss_dict, rel=1e-6)
    assert ours.best_valid_score == pytest.approx(score, abs=1e-6)
    biases = [one.model.encoder.repeat_bias.item() for one in (ours, trainer)]
    assert biases[0] == pytest.approx(biases[1], rel=1e-5) and abs(biases[0]) > 0.1
    assert {k: v for k, v in result.items() if "coverage" not in k} == pytest.approx(
        {k: v for k, v in ours.best_valid_result.items() if "coverage" not in k}, abs=1e-6
    )


def test_a_checkpoint_holds_no_pickle_and_can_be_gone_on_from(plain: Make, tmp_path: Path):
    config = plain(epochs=1)
    trainer, train, valid, _ = load(config)
    trainer.fit(train, valid)
    (file,) = (tmp_path / "saved").iterdir()
    assert str(file) == trainer.saved_model_file and file.suffix == ".safetensors"
    with safe_open(file, framework="pt") as opened:
        assert len(list(opened.keys())) > 10
    other, *_ = load(config)
    other.resume_checkpoint(file)
    assert (other.start_epoch, other.best_valid_score) == (1, trainer.best_valid_score)
    ours, theirs = other.optimizer.state_dict(), trainer.optimizer.state_dict()
    assert ours["param_groups"][0]["lr"] == 0.01 and len(ours["state"]) == len(theirs["state"]) > 10
    for number, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][number][key], value) for key, value in state.items())
    torch.save({"state_dict": {}}, file)
    with pytest.raises(ValueError, match="is not a checkpoint of M2Rec, and pickles are never loaded"):
        other.evaluate(valid)


def test_no_data_set_is_pickled_or_unpickled(plain: Make, tmp_path: Path):
    with pytest.raises(ValueError, match=r"toy-SequentialDataset\.pth: pickles are neither loaded nor made"):
        create_dataset(plain(save_dataset=True))
    assert (tmp_path / "saved" / "toy-SequentialDataset.pth").exists()
    with pytest.raises(ValueError, match="move it away"):
        create_dataset(plain())


def test_keys_without_effect_there_are_said(plain: Make, caplog: pytest.LogCaptureFixture):
    load(plain())
    assert "ignored with RecBole's data set: time_order: exact; use" in caplog.text
    caplog.clear()
    load(plain(time_order="recbole"))
    assert "ignored" not in caplog.text


def test_a_state_comes_back_as_it_was(tmp_path: Path):
    state = {
        "a": [1, 2.5, None, True, {"b": torch.arange(3)}],
        7: np.float64(0.5),
        "c": np.ones(2),
        "": -float("inf"),
    }
    save_state(state, tmp_path / "x")
    found = load_state(tmp_path / "x", "cpu")
    assert list(found) == list(state) and found["a"][:4] == [1, 2.5, None, True]
    assert torch.equal(found["a"][4]["b"], torch.arange(3)) and (found["c"] == np.ones(2)).all()
    assert (found[7], found[""]) == (0.5, -np.inf)
    with pytest.raises(ValueError, match=r"a\.0: object needs a pickle, which is never written"):
        save_state({"a": [object()]}, tmp_path / "y")
    assert not (tmp_path / "y").exists()
