"""The network without RecBole: item table, stacked layers, scores.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
D       model width (hidden_size)
V, T    items including padding, width of the text vectors
K       branches of a layer
R       rows of a sharded item table in one process
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
from m2rec.nn.gate import SoftmaxGate
from m2rec.nn.layer import Layer, LayerState
from m2rec.nn.mamba import MarkedParameters, ParameterMarks
from m2rec.nn.neighbors import Neighbors, load_neighbors
from m2rec.nn.repeat_bias import BIAS_MARKS, add_to_all_scores, create_repeat_bias
from m2rec.nn.sharded_embedding import ShardedEmbedding
from m2rec.nn.step_items import DistinctItems, StepItems, TableRows, find_distinct_items, list_all_items
from m2rec.nn.text_projection import TextBranch, TextProjection, mask_items_with_text
from m2rec.ops.contracts import without_autocast
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
        is_sharded: whether each process holds a part of the ID embedding; all processes then look up and
            score together (`ShardedEmbedding`).
    """

    marks: ClassVar[ParameterMarks] = {"repeat_bias": BIAS_MARKS}

    vectors: Tensor | None
    has_text: Tensor | None
    available: Tensor | None
    """(V, K), which branches have an input for each item; None if all have one for every item."""
    id_embedding: nn.Embedding | ShardedEmbedding
    neighbors: Neighbors | None
    """What is added to the network's scores; set after training."""

    def __init__(
        self,
        settings: ModelSettings,
        n_items: int,
        max_length: int,
        vectors: Tensor | None = None,
        is_sharded: bool = False,
    ) -> None:
        super().__init__()
        width = settings.hidden_size
        text_dim = 0 if vectors is None else vectors.shape[1]
        self.settings = settings
        self.register_buffer("vectors", None)
        self.register_buffer("has_text", None, persistent=False)
        self.id_embedding = (
            ShardedEmbedding(n_items, width) if is_sharded else nn.Embedding(n_items, width, padding_idx=0)
        )
        in_table = text_dim > 0 and settings.text_in_table
        self.table_text = TextProjection(text_dim, width, _INITIAL_STD) if in_table else None
        self.repeat_bias = create_repeat_bias(settings.repeat_bias)
        self.neighbors = None
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
    def has_learned_gate(self) -> bool:
        """Whether training has chosen the branches' weights; they are equal otherwise."""
        return isinstance(cast(Layer, self.layers[0]).gate, SoftmaxGate)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.own_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.own_embedding.weight.dtype

    @property
    def n_items(self) -> int:
        """V."""
        return self.id_embedding.num_embeddings

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the ID embedding."""
        return isinstance(self.id_embedding, ShardedEmbedding)

    @property
    def own_embedding(self) -> nn.Embedding:
        """The rows of the ID embedding that this process holds; all of them if it is not sharded."""
        embedding = self.id_embedding
        return embedding.rows if isinstance(embedding, ShardedEmbedding) else embedding

    def iterate_branches(self) -> Iterator[Branch]:
        """The branches of all layers."""
        for layer in self.layers:
            yield from cast(Layer, layer).branches.values()

    @classmethod
    def from_state(cls, settings: ModelSettings, max_length: int, state: dict[str, Tensor]) -> "Encoder":
        """The network of these weights, as `state_dict` names them.

        Raises:
            RuntimeError: the weights don't fit the settings.
            KeyError: there is no item embedding among them.
        """
        encoder = cls(settings, len(state["id_embedding.weight"]), max_length, state.get("vectors"))
        encoder.neighbors = load_neighbors(state)
        encoder.load_state_dict(state)
        return encoder

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
        if isinstance(self.id_embedding, ShardedEmbedding):
            self.id_embedding.draw_weight(_INITIAL_STD)
        else:
            nn.init.normal_(self.id_embedding.weight, std=_INITIAL_STD)
        if self.settings.init == "mamba4rec":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=_INITIAL_STD)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        if isinstance(self.id_embedding, nn.Embedding):
            with torch.no_grad():
                self.id_embedding.weight[0] = 0

    def prepare_step(self, items: Tensor, scored: Sequence[Tensor] | None = None) -> StepItems:
        """Compute once what a training step looks up of its items; each item's text is projected once.

        Where `id_embedding.sparse` asks for sparse gradients, the cost does not depend on V.

        Args:
            items: (B, L), the histories.
            scored: ids of any shapes, the items that the loss compares; None for all items.
        """
        n_items, is_sparse = self.n_items, self.id_embedding.sparse
        with without_autocast(self.device):
            if scored is None:
                in_table = list_all_items(n_items, items.device)
            else:
                in_table = find_distinct_items([items, *scored], n_items, is_sparse)
            table = self._compute_table_rows(in_table)
            branches = [cast(Layer, layer).branches.get("text") for layer in self.layers]
            if self.vectors is None or not any(branches):
                return StepItems(table, None, [None] * len(branches))
            in_histories = find_distinct_items([items], n_items, is_sparse)
            vectors = in_histories.select(self.vectors)
            texts = []
            for branch in branches:
                texts.append(branch.project_vectors(vectors) if isinstance(branch, TextBranch) else None)
        return StepItems(table, in_histories, texts)

    def _compute_table_rows(self, items: DistinctItems) -> TableRows:
        rows = self._get_weight() if items.ids is None else self.id_embedding(items.ids)
        if self.table_text is None:
            return TableRows(items, rows)
        assert self.vectors is not None
        text = self.table_text.project_vectors(items.select(self.vectors))
        if self.training and self.settings.id_dropout:
            return TableRows(items, rows, text)
        return TableRows(items, rows + text)

    def _get_weight(self) -> Tensor:
        """(V, D), the ID embedding."""
        assert isinstance(self.id_embedding, nn.Embedding), "no process has the whole table"
        return self.id_embedding.weight

    def embed_items(self, ids: Tensor, step: StepItems | None = None) -> Tensor:
        """ids of any shape (...) -> their rows of the item table (..., D); of `step`, if they are there."""
        text: Tensor | None = None
        if step is not None:
            rows, text = step.table.look_up(ids)
        else:
            rows = self.id_embedding(ids)
            if self.table_text is not None:
                assert self.vectors is not None
                text = self.table_text.project_items(ids, self.vectors)
        return rows if text is None else self._drop_ids(rows, ids) + text

    def item_table(self, step: StepItems | None = None) -> Tensor:
        """The whole item table, (V, D); row 0 is zero. Of `step`, if it has all items."""
        n_items = self.n_items
        every_item = list_all_items(n_items, self.device)
        table = self._compute_table_rows(every_item) if step is None else step.table
        assert table.items.ids is None
        if table.text is None:
            return table.rows
        return self._drop_ids(table.rows, torch.arange(n_items, device=self.device)) + table.text

    def compute_own_table(self) -> Tensor:
        """(R, D), the rows of a sharded item table that belong to this process; no gradient."""
        embedding = self.id_embedding
        assert isinstance(embedding, ShardedEmbedding)
        rows = embedding.rows.weight.detach()
        if self.table_text is None:
            return rows
        assert self.vectors is not None
        with torch.no_grad():
            return rows + self.table_text.project_vectors(self.vectors[embedding.start : embedding.end])

    def take_part_in_lookup(self) -> Tensor:
        """What a process without rows does where others train on theirs; returns a loss of 0."""
        return cast(Tensor, self.id_embedding(torch.zeros(0, dtype=torch.long, device=self.device)).sum())

    @torch.no_grad()
    def take_part_in_scoring(self) -> None:
        """What a process without rows does where others score all items for theirs."""
        self.take_part_in_lookup()
        embedding = self.id_embedding
        assert isinstance(embedding, ShardedEmbedding)
        embedding.score_items(self.own_embedding.weight[:0], self.compute_own_table())

    def _drop_ids(self, rows: Tensor, ids: Tensor) -> Tensor:
        """In training, drop the ID embedding of some items with text, as for cold-start items."""
        share = self.settings.id_dropout
        if not (self.training and share):
            return rows
        assert self.has_text is not None
        dropped = (torch.rand(ids.shape, device=ids.device) < share) & self.has_text[ids]
        return rows.masked_fill(dropped[..., None], 0)

    def _embed_inputs(self, items: Tensor, step: StepItems | None = None) -> Tensor:
        """items (...) -> the first layer's input (..., D)."""
        return self.dropout(self.norm(self.embed_items(items, step)))  # type: ignore[no-any-return]

    def _make_batch(self, items: Tensor, lengths: Tensor | None = None) -> ItemBatch:
        return ItemBatch(items, lengths, self.vectors, self.available)

    def _make_batches(self, items: Tensor, lengths: Tensor, step: StepItems | None) -> list[ItemBatch]:
        """A batch for each layer, with its text where `step` has it."""
        batch = self._make_batch(items, lengths)
        if step is None:
            return [batch] * len(self.layers)
        return [batch._replace(text=text) for text in step.look_up_layer_texts(items)]

    def forward(self, items: Tensor, lengths: Tensor, step: StepItems | None = None) -> Tensor:
        """items: (B, L), lengths: (B,) -> (B, L, D). Padding never reaches a valid position.

        What depends on an item alone is looked up in `step`, or computed anew.
        """
        x, _ = self.encode_with_gate_weights(items, lengths, step)
        return x

    def encode_with_gate_weights(
        self, items: Tensor, lengths: Tensor, step: StepItems | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """As `forward`, with the gate's weights (B, L, K, D) of every layer."""
        x = self._embed_inputs(items, step)
        weights = []
        for layer, batch in zip(self.layers, self._make_batches(items, lengths, step), strict=True):
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

    def last(self, items: Tensor, lengths: Tensor, step: StepItems | None = None) -> Tensor:
        """items: (B, L), lengths: (B,) -> each row's last vector (B, D); `step` as in `forward`."""
        order, parts = [], []
        for rows, longest in group_rows_by_length(lengths, items.shape[1]):
            order.append(rows)
            parts.append(self.encode_last_positions(items[rows, :longest], lengths[rows], step))
        return torch.cat(parts)[torch.cat(order).argsort()]

    def encode_last_positions(self, items: Tensor, lengths: Tensor, step: StepItems | None = None) -> Tensor:
        """`last` for rows of similar length: (B, L), (B,) -> (B, D); the top layer computes one position."""
        x = self._embed_inputs(items, step)
        *lower, top = zip(self.layers, self._make_batches(items, lengths, step), strict=True)
        for layer, batch in lower:
            x, _ = layer(x, batch)
        layer, batch = top
        return cast(Layer, layer).last(x, batch)

    def encode_target_positions(
        self, items: Tensor, lengths: Tensor, targets: Tensor, step: StepItems | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors of all positions that have a target.

        Args:
            items: (B, L).
            lengths: (B,).
            targets: (B, L), 0 where there is none.
            step: as in `forward`.

        Returns:
            x (S, D), rows (S,) and times (S,), in no particular order.
        """
        parts, row_parts, time_parts = [], [], []
        for rows, longest in group_rows_by_length(lengths, items.shape[1]):
            row, time = (targets[rows, :longest] > 0).nonzero(as_tuple=True)
            x = self(items[rows, :longest], lengths[rows], step)
            parts.append(x[row, time])
            row_parts.append(rows[row])
            time_parts.append(time)
        return torch.cat(parts), torch.cat(row_parts), torch.cat(time_parts)

    def score_all_items(self, x: Tensor, items: Tensor, table: Tensor | None = None) -> Tensor:
        """The score of every item after a history.

        Args:
            x: (B, D), the vector of each history's end.
            items: (B, L), the history, which decides where `repeat_bias` and `neighbors` are added.
            table: (V, D), the item table, if it is at hand; (R, D), this process's part, if it is sharded.

        Returns:
            (B, V); padding's score means nothing.
        """
        if isinstance(self.id_embedding, ShardedEmbedding):
            scores = self.id_embedding.score_items(x, self.compute_own_table() if table is None else table)
        else:
            scores = F.linear(x, self.item_table() if table is None else table)
        if self.neighbors is not None:
            scores = self.neighbors.add_to_all_scores(scores, items, (items > 0).sum(1))
        return add_to_all_scores(scores, items, self.repeat_bias)


def _refresh_text_buffers(encoder: nn.Module, _: object) -> None:
    """Refresh the text buffers after loading: the weights may hold vectors of other items."""
    assert isinstance(encoder, Encoder)
    encoder.set_text_vectors(encoder.vectors)
