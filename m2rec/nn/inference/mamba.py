"""The Mamba-2 mixer for inference.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
D       model width
V       items including padding
E, N    inner width and state size of the Mamba mixer
H, P    heads, head width, H * P = E
n       positions
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.nn.branch import ItemBatch, select_last_positions
from m2rec.nn.inference.branch import PreparedBranch, TableBudget
from m2rec.nn.mamba import Mamba2, MixerState, compute_decay_rates
from m2rec.ops.ssd_inference import ssd_by_head, ssd_last_by_head


class PreparedMamba2(PreparedBranch):
    """The Mamba-2 mixer; in the first layer its input projection is a table.

    The convolution of the first layer is then a sum of one row per tap. The weight of the gated norm is
    part of the output projection, and its division by the root mean square comes after that, on D
    channels instead of E.

    Args:
        mixer: the mixer.
        inputs: (V, D), the layer's input by item; None if it depends on more than the item.
        budget: for tables by item.
    """

    def __init__(self, mixer: Mamba2, inputs: Tensor | None, budget: TableBudget) -> None:
        inner, states, heads = mixer.inner, mixer.d_state, len(mixer.D)
        self.inner, self.states, self.width = inner, states, mixer.head_dim
        self.weight = weight = mixer.in_proj.weight
        self.widths = [inner, inner + 2 * states, heads]
        self.gate_weight, self.mixed_weight, self.step_weight = weight.split(self.widths)
        self.scan_weight = weight[inner:]
        self.taps = mixer.conv1d.weight[:, 0].T.contiguous()  # (taps, E + 2N)
        assert mixer.conv1d.bias is not None
        self.bias = mixer.conv1d.bias
        self.step_bias = mixer.dt_bias
        self.A, self.skip = compute_decay_rates(mixer.A_log).to(weight.dtype), mixer.D
        self.eps = mixer.norm.eps
        output = (mixer.out_proj.weight * mixer.norm.weight).unflatten(1, (heads, self.width))
        self.output_weight = output.permute(1, 2, 0).contiguous()  # (H, P, D)
        self.mixed_table: Tensor | None = None
        table_width = (len(self.taps) + 1) * (inner + 2 * states)
        if inputs is not None and budget.reserve(table_width):
            self._build_tables(inputs)

    def _build_tables(self, inputs: Tensor) -> None:
        """By item: what each tap adds to the convolution, the step sizes, and the activated gate."""
        mixed = F.linear(inputs, self.mixed_weight)
        mixed[0] = 0  # positions before the first
        self.mixed_table = (mixed * self.taps[:, None]).flatten(0, 1)  # (taps * V, E + 2N)
        self.mixed_table[-len(inputs) :] += self.bias
        self.step_table = F.softplus(F.linear(inputs, self.step_weight) + self.step_bias)
        self.gate_table = F.silu(F.linear(inputs, self.gate_weight))

    def encode(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """x: (B, L, D) -> (B, L, D); L fills its chunks."""
        mixed, steps = self._prepare_scan(x, batch.items)
        u, B, C = mixed.split([self.inner, self.states, self.states], dim=-1)
        y = ssd_by_head(u, steps, self.A, B, C, self.skip)
        if self.mixed_table is not None:
            gate = F.embedding(batch.items, self.gate_table)
        else:
            gate = F.silu(F.linear(x, self.gate_weight), inplace=True)
        return self._project_heads(y.flatten(1, 2), self._split_heads(gate)).view_as(x)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `encode` for each row's last position only, (B, D)."""
        lengths = batch.lengths
        assert lengths is not None
        u, B, query, steps = self._prepare_last_scan(x, batch.items, lengths)
        y = ssd_last_by_head(u, steps, self.A, B, query, lengths)
        y += self.skip[:, None] * select_last_positions(u, lengths).unflatten(1, (-1, self.width))
        gate = F.silu(F.linear(select_last_positions(x, lengths), self.gate_weight))
        return self._project_heads(y.transpose(0, 1), self._split_heads(gate))

    def step(self, x: Tensor, state: MixerState, batch: ItemBatch) -> tuple[Tensor, MixerState]:
        """x (B, D) -> (B, D) and the new state, as `Mamba2.step`."""
        window, h = state
        z, mixed, steps = F.linear(x, self.weight).split(self.widths, dim=-1)
        inputs = torch.cat([window, mixed[:, None]], dim=1)
        mixed = F.silu((inputs * self.taps).sum(1).add_(self.bias), inplace=True)
        u, B, C = mixed.split([self.inner, self.states, self.states], dim=-1)
        u = u.view(len(x), -1, self.width)
        steps = F.softplus(steps + self.step_bias)
        h = h * torch.exp(steps * self.A)[..., None, None]
        h.addcmul_((u * steps[..., None])[..., None], B[:, None, None])
        y = torch.bmm(h.flatten(1, 2), C[..., None]).view_as(u)
        y.addcmul_(u, self.skip[:, None])
        return self._project_heads(y.transpose(0, 1), self._split_heads(F.silu(z))), (inputs[:, 1:], h)

    def _prepare_last_scan(self, x: Tensor, items: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """u (B, L, E), B (B, L, N), the last positions' C (B, N), the step sizes (B, L, H)."""
        keys = self.inner + self.states
        if self.mixed_table is not None:
            mixed, steps = self._prepare_scan(x, items)
            query = select_last_positions(mixed, lengths)[:, keys:]
        else:
            mixed = self._convolve(F.linear(x, self.mixed_weight[:keys]), slice(keys))
            steps = F.softplus(F.linear(x, self.step_weight, self.step_bias))
            query = self._convolve_last(x, lengths, slice(keys, None))
        u, B = mixed[..., :keys].split([self.inner, self.states], dim=-1)
        return u, B, query, steps

    def _prepare_scan(self, x: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """The activated convolution (B, L, E + 2N) and the step sizes (B, L, H)."""
        if self.mixed_table is not None:
            rows = _shift_items(items, len(self.taps), len(self.step_table))
            mixed = F.embedding_bag(rows, self.mixed_table, mode="sum").view(*items.shape, -1)
            return F.silu(mixed, inplace=True), F.embedding(items, self.step_table)
        projected = F.linear(x, self.scan_weight)
        mixed, steps = projected.split([len(self.mixed_weight), len(self.step_weight)], dim=-1)
        return self._convolve(mixed, slice(None)), F.softplus(steps + self.step_bias)

    def _convolve(self, x: Tensor, channels: slice) -> Tensor:
        """The short convolution of some channels with SiLU: x (B, L, K) -> (B, L, K)."""
        taps = self.taps[:, channels].contiguous()
        y = torch.addcmul(self.bias[channels], x, taps[-1])
        for lag in range(1, min(len(taps), x.shape[1])):
            y[:, lag:].addcmul_(x[:, :-lag], taps[-1 - lag])
        return F.silu(y, inplace=True)

    def _convolve_last(self, x: Tensor, lengths: Tensor, channels: slice) -> Tensor:
        """Project and convolve some channels for the last positions: x (B, L, D) -> (B, K)."""
        taps = self.taps[:, channels]
        positions = lengths[:, None] - torch.arange(len(taps), 0, -1, device=x.device)  # (B, taps)
        rows = torch.arange(len(x), device=x.device)[:, None]
        window = x[rows, positions.clamp(min=0)] * (positions >= 0)[..., None]
        mixed = F.linear(window, self.mixed_weight[channels])
        return F.silu((mixed * taps).sum(1) + self.bias[channels])

    def _split_heads(self, x: Tensor) -> Tensor:
        """x (..., E) -> (H, n, P), a view."""
        return x.view(-1, self.inner // self.width, self.width).transpose(0, 1)

    def _project_heads(self, y: Tensor, gate: Tensor) -> Tensor:
        """The scan's output y (H, n, P), changed in place, gated by (H, n, P) -> (n, D)."""
        y.mul_(gate)
        squares = torch.linalg.vector_norm(y, dim=-1).square_().sum(0)
        scale = (squares / self.inner + self.eps).rsqrt_()
        projected = torch.mm(y[0], self.output_weight[0])
        for part, weight in zip(y[1:], self.output_weight[1:], strict=True):
            projected.addmm_(part, weight)
        return projected.mul_(scale[:, None])


def _shift_items(items: Tensor, taps: int, n_items: int) -> Tensor:
    """items (B, L) -> (B L, taps), the rows of a table (taps * V, ...) that a convolution adds up."""
    offsets = torch.arange(taps, device=items.device) * n_items
    before = F.pad(items, (taps - 1, 0)).unfold(1, taps, 1)  # (B, L, taps)
    return (before + offsets).flatten(0, 1)
