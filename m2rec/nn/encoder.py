"""The network without RecBole: item table, stacked layers, scores.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
D       model width (hidden_size)
V, T    items including padding, width of the text vectors
K       branches of a layer
S       positions that have a target
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.nn.batching import group_rows_by_length
from m2rec.nn.branch import Branch, ItemBatch
from m2rec.nn.dropout import Dropout
from m2rec.nn.layer import Layer, LayerState
from m2rec.nn.mamba import MarkedParameters, ParameterMarks
from m2rec.nn.repeat_bias import BIAS_MARKS, add_to_all_scores, create_repeat_bias
from m2rec.nn.text_projection import TextProjection, mask_items_with_text
from m2rec.settings import ModelSettings

_INITIAL_STD = 0.02

ContinueLayer = Callable[[Layer, Tensor, Any, ItemBatch], tuple[Tensor, LayerState]]


class Encoder(MarkedParameters):
    """Turns item histories into vectors that are compared with the item table.

    Args:
        settings: the model's settings.
        n_items: V, padding included.
        max_length: longest history, in steps.
        vectors: (V, T) frozen text vectors in internal item ids, zero for an item without
            text; None without text. They are stored with the weights.
    """

    marks: ClassVar[ParameterMarks] = {"repeat_bias": BIAS_MARKS}

    vectors: Tensor | None
    has_text: Tensor | None
    available: Tensor | None
    """(V, K), which branches have an input for each item; None if all have one for every item."""

    def __init__(
        self, settings: ModelSettings, n_items: int, max_length: int, vectors: Tensor | None = None
    ) -> None:
        super().__init__()
        width = settings.hidden_size
        text_dim = 0 if vectors is None else vectors.shape[1]
        self.settings = settings
        self.register_buffer("vectors", None)
        self.register_buffer("has_text", None, persistent=False)
        self.id_embedding = nn.Embedding(n_items, width, padding_idx=0)
        in_table = text_dim > 0 and settings.text_in_table
        self.table_text = TextProjection(text_dim, width, _INITIAL_STD) if in_table else None
        self.repeat_bias = create_repeat_bias(settings.repeat_bias)
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(settings.dropout_prob)
        self.layers = nn.ModuleList(Layer(settings, max_length, text_dim) for _ in range(settings.n_layers))
        self.register_buffer("available", None, persistent=False)
        self.set_text_vectors(vectors)
        self.register_load_state_dict_post_hook(_refresh_text_buffers)  # type: ignore[no-untyped-call]
        self.mark_parameters()
        self._initialize_weights()

    @property
    def branches(self) -> list[str]:
        """Names of a layer's branches, in the order of the gate's weights."""
        first = cast(Layer, self.layers[0])
        return [branch.name for branch in first.branches.values()]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.id_embedding.weight.device

    def iterate_branches(self) -> Iterator[Branch]:
        """The branches of all layers."""
        for layer in self.layers:
            yield from cast(Layer, layer).branches.values()

    def require_recurrence(self) -> None:
        """Check that live users can be updated event by event.

        Raises:
            ValueError: a branch needs the whole history at once.
        """
        for branch in self.iterate_branches():
            branch.require_recurrence()

    def set_text_vectors(self, vectors: Tensor | None) -> None:
        """Replace the text vectors by (V, T)."""
        self.vectors = vectors
        self.has_text = None if vectors is None else mask_items_with_text(vectors)
        self.available = self._build_branch_mask(vectors)

    def _build_branch_mask(self, vectors: Tensor | None) -> Tensor | None:
        """(V, K), which branches have an input for each item; None if all have one for every item."""
        first = cast(Layer, self.layers[0])
        masks = [branch.mask_items(vectors) for branch in first.branches.values()]
        partial = [mask for mask in masks if mask is not None]
        if not partial:
            return None
        every_item = torch.ones_like(partial[0])
        return torch.stack([every_item if mask is None else mask for mask in masks], dim=-1)

    @torch.no_grad()
    def make_inference_copy(self, table: Tensor) -> "Encoder":
        """A copy for inference with every item's text projected once; other weights are shared.

        Where histories are many, most of what a position's text costs is saved.

        Args:
            table: (V, D), the item table.
        """
        # deepcopy takes what its memo already holds, so tensors are shared, not copied
        shared = {id(tensor): tensor for tensor in chain(self.parameters(), self.buffers())}
        inference_encoder = copy.deepcopy(self, shared)
        inference_encoder.id_embedding = nn.Embedding.from_pretrained(table)
        inference_encoder.table_text = None
        for branch in inference_encoder.iterate_branches():
            branch.prepare_for_inference(self.vectors)
        return inference_encoder

    def _initialize_weights(self) -> None:
        """Small embeddings; Mamba's own values stay, unless `init: mamba4rec` asks otherwise.

        Mamba4Rec draws every linear map anew, Mamba's among them, which moves the initial
        step size from [0.001, 0.1] to about 0.69.
        """
        nn.init.normal_(self.id_embedding.weight, std=_INITIAL_STD)
        if self.settings.init == "mamba4rec":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=_INITIAL_STD)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.id_embedding.weight[0] = 0

    def embed_items(self, ids: Tensor) -> Tensor:
        """ids of any shape (...) -> their rows of the item table (..., D)."""
        rows: Tensor = self.id_embedding(ids)
        if self.table_text is not None:
            assert self.vectors is not None
            rows = self._drop_ids(rows, ids) + self.table_text.project_items(ids, self.vectors)
        return rows

    def item_table(self) -> Tensor:
        """The whole item table, (V, D); row 0 is zero."""
        table: Tensor = self.id_embedding.weight
        if self.table_text is not None:
            assert self.vectors is not None
            table = self._drop_ids(table, torch.arange(len(table), device=table.device))
            table = table + self.table_text.project_all_items(self.vectors)
        return table

    def _drop_ids(self, rows: Tensor, ids: Tensor) -> Tensor:
        """In training, drop the ID embedding of some items with text, as for cold-start items."""
        share = self.settings.id_dropout
        if not (self.training and share):
            return rows
        assert self.has_text is not None
        dropped = (torch.rand(ids.shape, device=ids.device) < share) & self.has_text[ids]
        return rows.masked_fill(dropped[..., None], 0)

    def _embed_inputs(self, items: Tensor) -> Tensor:
        """items (...) -> the first layer's input (..., D)."""
        return self.dropout(self.norm(self.embed_items(items)))  # type: ignore[no-any-return]

    def _make_batch(self, items: Tensor, lengths: Tensor | None = None) -> ItemBatch:
        return ItemBatch(items, lengths, self.vectors, self.available)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """items: (B, L), lengths: (B,) -> (B, L, D). Padding never reaches a valid position."""
        x, _ = self.encode_with_gate_weights(items, lengths)
        return x

    def encode_with_gate_weights(self, items: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As `forward`, with the gate's weights (B, L, K, D) of every layer."""
        batch = self._make_batch(items, lengths)
        x = self._embed_inputs(items)
        weights = []
        for layer in self.layers:
            x, w = layer(x, batch)
            weights.append(w)
        return x, weights

    def advance(
        self, items: Tensor, states: list[LayerState] | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """Continue histories, of any length each, by the items (B, L) that follow `states`.

        Without `states` they begin. The cost does not depend on what came before.

        Returns:
            The vectors (B, L, D), equal to those of `forward` over the whole histories, and
            the states after them.
        """
        before: Sequence[LayerState | None] = states or [None] * len(self.layers)
        return self._continue_histories(Layer.advance, items, before)

    def step(self, items: Tensor, states: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """As `advance` for one item per row, and fastest: items (B,) -> vectors (B, D), new states."""
        return self._continue_histories(Layer.step, items, states)

    def _continue_histories(
        self, run: ContinueLayer, items: Tensor, states: Sequence[LayerState | None]
    ) -> tuple[Tensor, list[LayerState]]:
        batch = self._make_batch(items)
        x = self._embed_inputs(items)
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x, new = run(cast(Layer, layer), x, state, batch)
            after.append(new)
        return x, after

    def last(self, items: Tensor, lengths: Tensor) -> Tensor:
        """items: (B, L), lengths: (B,) -> the vector of each last position, (B, D)."""
        order, parts = [], []
        for rows, longest in group_rows_by_length(lengths, items.shape[1]):
            order.append(rows)
            parts.append(self.encode_last_positions(items[rows, :longest], lengths[rows]))
        return torch.cat(parts)[torch.cat(order).argsort()]

    def encode_last_positions(self, items: Tensor, lengths: Tensor) -> Tensor:
        """`last` for rows of similar length: (B, L), (B,) -> (B, D); the top layer computes one position."""
        batch = self._make_batch(items, lengths)
        x = self._embed_inputs(items)
        *lower, top = self.layers
        for layer in lower:
            x, _ = layer(x, batch)
        return cast(Layer, top).last(x, batch)

    def encode_target_positions(
        self, items: Tensor, lengths: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors of all positions that have a target.

        Args:
            items: (B, L).
            lengths: (B,).
            targets: (B, L), 0 where there is none.

        Returns:
            x (S, D), rows (S,) and times (S,), in no particular order.
        """
        parts, row_parts, time_parts = [], [], []
        for rows, longest in group_rows_by_length(lengths, items.shape[1]):
            row, time = (targets[rows, :longest] > 0).nonzero(as_tuple=True)
            x = self(items[rows, :longest], lengths[rows])
            parts.append(x[row, time])
            row_parts.append(rows[row])
            time_parts.append(time)
        return torch.cat(parts), torch.cat(row_parts), torch.cat(time_parts)

    def score_all_items(self, x: Tensor, items: Tensor, table: Tensor | None = None) -> Tensor:
        """The score of every item after a history.

        Args:
            x: (B, D), the vector of each history's end.
            items: (B, L), the history, which decides where `repeat_bias` is added.
            table: (V, D), the item table, if it is at hand.

        Returns:
            (B, V); padding's score means nothing.
        """
        scores = F.linear(x, self.item_table() if table is None else table)
        return add_to_all_scores(scores, items, self.repeat_bias)


def _refresh_text_buffers(encoder: nn.Module, _: object) -> None:
    """Refresh the text buffers after loading: the weights may hold vectors of other items."""
    assert isinstance(encoder, Encoder)
    encoder.set_text_vectors(encoder.vectors)
