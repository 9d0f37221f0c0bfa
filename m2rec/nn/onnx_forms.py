"""The branches out of plain real operations, of which an ONNX graph can be made.

What the other forms of inference do in place, chunk by chunk or with complex numbers is written here with
shapes that depend on no value, so that batch and length stay free in the graph.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
D       model width
E, N    inner width and state size of a Mamba mixer
H, P    heads, head width, H * P = E
M       oscillation modes per channel in the causal filter
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.nn.branch import Branch, ItemBatch, select_last_positions
from m2rec.nn.encoder import Encoder
from m2rec.nn.filters import CausalFilter
from m2rec.nn.layer import Layer
from m2rec.nn.mamba import Mamba, Mamba2, compute_decay_rates
from m2rec.settings import ModelSettings


class OnnxMamba2(Mamba2):
    """The Mamba-2 mixer; a history is one chunk."""

    def forward(self, x: Tensor, batch: ItemBatch | None = None) -> Tensor:
        """x: (B, L, D) -> (B, L, D)."""
        z, xBC, dt = self._project_inputs(x)
        u, B, C = self._split_channels(_convolve_causally(xBC, self.conv1d))
        u = u.transpose(1, 2)  # (B, H, L, P)
        step = F.softplus(dt + self.dt_bias)  # (B, L, H)
        log_decay = (step * compute_decay_rates(self.A_log)).cumsum(1).mT  # (B, H, L)
        between = log_decay[..., None] - log_decay[..., None, :]
        decay = torch.exp(between.masked_fill(_mark_later_positions(x.shape[1]), -torch.inf))
        weights = decay * (C @ B.mT)[:, None] * step.mT[:, :, None]  # (B, H, L, L)
        y = weights @ u + self.D[:, None, None] * u
        return self._project_output(y.transpose(1, 2), z)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `forward` for each row's last position only: x (B, L, D) -> (B, D)."""
        assert batch.lengths is not None
        z, xBC, dt = self._project_for_last(x, batch.lengths)
        u, B, C = self._split_channels(_convolve_causally(xBC, self.conv1d))
        is_inside = torch.arange(x.shape[1]) < batch.lengths[:, None]
        step = F.softplus(dt + self.dt_bias) * is_inside[..., None]
        log_decay = (step * compute_decay_rates(self.A_log)).cumsum(1)  # (B, L, H)
        similarity = B @ select_last_positions(C, batch.lengths)[..., None]  # (B, L, 1)
        weights = torch.exp(log_decay[:, -1:] - log_decay) * step * similarity
        y = (weights.mT[:, :, None] @ u.transpose(1, 2))[:, :, 0]  # (B, H, P)
        y = y + self.D[:, None] * select_last_positions(u, batch.lengths)
        return self._project_output(y, z)


class OnnxMamba(Mamba):
    """The Mamba mixer; the scan doubles the span of its sums in each of log2(L) passes.

    Args:
        hidden_size, d_state, d_conv, expand: as of `Mamba`.
        max_length: the longest history, in steps.
    """

    def __init__(self, hidden_size: int, d_state: int, d_conv: int, expand: int, max_length: int) -> None:
        super().__init__(hidden_size, d_state, d_conv, expand)
        self.max_length = max_length

    @classmethod
    def build(cls, settings: ModelSettings, max_length: int) -> "OnnxMamba":
        """The mixer of these settings."""
        sizes = (settings.hidden_size, settings.d_state, settings.d_conv, settings.expand)
        return cls(*sizes, max_length)

    def forward(self, x: Tensor, batch: ItemBatch | None = None) -> Tensor:
        """x: (B, L, D) -> (B, L, D)."""
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        u = _convolve_causally(u, self.conv1d)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        step = F.softplus(self.dt_proj(dt) + self.dt_proj.bias)[..., None]  # (B, L, E, 1)
        decay = torch.exp(step * compute_decay_rates(self.A_log))  # (B, L, E, N)
        h = step * u[..., None] * B[:, :, None]
        span = 1  # each h is the sum over so many positions, each decay their product
        while span < self.max_length:
            h = h + decay * _shift_later(h, span)
            decay = decay * _shift_later(decay, span)
            span *= 2
        y = (h @ C[..., None])[..., 0] + self.D * u
        return self.out_proj(y * F.silu(z))  # type: ignore[no-any-return]


class OnnxCausalFilter(CausalFilter):
    """The causal filter; a state is two real numbers per channel and mode, real and imaginary part.

    Args:
        hidden_size, n_modes, max_length: as of `CausalFilter`.
    """

    taps: Tensor
    """(D, max_length), the impulse response."""
    poles: Tensor
    """(D, M, 2), real and imaginary part."""

    def __init__(self, hidden_size: int, n_modes: int, max_length: int) -> None:
        super().__init__(hidden_size, n_modes, max_length)
        self.max_length = max_length

    def prepare_for_inference(self, vectors: Tensor | None) -> None:
        """Compute the impulse response and the poles once."""
        poles = self.compute_mode_powers(torch.ones(()))
        self.register_buffer("taps", self.kernel(self.max_length), persistent=False)
        self.register_buffer("poles", torch.view_as_real(poles), persistent=False)

    def forward(self, x: Tensor, batch: ItemBatch | None = None) -> Tensor:
        """x: (B, L, D) -> (B, L, D), L at most `max_length`."""
        positions = torch.arange(x.shape[1])
        response = self._look_up_response(positions[:, None] - positions)  # (L, L, D)
        return (response.permute(2, 0, 1) @ x.permute(2, 1, 0)).permute(2, 1, 0)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `forward` for each row's last position only: x (B, L, D) -> (B, D)."""
        assert batch.lengths is not None
        lag = batch.lengths[:, None] - 1 - torch.arange(x.shape[1])
        return (self._look_up_response(lag) * x).sum(1)

    def step(self, x: Tensor, state: Tensor, batch: ItemBatch | None = None) -> tuple[Tensor, Tensor]:
        """One position: x (B, D), state (B, D, M, 2) -> y (B, D) and the state after it."""
        (real, imaginary), (a, b) = state.unbind(-1), self.poles.unbind(-1)
        real, imaginary = a * real - b * imaginary + x[..., None], a * imaginary + b * real
        y = (self.cosine * real + self.sine * imaginary).sum(-1)
        return y, torch.stack([real, imaginary], dim=-1)

    def _look_up_response(self, lag: Tensor) -> Tensor:
        """lag (...), below 0 for later positions -> (..., D), 0 for them."""
        padded = F.pad(self.taps, (1, 0)).mT  # row 0 is theirs
        return padded[(lag + 1).clamp(min=0)]


BranchForm = type[OnnxMamba2] | type[OnnxMamba] | type[OnnxCausalFilter]

ONNX_FORMS: dict[type[Branch], BranchForm] = {
    Mamba2: OnnxMamba2,
    Mamba: OnnxMamba,
    CausalFilter: OnnxCausalFilter,
}
"""The form by a branch's class; a branch that is not here goes into the graph as it is."""


def make_onnx_encoder(encoder: Encoder, max_length: int) -> Encoder:
    """A copy for inference whose branches an ONNX graph can be made of.

    Its states are those of the network, complex numbers as two real ones.

    Args:
        encoder: a trained network on a CPU, in float32.
        max_length: the longest history, in steps.
    """
    portable = encoder.make_inference_copy(encoder.item_table())
    for module in portable.layers:
        layer = cast(Layer, module)
        for key, branch in layer.branches.items():
            form_class = ONNX_FORMS.get(type(branch))
            if form_class is not None:
                form = form_class.build(encoder.settings, max_length)
                form.load_state_dict(branch.state_dict())
                form.prepare_for_inference(encoder.vectors)
                setattr(layer, key, form)
    return portable.eval().requires_grad_(False)


def _convolve_causally(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """The short convolution and SiLU: x (B, L, E) -> (B, L, E)."""
    return F.silu(conv(x.mT)[..., : x.shape[1]].mT)


def _mark_later_positions(length: int) -> Tensor:
    """(L, L), True where the second position is later than the first."""
    positions = torch.arange(length)
    return positions > positions[:, None]


def _shift_later(x: Tensor, span: int) -> Tensor:
    """x (B, L, ...) -> the values `span` positions before, 0 before the first."""
    return F.pad(x, (0, 0, 0, 0, span, 0))[:, : x.shape[1]]
