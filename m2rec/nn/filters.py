"""The frequency branch: filters over time, applied with the FFT along the positions.

`CausalFilter` is ours: a kernel of damped oscillations, one-sided, so that every position
can be trained. `LowPassFilter` is the paper's global low-pass (arXiv 2505.04445), which lets a
position see its future and therefore only fits training on the last position. `IdentityFilter`
filters nothing: with it one sees what the branch's place alone is worth.
"""

import math

import torch
from torch import Tensor, nn

from m2rec.ops.contracts import without_autocast as without_autocast


class CausalFilter(nn.Module):
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

    def __init__(self, hidden_size: int, n_modes: int, max_length: int) -> None:
        super().__init__()
        longest = max(max_length, 2)
        period = torch.logspace(math.log10(2), math.log10(longest), n_modes).repeat(hidden_size, 1)
        amplitude = (2 / (period * n_modes)).sqrt()
        self.log_damping = nn.Parameter(-period.log())  # (D, M)
        self.frequency = nn.Parameter(2 * math.pi / period)  # (D, M)
        self.cosine = nn.Parameter(torch.randn_like(period) * amplitude)  # (D, M), b
        self.sine = nn.Parameter(torch.randn_like(period) * amplitude)  # (D, M), c

    def kernel(self, length: int) -> Tensor:
        """The first `length` values of the impulse response, (D, length), in float32 at least."""
        dtype = torch.promote_types(self.cosine.dtype, torch.float32)
        tau = torch.arange(length, device=self.cosine.device, dtype=dtype)
        damping, w, b, c = (
            p.to(dtype)[..., None] for p in (self.log_damping.exp(), self.frequency, self.cosine, self.sine)
        )
        modes = torch.exp(-damping * tau) * (b * torch.cos(w * tau) + c * torch.sin(w * tau))
        return modes.sum(1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: (B, L, D) -> (B, L, D); `lengths` are not needed, padding comes last."""
        length = x.shape[1]
        size = 2 * length  # so that nothing wraps around from the end to the start
        kernel = self.kernel(length)
        spectrum = torch.fft.rfft(x.to(kernel.dtype), n=size, dim=1)
        response = torch.fft.rfft(kernel, n=size, dim=1).T  # (size / 2 + 1, D)
        y: Tensor = torch.fft.irfft(spectrum * response, n=size, dim=1)
        return y[:, :length].to(x.dtype)

    def last(self, x: Tensor, lengths: Tensor) -> Tensor:
        """As `forward` for each row's last position alone: x (B, L, D), lengths (B,) -> (B, D)."""
        kernel = self.kernel(x.shape[1]).flip(1)
        heard = _right_align_rows(x, lengths).to(kernel.dtype)
        with without_autocast(x.device):  # as the FFT, which stays in float32
            return torch.einsum("bld,dl->bd", heard, kernel).to(x.dtype)

    def advance(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Continue histories: each mode is a complex recurrence, so its past is one number.

            h_m[t] = p_m h_m[t-1] + x[t],   p_m = exp(-a_m + i w_m),   y = Re sum_m (b_m - i c_m) h_m

        Args:
            x: (B, L, D), the next positions.
            state: (B, D, M) complex from the positions before; None before the first.

        Returns:
            y (B, L, D) and the state after them.
        """
        length = x.shape[1]
        y = self(x)
        powers = self._compute_mode_powers(torch.arange(length + 1, device=x.device))  # (D, M, L + 1)
        added = torch.einsum("bld,dml->bdm", x.to(powers.dtype), powers[..., :length].flip(-1))
        if state is None:
            return y, added
        dtype = state.real.dtype  # there are no complex numbers of bfloat16
        weighted = torch.complex(self.cosine.to(dtype), -self.sine.to(dtype)) * state
        echo = torch.einsum("bdm,dml->bld", weighted, powers[..., 1:]).real
        return y + echo.to(y.dtype), powers[..., length] * state + added

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As `advance` for one position: x (B, D) -> y (B, D) and the state after it."""
        state = self._compute_mode_powers(torch.ones((), device=x.device)) * state + x[..., None]
        y = (self.cosine * state.real + self.sine * state.imag).sum(-1)
        return y.to(x.dtype), state

    def _compute_mode_powers(self, tau: Tensor) -> Tensor:
        """p_m to the powers tau (...), (D, M, ...) complex."""
        dtype = torch.promote_types(self.cosine.dtype, torch.float32)
        shape = (..., *(None,) * tau.dim())
        damping, w = self.log_damping.exp().to(dtype)[shape], self.frequency.to(dtype)[shape]
        return torch.polar(torch.exp(-damping * tau), w * tau)


def _right_align_rows(x: Tensor, lengths: Tensor) -> Tensor:
    """x (B, L, D): each row's first `lengths` positions moved to its end, zeros before them."""
    index = torch.arange(x.shape[1], device=x.device) - (x.shape[1] - lengths[:, None])
    moved = x.gather(1, index.clamp(min=0)[..., None].expand_as(x))
    return moved * (index >= 0)[..., None]


class LowPassFilter(nn.Module):
    """The paper's low-pass: keeps the lowest share of a history's frequencies. Not causal.

    Every row is transformed at its own length n: of its n // 2 + 1 frequencies the lowest
    ceil(cutoff * (n // 2 + 1)) stay. That is a circular convolution whose kernel depends on
    n only, so the kernels of all lengths are made once and rows of different lengths are
    filtered by one product of matrices. Padding comes out as zero.

    Args:
        cutoff: share of the frequencies kept, in (0, 1]; 1 is the identity.
        max_length: longest history, in steps.
    """

    kernels: Tensor

    def __init__(self, cutoff: float, max_length: int) -> None:
        super().__init__()
        kernels = torch.zeros(max_length + 1, max_length)  # by length and lag
        for n in range(1, max_length + 1):
            bins = n // 2 + 1
            keep = (torch.arange(bins) < math.ceil(cutoff * bins)).float()
            kernels[n, :n] = torch.fft.irfft(keep, n=n)
        self.register_buffer("kernels", kernels, persistent=False)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x: (B, L, D), lengths: (B,) -> (B, L, D)."""
        t = torch.arange(x.shape[1], device=x.device)
        lag = (t[:, None] - t).remainder(lengths[:, None, None].clamp(min=1))  # (B, L, L)
        weights = self.kernels[lengths[:, None, None], lag]
        inside = t < lengths[:, None]
        weights = weights * inside[:, :, None] * inside[:, None, :]
        return weights.to(x.dtype) @ x


class IdentityFilter(nn.Module):
    """The ablation of the filter: the branch hands on what it gets, and remembers nothing."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: (B, L, D) -> the same."""
        return x

    def advance(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As in `CausalFilter`; the state is empty."""
        return x, x.new_empty(len(x), 0)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As in `CausalFilter`."""
        return x, state
