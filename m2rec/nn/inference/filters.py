"""The causal filter for inference.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
D       model width
c, Q    chunks of a row, positions of a chunk, c * Q = L
M       oscillation modes per channel in the causal filter
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.nn.branch import ItemBatch
from m2rec.nn.filters import CausalFilter
from m2rec.nn.inference.branch import PreparedBranch, TableBudget
from m2rec.ops.ssd import MAX_CHUNK, split_into_chunks


class PreparedFilter(PreparedBranch):
    """The causal filter, chunk by chunk: inside a chunk a Toeplitz matrix, between chunks the modes' states.

    Args:
        branch: the filter.
        inputs: not used.
        budget: not used.
    """

    def __init__(self, branch: CausalFilter, inputs: Tensor | None, budget: TableBudget) -> None:
        self.branch = branch
        kernel = branch.kernel(MAX_CHUNK)
        self.lagged = _append_zero_row(kernel.T)
        lags = torch.arange(MAX_CHUNK) - torch.arange(MAX_CHUNK)[:, None]
        self.toeplitz = kernel[:, lags.clamp(min=0)] * (lags >= 0)  # (D, Q, Q), from and to
        powers = branch.compute_mode_powers(torch.arange(MAX_CHUNK + 1))  # (D, M, Q + 1)
        self.powers = powers.mT.contiguous()  # (D, Q + 1, M)
        self.poles = powers[..., 1].contiguous()
        self.coefficients = torch.complex(branch.cosine, -branch.sine)
        readout = self.coefficients[..., None] * powers
        readout = torch.view_as_real(readout.conj().resolve_conj())  # (D, M, Q + 1, 2)
        self.readout = readout.transpose(2, 3).flatten(1, 2).contiguous()  # (D, 2M, Q + 1)

    def encode(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """x: (B, L, D) -> (B, L, D); L fills its chunks."""
        n_chunks, size = split_into_chunks(x.shape[1])
        chunks = x.permute(2, 0, 1).contiguous().view(x.shape[2], -1, size)  # (D, B c, Q)
        y = torch.bmm(chunks, self.toeplitz[:, :size, :size])
        if n_chunks > 1:
            entering = self._compute_entering_states(chunks, n_chunks, size)
            y.baddbmm_(entering, self.readout[:, :, 1 : size + 1])
        return y.view(x.shape[2], *x.shape[:2]).permute(1, 2, 0).contiguous()

    def _compute_entering_states(self, chunks: Tensor, n_chunks: int, size: int) -> Tensor:
        """The modes' states before each chunk, (D, B c, 2M), real and imaginary parts side by side."""
        backwards = torch.view_as_real(self.powers[:, :size].flip(1)).flatten(2)  # (D, Q, 2M)
        added = torch.bmm(chunks, backwards).unflatten(2, (-1, 2))
        added = torch.view_as_complex(added).unflatten(1, (-1, n_chunks))  # (D, B, c, M)
        decay = self.powers[:, size, None]
        entering = torch.zeros_like(added)
        for c in range(1, n_chunks):
            torch.addcmul(added[:, :, c - 1], decay, entering[:, :, c - 1], out=entering[:, :, c])
        return torch.view_as_real(entering).flatten(1, 2).flatten(2)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `encode` for each row's last position only, (B, D)."""
        assert batch.lengths is not None
        length, lagged = x.shape[1], self.lagged  # another thread may replace it
        if len(lagged) <= length:
            self.lagged = lagged = _append_zero_row(self.branch.kernel(length).T)
        lags = batch.lengths[:, None] - 1 - torch.arange(length, device=x.device)
        lags = lags.masked_fill(lags < 0, len(lagged) - 1)
        return F.embedding(lags, lagged).mul_(x).sum(1)

    def step(self, x: Tensor, state: Tensor, batch: ItemBatch) -> tuple[Tensor, Tensor]:
        """x (B, D) -> (B, D) and the new state (B, D, M), as `CausalFilter.step`."""
        state = (state * self.poles).add_(x[..., None])
        return (state * self.coefficients).sum(-1).real, state


def _append_zero_row(kernel: Tensor) -> Tensor:
    """(L, D) -> (L + 1, D)."""
    return F.pad(kernel, (0, 0, 0, 1))
