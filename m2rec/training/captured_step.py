"""`compile: true` on CUDA: the gradients of a training step as one CUDA graph.

A step of this model is about 800 short kernels, and the GPU waits for Python between them. A CUDA graph
is recorded once for each shape of a batch and then launched by a single call: forward pass, loss and
backward pass. `torch.compile(mode="reduce-overhead")` records graphs as well, but around the code of a
compiler, and silently leaves out whatever keeps it from recording, which shows on a GPU alone. An explicit
graph launches the kernels of the plain step. It needs two things, and tests on a CPU can show both: few
shapes (`m2rec.nn.batching.pad_training_rows`), and no operation that reads a value back from the device
(`M2Rec.calculate_padded_loss`, which is traced as one graph). None of it has run on a GPU yet.

All else stays outside: clipping, optimiser, average of the weights. They see ordinary gradients, and their
few kernels are fused over all parameters. Random numbers come from PyTorch's generator, whose state a graph
reads when it is launched; recording leaves the state as it was, so that a resumed run ends the same.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m2rec.compat import Interaction
from m2rec.models.m2rec import M2Rec
from m2rec.training.compilation import explain_failure, restore_random_state

logger = logging.getLogger(__name__)

# before a graph is recorded: libraries load their kernels and plan their transforms at the first calls
_WARM_UP_STEPS = 3


class _Recording(NamedTuple):
    """One shape's step."""

    batch: tuple[Tensor | None, ...]
    """A `PaddedBatch` that the step reads, at fixed addresses."""
    launch: Callable[[], None]
    """Computes the loss and the gradients of the batch."""


class CapturedSteps:
    """Computes the gradients of training steps, each shape by its own graph.

    On a device without CUDA graphs the same padded step runs as it is; the tests do that.

    Args:
        model: on its device. Its parameters must keep their places in memory.
        n_rows: rows of a full batch.
        precision: makes the context of the forward pass, autocast or not.
    """

    def __init__(
        self, model: M2Rec, n_rows: int, precision: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._model, self._n_rows, self._precision = model, n_rows, precision
        self._device = model.encoder.device
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        # all graphs write to these, and use the same memory for what lies between
        self._gradients = [torch.zeros_like(p) for p in self._parameters]
        self._loss = torch.zeros((), device=self._device)
        self._is_used = [False] * len(self._parameters)
        self._pool: Any = None
        self._stream: Any = None
        self._recordings: dict[tuple[int, int, int], _Recording] = {}

    @property
    def n_shapes(self) -> int:
        """How many shapes have been recorded."""
        return len(self._recordings)

    def compute_gradients(self, batch: Interaction) -> Tensor:
        """Set the gradients of all parameters and return the loss, ().

        The gradients are valid until the next call.

        Args:
            batch: rows on the CPU, so that their shape is known without waiting for the device.
        """
        padded = self._model.pad_batch(batch, self._n_rows)
        recording = self._recordings.get(padded.sizes)
        if recording is None:
            recording = self._recordings[padded.sizes] = self._record(padded)
        for place, value in zip(recording.batch, padded, strict=True):
            if place is not None and value is not None:
                place.copy_(value, non_blocking=True)
        recording.launch()
        for p, gradient, is_used in zip(self._parameters, self._gradients, self._is_used, strict=True):
            p.grad = gradient if is_used else None
        return self._loss.clone()

    def _record(self, padded: Any) -> _Recording:
        """A step for batches of the shape of `padded`, from `M2Rec.pad_batch`.

        Raises:
            UserError: it can't be recorded.
        """
        batch = padded._make(None if t is None else t.to(self._device, copy=True) for t in padded)

        def compute() -> None:
            with self._precision():
                loss = self._model.calculate_padded_loss(batch)
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            self._is_used = [gradient is not None for gradient in gradients]
            pairs = [(k, g) for k, g in zip(self._gradients, gradients, strict=True) if g is not None]
            kept, found = zip(*pairs, strict=True)
            torch._foreach_copy_(kept, found)
            self._loss.copy_(loss.detach())

        if self._device.type != "cuda":
            return _Recording(batch, compute)
        start = perf_counter()
        with explain_failure(), restore_random_state(self._model):
            launch = self._record_graph(compute)
        seconds = perf_counter() - start
        logger.info("captured a step of %s rows, %s items, %s targets in %.1f s", *batch.sizes, seconds)
        return _Recording(batch, launch)

    def _record_graph(self, compute: Callable[[], None]) -> Callable[[], None]:
        """What launches the recorded kernels of `compute`; see "CUDA Graphs" in PyTorch's documentation."""
        current = torch.cuda.current_stream(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        side = self._stream
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_STEPS):
                compute()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side):  # by default a stream of the first GPU
            compute()
        self._pool = graph.pool()
        return graph.replay
