"""`compile: true`: the layers' training in compiled code, and all that must not notice."""

import copy
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from m2rec.compat import data_preparation, init_seed
from m2rec.data.dataset import HistoryDataset
from m2rec.errors import UserError
from m2rec.models.m2rec import M2Rec
from m2rec.nn.encoder import Encoder
from m2rec.run_folder import RunFolder
from m2rec.settings import ModelSettings
from m2rec.training import compilation, trainer
from m2rec.training.compilation import compile_layers, resolve_compile
from m2rec.training.configuration import build_config
from tests.conftest import as_arguments, small
from tests.test_checkpoint import Command, outcome, stopped
from tests.test_encoder import SMALL, L, T, V, histories

CPU = torch.device("cpu")
HAS_COMPILER = not compilation._find_obstacle("cpu")
# the layer that is compiled soonest, for what does not depend on the parts of a layer
SHORT = {"mixer": "attention", "filter": "none", "n_layers": 1}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class CountingBackend:
    """Runs graphs as they are; counts how many were made and how often they ran."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def call(*arguments: Any) -> Any:
            self.calls += 1
            return graph.forward(*arguments)

        return call


def made(data_path: Path, **others: Any) -> M2Rec:
    config = build_config(small(data_path, **{"dropout_prob": 0.0, **others}))
    init_seed(config["seed"], True)
    train, *_ = data_preparation(config, HistoryDataset(config))
    return M2Rec(config, train.dataset)


def compiled(model: M2Rec, backend: Any = "eager") -> M2Rec:
    compile_layers(model, 4, 10, nullcontext(), backend)
    return model


def gradients(model: M2Rec, items: Tensor, lengths: Tensor) -> list[Tensor]:
    """The vectors of all positions, and the gradient of each parameter of the layers."""
    model.train()
    x = model.encoder(items, lengths, model.encoder.prepare_step(items))
    found = torch.autograd.grad(x.square().sum(), list(model.encoder.layers.parameters()), allow_unused=True)
    return [x, *(g for g in found if g is not None)]


# --- the answer


def test_auto_answers_by_the_device():
    assert not resolve_compile("auto", CPU).is_compiled
    assert not resolve_compile("auto", torch.device("cuda")).is_compiled
    assert resolve_compile(False, CPU) == (False, "named by compile")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="compiler and there is no no-such-compiler: install one"):
        resolve_compile(True, CPU)


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_true_is_taken_where_there_is_a_compiler():
    assert resolve_compile(True, CPU) == (True, "named by compile")


def test_a_run_stores_the_answer(command: Command, toy: Path):
    status, out, err = command(*as_arguments(small(toy, epochs=1, text_vectors="none")))
    assert status == 0, err
    assert "layers not compiled (auto: " in err
    assert RunFolder(Path(out.splitlines()[-1])).read_config()["compile"] is False


def test_baselines_ignore_the_key(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        build_config({"model": "SASRec", "compile": True})
    assert "these keys are ignored by SASRec: compile" in caplog.text
    compile_layers(nn.Linear(2, 2), 4, 10, nullcontext(), "no such backend")


# --- one graph


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"filter": "low_pass"},
        {"filter": "residual", "gate": "mean"},
        {"mixer": "mamba"},
        {"mixer": "attention", "filter": "none"},
    ],
    ids=lambda others: "-".join(map(str, others.values())) or "defaults",
)
def test_a_layer_is_one_graph(others: dict[str, Any]):
    """`fullgraph` fails at the first operation that breaks it."""
    encoder = Encoder(ModelSettings(**{**SMALL, "dropout_prob": 0.0, **others}), V, L, torch.randn(V, T))
    layer, (items, lengths) = encoder.layers[0], histories(3, 12, 7)
    batch = encoder._make_batch(items, lengths)
    x = torch.randn(*items.shape, SMALL["hidden_size"], requires_grad=True)
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    results = [(y, *torch.autograd.grad(y.sum(), x)) for y in (run(x, batch)[0] for run in (layer, whole))]
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# --- what is compiled, and what is not


def test_same_vectors_and_gradients_at_all_sizes(toy: Path):
    """In compiled code and where it does not fit: one row, one position, short histories."""
    plain = made(toy, n_layers=1)
    model = compiled(copy.deepcopy(plain), "aot_eager")
    for n_rows, length in ((4, 10), (3, 10), (1, 10), (5, 4), (2, 1)):
        items = torch.randint(1, plain.n_items, (n_rows, length))
        lengths = torch.randint(1, length + 1, (n_rows,))
        pairs = zip(gradients(model, items, lengths), gradients(plain, items, lengths), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


def test_code_is_made_once_and_for_training_alone(toy: Path):
    backend = CountingBackend()
    model = compiled(made(toy), backend)
    graphs, calls = backend.graphs, backend.calls
    assert graphs >= 1
    for n_rows, length in ((4, 10), (3, 7), (1, 10), (2, 1)):
        items = torch.randint(1, model.n_items, (n_rows, length))
        gradients(model, items, torch.full((n_rows,), length))
    assert backend.graphs == graphs and backend.calls >= calls + 2 * len(model.encoder.layers)
    calls = backend.calls
    model.eval()
    with torch.no_grad():
        model.encoder(items, torch.full((2,), 1))
    assert (backend.graphs, backend.calls) == (graphs, calls)


def test_copies_are_plain_and_names_stay(toy: Path):
    plain = made(toy, **SHORT)
    names = list(plain.state_dict())
    backend = CountingBackend()
    model = compiled(plain, backend)
    calls = backend.calls
    assert list(model.state_dict()) == names
    copies = [copy.deepcopy(model).encoder, model.encoder.make_inference_copy(model.encoder.item_table())]
    for encoder in copies:
        encoder(torch.ones(4, 10, dtype=torch.long), torch.full((4,), 10))
    assert backend.calls == calls
    model.load_state_dict(model.state_dict())


def test_generators_and_gradients_are_left_alone(toy: Path):
    model = made(toy, dropout_prob=0.5, **SHORT).eval()
    before = torch.get_rng_state()
    compiled(model, "aot_eager")
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_a_failure_is_one_line(toy: Path):
    def backend(*_: Any) -> Any:
        raise RuntimeError("first line\nsecond line " + "x" * 1_000)

    with pytest.raises(UserError, match=r"compile: True does not work here \(.*set compile: false") as error:
        compiled(made(toy, **SHORT), backend)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


# --- whole runs


@pytest.fixture
def by_aot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs compile without a C++ compiler."""
    monkeypatch.setattr(trainer, "compile_layers", partial(compile_layers, backend="aot_eager"))
    monkeypatch.setattr(compilation, "_find_obstacle", lambda kind: "")


@pytest.mark.parametrize(
    "others",
    [
        pytest.param({"average_epochs": 0.5, **SHORT}, id="dense"),
        pytest.param(
            {"rows": "prefix", "enable_amp": True, "stopping_step": 0, "filter": "none", "n_layers": 1},
            id="prefix",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_stopped_and_resumed_is_as_never_stopped(
    command: Command, toy: Path, tmp_path: Path, by_aot: None, others: dict[str, Any]
):
    values = small(toy, epochs=4, learning_rate=0.01, text_vectors="none", compile=True, **others)
    status, out, err = command(*as_arguments(values))
    assert status == 0, err
    assert "layers compiled (named by compile)" in err and "compiled in " in err
    folder = stopped({**values, "runs_dir": str(tmp_path / "runs")}, after=1)
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 0, err
    assert "compiled in " in err
    one, other = outcome(Path(out.splitlines()[-1])), outcome(folder)
    assert other[:3] == one[:3]
    for name, value in one[3].items():
        assert torch.equal(other[3][name], value), name


def test_a_compiled_run_equals_a_plain_one(command: Command, toy: Path, by_aot: None):
    folders = {}
    for answer in (True, False):
        values = small(toy, dropout_prob=0.0, text_vectors="none", compile=answer, **SHORT)
        status, out, err = command(*as_arguments(values))
        assert status == 0, err
        folders[answer] = Path(out.splitlines()[-1])
    weights = {answer: load_file(folder / "model.safetensors") for answer, folder in folders.items()}
    assert weights[True].keys() == weights[False].keys()
    for name, value in weights[False].items():
        torch.testing.assert_close(weights[True][name], value, atol=1e-3, rtol=1e-3)
    assert json.loads((folders[True] / "metrics.json").read_text())["epochs"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_the_real_compiler(toy: Path):
    """Inductor: vectors and gradients of one layer, with dropout switched off."""
    plain = made(toy, n_layers=1, filter="residual", text_vectors="none")
    model = compiled(copy.deepcopy(plain), "inductor")
    items = torch.randint(1, plain.n_items, (4, 10))
    pairs = zip(*(gradients(m, items, torch.full((4,), 10)) for m in (model, plain)), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
