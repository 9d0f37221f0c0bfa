"""The frequency branch: filters over time, applied with the FFT along the positions.

`CausalFilter` is ours: a kernel of damped oscillations, one-sided, so that every position
can be trained. `LowPassFilter` is the paper's global low-pass (arXiv 2505.04445), which lets a
position see its future and therefore only fits training on the last position. `IdentityFilter`
is the identity, the ablation of the filter.
"""

import math

import torch
from torch import Tensor, nn

from m2rec.nn.branch import Branch, ItemBatch
from m2rec.ops.contracts import without_autocast
from m2rec.settings import ModelSettings


class CausalFilter(Branch):
    """Learnable causal filter per channel, made of M damped oscillations.

        k[tau] = sum_m exp(-a_m tau) * (b_m cos(w_m tau) + c_m sin(w_m tau)),   tau >= 0
        y[t] = sum_tau k[tau] x[t - tau]

    a_m = exp(log_damping) > 0 in 1/steps, w_m in radians per step. Periods 2 pi / w_m start
    log-spaced from 2 to `max_length` steps, each decaying within about one period, with
    amplitudes such that all scales carry the same energy and the output has the input's
    variance.

    Args:
        hidden_size: channels D.
        n_modes: M.
        max_length: longest period at the start, in steps.
    """

    name = "frequency"

    def __init__(self, hidden_size: int, n_modes: int, max_length: int) -> None:
        super().__init__()
        longest = max(max_length, 2)
        period = torch.logspace(math.log10(2), math.log10(longest), n_modes).repeat(hidden_size, 1)
        amplitude = (2 / (period * n_modes)).sqrt()
        self.log_damping = nn.Parameter(-period.log())  # (D, M)
        self.frequency = nn.Parameter(2 * math.pi / period)  # (D, M)
        self.cosine = nn.Parameter(torch.randn_like(period) * amplitude)  # (D, M), b
        self.sine = nn.Parameter(torch.randn_like(period) * amplitude)  # (D, M), c

    @classmethod
    def build(cls, settings: ModelSettings, max_length: int) -> "CausalFilter":
        """The filter of these settings."""
        return cls(settings.hidden_size, settings.filter_modes, max_length)

    def kernel(self, length: int) -> Tensor:
        """The first `length` values of the impulse response, (D, length), in float32 at least."""
        dtype = torch.promote_types(self.cosine.dtype, torch.float32)
        tau = torch.arange(length, device=self.cosine.device, dtype=dtype)
        parameters = (self.log_damping.exp(), self.frequency, self.cosine, self.sine)
        damping, w, b, c = (p.to(dtype)[..., None] for p in parameters)
        oscillation = b * torch.cos(w * tau) + c * torch.sin(w * tau)
        modes = torch.exp(-damping * tau) * oscillation
        return modes.sum(1)

    def forward(self, x: Tensor, batch: ItemBatch | None = None) -> Tensor:
        """x: (B, L, D) -> (B, L, D)."""
        length = x.shape[1]
        size = 2 * length  # so that nothing wraps around from the end to the start
        kernel = self.kernel(length)
        spectrum = torch.fft.rfft(x.to(kernel.dtype), n=size, dim=1)
        response = torch.fft.rfft(kernel, n=size, dim=1).T  # (size / 2 + 1, D)
        y: Tensor = torch.fft.irfft(spectrum * response, n=size, dim=1)
        return y[:, :length].to(x.dtype)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `forward` for each row's last position only: x (B, L, D) -> (B, D)."""
        assert batch.lengths is not None
        kernel = self.kernel(x.shape[1]).flip(1)
        aligned = _right_align_rows(x, batch.lengths).to(kernel.dtype)
        with without_autocast(x.device):  # as the FFT, which stays in float32
            return torch.einsum("bld,dl->bd", aligned, kernel).to(x.dtype)

    def advance(
        self, x: Tensor, state: Tensor | None = None, batch: ItemBatch | None = None
    ) -> tuple[Tensor, Tensor]:
        """Continue histories: each mode is a complex recurrence, so its past is one number.

            h_m[t] = p_m h_m[t-1] + x[t],   p_m = exp(-a_m + i w_m),   y = Re sum_m (b_m - i c_m) h_m

        Args:
            x: (B, L, D), the next positions.
            state: (B, D, M) complex from the positions before; None before the first.
            batch: not used.

        Returns:
            y (B, L, D) and the state after them.
        """
        length = x.shape[1]
        y = self(x)
        powers = self.compute_mode_powers(torch.arange(length + 1, device=x.device))  # (D, M, L + 1)
        backwards = powers[..., :length].flip(-1)
        added = torch.einsum("bld,dml->bdm", x.to(powers.dtype), backwards)
        if state is None:
            return y, added
        dtype = state.real.dtype  # there are no complex numbers of bfloat16
        coefficients = torch.complex(self.cosine.to(dtype), -self.sine.to(dtype))
        from_state = torch.einsum("bdm,dml->bld", coefficients * state, powers[..., 1:]).real
        return y + from_state.to(y.dtype), powers[..., length] * state + added

    def step(self, x: Tensor, state: Tensor, batch: ItemBatch | None = None) -> tuple[Tensor, Tensor]:
        """As `advance` for one position: x (B, D) -> y (B, D) and the state after it."""
        poles = self.compute_mode_powers(torch.ones((), device=x.device))
        state = poles * state + x[..., None]
        y = (self.cosine * state.real + self.sine * state.imag).sum(-1)
        return y.to(x.dtype), state

    def compute_mode_powers(self, tau: Tensor) -> Tensor:
        """p_m to the powers tau (...), (D, M, ...) complex."""
        dtype = torch.promote_types(self.cosine.dtype, torch.float32)
        shape = (..., *(None,) * tau.dim())
        damping = self.log_damping.exp().to(dtype)[shape]
        w = self.frequency.to(dtype)[shape]
        return torch.polar(torch.exp(-damping * tau), w * tau)


def _right_align_rows(x: Tensor, lengths: Tensor) -> Tensor:
    """x (B, L, D): each row's first `lengths` positions moved to its end, zeros before them."""
    length = x.shape[1]
    index = torch.arange(length, device=x.device) - (length - lengths[:, None])
    moved = x.gather(1, index.clamp(min=0)[..., None].expand_as(x))
    return moved * (index >= 0)[..., None]


class LowPassFilter(Branch):
    """The paper's low-pass: keeps the lowest share of a history's frequencies. Not causal.

    Every row is transformed at its own length n: of its n // 2 + 1 frequencies the lowest
    ceil(cutoff * (n // 2 + 1)) stay. That is a circular convolution whose kernel depends on
    n only, so the kernels of all lengths are made once and rows of different lengths are
    filtered by one product of matrices. Padding comes out as zero.

    Args:
        cutoff: share of the frequencies kept, in (0, 1]; 1 is the identity.
        max_length: longest history, in steps.
    """

    name = "frequency"
    setting = "filter: 'low_pass'"
    kernels: Tensor

    def __init__(self, cutoff: float, max_length: int) -> None:
        super().__init__()
        kernels = torch.zeros(max_length + 1, max_length)  # by length and lag
        for n in range(1, max_length + 1):
            bins = n // 2 + 1
            keep = (torch.arange(bins) < math.ceil(cutoff * bins)).float()
            kernels[n, :n] = torch.fft.irfft(keep, n=n)
        self.register_buffer("kernels", kernels, persistent=False)

    @classmethod
    def build(cls, settings: ModelSettings, max_length: int) -> "LowPassFilter":
        """The filter of these settings."""
        return cls(settings.filter_cutoff, max_length)

    def forward(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """x: (B, L, D) -> (B, L, D)."""
        assert batch.lengths is not None
        lengths = batch.lengths[:, None]
        t = torch.arange(x.shape[1], device=x.device)
        lag = (t[:, None] - t).remainder(lengths[..., None].clamp(min=1))  # (B, L, L)
        inside = t < lengths
        weights = self.kernels[lengths[..., None], lag] * inside[:, :, None] * inside[:, None, :]
        return weights.to(x.dtype) @ x


class IdentityFilter(Branch):
    """The identity, an ablation of the filter."""

    name = "frequency"

    @classmethod
    def build(cls, settings: ModelSettings, max_length: int) -> "IdentityFilter":
        """The filter of these settings."""
        return cls()

    def forward(self, x: Tensor, batch: ItemBatch | None = None) -> Tensor:
        """x: (B, L, D) -> the same."""
        return x

    def advance(self, x: Tensor, state: Tensor | None, batch: ItemBatch) -> tuple[Tensor, Tensor]:
        """x unchanged; the state is empty."""
        return x, x.new_empty(x.shape[0], 0)

    step = advance
