"""SSD without gradients, head by head: what `ssd` and `ssd_last` compute, with few passes over memory.

Each head is a strided view of the convolution's output, which a product of matrices reads without a copy.
Decays are powers of two, because exp2 is several times faster than exp on a CPU, and are cut off at 2^-120,
because exponents that underflow take a slow path.

letter  meaning
B, L    batch, sequence length
H, P    heads, head width
N       state size
c, Q    chunks of a row, positions of a chunk, c * Q = L
"""

import torch
from torch import Tensor

from m2rec.ops.contracts import LOG2_E
from m2rec.ops.ssd import split_into_chunks

MIN_EXPONENT = -120.0


def ssd_by_head(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """As `ssd` from a zero state; L fills its chunks.

    Args:
        u: (B, L, H * P), rows may be strided.
        dt: (B, L, H), after softplus.
        A, D: (H,).
        B, C: (B, L, N), rows may be strided.

    Returns:
        (H, B, L, P).
    """
    batch, length = dt.shape[:2]
    heads, width = len(A), u.shape[2] // len(A)
    n_chunks, size = split_into_chunks(length)
    assert n_chunks * size == length
    keys, queries, inputs = (_merge_chunks(t, n_chunks, size) for t in (B, C, u))
    steps = _merge_chunks(dt, n_chunks, size).permute(2, 0, 1).contiguous()  # (H, B c, Q)
    log_decay = (steps * (A * LOG2_E)[:, None, None]).cumsum(-1)
    similarity = torch.bmm(queries, keys.mT)
    y = u.new_empty(heads, batch * n_chunks, size, width)
    weights = torch.empty_like(similarity)
    for h in range(heads):
        values = inputs[..., h * width : (h + 1) * width]
        torch.sub(log_decay[h, :, :, None], log_decay[h, :, None], out=weights)
        weights.clamp_(MIN_EXPONENT, 0).exp2_().mul_(similarity).mul_(steps[h, :, None]).tril_()
        weights.diagonal(dim1=1, dim2=2).add_(D[h])
        torch.bmm(weights, values, out=y[h])
        if n_chunks > 1:
            entering = _compute_entering_states(values, keys, steps[h], log_decay[h], n_chunks)
            decay = log_decay[h].clamp(min=MIN_EXPONENT).exp2_()
            y[h].baddbmm_(queries * decay[..., None], entering)
    return y.view(heads, batch, length, width)


def _merge_chunks(x: Tensor, n_chunks: int, size: int) -> Tensor:
    """x (B, c Q, K) -> a view (B c, Q, K)."""
    chunks: Tensor = x.unflatten(1, (n_chunks, size)).flatten(0, 1)
    return chunks


def _compute_entering_states(
    values: Tensor, keys: Tensor, steps: Tensor, log_decay: Tensor, n_chunks: int
) -> Tensor:
    """The state of one head before each chunk: values (B c, Q, P), keys (B c, Q, N) -> (B c, N, P)."""
    to_end = (log_decay[:, -1:] - log_decay).clamp_(min=MIN_EXPONENT).exp2_().mul_(steps)
    added = torch.bmm((keys * to_end[..., None]).mT, values).unflatten(0, (-1, n_chunks))
    decay = log_decay[:, -1].clamp(min=MIN_EXPONENT).exp2_().view(-1, n_chunks, 1, 1)
    entering = torch.zeros_like(added)
    for c in range(1, n_chunks):
        torch.addcmul(added[:, c - 1], decay[:, c - 1], entering[:, c - 1], out=entering[:, c])
    return entering.flatten(0, 1)


def ssd_last_by_head(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, query: Tensor, lengths: Tensor) -> Tensor:
    """As `ssd_last` without the skip, (B, H, P).

    Args:
        u, dt, A, B: as in `ssd_by_head`, any L.
        query: (B, N), C of each row's last position.
        lengths: (B,).
    """
    heads, width = len(A), u.shape[2] // len(A)
    positions = torch.arange(dt.shape[1], device=dt.device)
    steps = dt * (positions < lengths[:, None])[..., None]
    log_decay = (steps * (A * LOG2_E)).cumsum(1)
    after = (log_decay[:, -1:] - log_decay).clamp_(min=MIN_EXPONENT).exp2_().mul_(steps)  # (B, L, H)
    weights = torch.bmm(B, query[..., None]).mul(after).mT.contiguous()  # (B, H, L)
    parts = []
    for h in range(heads):
        values = u[..., h * width : (h + 1) * width]
        parts.append(torch.bmm(weights[:, h : h + 1], values))
    return torch.cat(parts, dim=1)
