"""The network without RecBole: item table, stacked layers, scores.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
D       model width (hidden_size)
V, T    items including padding, width of the text vectors
K       branches of a layer
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.nn.layer import Layer, LayerState
from m2rec.nn.mamba import MarkedParameters, ParameterMarks
from m2rec.nn.repeat_bias import mark_first_occurrences
from m2rec.nn.text_projection import ProjectedText, TextProjection, has_text
from m2rec.settings import ModelSettings

_INITIAL_STD = 0.02

# adaptive optimisers move a weight by about learning_rate per step; this one must move by several in an epoch
_BIAS_LR_MULTIPLIER = 100.0

# lengths at which a batch is cut into groups on a CPU; finer steps cost more in calls than they save
_LENGTH_BOUNDARIES = (8, 16, 32, 64, 128, 256, 512, 1024)


class Encoder(MarkedParameters):
    """Turns item histories into vectors that are compared with the item table.

    Args:
        settings: the model's settings.
        n_items: V, padding included.
        max_length: longest history, in steps.
        vectors: (V, T) frozen text vectors in internal item ids, zero for an item without
            text; None without text. They are stored with the weights.
    """

    marks: ClassVar[ParameterMarks] = {
        "repeat_bias": {"_no_weight_decay": True, "_pace": _BIAS_LR_MULTIPLIER}
    }

    vectors: Tensor | None
    has_text: Tensor | None
    available: Tensor | None

    def __init__(
        self, settings: ModelSettings, n_items: int, max_length: int, vectors: Tensor | None = None
    ) -> None:
        super().__init__()
        size = settings.hidden_size
        text_dim = 0 if vectors is None else vectors.shape[1]
        self.settings = settings
        self.register_buffer("vectors", vectors)
        self.register_buffer("has_text", None if vectors is None else has_text(vectors), persistent=False)

        self.id_embedding = nn.Embedding(n_items, size, padding_idx=0)
        in_table = text_dim > 0 and settings.text_in_table
        self.table_text = TextProjection(text_dim, size, _INITIAL_STD) if in_table else None
        self.repeat_bias = nn.Parameter(torch.zeros(())) if settings.repeat_bias else None
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(settings.dropout_prob)
        in_sequence = text_dim if settings.text_in_sequence else 0
        self.layers = nn.ModuleList(
            Layer(settings, max_length, in_sequence) for _ in range(settings.n_layers)
        )
        available = None if not in_sequence else self._build_branch_mask(len(self.branches))
        self.register_buffer("available", available, persistent=False)
        self.register_load_state_dict_post_hook(_refresh_text_buffers)  # type: ignore[no-untyped-call]
        self.mark_parameters()
        self._initialize_weights()

    @property
    def branches(self) -> list[str]:
        """Names of a layer's branches, in the order of the gate's weights."""
        return cast(Layer, self.layers[0]).branches

    def _build_branch_mask(self, n_branches: int) -> Tensor:
        """(V, K), which branches have something to say at an item: the last one, text, only of some."""
        assert self.has_text is not None
        available = torch.ones(len(self.has_text), n_branches, dtype=torch.bool, device=self.has_text.device)
        available[:, -1] = self.has_text
        return available

    def set_text_vectors(self, vectors: Tensor | None) -> None:
        """Take these text vectors (V, T) in place of the old ones."""
        self.vectors = vectors
        self.has_text = None if vectors is None else has_text(vectors)
        if self.available is not None:
            self.available = self._build_branch_mask(self.available.shape[1])

    @torch.no_grad()
    def make_inference_copy(self, table: Tensor) -> "Encoder":
        """The same network for use only, which looks up each item's projected text.

        Where histories are many, most of what a position's text costs is saved. The rest of the
        weights is shared.

        Args:
            table: (V, D), the item table.
        """
        shared = {id(tensor): tensor for tensor in chain(self.parameters(), self.buffers())}
        twin = copy.deepcopy(self, shared)
        twin.id_embedding, twin.table_text = nn.Embedding.from_pretrained(table), None
        for layer in cast(Iterable[Layer], twin.layers):
            if isinstance(layer.text, TextProjection):
                assert self.vectors is not None
                layer.text = ProjectedText(layer.text.table(self.vectors))
        return twin

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

    def items(self, ids: Tensor) -> Tensor:
        """ids of any shape (...) -> their rows of the item table (..., D)."""
        rows: Tensor = self.id_embedding(ids)
        if self.table_text is not None:
            assert self.vectors is not None
            rows = self._drop_ids(rows, ids) + self.table_text(ids, self.vectors)
        return rows

    def item_table(self) -> Tensor:
        """The whole item table, (V, D); row 0 is zero."""
        table: Tensor = self.id_embedding.weight
        if self.table_text is not None:
            assert self.vectors is not None
            table = self._drop_ids(table, torch.arange(len(table), device=table.device))
            table = table + self.table_text.table(self.vectors)
        return table

    def _drop_ids(self, rows: Tensor, ids: Tensor) -> Tensor:
        """In training, let some items with text stand by that alone, as items do that were added later."""
        share = self.settings.id_dropout
        if not (self.training and share):
            return rows
        assert self.has_text is not None
        dropped = (torch.rand(ids.shape, device=ids.device) < share) & self.has_text[ids]
        return rows.masked_fill(dropped[..., None], 0)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """items: (B, L), lengths: (B,) -> (B, L, D). Padding never reaches a valid position."""
        x, _ = self.encode(items, lengths)
        return x

    def encode(self, items: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As `forward`, with the gate's weights (B, L, K, D) of every layer."""
        x = self.dropout(self.norm(self.items(items)))
        weights = []
        for layer in self.layers:
            x, w = layer(x, items, lengths, self.vectors, self.available)
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
        x = self.dropout(self.norm(self.items(items)))
        before: Sequence[LayerState | None] = states or [None] * len(self.layers)
        after = []
        for layer, state in zip(cast(Iterable[Layer], self.layers), before, strict=True):
            x, new = layer.advance(x, items, self.vectors, self.available, state)
            after.append(new)
        return x, after

    def step(self, items: Tensor, states: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """As `advance` for one item per row, and fastest: items (B,) -> vectors (B, D), new states."""
        x = self.dropout(self.norm(self.items(items)))
        after = []
        for layer, state in zip(cast(Iterable[Layer], self.layers), states, strict=True):
            x, new = layer.step(x, items, self.vectors, self.available, state)
            after.append(new)
        return x, after

    def last(self, items: Tensor, lengths: Tensor) -> Tensor:
        """items: (B, L), lengths: (B,) -> the vector of each last position, (B, D)."""
        order, parts = [], []
        for rows, longest in group_rows_by_length(lengths, items.shape[1]):
            order.append(rows)
            parts.append(self._last(items[rows, :longest], lengths[rows]))
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _last(self, items: Tensor, lengths: Tensor) -> Tensor:
        """`last` for rows of similar length; the last layer leaves out what nobody asks for."""
        x = self.dropout(self.norm(self.items(items)))
        *others, last = cast(Iterable[Layer], self.layers)
        for layer in others:
            x, _ = layer(x, items, lengths, self.vectors, self.available)
        return last.last(x, items, lengths, self.vectors, self.available)

    def positions(self, items: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors of all positions that have a target, and where those are.

        Args:
            items: (B, L).
            lengths: (B,).
            targets: (B, L), 0 where there is none.

        Returns:
            x (S, D), rows (S,) and times (S,), in no particular order.
        """
        parts, at, when = [], [], []
        for rows, longest in group_rows_by_length(lengths, items.shape[1]):
            row, time = (targets[rows, :longest] > 0).nonzero(as_tuple=True)
            parts.append(self(items[rows, :longest], lengths[rows])[row, time])
            at.append(rows[row])
            when.append(time)
        return torch.cat(parts), torch.cat(at), torch.cat(when)

    def scores(self, x: Tensor, items: Tensor, table: Tensor | None = None) -> Tensor:
        """The score of every item after a history.

        Args:
            x: (B, D), the vector of each history's end.
            items: (B, L), the history, which decides where `repeat_bias` is added.
            table: (V, D), the item table, where it is at hand.

        Returns:
            (B, V); padding's score means nothing.
        """
        scores = F.linear(x, self.item_table() if table is None else table)
        if self.repeat_bias is None:
            return scores
        row, place = mark_first_occurrences(items).nonzero(as_tuple=True)
        raised = self.repeat_bias.to(scores.dtype).expand(len(row))
        return scores.index_put_((row, items[row, place]), raised, accumulate=True)


def group_rows_by_length(lengths: Tensor, longest: int) -> Iterator[tuple[Tensor, int]]:
    """Rows of a batch that go through the encoder together, so that little of it is padding.

    Where most histories are short and a few are long, this is most of the work saved. On a GPU,
    where a few big calls cost less than many small ones, padding is only cut to the longest row.

    Args:
        lengths: (B,), at least 1 each.
        longest: L, the padded length.

    Yields:
        Row numbers (b,) and the padded length that is enough for them.
    """
    if lengths.is_cuda:
        yield torch.arange(len(lengths), device=lengths.device), int(lengths.max())
        return
    steps = [step for step in _LENGTH_BOUNDARIES if step < longest] + [longest]
    group = torch.bucketize(lengths, torch.tensor(steps, device=lengths.device))
    for number in group.unique().tolist():
        rows = (group == number).nonzero().squeeze(1)
        yield rows, int(lengths[rows].max())


def _refresh_text_buffers(encoder: nn.Module, _: object) -> None:
    """Weights bring their text vectors, which may be of other items than those given at the start."""
    assert isinstance(encoder, Encoder)
    encoder.set_text_vectors(encoder.vectors)
