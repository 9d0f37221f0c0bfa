"""Adam and AdamW for a table of which a step uses few rows: the cost of a step does not depend on V.

Adam moves every row in every step, also one without a gradient: by what its first moment still holds, and by
weight decay. Here a row is left alone until a step reads it. What it has missed is then made up at once, so
that the step reads what it would have read. With gradient 0, step t is for a row that was last used in step s

    w       <- decay w - lr k_t q u        k_t = sqrt(1 - b2^t) / (1 - b1^t),  q = (b1 / sqrt(b2))^(t - s)
    average <- (1 - a_t) average + a_t w   u = m / (sqrt(v) + eps sqrt(1 - b2^s)),  moments of step s

which is linear in w, average and u. So the coefficients of any number of missed steps depend on s and the
present step alone, and are the same for all rows and all channels. All of this is exact but for eps: in the
missed steps it is held at the share of the denominator that it has in step s.

letter  meaning
V, D    items including padding, model width
n       rows of a step
C       steps since all rows were caught up
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK_ROWS = 8_192  # whose moments and weights stay in a CPU's cache
_ALL_STATE = ("first", "second", "last_steps", "missed", "n_steps")


class _MissedSteps:
    """What the steps after step s have done to a row without a gradient, for each s since `start`.

    Args:
        start: the first s, the present step.
        betas: b1, b2 of Adam.
        learning_rate: lr.
        decay: what a step leaves of a weight.
    """

    def __init__(
        self, start: int, betas: tuple[float, float], learning_rate: float, decay: float, device: torch.device
    ) -> None:
        self.start, self._betas, self._learning_rate, self._decay = start, betas, learning_rate, decay
        # of w and u in w, of average, w and u in average, and q; float64, as errors add up
        self._places = torch.zeros(6, 64, dtype=torch.float64, device=device)
        self._count = 0
        self._append_present()

    @property
    def coefficients(self) -> Tensor:
        """(6, C + 1) by s: of w and u in w; of average, w and u in average; q."""
        return self._places[:, : self._count]

    def restore(self, coefficients: Tensor) -> None:
        """Replace them by saved ones, of which the last is of the present step."""
        self.start -= coefficients.shape[1] - 1
        self._places, self._count = coefficients.to(self._places.device, copy=True), coefficients.shape[1]

    def add_step(self, number: int, average_weight: float) -> None:
        """Add step `number`, which moves the average by this weight towards w."""
        b1, b2 = self._betas
        w_of_w, w_of_u, average_of_average, average_of_w, average_of_u, q = self.coefficients
        q *= b1 / b2**0.5
        w_of_w *= self._decay
        scale = self._learning_rate * (1 - b2**number) ** 0.5 / (1 - b1**number)
        w_of_u.mul_(self._decay).sub_(q, alpha=scale)
        average_of_average *= 1 - average_weight
        average_of_w.lerp_(w_of_w, average_weight)
        average_of_u.lerp_(w_of_u, average_weight)
        self._append_present()

    def _append_present(self) -> None:
        """The coefficients of a row that has missed nothing."""
        if self._count == self._places.shape[1]:
            self._places = torch.cat([self._places, torch.zeros_like(self._places)], dim=1)
        present = self._places.new_tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
        self._places[:, self._count] = present
        self._count += 1


class LazyAdam:
    """Adam or AdamW for the weight of an embedding with sparse gradients.

    Args:
        embedding: (V, D); its gradients become sparse.
        settings: lr, betas, eps and the decoupled weight_decay, as a group of `torch.optim.AdamW` has them.
        average: (V, D), a moving average of the weight that is updated as well; None without one.
    """

    def __init__(
        self, embedding: nn.Embedding, settings: Mapping[str, Any], average: Tensor | None = None
    ) -> None:
        embedding.sparse = True
        self._embedding, self._average = embedding, average
        self._betas, self._eps, self._learning_rate = settings["betas"], settings["eps"], settings["lr"]
        self._decay = 1 - self._learning_rate * settings["weight_decay"]
        weight = embedding.weight
        self._first, self._second = torch.zeros_like(weight), torch.zeros_like(weight)
        self._last_steps = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        self._n_steps = 0
        self._missed = self._begin_counting()

    def _begin_counting(self) -> _MissedSteps:
        device = self._embedding.weight.device
        return _MissedSteps(self._n_steps, self._betas, self._learning_rate, self._decay, device)

    @contextmanager
    def catch_up_when_read(self) -> Iterator[None]:
        """Within the block, rows are caught up before the embedding looks them up."""

        def catch_up(_: nn.Module, given: tuple[Tensor]) -> None:
            self._catch_up(given[0].flatten())

        handle = self._embedding.register_forward_pre_hook(catch_up)
        try:
            yield
        finally:
            handle.remove()

    def catch_up_all(self) -> None:
        """Bring all rows up to the present, at a cost of V rows."""
        n_items = len(self._last_steps)
        for start in range(0, n_items, _BLOCK_ROWS):
            end = min(start + _BLOCK_ROWS, n_items)
            self._catch_up(torch.arange(start, end, device=self._last_steps.device))
        self._missed = self._begin_counting()

    @torch.no_grad()
    def _catch_up(self, ids: Tensor) -> None:
        """Do to the rows of ids (n,) what the steps since their last one would have done."""
        for block in ids.split(_BLOCK_ROWS):
            last = self._last_steps[block]
            is_stale = last < self._n_steps
            if is_stale.any():
                self._catch_up_stale(block[is_stale], last[is_stale].long())

    def _catch_up_stale(self, ids: Tensor, last: Tensor) -> None:
        """`_catch_up` for the rows of ids (n,), whose last step is `last` (n,)."""
        b1, b2 = self._betas
        weight = self._embedding.weight
        found = self._missed.coefficients[:, last - self._missed.start]
        w_of_w, w_of_u, average_of_average, average_of_w, average_of_u, _ = found.to(weight.dtype)[..., None]
        first, second, w = (table.index_select(0, ids) for table in (self._first, self._second, weight))
        used = last.clamp(min=1)[:, None].double()  # before the first step the moments are 0
        eps = (self._eps * (1 - b2**used).sqrt()).to(w.dtype)
        u = first / second.sqrt().add_(eps)
        if self._average is not None:
            average = self._average.index_select(0, ids).mul_(average_of_average)
            self._average.index_copy_(0, ids, average.addcmul_(w, average_of_w).addcmul_(u, average_of_u))
        weight.index_copy_(0, ids, w.mul_(w_of_w).addcmul_(u, w_of_u))
        missed = (self._n_steps - last)[:, None].double()
        self._first.index_copy_(0, ids, first.mul_(b1**missed))
        self._second.index_copy_(0, ids, second.mul_(b2**missed))
        self._last_steps[ids] = self._n_steps

    @torch.no_grad()
    def step(self, average_weight: float = 0.0) -> None:
        """Take a step with the embedding's sparse gradient; the average moves by this weight.

        A row without a gradient, and all rows where there is none at all, miss the step.
        """
        gradient = self._embedding.weight.grad
        number = self._n_steps + 1
        if gradient is not None:
            gradient = gradient.coalesce()
            (ids,), rows = gradient.indices(), gradient.values()
            self._catch_up(ids)  # of gradients from other processes
            for block, part in zip(ids.split(_BLOCK_ROWS), rows.split(_BLOCK_ROWS), strict=True):
                self._update_rows(block, part, number, average_weight)
        self._n_steps = number
        self._missed.add_step(number, average_weight)

    def _update_rows(self, ids: Tensor, gradient: Tensor, number: int, average_weight: float) -> None:
        """Adam's step on the rows of ids (n,), which are up to date; gradient (n, D)."""
        b1, b2 = self._betas
        weight = self._embedding.weight
        first = self._first.index_select(0, ids).lerp_(gradient, 1 - b1)
        second = self._second.index_select(0, ids).mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        denominator = second.sqrt().div_((1 - b2**number) ** 0.5).add_(self._eps)
        w = weight.index_select(0, ids).mul_(self._decay)
        w.addcdiv_(first, denominator, value=-self._learning_rate / (1 - b1**number))
        self._first.index_copy_(0, ids, first)
        self._second.index_copy_(0, ids, second)
        weight.index_copy_(0, ids, w)
        if self._average is not None:
            self._average.index_copy_(0, ids, self._average.index_select(0, ids).lerp_(w, average_weight))
        self._last_steps[ids] = number

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state by name, without the weight and its average."""
        return {
            "first": self._first,
            "second": self._second,
            "last_steps": self._last_steps,
            "missed": self._missed.coefficients,
            "n_steps": torch.tensor(self._n_steps),
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` returned.

        Raises:
            KeyError: a tensor is missing.
            RuntimeError: they are of a table of another size.
        """
        first, second, last_steps, missed, n_steps = (tensors[name] for name in _ALL_STATE)
        self._first.copy_(first)
        self._second.copy_(second)
        self._last_steps.copy_(last_steps)
        self._n_steps = int(n_steps)
        self._missed = self._begin_counting()
        self._missed.restore(missed)


def expose_gradient_rows(parameter: nn.Parameter) -> Tensor:
    """A tensor whose `grad` is the memory of the parameter's sparse gradient, for `clip_grad_norm_`."""
    gradient = parameter.grad
    assert gradient is not None
    parameter.grad = gradient = gradient.coalesce()
    rows = torch.empty_like(gradient.values())
    rows.grad = gradient.values()
    return rows
