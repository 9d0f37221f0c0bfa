"""Exponential moving average of a model's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from m2rec.errors import UserError


class WeightEMA:
    """The average of the weights over about the last `steps` steps of the optimizer.

    Step t moves it by max(1 / steps, 9 / (t + 9)) towards the weights, so that the initial weights are soon
    forgotten (as in TensorFlow's ExponentialMovingAverage with num_updates).

    Args:
        model: its trained parameters are averaged; its buffers are not.
        steps: at least 1, which averages nothing.
        other: a parameter whose average is here, but is updated elsewhere (`LazyAdam`).
    """

    def __init__(self, model: nn.Module, steps: float, other: nn.Parameter | None = None) -> None:
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self._weights.items()}
        self._updated = [name for name, p in self._weights.items() if p is not other]
        self.steps = steps
        self.n_updates = 0

    @torch.no_grad()
    def update(self) -> float:
        """Move the average towards the weights after a step; returns by which share of the way."""
        self.n_updates += 1
        weight = min(1.0, max(1 / self.steps, 9 / (self.n_updates + 9)))
        averages, weights = (
            [kept[name] for name in self._updated] for kept in (self.averages, self._weights)
        )
        if averages:
            torch._foreach_lerp_(averages, weights, weight)
        return weight

    def find_average(self, parameter: nn.Parameter) -> Tensor:
        """The average of one of the parameters, in place."""
        (name,) = [name for name, p in self._weights.items() if p is parameter]
        return self.averages[name]

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Give the model the averages as its weights for a while."""
        self._swap_weights()
        try:
            yield
        finally:
            self._swap_weights()

    def _swap_weights(self) -> None:
        for name, p in self._weights.items():
            p.data, self.averages[name] = self.averages[name], p.data

    def load(self, averages: Mapping[str, Tensor], n_updates: int) -> None:
        """Restore the averages after this number of updates.

        Raises:
            ValueError: they are of another model.
        """
        for name, average in self.averages.items():
            if name not in averages or averages[name].shape != average.shape:
                raise UserError("the averages are of another model")
            average.copy_(averages[name])
        self.n_updates = n_updates
