"""State space duality, the recurrence of Mamba-2 (arXiv 2405.21060).

    h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * x[t] B[t]^T              state (B, H, P, N)
    y[t] = h[t] C[t] + D * x[t]

One decay per head instead of one per channel and state, so that a whole chunk of positions
is a product of matrices (section 6 of the paper). B and C are shared by all heads
(`ngroups = 1` in `mamba_ssm`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.errors import UserError
from m2rec.ops.backend import Implementations, load_implementation
from m2rec.ops.contracts import (
    check_arguments,
    differentiate_reference,
    drop_time,
    needs_gradient,
    without_autocast,
)

# Work inside a chunk grows with its length, the chain between chunks shrinks with it.
MAX_CHUNK = 64

# of the Triton kernels: L, which a program walks alone, and P and N, whose tiles lie in registers
_MAX_TRITON_LENGTH = 256
_MAX_TRITON_SIZE = 128

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
    """SSD on the chosen backend; arguments and result as in `ssd_ref`.

    `auto` is PyTorch on every device: the Triton kernels are not timed yet.
    """
    check_arguments("ssd", _SHAPES, (x, dt, A, B, C, D, dt_bias, initial_state))
    run = load_implementation(_IMPLEMENTATIONS, "torch" if backend == "auto" else backend, x.device)
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
        rows = torch.arange(x.shape[0], device=x.device)
        remaining = (lengths[:, None] - torch.arange(x.shape[1], device=x.device))[..., None]
        dt = dt.masked_fill(remaining <= 0, 0)
        decay = dt * A
        after = decay.flip(1).cumsum(1).flip(1) - decay  # (B, L, H), of the positions after t only
        # zero already; the mask cuts its gradient, as in _compute_by_chunks
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


def _ssd_torch(
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
    """By chunks; on a CPU with a backward pass of its own, which makes fewer passes than autograd's."""
    u, dt, A, B, C = _prepare_ssd_inputs(x, dt, A, B, C, dt_bias, dt_softplus)
    D = None if D is None else D.to(u.dtype)
    h = _make_zero_state(u, B) if initial_state is None else initial_state.to(u.dtype)
    given = (u, dt, A, B, C, D, h)
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and needs_gradient(*given):
        y, h = _ChunkedSSD.apply(*given)  # type: ignore[no-untyped-call]
    else:
        y, h = _compute_by_chunks(*given)
    y = y.to(x.dtype)
    return (y, h) if return_last_state else y


class _Chunks(NamedTuple):
    """A sequence in c chunks of Q positions."""

    u: Tensor
    """(B, c, H, Q, P)"""
    step: Tensor
    """(B, c, H, Q)"""
    log_decay: Tensor
    """(B, c, H, Q), the sum of step * A within the chunk, up to and with each position."""
    B: Tensor
    """(B, c, Q, N)"""
    C: Tensor
    """(B, c, Q, N)"""


class _Products(NamedTuple):
    """What the result of a chunk is made of."""

    entering: Tensor
    """(B, c, H, N, P), the state before each chunk."""
    decay: Tensor
    """(B, c, H, Q, Q), from a position to a later one; 0 elsewhere."""
    similarity: Tensor
    """(B, c, Q, Q), C @ B.mT."""
    weights: Tensor
    """(B, c, H, Q, Q), how position i weighs j."""


def split_into_chunks(length: int) -> tuple[int, int]:
    """The number of chunks and their equal size; together they are `length` positions or a few more."""
    if length <= MAX_CHUNK:
        return 1, length
    n_chunks = -(-length // MAX_CHUNK)
    return n_chunks, -(-length // n_chunks)


def _compute_by_chunks(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunks of equal length; inside a chunk matrix products, between chunks the recurrence.

    What a position adds to itself, or the last one to the chunk's end, has no decay. It is kept apart:
    as exp(s_i - s_i) it would drown the gradient of A, which fast decay makes many times smaller.

    Returns:
        y (B, L, H, P) and the last state (B, H, P, N).
    """
    chunks = _cut_into_chunks(u, dt, A, B, C)
    products, h = _multiply_chunks(chunks, D, h.mT.contiguous())
    return _join_chunks(_sum_outputs(chunks, products), u.shape[1]), h.mT


def _cut_time(t: Tensor) -> Tensor:
    """(B, L, ...) -> (B, c, Q, ...), the tail filled with zeros: a step of 0 changes no state."""
    n_chunks, size = split_into_chunks(t.shape[1])
    missing = n_chunks * size - t.shape[1]
    if missing:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
    return t.reshape(t.shape[0], n_chunks, size, *t.shape[2:])


def _join_chunks(t: Tensor, length: int) -> Tensor:
    """(B, c, H, Q, ...) -> (B, L, H, ...)."""
    return t.transpose(2, 3).flatten(1, 2)[:, :length]


def _cut_into_chunks(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> _Chunks:
    step = _cut_time(dt).transpose(2, 3).contiguous()
    log_decay = (step * A[:, None]).cumsum(-1)
    return _Chunks(_cut_time(u).transpose(2, 3).contiguous(), step, log_decay, _cut_time(B), _cut_time(C))


def _compute_decay_to_end(log_decay: Tensor) -> Tensor:
    """exp of what decays after each position of a chunk, (B, c, H, Q); 1 for the last."""
    remaining = log_decay[..., -1:] - log_decay
    return remaining.masked_fill(_mark_end(log_decay), 0).exp()


def _mark_end(log_decay: Tensor) -> Tensor:
    """(Q,) True for the last position."""
    size = log_decay.shape[-1]
    return torch.arange(size, device=log_decay.device) == size - 1


def _multiply_chunks(chunks: _Chunks, D: Tensor | None, h: Tensor) -> tuple[_Products, Tensor]:
    """The products of all chunks and the last state, from the first one h (B, H, N, P)."""
    u, step, log_decay, B, C = chunks
    to_end = step * _compute_decay_to_end(log_decay)
    added = (B[:, :, None] * to_end[..., None]).mT @ u  # to the state at the chunk's end
    whole_decay, entering = torch.exp(log_decay[..., -1, None, None]), []
    for c in range(u.shape[1]):
        entering.append(h)
        h = torch.addcmul(added[:, c], whole_decay[:, c], h)
    size = u.shape[3]
    not_before = torch.ones(size, size, dtype=torch.bool, device=u.device).triu()
    gap = log_decay[..., None] - log_decay[..., None, :]
    decay = gap.masked_fill_(not_before, -torch.inf).exp_()
    similarity = C @ B.mT
    weights = _compute_chunk_weights(decay, similarity[:, :, None], step, D)
    return _Products(torch.stack(entering, 1), decay, similarity, weights), h


def _compute_chunk_weights(decay: Tensor, similarity: Tensor, step: Tensor, D: Tensor | None) -> Tensor:
    """How position i of a chunk weighs j: decay (B, c, H, Q, Q), similarity (B, c, 1, Q, Q) -> as decay.

    Position i reads j < i, decayed by exp(s_i - s_j), and itself, undecayed, with D. The steps are part of
    the weights, because u is the larger tensor.
    """
    weights = decay * similarity * step[..., None, :]
    to_itself = similarity.diagonal(dim1=-2, dim2=-1) * step
    if D is not None:
        to_itself = to_itself + D[:, None]
    weights.diagonal(dim1=-2, dim2=-1).add_(to_itself)
    return weights


def _sum_outputs(chunks: _Chunks, products: _Products) -> Tensor:
    """y of all chunks (B, c, H, Q, P): what the state before the chunk gives, and the chunk itself."""
    queries = chunks.C[:, :, None] * torch.exp(chunks.log_decay)[..., None]
    from_before, u = queries @ products.entering, chunks.u
    y = torch.baddbmm(from_before.flatten(0, 2), products.weights.flatten(0, 2), u.flatten(0, 2))
    return y.view_as(u)


class _ChunkedSSD(torch.autograd.Function):
    """`_compute_by_chunks` with its backward pass, which reads what the forward pass has made."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Arguments and results as of `_compute_by_chunks`."""
        chunks = _cut_into_chunks(u, dt, A, B, C)
        products, last = _multiply_chunks(chunks, D, h.mT.contiguous())
        ctx.save_for_backward(u, dt, A, B, C, D, h, *chunks, *products)
        return _join_chunks(_sum_outputs(chunks, products), u.shape[1]), last.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of all arguments."""
        given, kept = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        if torch.is_grad_enabled():
            return tuple(differentiate_reference(_compute_by_chunks, given, grads))
        chunks, products = _Chunks(*kept[:5]), _Products(*kept[5:])
        A, D, length = given[2], given[5], given[0].shape[1]
        dy = _cut_time(grads[0]).transpose(2, 3).contiguous()
        dleaving, dh = _walk_states_back(chunks, dy, grads[1].mT.contiguous())
        du = _compute_input_gradient(chunks, products, dy, dleaving)
        dstep, dlog_decay, dB, dC, dD = _differentiate_products(chunks, products, dy, dleaving)
        later = dlog_decay.flip(-1).cumsum(-1).flip(-1)  # all decays that a step is part of
        dA = (later * chunks.step).sum((0, 1, 3))
        dstep = dstep + later * A[:, None]
        dB, dC = (t.flatten(1, 2)[:, :length] for t in (dB, dC))
        du, ddt = _join_chunks(du, length), _join_chunks(dstep, length)
        return du, ddt, dA, dB, dC, None if D is None else dD, dh.mT


def _walk_states_back(chunks: _Chunks, dy: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the states after each chunk (B, c, H, N, P), and of the first state.

    Args:
        chunks: the sequence.
        dy: (B, c, H, Q, P).
        dh: (B, H, N, P), the gradient of the last state.
    """
    queries = chunks.C[:, :, None] * torch.exp(chunks.log_decay)[..., None]
    read = queries.mT @ dy
    whole_decay = torch.exp(chunks.log_decay[..., -1, None, None])
    dleaving = torch.empty_like(read)
    for c in reversed(range(read.shape[1])):
        dleaving[:, c] = dh
        dh = torch.addcmul(read[:, c], whole_decay[:, c], dh)
    return dleaving, dh


def _compute_input_gradient(chunks: _Chunks, products: _Products, dy: Tensor, dleaving: Tensor) -> Tensor:
    """(B, c, H, Q, P): through the state at the chunk's end, and within the chunk."""
    to_end = chunks.step * _compute_decay_to_end(chunks.log_decay)
    through_state = (chunks.B[:, :, None] * to_end[..., None]) @ dleaving
    inside = products.weights.mT.flatten(0, 2)
    return torch.baddbmm(through_state.flatten(0, 2), inside, dy.flatten(0, 2)).view_as(dy)


def _differentiate_products(
    chunks: _Chunks, products: _Products, dy: Tensor, dleaving: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of step and log_decay (B, c, H, Q), of B and C (B, c, Q, N), and of D (H,)."""
    u, step, log_decay, B, C = chunks
    entering, decay, similarity, _ = products
    until, after = torch.exp(log_decay), _compute_decay_to_end(log_decay)
    dqueries, dkeys = dy @ entering.mT, u @ dleaving.mT  # (B, c, H, Q, N)
    dto_end = _sum_last(dkeys * B[:, :, None])
    dafter = (dto_end * step * after).masked_fill(_mark_end(log_decay), 0)
    dlog_decay = _sum_last(dqueries * C[:, :, None]).mul_(until).sub_(dafter)
    dlog_decay[..., -1] += dafter.sum(-1) + until[..., -1] * (entering * dleaving).sum((-2, -1))

    dweights = dy @ u.mT
    to_itself = dweights.diagonal(dim1=-2, dim2=-1).clone()
    dstep = to_itself * similarity.diagonal(dim1=-2, dim2=-1)[:, :, None] + dto_end * after
    decayed = dweights.mul_(decay)
    dsimilarity = _sum_heads(decayed, step[..., None, :])
    dsimilarity.diagonal(dim1=-2, dim2=-1).add_((to_itself * step).sum(2))
    per_step = decayed.mul_(similarity[:, :, None])
    read = per_step.sum(-2)  # of each position, by the later ones
    dlog_decay += (per_step @ step[..., None])[..., 0] - read * step
    dB = _sum_heads(dkeys, (step * after)[..., None]) + dsimilarity.mT @ C
    dC = _sum_heads(dqueries, until[..., None]) + dsimilarity @ B
    return dstep + read, dlog_decay, dB, dC, to_itself.sum((0, 1, 3))


def _sum_last(t: Tensor) -> Tensor:
    """t.sum(-1), as a product, which is several times faster for short rows."""
    return t @ t.new_ones(t.shape[-1])


def _sum_heads(t: Tensor, factor: Tensor) -> Tensor:
    """(t * factor).sum(2) for t (B, c, H, ...), head by head."""
    heads = list(zip(t.unbind(2), factor.unbind(2), strict=True))
    total = heads[0][0] * heads[0][1]
    for head, its_factor in heads[1:]:
        total.addcmul_(head, its_factor)
    return total


def _ssd_triton(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Our kernels; long sequences and wide states, for which they are not made, go to PyTorch."""
    if x.shape[1] > _MAX_TRITON_LENGTH or max(x.shape[3], B.shape[2]) > _MAX_TRITON_SIZE:
        return _ssd_torch(x, dt, A, B, *others)
    from m2rec.ops.ssd_triton import ssd_triton  # needs triton

    return ssd_triton(x, dt, A, B, *others)


_IMPLEMENTATIONS: Implementations = {
    "reference": ssd_ref,
    "torch": _ssd_torch,
    "triton": _ssd_triton,
    "mamba_ssm": "mamba_ssm_backend:ssd_mamba_ssm",
}
