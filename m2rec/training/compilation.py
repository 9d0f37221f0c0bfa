"""The key `compile`: `torch.compile` for the training of M2Rec's layers.

On CUDA the key means another thing, graphs of whole steps: see `m2rec.training.captured_step`.

Only calls that record a gradient are compiled. Validation, test and saved models run the plain layers, so
that a metric never depends on the compiler, and a copy of a layer is a plain layer.

The code is made once, before the first step, for batches and histories of any size that the same code can
serve; anything else runs as it is. It is never made again later, so that it does not depend on which batch
came first: a resumed run computes with the code of the run that was stopped.
"""

import logging
import os
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from shutil import which
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m2rec import distributed
from m2rec.cli import name_command
from m2rec.errors import UserError, format_one_line
from m2rec.models.m2rec import M2Rec

logger = logging.getLogger(__name__)

_CXX = {"darwin": "clang++", "win32": "cl"}


class CompileChoice(NamedTuple):
    """Whether training is compiled and, for the log, why."""

    is_compiled: bool
    reason: str


def resolve_compile(requested: bool | str, device: torch.device) -> CompileChoice:
    """Turn the key `compile` into an answer; `auto` depends on the device alone, never on timing.

    Raises:
        UserError: true was asked for, and something is missing.
    """
    if requested == "auto":
        return _choose_for_device(device.type)
    if not requested:
        return CompileChoice(False, "named by compile")
    if obstacle := _find_obstacle(device.type):
        raise UserError(f"compile: True needs {obstacle}; or set compile: false")
    return CompileChoice(True, "named by compile")


def _choose_for_device(kind: str) -> CompileChoice:
    if kind == "cpu":
        return CompileChoice(False, "auto: on a CPU it saves less in a run than compiling takes")
    return CompileChoice(False, f"auto: not measured on device type {kind} yet")


def _find_obstacle(kind: str) -> str:
    """What torch.compile lacks for this type of device, with the cure; empty if nothing."""
    if kind == "cuda":  # graphs, no compiler
        if distributed.local_rank() is None:
            return ""
        return f"one process on CUDA and this is torchrun: start {name_command('train')}"
    if not hasattr(torch.compiler, "set_stance"):
        return f"torch 2.6 or newer and this is {torch.__version__}: pip install -U torch"
    compiler = os.environ.get("CXX") or _CXX.get(sys.platform, "g++")
    if which(compiler) is None:
        return f"a C++ compiler and there is no {compiler}: install one, or set CXX"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as PyTorch looks for it
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    return "" if header.is_file() else f"{header}: install python3-dev"


class _TrainedLayer:
    """The call of one layer: compiled where a gradient is recorded and the code fits, else as it is.

    Attributes:
        is_warming: whether this call may compile.
    """

    def __init__(self, layer: nn.Module, backend: str) -> None:
        self.is_warming = False
        self._plain: Callable[..., Any] = layer._call_impl
        self._compiled = torch.compile(self._plain, backend=backend)

    def __call__(self, x: Tensor, batch: Any) -> Any:
        """x: (B, L, D), batch: the items behind it."""
        if not torch.is_grad_enabled():
            return self._plain(x, batch)
        if self.is_warming:
            _mark_dynamic_sizes(x, batch)
            return self._compiled(x, batch)
        with torch.compiler.set_stance("eager_on_recompile"):
            return self._compiled(x, batch)


def _mark_dynamic_sizes(x: Tensor, batch: Any) -> None:
    """Let the code serve any B and L; all other sizes are the run's."""
    mark: Any = torch._dynamo.maybe_mark_dynamic
    given = [(x, (0, 1)), (batch.items, (0, 1)), (batch.lengths, (0,))]
    if batch.text is not None:
        given.append((batch.text, (0, 1)))
    for tensor, dimensions in given:
        for dimension in dimensions:
            mark(tensor, dimension)


def compile_layers(
    model: nn.Module,
    n_rows: int,
    length: int,
    precision: AbstractContextManager[Any],
    backend: str = "inductor",
) -> None:
    """Compile the layers of M2Rec for training, in place; names in the state dict stay. Others: nothing.

    Args:
        model: on its device.
        n_rows: B of the batch that the code is made with.
        length: its L, the longest history.
        precision: autocast or not, as in training.
        backend: of torch.compile.

    Raises:
        UserError: it does not work here.
    """
    if not isinstance(model, M2Rec):
        return
    torch.compiler.reset()  # an earlier run's code counts towards a limit
    calls = []
    for layer in model.encoder.layers:
        call = _TrainedLayer(layer, backend)
        layer._compiled_call_impl = call  # where nn.Module.compile() puts its own; copies leave it behind
        calls.append(call)
    logger.info("%s", _describe_cost())
    start = perf_counter()
    with _compiling(calls), restore_random_state(model), precision:
        _run_training_pass(model, max(2, n_rows), length)
    logger.info("compiled in %.1f s", perf_counter() - start)


def _describe_cost() -> str:
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_USER"
    return (
        f"compiling the layers: about a minute, once on this machine; later runs find the code in {folder} "
        "(TORCHINDUCTOR_CACHE_DIR) and take some seconds"
    )


@contextmanager
def _compiling(calls: list[_TrainedLayer]) -> Iterator[None]:
    """Let the calls compile."""
    for call in calls:
        call.is_warming = True
    try:
        with warnings.catch_warnings(action="ignore"):  # the compiler's own, about its internals
            with explain_failure():
                yield
    finally:
        for call in calls:
            call.is_warming = False


@contextmanager
def explain_failure() -> Iterator[None]:
    """Make one line of what fails inside."""
    try:
        yield
    except torch.OutOfMemoryError:  # with a cure of its own
        raise
    except Exception as error:  # dynamo's, the backend's, the C++ compiler's, CUDA's: they share no class
        what = f"{type(error).__name__}: {_shorten(format_one_line(error))}"
        raise UserError(
            f"compile: True does not work here ({what}); set compile: false, or see --state=DEBUG"
        ) from error


def _shorten(message: str, most: int = 200) -> str:
    return message if len(message) <= most else f"{message[:most]}..."


@contextmanager
def restore_random_state(model: nn.Module) -> Iterator[None]:
    """Leave the generators as they were: a compiled run starts with the random numbers of a plain one."""
    devices = [p.device.index or 0 for p in model.parameters() if p.is_cuda][:1]
    with torch.random.fork_rng(devices=devices):
        yield


def _run_training_pass(model: M2Rec, n_rows: int, length: int) -> None:
    """Forward and backward through the layers, with full rows of random items; no gradient is kept."""
    was_training = model.training
    model.train()
    encoder, device = model.encoder, next(model.parameters()).device
    items = torch.randint(1, max(2, model.n_items), (n_rows, length), device=device)
    lengths = torch.full((n_rows,), length, device=device)
    x, _, _ = encoder.encode_target_positions(items, lengths, items, encoder.prepare_step(items))
    torch.autograd.grad(x.sum(), list(encoder.layers.parameters()), allow_unused=True)
    model.train(was_training)
