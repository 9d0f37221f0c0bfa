"""One stacked layer: branches -> gate -> residual and norm -> feed-forward."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from m2rec.errors import UserError
from m2rec.nn.attention import Attention
from m2rec.nn.filters import CausalFilter, IdentityFilter, LowPassFilter
from m2rec.nn.gate import MeanGate, SoftmaxGate
from m2rec.nn.mamba import Mamba, Mamba2, MixerState, select_last_positions
from m2rec.nn.text_projection import ProjectedText, TextProjection
from m2rec.settings import ModelSettings


class LayerState(NamedTuple):
    """What a layer remembers of a history; its size does not depend on the history's length."""

    mixer: MixerState
    filter: Tensor | None


class Layer(nn.Module):
    """(B, L, D) -> (B, L, D): temporal, frequency and semantic branch, merged by the gate.

    Args:
        settings: which branches there are, and their sizes.
        max_length: longest history, in steps.
        text_dim: T, or 0 without a semantic branch.
    """

    def __init__(self, settings: ModelSettings, max_length: int, text_dim: int) -> None:
        super().__init__()
        size = settings.hidden_size
        self.mixer = build_mixer(settings, max_length)
        self.filter = build_filter(settings, max_length)
        self.text: TextProjection | ProjectedText | None = None
        if text_dim:
            self.text = TextProjection(text_dim, size, std=1.0)
        self.branches = ["temporal"]
        self.branches += ["frequency"] if self.filter is not None else []
        self.branches += ["semantic"] if self.text is not None else []
        gated = settings.gate == "softmax" and len(self.branches) > 1
        self.gate = SoftmaxGate(len(self.branches), size) if gated else MeanGate()
        self.feed_forward = FeedForward(size, settings.inner_size, settings.dropout_prob)
        self.dropout = nn.Dropout(settings.dropout_prob)
        self.norm = nn.LayerNorm(size)

    def forward(
        self, x: Tensor, items: Tensor, lengths: Tensor, vectors: Tensor | None, available: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            x: (B, L, D).
            items: (B, L), the ids behind x.
            lengths: (B,).
            vectors: (V, T), or None without text.
            available: (V, K), which branches have something to say at an item; None if all always.

        Returns:
            The new (B, L, D) and the gate's weights (B, L, K, D), K in the order of `branches`.
        """
        return self._merge_and_feed_forward(
            x, self._compute_sequence_outputs(x, lengths), items, vectors, available
        )

    def last(
        self, x: Tensor, items: Tensor, lengths: Tensor, vectors: Tensor | None, available: Tensor | None
    ) -> Tensor:
        """As `forward` for each row's last position alone, (B, D).

        Mamba-2 and the causal filter then work on one position; the other parts run over all.
        """
        if isinstance(self.mixer, Mamba2):
            outputs = [self.mixer.last(x, lengths)]
        else:
            outputs = [select_last_positions(self.mixer(x), lengths)]
        if isinstance(self.filter, CausalFilter):
            outputs.append(self.filter.last(x, lengths))
        elif self.filter is not None:
            outputs.append(select_last_positions(self.filter(x, lengths), lengths))
        x, items = select_last_positions(x, lengths), select_last_positions(items, lengths)
        return self._merge_and_feed_forward(x, outputs, items, vectors, available)[0]

    def advance(
        self,
        x: Tensor,
        items: Tensor,
        vectors: Tensor | None,
        available: Tensor | None,
        state: LayerState | None = None,
    ) -> tuple[Tensor, LayerState]:
        """As `forward` for the positions that follow `state`, None before the first.

        Raises:
            ValueError: a part needs the whole history at once.
        """
        y, mixer = self.require_recurrent_mixer().advance(x, None if state is None else state.mixer)
        outputs, memory = [y], None
        if isinstance(self.filter, CausalFilter | IdentityFilter):
            f, memory = self.filter.advance(x, None if state is None else state.filter)
            outputs.append(f)
        return self._merge_and_feed_forward(x, outputs, items, vectors, available)[0], LayerState(
            mixer, memory
        )

    def step(
        self,
        x: Tensor,
        items: Tensor,
        vectors: Tensor | None,
        available: Tensor | None,
        state: LayerState,
    ) -> tuple[Tensor, LayerState]:
        """As `advance` for one position: x (B, D), items (B,) -> (B, D) and the state after it."""
        y, mixer = self.require_recurrent_mixer().step(x, state.mixer)
        outputs, memory = [y], state.filter
        if isinstance(self.filter, CausalFilter | IdentityFilter):
            assert memory is not None
            f, memory = self.filter.step(x, memory)
            outputs.append(f)
        return self._merge_and_feed_forward(x, outputs, items, vectors, available)[0], LayerState(
            mixer, memory
        )

    def _compute_sequence_outputs(self, x: Tensor, lengths: Tensor) -> list[Tensor]:
        """What the branches that look back say, (B, L, D) each."""
        outputs = [self.mixer(x)]
        if self.filter is not None:
            outputs.append(self.filter(x, lengths))
        return outputs

    def require_recurrent_mixer(self) -> Mamba | Mamba2:
        """The temporal branch, if every part of the layer can go on from a state.

        Raises:
            ValueError: one needs the whole history at once.
        """
        for key, value, rival in (("mixer", "attention", Attention), ("filter", "low_pass", LowPassFilter)):
            if isinstance(self.mixer, rival) or isinstance(self.filter, rival):
                raise UserError(
                    f"{key}: {value!r} needs the whole history at once and can't go on from a state; "
                    f"train with another {key}"
                )
        assert isinstance(self.mixer, Mamba | Mamba2)
        return self.mixer

    def _merge_and_feed_forward(
        self,
        x: Tensor,
        outputs: list[Tensor],
        items: Tensor,
        vectors: Tensor | None,
        available: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The semantic branch, the gate, and what follows it; arguments and result as in `forward`."""
        if self.text is not None:
            assert vectors is not None
            outputs.append(self.text(items, vectors))
        speaks = None if available is None else available[items]
        merged, weights = self.gate(torch.stack(outputs, dim=-2), speaks)
        x = self.norm(x + self.dropout(merged))
        return self.feed_forward(x), weights


class FeedForward(nn.Module):
    """layer_norm(x + W2 gelu(W1 x)), with dropout after each map."""

    def __init__(self, hidden_size: int, inner_size: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, inner_size)
        self.down = nn.Linear(inner_size, hidden_size)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, D) -> (B, L, D)."""
        h = self.dropout(self.activation(self.up(x)))
        return self.norm(x + self.dropout(self.down(h)))  # type: ignore[no-any-return]


def build_mixer(settings: ModelSettings, max_length: int) -> Mamba | Mamba2 | Attention:
    """The temporal branch that `mixer` names."""
    if settings.mixer == "attention":
        return Attention(settings.hidden_size, settings.n_heads, max_length, settings.dropout_prob)
    sizes = (settings.hidden_size, settings.d_state, settings.d_conv, settings.expand)
    if settings.mixer == "mamba":
        return Mamba(*sizes, backend=settings.scan_backend)
    return Mamba2(*sizes, settings.head_dim, backend=settings.scan_backend)


def build_filter(
    settings: ModelSettings, max_length: int
) -> CausalFilter | LowPassFilter | IdentityFilter | None:
    """The frequency branch that `filter` names, or None."""
    if settings.filter == "causal":
        return CausalFilter(settings.hidden_size, settings.filter_modes, max_length)
    if settings.filter == "low_pass":
        return LowPassFilter(settings.filter_cutoff, max_length)
    if settings.filter == "residual":
        return IdentityFilter()
    return None
