"""The temporal branch: Mamba (S6, arXiv 2312.00752) and Mamba-2 (SSD, arXiv 2405.21060).

Parameters, names, shapes and initial values are those of `mamba_ssm.Mamba` and
`mamba_ssm.Mamba2`, so that a state dict moves both ways.

    letter  meaning
    D       model width                     E    inner width, expand * D
    N       state size (d_state)            R    rank of the step size (dt_rank)
    H, P    heads and head width, H * P = E (Mamba-2)

A parameter marked `_no_weight_decay` should not be decayed.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.nn.branch import Branch, ItemBatch, select_last_positions
from m2rec.ops import (
    causal_conv1d,
    causal_conv1d_step,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_last,
    ssd_step,
)
from m2rec.settings import ModelSettings

# The step size dt starts log-uniformly in this range (paper 2312.00752, section 3.6).
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4

# A mixer's state of a history: the convolution's last inputs and the scan's state.
MixerState = tuple[Tensor, Tensor]

# By a parameter's name, its attributes for the optimiser.
ParameterMarks = Mapping[str, Mapping[str, object]]
_NO_WEIGHT_DECAY = {"_no_weight_decay": True}


class MarkedParameters(nn.Module):
    """A module that marks some of its parameters for the optimiser, in its copies too.

    Marks are attributes of the parameter, as in `mamba_ssm`, which `copy.deepcopy` leaves behind.
    """

    marks: ClassVar[ParameterMarks] = {}

    def mark_parameters(self) -> None:
        """Set the marks, once the parameters are there."""
        for name, marks in self.marks.items():
            parameter = getattr(self, name)
            if parameter is not None:
                vars(parameter).update(marks)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.mark_parameters()


class Mamba(MarkedParameters, Branch):
    """Mamba mixer: (B, L, D) -> (B, L, D), causal.

    Args:
        hidden_size: D.
        d_state: N.
        d_conv: taps of the short convolution.
        expand: E / D.
        backend: the operators' backend, `auto` or a name from `ops.BACKENDS`.
    """

    name = "temporal"
    marks: ClassVar[ParameterMarks] = dict.fromkeys(("A_log", "D"), _NO_WEIGHT_DECAY)

    def __init__(
        self, hidden_size: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, backend: str = "auto"
    ) -> None:
        super().__init__()
        inner = expand * hidden_size
        self.d_state, self.dt_rank, self.backend = d_state, math.ceil(hidden_size / 16), backend
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = StepSizeProjection(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))  # (E, N)
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_draw_dt_bias(inner))
        self.mark_parameters()

    @classmethod
    def build(cls, settings: ModelSettings, max_length: int) -> "Mamba":
        """The mixer of these settings."""
        sizes = (settings.hidden_size, settings.d_state, settings.d_conv, settings.expand)
        return cls(*sizes, backend=settings.scan_backend)

    def forward(self, x: Tensor, batch: ItemBatch | None = None) -> Tensor:
        """x: (B, L, D) -> (B, L, D)."""
        y, _ = self.advance(x)
        return y

    def advance(
        self, x: Tensor, state: MixerState | None = None, batch: ItemBatch | None = None
    ) -> tuple[Tensor, MixerState]:
        """Continue histories.

        Args:
            x: (B, L, D), the next positions.
            state: from the positions before; None before the first.

        Returns:
            y (B, L, D) and the state after them: the last K - 1 inputs of the convolution
            (B, K - 1, E), and the scan's (B, E, N).
        """
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        u, window = _apply_causal_conv(u, state, self.conv1d, self.backend)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, h = selective_scan(
            u,
            self.dt_proj(dt),
            compute_decay_rates(self.A_log),
            B,
            C,
            self.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            initial_state=None if state is None else state[1],
            return_last_state=True,
            backend=self.backend,
        )
        return self.out_proj(y), (window, h)

    def step(self, x: Tensor, state: MixerState, batch: ItemBatch | None = None) -> tuple[Tensor, MixerState]:
        """As `advance` for one position: x (B, D) -> y (B, D) and the state after it."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, window = _apply_causal_conv_step(u, state[0], self.conv1d)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A = compute_decay_rates(self.A_log)
        y, h = selective_scan_step(state[1], u, self.dt_proj(dt), A, B, C, self.D, z, self.dt_proj.bias, True)
        return self.out_proj(y), (window, h)


class StepSizeProjection(nn.Linear):
    """A linear map whose bias the scan adds, in float32 at least, before softplus."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., R) -> (..., E), without the bias."""
        return F.linear(x, self.weight)


class Mamba2(MarkedParameters, Branch):
    """Mamba-2 mixer: (B, L, D) -> (B, L, D), causal; one group of B and C.

    Args:
        hidden_size: D.
        d_state: N.
        d_conv: taps of the short convolution.
        expand: E / D.
        head_dim: P, a divisor of E.
        backend: the operators' backend, `auto` or a name from `ops.BACKENDS`.
    """

    name = "temporal"
    marks: ClassVar[ParameterMarks] = dict.fromkeys(("A_log", "D", "dt_bias"), _NO_WEIGHT_DECAY)

    def __init__(
        self,
        hidden_size: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        inner = expand * hidden_size
        heads, mixed = inner // head_dim, inner + 2 * d_state
        self.d_state, self.inner, self.head_dim, self.backend = d_state, inner, head_dim, backend
        self.in_proj = nn.Linear(hidden_size, inner + mixed + heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, d_conv, groups=mixed, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(_draw_dt_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(inner)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)
        self.mark_parameters()

    @classmethod
    def build(cls, settings: ModelSettings, max_length: int) -> "Mamba2":
        """The mixer of these settings."""
        sizes = (settings.hidden_size, settings.d_state, settings.d_conv, settings.expand)
        return cls(*sizes, settings.head_dim, backend=settings.scan_backend)

    def forward(self, x: Tensor, batch: ItemBatch | None = None) -> Tensor:
        """x: (B, L, D) -> (B, L, D)."""
        y, _ = self.advance(x)
        return y

    def advance(
        self, x: Tensor, state: MixerState | None = None, batch: ItemBatch | None = None
    ) -> tuple[Tensor, MixerState]:
        """As `Mamba.advance`; the states are (B, K - 1, E + 2N) and (B, H, P, N)."""
        z, xBC, dt = self._project_inputs(x)
        xBC, window = _apply_causal_conv(xBC, state, self.conv1d, self.backend)
        u, B, C = self._split_channels(xBC)
        y, h = ssd(
            u,
            dt,
            compute_decay_rates(self.A_log),
            B,
            C,
            self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_state=None if state is None else state[1],
            return_last_state=True,
            backend=self.backend,
        )
        return self._project_output(y, z), (window, h)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `forward` for each row's last position only: x (B, L, D) -> (B, D)."""
        assert batch.lengths is not None
        z, xBC, dt = self._project_for_last(x, batch.lengths)
        xBC, _ = _apply_causal_conv(xBC, None, self.conv1d, self.backend)
        u, B, C = self._split_channels(xBC)
        A = compute_decay_rates(self.A_log)
        y = ssd_last(u, dt, A, B, C, batch.lengths, self.D, self.dt_bias, True)
        return self._project_output(y, z)

    def step(self, x: Tensor, state: MixerState, batch: ItemBatch | None = None) -> tuple[Tensor, MixerState]:
        """As `advance` for one position: x (B, D) -> y (B, D) and the state after it."""
        z, xBC, dt = self._project_inputs(x)
        xBC, window = _apply_causal_conv_step(xBC, state[0], self.conv1d)
        u, B, C = self._split_channels(xBC)
        A = compute_decay_rates(self.A_log)
        y, h = ssd_step(state[1], u, dt, A, B, C, self.D, self.dt_bias, True)
        return self._project_output(y, z), (window, h)

    def _project_inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (..., D) -> the gate z (..., E), what is convolved (..., E + 2N), the step size (..., H)."""
        widths = [self.inner, self.inner + 2 * self.d_state, len(self.D)]
        return self.in_proj(x).split(widths, dim=-1)  # type: ignore[no-any-return]

    def _project_for_last(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_project_inputs`, with the gate z (B, E) of the last positions only."""
        if not _is_unhooked_linear(self.in_proj):
            z, xBC, dt = self._project_inputs(x)
            return select_last_positions(z, lengths), xBC, dt
        weight, heads = self.in_proj.weight, len(self.D)
        mixed = len(weight) - self.inner - heads
        gate_weight, scan_weight = weight.split([self.inner, mixed + heads])
        xBC, dt = F.linear(x, scan_weight).split([mixed, heads], dim=-1)
        z = F.linear(select_last_positions(x, lengths), gate_weight)
        return z, xBC, dt

    def _split_channels(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., E + 2N) -> the scan's input by head (..., H, P), B and C (..., N)."""
        u, B, C = xBC.split([self.inner, self.d_state, self.d_state], dim=-1)
        return u.unflatten(-1, (-1, self.head_dim)), B, C

    def _project_output(self, y: Tensor, z: Tensor) -> Tensor:
        """The scan's output (..., H, P), gated by z (..., E) -> (..., D)."""
        return self.out_proj(self.norm(y.flatten(-2), z))  # type: ignore[no-any-return]


class GatedRMSNorm(nn.Module):
    """x * silu(z), then divided by its root mean square over the channels, times a weight."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x, z: (..., E) -> (..., E)."""
        gated = (x * F.silu(z)).to(self.weight.dtype)
        return F.rms_norm(gated, self.weight.shape, self.weight, self.eps).to(x.dtype)


def compute_decay_rates(A_log: Tensor) -> Tensor:
    """A of the recurrence, negative, in float32 at least."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def _is_unhooked_linear(linear: nn.Module) -> bool:
    """True if the layer is a plain nn.Linear without hooks, so that its weight may be used directly."""
    return type(linear) is nn.Linear and not has_hooks(linear)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its own code."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks)


def _apply_causal_conv(
    x: Tensor, state: MixerState | None, conv: nn.Conv1d, backend: str
) -> tuple[Tensor, Tensor]:
    """The short convolution after the inputs in `state`: x (B, L, E) -> (B, L, E), the last inputs."""
    kept, length = conv.weight.shape[2] - 1, x.shape[1]
    inputs = F.pad(x, (0, 0, kept, 0)) if state is None else torch.cat([state[0], x], dim=1)
    y = causal_conv1d(x if state is None else inputs, conv.weight[:, 0], conv.bias, backend=backend)
    return y[:, -length:], inputs[:, length:]


def _apply_causal_conv_step(x: Tensor, window: Tensor, conv: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """As `_apply_causal_conv` for one position: x (B, E), window (B, K - 1, E) -> (B, E), new window."""
    inputs = torch.cat([window, x[:, None]], dim=1)
    return causal_conv1d_step(inputs, conv.weight[:, 0], conv.bias), inputs[:, 1:]


def _draw_dt_bias(size: int) -> Tensor:
    """The inverse softplus of step sizes drawn log-uniformly from [DT_MIN, DT_MAX]."""
    dt = torch.exp(torch.rand(size) * math.log(DT_MAX / DT_MIN) + math.log(DT_MIN))
    dt = dt.clamp(min=DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))
