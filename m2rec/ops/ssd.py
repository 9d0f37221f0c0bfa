"""State space duality, the recurrence of Mamba-2 (arXiv 2405.21060).

    h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * x[t] B[t]^T              state (B, H, P, N)
    y[t] = h[t] C[t] + D * x[t]

One decay per head instead of one per channel and state, so that a whole chunk of positions
is a product of matrices (section 6 of the paper). B and C are shared by all heads
(`ngroups = 1` in `mamba_ssm`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.errors import UserError
from m2rec.ops.backend import Implementations, load_implementation
from m2rec.ops.contracts import check_arguments, drop_time, without_autocast

# Work inside a chunk grows with its length, the chain between chunks shrinks with it.
_MAX_CHUNK = 64

_SHAPES = {
    "x": "BLHP", "dt": "BLH", "A": "H", "B": "BLN", "C": "BLN", "D": "H", "dt_bias": "H", "state": "BHPN",
}  # fmt: skip
_STEP_SHAPES = drop_time(_SHAPES)


def ssd_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence as it is written, one step after the other under autograd.

    Args:
        x: (B, L, H, P).
        dt: (B, L, H).
        A: (H,), negative for a decaying state.
        B, C: (B, L, N).
        D, dt_bias: (H,).
        dt_softplus: pass dt (after the bias) through softplus.
        initial_state: (B, H, P, N), zero if absent.
        return_last_state: return the state after the last step too.

    Returns:
        y (B, L, H, P) in the type of x; with `return_last_state` also the state
        (B, H, P, N) in the type of the computation, float32 at least.

    Raises:
        ValueError: an argument is not of its shape, or complex or integer.
    """
    check_arguments("ssd", _SHAPES, (x, dt, A, B, C, D, dt_bias, initial_state))
    u, dt, A, B, C = _prepare_ssd_inputs(x, dt, A, B, C, dt_bias, dt_softplus)
    h = _make_zero_state(u, B) if initial_state is None else initial_state.to(u.dtype)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[:, :, None, None]
        h = decay * h + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, None, None, :]
        outputs.append((h * C[:, t, None, None, :]).sum(-1))
    y = _apply_skip(torch.stack(outputs, dim=1), u, D).to(x.dtype)
    return (y, h) if return_last_state else y


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """SSD on the chosen backend; arguments and result as in `ssd_ref`."""
    check_arguments("ssd", _SHAPES, (x, dt, A, B, C, D, dt_bias, initial_state))
    run = load_implementation(_IMPLEMENTATIONS, backend, x.device)
    with without_autocast(x.device):
        return run(x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, return_last_state)  # type: ignore[no-any-return]


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step after `state` (B, H, P, N): x (B, H, P), dt (B, H), B, C (B, N) -> y (B, H, P), new state."""
    check_arguments("ssd_step", _STEP_SHAPES, (x, dt, A, B, C, D, dt_bias, state))
    with without_autocast(x.device):
        u, dt, A, B, C = _prepare_ssd_inputs(x, dt, A, B, C, dt_bias, dt_softplus)
        decay = torch.exp(dt * A)[..., None, None]
        h = decay * state + (dt[..., None] * u)[..., None] * B[:, None, None]
        y = torch.matmul(h.flatten(1, 2), C[..., None])[..., 0].view_as(u)
        return _apply_skip(y, u, D).to(x.dtype), h


def ssd_last(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    lengths: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """y of each row's last position alone, position `lengths - 1`; arguments otherwise as in `ssd_ref`.

    One query over all positions needs no state: y = sum_t (C . B[t]) dt[t] exp(sum_{s > t} dt[s] A) x[t],
    (B, H, P).
    """
    check_arguments("ssd_last", _SHAPES, (x, dt, A, B, C, D, dt_bias, None))
    if lengths.shape != x.shape[:1]:
        raise UserError(f"ssd_last: lengths has shape {tuple(lengths.shape)}, expected (B = {len(x)})")
    with without_autocast(x.device):
        u, dt, A, B, C = _prepare_ssd_inputs(x, dt, A, B, C, dt_bias, dt_softplus)
        rows = torch.arange(len(x), device=x.device)
        remaining = (lengths[:, None] - torch.arange(x.shape[1], device=x.device))[..., None]
        dt = dt.masked_fill(remaining <= 0, 0)
        decay = dt * A
        after = decay.flip(1).cumsum(1).flip(1) - decay  # (B, L, H), of the positions after t only
        # zero already; the mask cuts its gradient, as in _ssd_chunked
        after = after.masked_fill(remaining <= 1, 0)
        similarity = torch.matmul(B, C[rows, lengths - 1, :, None])  # (B, L, 1)
        weights = similarity * dt * torch.exp(after)
        y = torch.einsum("blh,blhp->bhp", weights, u)
        if D is not None:
            y = _apply_skip(y, u[rows, lengths - 1], D)
        return y.to(x.dtype)


def _apply_skip(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    """y + D x: y, x (..., H, P), D (H,)."""
    return y if D is None else y + D.to(x.dtype)[:, None] * x


def _prepare_ssd_inputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, dt_softplus: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything in float32 at least, dt with its bias and softplus."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return x, F.softplus(dt) if dt_softplus else dt, A, B, C


def _make_zero_state(x: Tensor, B: Tensor) -> Tensor:
    """A zero state (B, H, P, N)."""
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[2])


def _ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Chunks of equal length; inside a chunk matrix products, between chunks the recurrence.

    The tail is filled with dt = 0: such a step keeps the state and adds nothing.

    What a position adds to itself, or the last one to the chunk's end, has no decay. It is kept apart:
    as exp(s_i - s_i) it would drown the gradient of A, which fast decay makes many times smaller.
    """
    u, dt, A, B, C = _prepare_ssd_inputs(x, dt, A, B, C, dt_bias, dt_softplus)
    length = x.shape[1]
    n_chunks, size = 1, length
    if length > _MAX_CHUNK:
        n_chunks = -(-length // _MAX_CHUNK)
        size = -(-length // n_chunks)
    missing = n_chunks * size - length

    def chunk(t: Tensor) -> Tensor:
        if missing:
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
        return t.reshape(t.shape[0], n_chunks, size, *t.shape[2:])

    uq = chunk(u).transpose(2, 3).contiguous()  # (B, c, H, Q, P)
    bq, cq = chunk(B), chunk(C)  # (B, c, Q, N)
    step = chunk(dt).transpose(2, 3)  # (B, c, H, Q)
    log_decay = (step * A[:, None]).cumsum(-1)  # the sum up to and with q
    whole = log_decay[..., -1:]

    # what each chunk adds to the state at its end, and the chain of states, (B, H, N, P) here
    at_end = torch.arange(size, device=x.device) == size - 1
    remaining_decay = (whole - log_decay).masked_fill(at_end, 0)
    to_end = step * torch.exp(remaining_decay)
    added = (bq[:, :, None] * to_end[..., None]).mT @ uq
    h = _make_zero_state(u, B) if initial_state is None else initial_state.to(u.dtype)
    h, entering = h.mT, []
    for c in range(n_chunks):
        entering.append(h)
        h = torch.addcmul(added[:, c], torch.exp(whole[:, c, :, :, None]), h)
    decayed_queries = cq[:, :, None] * torch.exp(log_decay)[..., None]
    from_before = decayed_queries @ torch.stack(entering, 1)

    weights = _compute_chunk_weights(log_decay, step, bq, cq, D)
    y = torch.baddbmm(from_before.flatten(0, 2), weights.flatten(0, 2), uq.flatten(0, 2))
    y = y.view_as(uq).transpose(2, 3).flatten(1, 2)
    y = y[:, :length].to(x.dtype)
    return (y, h.mT) if return_last_state else y


def _compute_chunk_weights(log_decay: Tensor, step: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    """How position i of a chunk weighs j: log_decay, step (B, c, H, Q), B, C (B, c, Q, N) -> (B, c, H, Q, Q).

    Position i reads j < i, decayed by exp(s_i - s_j), and itself, undecayed, with D. The steps are part of
    the weights, because u is the larger tensor.
    """
    size = step.shape[-1]
    not_before = torch.ones(size, size, dtype=torch.bool, device=step.device).triu()
    gap = log_decay[..., None] - log_decay[..., None, :]
    decay = gap.masked_fill_(not_before, -torch.inf).exp_()
    similarity = (C @ B.mT)[:, :, None]
    weights = decay * similarity * step[..., None, :]
    to_itself = similarity.diagonal(dim1=-2, dim2=-1) * step
    if D is not None:
        to_itself = to_itself + D.to(step.dtype)[:, None]
    weights.diagonal(dim1=-2, dim2=-1).add_(to_itself)
    return weights


_IMPLEMENTATIONS: Implementations = {
    "reference": ssd_ref,
    "torch": _ssd_chunked,
    "triton": _ssd_chunked,  # all products of matrices, which need no kernel of ours
    "mamba_ssm": "mamba_ssm_backend:ssd_mamba_ssm",
}
