"""Whole runs on a GPU, beside the same on a CPU. What the operators do there is tested in tests/ops."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m2rec import Recommender
from m2rec.training.configuration import build_config
from m2rec.training.run import prepare_run, run_experiment
from tests.conftest import as_arguments, small

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def on_gpu(toy: Path, tmp_path: Path, write_vectors: Callable[..., Path]) -> dict[str, Any]:
    """Keys of a small run with text on the first GPU."""
    write_vectors(toy, "toy", [f"i{k}" for k in range(20)])
    return small(toy, gpu_id=0, runs_dir=str(tmp_path / "runs"))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"mixer": "mamba"},
        {"mixer": "attention"},
        {"rows": "prefix", "filter": "low_pass"},
        {"loss_type": "sampled", "n_negatives": 8},
        {"loss_type": "gBCE", "n_negatives": 8},
        {"id_dropout": 0.3, "average_epochs": 0.5},
        {"enable_amp": True},
        {"scan_backend": "triton"},
        {"compile": True, "average_epochs": 0.5},
        {"compile": True, "mixer": "mamba", "enable_amp": True},
        {"compile": True, "mixer": "attention", "loss_type": "sampled", "n_negatives": 8},
        {"compile": True, "rows": "prefix", "filter": "low_pass", "loss_type": "BPR"},
        {"compile": True, "loss_type": "gBCE", "n_negatives": 8, "id_dropout": 0.3},
        {"model": "SASRec"},
    ],
)
def test_runs(on_gpu: dict[str, Any], keys: dict[str, Any]):
    metrics = run_experiment(build_config({**on_gpu, **keys})).metrics
    assert metrics["device"] == torch.cuda.get_device_name(0)
    assert 0 <= metrics["test"]["ndcg@10"] <= 1


def test_a_run_learns_as_on_a_cpu(on_gpu: dict[str, Any]):
    """Without dropout the first epochs are the same up to rounding, captured as graphs, too."""
    losses = {}
    for gpu, captured in (("", False), (0, False), (0, True)):
        keys = {"gpu_id": gpu, "compile": captured, "dropout_prob": 0.0, "epochs": 2, "train_batch_size": 8}
        prepared = prepare_run(build_config({**on_gpu, **keys}))
        prepared.train()
        losses[gpu, captured] = list(prepared.trainer.train_loss_dict.values())
    for found in losses.values():
        assert found == pytest.approx(losses["", False], rel=1e-3)


def test_captured_steps_draw_new_masks_and_never_wait(on_gpu: dict[str, Any]):
    prepared = prepare_run(build_config({**on_gpu, "compile": True, "dropout_prob": 0.5}))
    trainer, train = prepared.trainer, prepared.loaders.train
    trainer._prepare_fit(train)
    trainer.model.train()
    batch = next(iter(train))
    steps = trainer._captured
    assert steps is not None
    state = torch.cuda.get_rng_state()
    first = steps.compute_gradients(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [steps.compute_gradients(batch) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len({float(loss) for loss in (first, *losses)}) == 4 and steps.n_shapes == 1
    torch.cuda.set_rng_state(state)
    assert torch.equal(steps.compute_gradients(batch), first)  # recording has drawn nothing


def test_a_captured_run_goes_on_as_never_stopped(on_gpu: dict[str, Any]):
    keys = {**on_gpu, "compile": True, "epochs": 3, "train_batch_size": 8}
    whole = prepare_run(build_config(keys))
    whole.train()
    stopped = prepare_run(build_config({**keys, "epochs": 1}))
    stopped.train()
    config = build_config({**keys, "config_files": [str(stopped.trainer.folder / "config.yaml")]})
    resumed = prepare_run(config, stopped.trainer.folder)
    resumed.train()
    assert resumed.trainer.train_loss_dict == whole.trainer.train_loss_dict


def test_a_run_goes_on(on_gpu: dict[str, Any], command: Command):
    prepared = prepare_run(build_config({**on_gpu, "epochs": 1}))
    prepared.train()
    config = prepared.trainer.folder / "config.yaml"
    config.write_text(re.sub(r"\nepochs: 1\n", "\nepochs: 3\n", config.read_text()))
    status, out, err = command(f"--resume={prepared.trainer.folder}", runs_dir=False)
    assert status == 0 and "resumed after epoch 0" in err and "M2Rec on toy" in out


def test_a_run_is_the_same_twice(on_gpu: dict[str, Any], command: Command):
    tables = [command(*as_arguments(on_gpu), runs_dir=False)[1].splitlines()[2:12] for _ in range(2)]
    assert tables[0] == tables[1]


def test_recommendations_are_those_of_a_cpu(on_gpu: dict[str, Any], tmp_path: Path):
    folder = run_experiment(build_config(on_gpu)).folder
    history, found = ["i1", "i2", "i3"], {}
    for device in ("cpu", "cuda"):
        made = Recommender.load(folder, device=device)
        session = made.session(history[:2])
        session.add(history[2])
        found[device] = [made.recommend(history, 5), session.recommend(5), made.similar_items("i4", 3)]
        made.explain(history)
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        assert [item.item for item in one] == [item.item for item in other]
        assert [item.score for item in one] == pytest.approx([item.score for item in other], abs=1e-3)
