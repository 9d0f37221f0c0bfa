"""One event of one live user: NumPy for what is small, because a call of PyTorch costs more than such work.

Products of a matrix and a vector stay in PyTorch, whose threads can be limited.

letter  meaning
D       model width
E, N    inner width and state size of the Mamba mixer
H, P    heads, head width, H * P = E
K       branches of a layer
M       oscillation modes per channel in the causal filter
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m2rec.nn.encoder import Encoder
from m2rec.nn.inference.branch import PreparedBranch
from m2rec.nn.inference.encoder import PreparedEncoder, can_prepare
from m2rec.nn.inference.filters import PreparedFilter
from m2rec.nn.inference.gate import PreparedGate, PreparedMean
from m2rec.nn.inference.layer import PreparedLayer
from m2rec.nn.inference.mamba import PreparedMamba2
from m2rec.nn.inference.text_projection import PreparedText
from m2rec.nn.layer import LayerState
from m2rec.nn.mamba import MixerState

Array = NDArray[Any]


class LiveBranch(Protocol):
    """A branch for one event of one user; states are those of `Branch.step`, of a batch of one."""

    def step(self, x: Array, state: Any, item: int) -> tuple[Array, Any]:
        """x (D,) -> (D,) and the new state."""


class LiveText:
    """The semantic branch: a row of its table."""

    def __init__(self, branch: PreparedText) -> None:
        assert branch.item_output is not None
        self.table = branch.item_output.numpy()

    def step(self, x: Array, state: Any, item: int) -> tuple[Array, Any]:
        """x (D,) -> (D,); the state is empty."""
        return self.table[item], state


class LiveMamba2:
    """The Mamba-2 mixer."""

    def __init__(self, branch: PreparedMamba2) -> None:
        self.weight = branch.weight
        self.inner, self.states = branch.inner, branch.states
        self.shape = (-1, branch.width)
        self.taps, self.bias = _to_array(branch.taps), _to_array(branch.bias)
        self.step_bias, self.A = _to_array(branch.step_bias), _to_array(branch.A)
        self.skip = _to_array(branch.skip)[:, None]
        self.eps = branch.eps
        self.output_weight = branch.output_weight.flatten(0, 1).T.contiguous()  # (D, E)

    def step(self, x: Array, state: MixerState, item: int) -> tuple[Array, MixerState]:
        """x (D,) -> (D,) and the new state, as `Mamba2.step`."""
        projected = torch.mv(self.weight, torch.from_numpy(x)).numpy()
        z, mixed = projected[: self.inner], projected[self.inner : -len(self.A)]
        inputs = np.concatenate([state[0][0].numpy(), mixed[None]])  # (taps, E + 2N)
        mixed = _apply_silu((inputs * self.taps).sum(0) + self.bias)
        u = mixed[: self.inner].reshape(self.shape)
        B, C = mixed[self.inner : -self.states], mixed[-self.states :]
        steps = np.logaddexp(projected[-len(self.A) :] + self.step_bias, 0)  # softplus
        h = state[1][0].numpy() * np.exp(steps * self.A)[:, None, None]  # (H, P, N)
        h += (u * steps[:, None])[..., None] * B
        y = (h @ C + u * self.skip).ravel() * _apply_silu(z)
        y /= np.sqrt(y @ y / len(y) + self.eps)
        output = torch.mv(self.output_weight, torch.from_numpy(y)).numpy()
        return output, (torch.from_numpy(inputs[None, 1:]), torch.from_numpy(h[None]))


class LiveFilter:
    """The causal filter."""

    def __init__(self, branch: PreparedFilter) -> None:
        self.poles, self.coefficients = _to_array(branch.poles), _to_array(branch.coefficients)

    def step(self, x: Array, state: Tensor, item: int) -> tuple[Array, Tensor]:
        """x (D,) -> (D,) and the new state (1, D, M), as `CausalFilter.step`."""
        after = state[0].numpy() * self.poles
        after += x[:, None]
        y = (after * self.coefficients).sum(1).real
        return y, torch.from_numpy(after[None])


LIVE: dict[type[PreparedBranch], Callable[..., LiveBranch]] = {
    PreparedMamba2: LiveMamba2,
    PreparedFilter: LiveFilter,
    PreparedText: LiveText,
}
"""The form for live users by a prepared branch's class; with another class the batch's form runs."""


class LiveGate:
    """The softmax gate."""

    def __init__(self, gate: PreparedGate) -> None:
        self.weight, self.bias = gate.weight, gate.bias
        self.available = None if gate.available is None else gate.available.numpy()

    def merge(self, outputs: Sequence[Array], item: int) -> Array:
        """The branches' outputs (D,) -> (D,)."""
        flat = np.concatenate(outputs)
        logits = torch.addmv(self.bias, self.weight, torch.from_numpy(flat)).numpy()
        logits = logits.reshape(len(outputs), -1)
        if self.available is not None:
            logits[~self.available[item]] = -np.inf
        weights = np.exp2(logits - logits.max(0))
        merged: Array = (weights * flat.reshape(logits.shape)).sum(0) / weights.sum(0)
        return merged


class LiveMean:
    """The mean of the branches that are available."""

    def __init__(self, gate: PreparedMean) -> None:
        self.share = gate.share
        self.weights = None if gate.weights is None else gate.weights.numpy()

    def merge(self, outputs: Sequence[Array], item: int) -> Array:
        """The branches' outputs (D,) -> (D,)."""
        flat = np.stack(outputs)
        if self.weights is None:
            return np.asarray(flat.sum(0) * self.share)
        return np.asarray(self.weights[item].astype(flat.dtype) @ flat)


class LiveLayer:
    """A layer whose branches are all in `LIVE`, and whose gate has a form here."""

    def __init__(self, layer: PreparedLayer) -> None:
        gate = layer.gate
        assert isinstance(gate, PreparedGate | PreparedMean)
        self.layer = layer.layer
        self.branches = [LIVE[type(branch)](branch) for branch in layer.branches]
        self.gate = LiveGate(gate) if isinstance(gate, PreparedGate) else LiveMean(gate)

    def step(self, x: Array, state: LayerState, item: int) -> tuple[Array, LayerState]:
        """x (D,) -> (D,) and the new state, as `Layer.step`."""
        outputs, after = [], {}
        for key, branch in zip(self.layer.branch_keys, self.branches, strict=True):
            y, after[key] = branch.step(x, state[key], item)
            outputs.append(y)
        merged = self.gate.merge(outputs, item)
        return self._feed_forward(torch.from_numpy(x + merged)).numpy(), after

    def _feed_forward(self, x: Tensor) -> Tensor:
        """The two norms and what is between them: (D,) -> (D,)."""
        part = self.layer.feed_forward
        x = self.layer.norm(x)
        hidden = torch.ops.aten.gelu_(torch.addmv(part.up.bias, part.up.weight, x))
        fed: Tensor = part.norm(x + torch.addmv(part.down.bias, part.down.weight, hidden))
        return fed


class LiveEncoder(PreparedEncoder):
    """A prepared network that is faster for one event of one user.

    Args:
        encoder, table: as in `PreparedEncoder`.
    """

    def __init__(self, encoder: Encoder, table: Tensor) -> None:
        super().__init__(encoder, table)
        self._live_layers: list[LiveLayer] | None = None
        if all(map(can_run_live, self.layers)):
            self._live_layers = list(map(LiveLayer, self.layers))

    @torch.no_grad()
    def step(self, items: Tensor, states: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """As `Encoder.step`: items (B,) -> vectors (B, D) and new states."""
        if self._live_layers is None or len(items) > 1:
            return super().step(items, states)
        item = int(items)
        x: Array = self.inputs[item].numpy()
        after = []
        for layer, state in zip(self._live_layers, states, strict=True):
            x, new = layer.step(x, state, item)
            after.append(new)
        return torch.from_numpy(x[None]), after


def can_run_live(layer: PreparedLayer) -> bool:
    """Whether `LiveLayer` has a form for all parts of a layer."""
    has_branches = all(type(branch) in LIVE for branch in layer.branches)
    return has_branches and isinstance(layer.gate, PreparedGate | PreparedMean)


def prepare_encoder(encoder: Encoder, table: Tensor) -> Encoder | PreparedEncoder:
    """The network for inference: prepared if it can be, else with each item's text projected once."""
    if can_prepare(encoder):
        return LiveEncoder(encoder, table)
    return encoder.make_inference_copy(table)


def _to_array(tensor: Tensor) -> Array:
    """The tensor's values; the memory is shared."""
    array: Array = tensor.detach().numpy()
    return array


def _apply_silu(x: Array) -> Array:
    activated: Array = x * (0.5 + 0.5 * np.tanh(0.5 * x))  # exp(-x) could overflow
    return activated
