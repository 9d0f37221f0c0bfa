"""The network for inference on a CPU: what depends on an item alone is a table, the rest few passes in place.

The results are those of `Encoder`, to rounding. A branch without a prepared form here runs as it is.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
D       model width
V       items including padding
E, N    inner width and state size of the Mamba mixer
H, P    heads, head width, H * P = E
K       branches of a layer
c, Q    chunks of a row, positions of a chunk, c * Q = L
M       oscillation modes per channel in the causal filter
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.nn.batching import group_rows_by_length
from m2rec.nn.branch import Branch, ItemBatch, select_last_positions
from m2rec.nn.encoder import Encoder
from m2rec.nn.filters import CausalFilter
from m2rec.nn.gate import SoftmaxGate
from m2rec.nn.layer import Layer, LayerState
from m2rec.nn.mamba import Mamba2, MixerState, compute_decay_rates, has_hooks
from m2rec.nn.text_projection import TextBranch
from m2rec.ops.contracts import LOG2_E, without_autocast
from m2rec.ops.ssd import MAX_CHUNK, split_into_chunks
from m2rec.ops.ssd_inference import MIN_EXPONENT, ssd_by_head, ssd_last_by_head

# tables by item that a prepared network may hold, in bytes
TABLE_BYTES = 2**30

_OWN_MODULES = ("m2rec.nn.", "torch.nn.modules.")


class TableBudget:
    """Memory that is left for tables by item."""

    def __init__(self, n_items: int, itemsize: int, total: int = TABLE_BYTES) -> None:
        self._row_bytes, self._left = n_items * itemsize, total

    def reserve(self, width: int) -> bool:
        """Take the memory of a table (V, width), if there is enough."""
        size = self._row_bytes * width
        if size > self._left:
            return False
        self._left -= size
        return True


class PreparedBranch(ABC):
    """A branch of a layer without gradients."""

    item_output: Tensor | None = None
    """(V, D) by item, if the output depends on nothing else."""

    @abstractmethod
    def encode(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """x: (B, L, D) -> (B, L, D); L fills its chunks."""

    @abstractmethod
    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `encode` for each row's last position only, (B, D)."""

    @abstractmethod
    def step(self, x: Tensor, state: Any, batch: ItemBatch) -> tuple[Tensor, Any]:
        """As `Branch.step`: x (B, D) -> (B, D) and the new state."""


class PlainBranch(PreparedBranch):
    """A branch without a prepared form.

    Args:
        branch: the branch.
        inputs: not used.
        budget: not used.
    """

    def __init__(self, branch: Branch, inputs: Tensor | None, budget: TableBudget) -> None:
        self.branch = branch

    def encode(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """x: (B, L, D) -> (B, L, D)."""
        x, batch, missing = self._remove_filling(x, batch)
        return F.pad(self.branch(x, batch), (0, 0, 0, missing))

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `encode` for each row's last position only, (B, D)."""
        x, batch, _ = self._remove_filling(x, batch)
        return self.branch.last(x, batch)

    def step(self, x: Tensor, state: Any, batch: ItemBatch) -> tuple[Tensor, Any]:
        """x (B, D) -> (B, D) and the new state."""
        return self.branch.step(x, state, batch)

    def _remove_filling(self, x: Tensor, batch: ItemBatch) -> tuple[Tensor, ItemBatch, int]:
        """Without the positions after the longest row's end, of which a branch may know no weights."""
        assert batch.lengths is not None
        longest = int(batch.lengths.max())
        return x[:, :longest], batch._replace(items=batch.items[:, :longest]), x.shape[1] - longest


class PreparedText(PreparedBranch):
    """The semantic branch, a table.

    Args:
        branch: with every item's text projected.
        inputs: not used.
        budget: not used; the table exists already.
    """

    def __init__(self, branch: TextBranch, inputs: Tensor | None, budget: TableBudget) -> None:
        assert branch.projected is not None
        self.item_output = branch.projected

    def encode(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """batch.items (...) -> (..., D), whatever x is."""
        assert self.item_output is not None
        return F.embedding(batch.items, self.item_output)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `encode` for each row's last position only, (B, D)."""
        return self.encode(x, batch.select_last_positions())

    def step(self, x: Tensor, state: Any, batch: ItemBatch) -> tuple[Tensor, Any]:
        """x (B, D) -> (B, D); the state is empty."""
        return self.encode(x, batch), state


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


class PreparedFilter(PreparedBranch):
    """The causal filter, chunk by chunk: inside a chunk a Toeplitz matrix, between chunks the modes' states.

    Args:
        branch: the filter.
        inputs: not used.
        budget: not used.
    """

    def __init__(self, branch: CausalFilter, inputs: Tensor | None, budget: TableBudget) -> None:
        self.branch = branch
        kernel = branch.kernel(MAX_CHUNK)
        self.lagged = _append_zero_row(kernel.T)
        lags = torch.arange(MAX_CHUNK) - torch.arange(MAX_CHUNK)[:, None]
        self.toeplitz = kernel[:, lags.clamp(min=0)] * (lags >= 0)  # (D, Q, Q), from and to
        powers = branch.compute_mode_powers(torch.arange(MAX_CHUNK + 1))  # (D, M, Q + 1)
        self.powers = powers.mT.contiguous()  # (D, Q + 1, M)
        self.poles = powers[..., 1].contiguous()
        self.coefficients = torch.complex(branch.cosine, -branch.sine)
        readout = self.coefficients[..., None] * powers
        readout = torch.view_as_real(readout.conj().resolve_conj())  # (D, M, Q + 1, 2)
        self.readout = readout.transpose(2, 3).flatten(1, 2).contiguous()  # (D, 2M, Q + 1)

    def encode(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """x: (B, L, D) -> (B, L, D); L fills its chunks."""
        n_chunks, size = split_into_chunks(x.shape[1])
        chunks = x.permute(2, 0, 1).contiguous().view(x.shape[2], -1, size)  # (D, B c, Q)
        y = torch.bmm(chunks, self.toeplitz[:, :size, :size])
        if n_chunks > 1:
            entering = self._compute_entering_states(chunks, n_chunks, size)
            y.baddbmm_(entering, self.readout[:, :, 1 : size + 1])
        return y.view(x.shape[2], *x.shape[:2]).permute(1, 2, 0).contiguous()

    def _compute_entering_states(self, chunks: Tensor, n_chunks: int, size: int) -> Tensor:
        """The modes' states before each chunk, (D, B c, 2M), real and imaginary parts side by side."""
        backwards = torch.view_as_real(self.powers[:, :size].flip(1)).flatten(2)  # (D, Q, 2M)
        added = torch.bmm(chunks, backwards).unflatten(2, (-1, 2))
        added = torch.view_as_complex(added).unflatten(1, (-1, n_chunks))  # (D, B, c, M)
        decay = self.powers[:, size, None]
        entering = torch.zeros_like(added)
        for c in range(1, n_chunks):
            torch.addcmul(added[:, :, c - 1], decay, entering[:, :, c - 1], out=entering[:, :, c])
        return torch.view_as_real(entering).flatten(1, 2).flatten(2)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `encode` for each row's last position only, (B, D)."""
        assert batch.lengths is not None
        length, lagged = x.shape[1], self.lagged  # another thread may replace it
        if len(lagged) <= length:
            self.lagged = lagged = _append_zero_row(self.branch.kernel(length).T)
        lags = batch.lengths[:, None] - 1 - torch.arange(length, device=x.device)
        lags = lags.masked_fill(lags < 0, len(lagged) - 1)
        return F.embedding(lags, lagged).mul_(x).sum(1)

    def step(self, x: Tensor, state: Tensor, batch: ItemBatch) -> tuple[Tensor, Tensor]:
        """x (B, D) -> (B, D) and the new state (B, D, M), as `CausalFilter.step`."""
        state = (state * self.poles).add_(x[..., None])
        return (state * self.coefficients).sum(-1).real, state


def _append_zero_row(kernel: Tensor) -> Tensor:
    """(L, D) -> (L + 1, D)."""
    return F.pad(kernel, (0, 0, 0, 1))


PREPARED: dict[type[Branch], Callable[..., PreparedBranch]] = {
    Mamba2: PreparedMamba2,
    CausalFilter: PreparedFilter,
    TextBranch: PreparedText,
}
"""The prepared form by a branch's class; a class that is not here runs as it is."""


class PreparedGate:
    """The softmax gate, with the logits of what depends on the item alone in a table.

    Args:
        gate: the gate.
        branches: of its layer.
        available: (V, K), as in `Encoder`.
        budget: for tables by item.
    """

    def __init__(
        self,
        gate: SoftmaxGate,
        branches: Sequence[PreparedBranch],
        available: Tensor | None,
        budget: TableBudget,
    ) -> None:
        width = gate.logits.out_features // len(branches)
        self.weight = gate.logits.weight * LOG2_E  # (K D, K D), outputs first
        weight = self.weight.T.contiguous()
        self.available = None if available is None or available.all() else available
        self.weights: list[Tensor | None] = list(weight.split(width))
        self.bias = gate.logits.bias * LOG2_E
        self.table: Tensor | None = None
        if available is not None and budget.reserve(len(weight)):
            self.table = self.bias.repeat(len(available), 1)
            for k, branch in enumerate(branches):
                part = self.weights[k]
                if branch.item_output is not None and part is not None:
                    self.table.addmm_(branch.item_output, part)
                    self.weights[k] = None
            if self.available is not None:
                _mask_logits(self.table.unflatten(1, (-1, width)), self.available)

    def merge(self, outputs: Sequence[Tensor], items: Tensor) -> Tensor:
        """The branches' outputs (n, D), at items (n,), merged -> (n, D)."""
        logits = self._compute_logits(outputs, items)
        parts = logits.unbind(1)
        top = torch.maximum(parts[0], parts[1])
        for part in parts[2:]:
            torch.maximum(top, part, out=top)
        logits.sub_(top[:, None])
        if self.available is not None:
            logits.clamp_(min=MIN_EXPONENT)  # minus infinity takes a slow path
        logits.exp2_()
        total = torch.add(parts[0], parts[1])
        merged = parts[0] * outputs[0]
        merged.addcmul_(parts[1], outputs[1])
        for part, output in zip(parts[2:], outputs[2:], strict=True):
            total.add_(part)
            merged.addcmul_(part, output)
        return merged.div_(total)

    def _compute_logits(self, outputs: Sequence[Tensor], items: Tensor) -> Tensor:
        """(n, K, D), base 2."""
        if self.table is not None:
            flat = F.embedding(items, self.table)
        else:
            flat = self.bias.repeat(len(items), 1)
        for output, weight in zip(outputs, self.weights, strict=True):
            if weight is not None:
                flat.addmm_(output, weight)
        logits: Tensor = flat.unflatten(1, (len(outputs), -1))
        if self.table is None and self.available is not None:
            _mask_logits(logits, self.available[items])
        return logits


def _mask_logits(logits: Tensor, available: Tensor) -> None:
    """In place, minus infinity where a branch has no input: logits (n, K, D), available (n, K)."""
    logits.masked_fill_(~available[..., None], -torch.inf)


class PreparedLayer:
    """A layer without gradients, whose activations are changed in place.

    Args:
        layer: the layer.
        inputs: (V, D), its input by item; None if it depends on more than the item.
        available: (V, K), as in `Encoder`.
        budget: for tables by item.
    """

    def __init__(
        self, layer: Layer, inputs: Tensor | None, available: Tensor | None, budget: TableBudget
    ) -> None:
        self.layer = layer
        self.branches: list[PreparedBranch] = []
        for branch in layer.branches.values():
            build = PREPARED.get(type(branch), PlainBranch)
            self.branches.append(build(branch, inputs, budget))
        self.available = available
        self.gate: PreparedGate | nn.Module = layer.gate
        if isinstance(layer.gate, SoftmaxGate):
            self.gate = PreparedGate(layer.gate, self.branches, available, budget)

    def encode(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """x: (B, L, D), changed in place -> (B, L, D); L fills its chunks."""
        outputs = [branch.encode(x, batch) for branch in self.branches]
        return self._merge_and_feed_forward(x, outputs, batch)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `encode` for each row's last position only, (B, D)."""
        assert batch.lengths is not None
        outputs = [branch.last(x, batch) for branch in self.branches]
        ends = select_last_positions(x, batch.lengths)
        return self._merge_and_feed_forward(ends, outputs, batch.select_last_positions())

    def step(self, x: Tensor, state: LayerState, batch: ItemBatch) -> tuple[Tensor, LayerState]:
        """x: (B, D), changed in place -> (B, D) and the new state, as `Layer.step`."""
        outputs, after = [], {}
        for key, branch in zip(self.layer.branch_keys, self.branches, strict=True):
            y, after[key] = branch.step(x, state[key], batch)
            outputs.append(y)
        return self._merge_and_feed_forward(x, outputs, batch), after

    def _merge_and_feed_forward(self, x: Tensor, outputs: list[Tensor], batch: ItemBatch) -> Tensor:
        """The gate and what follows it; x is changed in place."""
        flat = [output.reshape(-1, output.shape[-1]) for output in outputs]
        merged = self._merge(flat, batch.items.flatten()).view_as(x)
        normed: Tensor = self.layer.norm(x.add_(merged))
        return self._feed_forward(normed.flatten(0, -2)).view_as(x)

    def _merge(self, outputs: list[Tensor], items: Tensor) -> Tensor:
        """The branches' outputs (n, D), at items (n,), merged -> (n, D)."""
        if isinstance(self.gate, PreparedGate):
            return self.gate.merge(outputs, items)
        mask = None if self.available is None else self.available[items]
        return cast(Tensor, self.gate(torch.stack(outputs, dim=-2), mask)[0])

    def _feed_forward(self, x: Tensor) -> Tensor:
        """x: (n, D), changed in place -> (n, D)."""
        part = self.layer.feed_forward
        hidden = torch.ops.aten.gelu_(torch.mm(x, part.up.weight.T).add_(part.up.bias))
        x.addmm_(hidden, part.down.weight.T).add_(part.down.bias)
        return cast(Tensor, part.norm(x))


class PreparedEncoder:
    """A trained network without gradients: what `Encoder` computes for histories and live users.

    Args:
        encoder: a trained network. Weights are shared: after a change, make a new one (`is_current`).
        table: (V, D), the item table.
    """

    @torch.no_grad()
    def __init__(self, encoder: Encoder, table: Tensor) -> None:
        self.table = table
        self._versions = _read_versions(encoder)
        self._source = encoder.make_inference_copy(table)
        self.inputs = self._source.norm(table)
        self.layers = self._prepare_layers()

    def _prepare_layers(self) -> list[PreparedLayer]:
        budget = TableBudget(len(self.table), self.table.itemsize)
        inputs = self.inputs if budget.reserve(self.table.shape[1]) else None
        layers = []
        for layer in self._source.layers:
            layers.append(PreparedLayer(cast(Layer, layer), inputs, self._source.available, budget))
            inputs = None  # of the higher layers it depends on the history
        return layers

    def is_current(self, encoder: Encoder) -> bool:
        """Whether no weight of the encoder has changed in place since it was prepared."""
        return _read_versions(encoder) == self._versions

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.table.device

    @property
    def repeat_bias(self) -> Tensor | None:
        """As in `Encoder`."""
        return self._source.repeat_bias

    @torch.no_grad()
    def last(self, items: Tensor, lengths: Tensor) -> Tensor:
        """items: (B, L), lengths: (B,) -> the vector of each last position, (B, D)."""
        vectors = self.table.new_empty(len(items), self.table.shape[1])
        with without_autocast(self.device):
            for rows, longest in group_rows_by_length(lengths, items.shape[1]):
                vectors[rows] = self._encode_last_positions(items[rows, :longest], lengths[rows])
        return vectors

    def _encode_last_positions(self, items: Tensor, lengths: Tensor) -> Tensor:
        """`last` for rows of similar length, padded until they fill their chunks."""
        n_chunks, size = split_into_chunks(items.shape[1])
        items = F.pad(items, (0, n_chunks * size - items.shape[1]))
        batch = ItemBatch(items, lengths, self._source.vectors, self._source.available)
        x = F.embedding(items, self.inputs)
        *lower, top = self.layers
        for layer in lower:
            x = layer.encode(x, batch)
        return top.last(x, batch)

    @torch.no_grad()
    def score_all_items(self, items: Tensor, lengths: Tensor) -> Tensor:
        """items: (B, L), lengths: (B,) -> the score of every item, (B, V); padding's means nothing."""
        return self._source.score_all_items(self.last(items, lengths), items, self.table)

    def advance(
        self, items: Tensor, states: list[LayerState] | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """As `Encoder.advance`."""
        return self._source.advance(items, states)

    @torch.no_grad()
    def step(self, items: Tensor, states: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """As `Encoder.step`: items (B,) -> vectors (B, D) and new states."""
        batch = ItemBatch(items, None, self._source.vectors, self._source.available)
        x = F.embedding(items, self.inputs)
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x, new = layer.step(x, state, batch)
            after.append(new)
        return x, after


def _read_versions(encoder: Encoder) -> list[tuple[int, int]]:
    """By tensor, where its memory is and how often it has been changed in place."""
    return [(t.data_ptr(), t._version) for t in chain(encoder.parameters(), encoder.buffers())]


def can_prepare(encoder: Encoder) -> bool:
    """Whether the network is on a CPU, in float32 or float64, without hooks, quantized or foreign layers."""
    has_type = encoder.id_embedding.weight.dtype in (torch.float32, torch.float64)
    return encoder.device.type == "cpu" and has_type and all(map(_is_unmodified, encoder.modules()))


def _is_unmodified(module: nn.Module) -> bool:
    return type(module).__module__.startswith(_OWN_MODULES) and not has_hooks(module)
