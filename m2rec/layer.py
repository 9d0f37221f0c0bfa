"""One stacked layer: branches -> gate -> residual and norm -> feed-forward."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from m2rec.fourier import CausalFilter, LowPass
from m2rec.gate import MeanGate, SoftmaxGate
from m2rec.mamba import Mamba, Mamba2, MixerState
from m2rec.settings import ModelSettings
from m2rec.text import TextProjection


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
        self.mamba = build_mixer(settings)
        self.filter = build_filter(settings, max_length)
        self.text = TextProjection(text_dim, size, std=1.0) if text_dim else None
        self.branches = ["temporal"]
        self.branches += ["frequency"] if self.filter is not None else []
        self.branches += ["semantic"] if self.text is not None else []
        gated = settings.gate == "softmax" and len(self.branches) > 1
        self.gate = SoftmaxGate(len(self.branches), size) if gated else MeanGate()
        self.feed_forward = FeedForward(size, settings.inner_size, settings.dropout_prob)
        self.dropout = nn.Dropout(settings.dropout_prob)
        self.norm = nn.LayerNorm(size)

    def forward(
        self, x: Tensor, items: Tensor, lengths: Tensor, vectors: Tensor | None, described: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            x: (B, L, D).
            items: (B, L), the ids behind x.
            lengths: (B,).
            vectors: (V, T), or None without text.
            described: (V,), which items have text, or None without text.

        Returns:
            The new (B, L, D) and the gate's weights (B, L, K, D), K in the order of `branches`.
        """
        outputs = [self.mamba(x)]
        if self.filter is not None:
            outputs.append(self.filter(x, lengths))
        return self._merge(x, outputs, items, vectors, described)

    def advance(
        self,
        x: Tensor,
        items: Tensor,
        vectors: Tensor | None,
        described: Tensor | None,
        state: LayerState | None,
    ) -> tuple[Tensor, LayerState]:
        """As `forward` for the positions that follow `state`, None before the first.

        Raises:
            ValueError: the filter is the low-pass, which can't run forward in time.
        """
        y, mixer = self.mamba.advance(x, None if state is None else state.mixer)
        outputs, memory = [y], None
        if isinstance(self.filter, LowPass):
            raise ValueError("filter: 'low_pass' needs the whole history at once; train with filter: causal")
        if self.filter is not None:
            f, memory = self.filter.advance(x, None if state is None else state.filter)
            outputs.append(f)
        return self._merge(x, outputs, items, vectors, described)[0], LayerState(mixer, memory)

    def _merge(
        self,
        x: Tensor,
        outputs: list[Tensor],
        items: Tensor,
        vectors: Tensor | None,
        described: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The semantic branch, the gate, and what follows it; arguments and result as in `forward`."""
        available = [torch.ones_like(items, dtype=torch.bool)] * len(self.branches)
        if self.text is not None:
            assert vectors is not None and described is not None
            outputs.append(self.text(items, vectors))
            available[-1] = described[items]
        merged, weights = self.gate(torch.stack(outputs, dim=-2), torch.stack(available, dim=-1))
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


def build_mixer(settings: ModelSettings) -> Mamba | Mamba2:
    """The temporal branch that `mixer` names."""
    sizes = (settings.hidden_size, settings.d_state, settings.d_conv, settings.expand)
    if settings.mixer == "mamba":
        return Mamba(*sizes, backend=settings.scan_backend)
    return Mamba2(*sizes, settings.head_dim, backend=settings.scan_backend)


def build_filter(settings: ModelSettings, max_length: int) -> CausalFilter | LowPass | None:
    """The frequency branch that `filter` names, or None."""
    if settings.filter == "causal":
        return CausalFilter(settings.hidden_size, settings.filter_modes, max_length)
    if settings.filter == "low_pass":
        return LowPass(settings.filter_cutoff, max_length)
    return None
