"""The whole network for inference.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
D       model width
V       items including padding
"""

from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.nn.batching import group_rows_by_length
from m2rec.nn.branch import ItemBatch
from m2rec.nn.encoder import Encoder
from m2rec.nn.inference.branch import TableBudget
from m2rec.nn.inference.layer import PreparedLayer
from m2rec.nn.layer import Layer, LayerState
from m2rec.nn.mamba import has_hooks
from m2rec.nn.neighbors import Neighbors
from m2rec.ops.contracts import without_autocast
from m2rec.ops.ssd import split_into_chunks

# tables by item that a prepared network may hold, in bytes
TABLE_BYTES = 2**30

_OWN_MODULES = ("m2rec.nn.", "torch.nn.modules.")


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
        budget = TableBudget(len(self.table), self.table.itemsize, TABLE_BYTES)
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
    def neighbors(self) -> Neighbors | None:
        """As in `Encoder`."""
        return self._source.neighbors

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
    """Whether the network is on a CPU, in float32 or float64, without hooks, quantized or foreign layers.

    One whose item table is sharded can't be prepared: that needs the whole table.
    """
    has_type = encoder.dtype in (torch.float32, torch.float64) and not encoder.is_sharded
    return encoder.device.type == "cpu" and has_type and all(map(_is_unmodified, encoder.modules()))


def _is_unmodified(module: nn.Module) -> bool:
    return type(module).__module__.startswith(_OWN_MODULES) and not has_hooks(module)
