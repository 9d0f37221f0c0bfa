"""An exponential moving average of a model's weights, which is validated and kept in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from m2rec.errors import UserError


class WeightEMA:
    """The average of the weights over about the last `steps` steps of the optimizer.

    After step t it moves by max(1 / steps, 9 / (t + 9)) towards the weights, so that it does not
    drag the initial ones along (as in TensorFlow's ExponentialMovingAverage with num_updates).

    Args:
        model: whose trained parameters are averaged; its buffers are not.
        steps: at least 1, which is no average.
    """

    def __init__(self, model: nn.Module, steps: float) -> None:
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self._weights.items()}
        self.steps = steps
        self.taken = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.taken += 1
        share = min(1.0, max(1 / self.steps, 9 / (self.taken + 9)))
        torch._foreach_lerp_(list(self.averages.values()), list(self._weights.values()), share)

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """The model has the averages for its weights."""
        self._swap_weights()
        try:
            yield
        finally:
            self._swap_weights()

    def _swap_weights(self) -> None:
        for name, p in self._weights.items():
            p.data, self.averages[name] = self.averages[name], p.data

    def load(self, averages: dict[str, Tensor], taken: int) -> None:
        """Go on from these averages after so many steps.

        Raises:
            ValueError: they are of another model.
        """
        shapes = {name: t.shape for name, t in averages.items()}
        if shapes != {name: t.shape for name, t in self.averages.items()}:
            raise UserError("the averages are of another model")
        for name, value in averages.items():
            self.averages[name].copy_(value)
        self.taken = taken
