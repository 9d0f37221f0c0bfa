"""`compile: true` on CUDA without a GPU: padded batches, few shapes, one graph, runs of padded steps."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from m2rec.compat import data_preparation, init_seed
from m2rec.data.dataset import HistoryDataset
from m2rec.data.histories import shift_targets
from m2rec.errors import UserError
from m2rec.models.m2rec import M2Rec
from m2rec.nn.batching import MAX_PADDED_SHAPES, PaddedBatch, pad_training_rows
from m2rec.nn.losses import bpr, cross_entropy, gbce, sampled_cross_entropy
from m2rec.nn.repeat_bias import PaddedRepeatBias, RepeatBias
from m2rec.training import compilation
from m2rec.training.captured_step import CapturedSteps
from m2rec.training.compilation import resolve_compile
from m2rec.training.configuration import build_config
from m2rec.training.trainer import RunTrainer
from tests.conftest import as_arguments, small
from tests.test_checkpoint import Command, outcome, stopped

CUDA = torch.device("cuda")
VARIANTS = [
    {},
    {"mixer": "mamba", "scan_backend": "torch"},
    {"mixer": "attention", "filter": "none", "loss_type": "sampled", "n_negatives": 6, "negatives_shared": 9},
    {"loss_type": "gBCE", "n_negatives": 6, "gate": "mean"},
    {"loss_type": "BPR"},
    {"rows": "prefix", "filter": "low_pass"},
    {"repeat_bias": False, "id_dropout": 0.5, "filter": "residual"},
]
NAMES = ["-".join(map(str, variant.values())) or "defaults" for variant in VARIANTS]


def made(data_path: Path, **others: Any) -> tuple[M2Rec, Any]:
    """A model without dropout, and the loader of its training rows."""
    config = build_config(small(data_path, **{"dropout_prob": 0.0, "train_batch_size": 8, **others}))
    init_seed(config["seed"], True)
    train, *_ = data_preparation(config, HistoryDataset(config))
    return M2Rec(config, train.dataset), train


def dense_rows(n: int, length: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Items (n, length), lengths up to `longest`, the first of which is, and the targets of all positions."""
    lengths = torch.randint(1, longest + 1, (n,))
    lengths[0] = longest
    items = torch.randint(1, 12, (n, length)) * (torch.arange(length) < lengths[:, None])
    return items, lengths, shift_targets(items, lengths, torch.randint(1, 12, (n,)))


# --- shapes


@pytest.mark.parametrize(
    ("longest", "length"), [(1, 7), (7, 7), (8, 13), (13, 13), (25, 25), (26, 50), (50, 50)]
)
def test_padding_keeps_every_target(longest: int, length: int):
    items, lengths, targets = dense_rows(5, 50, longest)
    batch = pad_training_rows(items, lengths, targets, n_rows=8)
    assert batch.items.shape == (8, length) and batch.lengths.tolist() == [*lengths.tolist(), 1, 1, 1]
    assert torch.equal(batch.items[:5, :longest], items[:, :longest])
    assert not batch.items[5:].any()
    kept = batch.targets > 0
    found = torch.zeros_like(targets)
    found[batch.rows[kept], batch.times[kept]] = batch.targets[kept]
    assert torch.equal(found, targets) and int(kept.sum()) == int((targets > 0).sum())


def test_prefix_rows_have_one_target_each():
    items, lengths, _ = dense_rows(5, 50, 50)
    targets = torch.arange(1, 6)
    batch = pad_training_rows(items, lengths, targets, 16, negatives=targets + 10)
    assert batch.sizes == (16, 50, 6) and batch.targets.tolist() == [1, 2, 3, 4, 5, 0]
    assert batch.negatives is not None and batch.negatives.tolist() == [11, 12, 13, 14, 15, 0]
    assert torch.equal(batch.times[:5], lengths - 1) and batch.rows.tolist() == [0, 1, 2, 3, 4, 0]


def test_shapes_are_few_whatever_the_rows():
    shapes = set()
    for n in range(1, 17):
        for longest in range(1, 51):
            shapes.add(pad_training_rows(*dense_rows(n, 50, longest), n_rows=16).sizes)
    assert 8 < len(shapes) <= MAX_PADDED_SHAPES
    assert {shape[0] for shape in shapes} == {16}


@pytest.mark.parametrize("rows", ["dense", "prefix"])
def test_an_epoch_of_ml_100k_has_few_shapes(rows: str):
    """With the defaults but smaller batches, so that there are many; none of the targets is lost."""
    config = build_config({"text_vectors": "none", "train_batch_size": 128, "rows": rows, "report": False})
    init_seed(config["seed"], True)
    train, *_ = data_preparation(config, HistoryDataset(config))
    model = M2Rec(config, train.dataset)
    batches = [model.pad_batch(batch, 128) for batch in train]
    assert len({batch.sizes for batch in batches}) <= 4
    assert sum(int((batch.targets > 0).sum()) for batch in batches) == train.dataset.n_targets


# --- the same numbers


def test_padded_repeats_equal_repeats():
    items, lengths, targets = dense_rows(6, 9, 9)
    batch = pad_training_rows(items, lengths, targets, 8)
    is_target, bias = batch.targets > 0, torch.tensor(-1.5)
    n = int(is_target.sum())
    plain = RepeatBias(items, batch.rows[:n], batch.times[:n], bias)
    padded = PaddedRepeatBias(batch.items, batch.rows, batch.times, is_target, bias)
    for start, stop in ((0, n), (3, 7)):
        flat, _ = plain.find_seen_scores(start, stop, 11)
        found, counts = padded.find_seen_scores(start, stop, 11)
        assert counts is not None
        assert sorted(found[counts].tolist()) == sorted(flat.tolist())
    wanted = torch.randint(1, 12, (len(is_target),))
    wanted[n:] = items[0, 0]  # a position of padding stands at the first item of all
    assert n < len(wanted)
    found = padded.bias_for_items(wanted)
    assert torch.equal(found[:n], plain.bias_for_items(wanted[:n])) and not found[n:].any()
    for size in (4, 7):
        groups = -(-len(is_target) // size)
        shared = torch.randint(1, 12, (groups, 5))  # with duplicates
        found = padded.bias_for_shared_items(shared, size).flatten(0, 1)
        expected = plain.bias_for_shared_items(shared, size).flatten(0, 1)
        assert torch.equal(found[:n], expected[:n]) and not found[n:].any()


@pytest.mark.parametrize("name", ["CE", "sampled", "gBCE", "BPR"])
def test_losses_leave_padding_out(name: str, monkeypatch: pytest.MonkeyPatch):
    """Value and gradients, with three positions of padding and without them, in several blocks."""
    monkeypatch.setattr("m2rec.nn.repeat_bias._MAX_BLOCK_FLAGS", 9 * 6)
    n, padded, groups = 32, 35, 7  # both are seven groups of five
    items, _, _ = dense_rows(6, 9, 9)
    rows, times = torch.randint(6, (padded,)), torch.randint(9, (padded,))
    is_target = torch.arange(padded) < n
    targets = torch.randint(1, 12, (padded,)) * is_target
    drawn = torch.randint(1, 12, (groups, 6))
    given = [torch.randn(padded, 4).double(), torch.randn(12, 4).double(), torch.tensor(0.7).double()]
    results = []
    for stop in (n, padded):
        leaves = [value.clone().requires_grad_() for value in (given[0][:stop], *given[1:])]
        x, table, bias = leaves
        x = x.masked_fill(~is_target[:stop, None], 0)
        repeats = RepeatBias(items, rows[:stop], times[:stop], bias)
        if stop == padded:
            repeats = PaddedRepeatBias(items, rows, times, is_target, bias)
        embed, wanted = partial(functional.embedding, weight=table), targets[:stop]
        if name == "CE":
            loss = cross_entropy(x, wanted, table, repeats)
        elif name == "BPR":
            loss = bpr(x, wanted, embed, drawn.flatten()[:stop], repeats)
        elif name == "gBCE":
            loss = gbce(x, wanted, embed, drawn, 12, 0.75, repeats)
        else:
            loss = sampled_cross_entropy(x, wanted, embed, drawn, torch.zeros(groups, 6), repeats)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    (loss, dx, *others), (padded_loss, padded_dx, *padded_others) = results
    assert torch.allclose(padded_loss, loss, atol=1e-12)
    assert torch.allclose(padded_dx[:n], dx, atol=1e-12) and not padded_dx[n:].any()
    for found, expected in zip(padded_others, others, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    "variant", [VARIANTS[0], VARIANTS[1], VARIANTS[5]], ids=[NAMES[0], NAMES[1], NAMES[5]]
)
def test_a_padded_step_equals_a_plain_one(toy: Path, variant: dict[str, Any]):
    """Loss and gradients of every batch of an epoch, the last one smaller."""
    model, train = made(toy, **variant)
    steps = CapturedSteps(model, 8, nullcontext)
    sizes = []
    for batch in train:
        sizes.append(len(batch))
        model.zero_grad()
        expected = model.calculate_loss(batch)
        expected.backward()
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        torch.testing.assert_close(steps.compute_gradients(batch), expected.detach(), atol=1e-5, rtol=1e-5)
        for name, p in model.named_parameters():
            if gradients[name] is None:
                assert p.grad is None, name
            else:
                torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)
    assert len(set(sizes)) == 2 and 1 <= steps.n_shapes <= len(sizes)


# --- nothing is read back from the device


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_a_padded_step_reads_no_value(toy: Path, variant: dict[str, Any]):
    """Loss and gradients of tensors that have shapes and no values: reading one is an error."""
    model, train = made(toy, **{"dropout_prob": 0.3, **variant})
    batch = model.pad_batch(next(iter(train)), 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = PaddedBatch(*(None if t is None else mode.from_tensor(t) for t in batch))
        loss = model.calculate_padded_loss(fake)
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        assert loss.shape == () and any(gradient is not None for gradient in found)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            loss.item()


@pytest.mark.parametrize(
    "variant", [VARIANTS[0], VARIANTS[2], VARIANTS[5]], ids=[NAMES[0], NAMES[2], NAMES[5]]
)
def test_a_padded_loss_is_one_graph(toy: Path, variant: dict[str, Any]):
    model, train = made(toy, n_layers=1, **variant)
    batch = model.pad_batch(next(iter(train)), 8)
    torch.compiler.reset()
    whole = torch.compile(model.calculate_padded_loss, backend="aot_eager", fullgraph=True)
    random = torch.get_rng_state()
    losses = []
    for run in (model.calculate_padded_loss, whole):
        torch.set_rng_state(random)
        losses.append(run(batch))
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


# --- whole runs


@pytest.fixture
def padded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with `compile: true` take their steps as on CUDA, without the graphs."""

    def capture(trainer: RunTrainer, n_rows: int) -> None:
        trainer._captured = trainer._capture_steps(min(trainer.config["train_batch_size"], n_rows))

    monkeypatch.setattr(RunTrainer, "_compile", capture)
    monkeypatch.setattr(compilation, "_find_obstacle", lambda kind: "")


@pytest.fixture
def run(command: Command) -> Callable[[dict[str, Any]], Path]:
    def start(values: dict[str, Any]) -> Path:
        status, out, err = command(*as_arguments(values))
        assert status == 0, err
        return Path(out.splitlines()[-1])

    return start


def test_a_captured_run_equals_a_plain_one(run: Callable[..., Path], toy: Path, padded_steps: None):
    """Clipping, the average of the weights, a smaller last batch, validation between epochs."""
    others = {"average_epochs": 0.5, "clip_grad_norm": "{max_norm: 0.5}", "train_batch_size": 12}
    folders = []
    for answer in (True, False):
        values = small(toy, dropout_prob=0.0, n_layers=1, text_vectors="none", compile=answer, **others)
        folders.append(run(values))
    captured, plain = (load_file(folder / "model.safetensors") for folder in folders)
    for name, value in plain.items():
        torch.testing.assert_close(captured[name], value, atol=1e-3, rtol=1e-3)


def test_stopped_and_resumed_is_as_never_stopped(
    run: Callable[..., Path], command: Command, toy: Path, tmp_path: Path, padded_steps: None
):
    values = small(toy, epochs=3, learning_rate=0.01, text_vectors="none", compile=True, train_batch_size=12)
    one = outcome(run(values))
    folder = stopped({**values, "runs_dir": str(tmp_path / "runs")}, after=1)
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 0, err
    other = outcome(folder)
    assert other[:3] == one[:3]
    for name, value in one[3].items():
        assert torch.equal(other[3][name], value), name


def test_a_loss_that_is_not_finite_ends_the_run(
    command: Command, toy: Path, padded_steps: None, monkeypatch: pytest.MonkeyPatch
):
    compute = CapturedSteps.compute_gradients
    monkeypatch.setattr(
        CapturedSteps, "compute_gradients", lambda *given: compute(*given) * torch.tensor(float("nan"))
    )
    status, _, err = command(*as_arguments(small(toy, text_vectors="none", compile=True)))
    assert status == 2 and "training loss became nan in epoch 0" in err


def test_a_loss_of_its_own_is_not_captured(toy: Path, caplog: pytest.LogCaptureFixture):
    class Other(M2Rec):
        def calculate_loss(self, interaction: Any) -> Tensor:
            return super().calculate_loss(interaction)

    model, _ = made(toy)
    model.__class__ = Other
    trainer = RunTrainer.__new__(RunTrainer)
    trainer.model = model
    with caplog.at_level(logging.WARNING):
        assert trainer._capture_steps(8) is None
    assert "compile: Other has a calculate_loss of its own" in caplog.text


# --- the answer


def test_true_on_cuda_needs_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    assert resolve_compile(True, CUDA).is_compiled
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="compile: True needs one process on CUDA and this is torchrun"):
        resolve_compile(True, CUDA)
    assert not resolve_compile("auto", CUDA).is_compiled
