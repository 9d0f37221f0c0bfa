"""State space duality as Triton kernels, for many short sequences on a GPU: two registered operators.

A program takes one sequence, one head and a block of the head's width, and walks over time in chunks with
the state in registers; inside a chunk everything is a product of matrices. Forward saves the state before
every chunk. Backward takes the chunks from the last to the first with the gradient of the state in registers.
Sums over heads and over the batch are partial sums, added up by torch: no atomics, so the same result on
every run. The gradients of the decays are sums of what each decay is part of, without differences, so that
float32 is enough where decay is fast.

`m2rec::ssd` and `m2rec::ssd_backward` have shapes that PyTorch can compute without running them, so
`torch.compile` and `torch.export` see one call. x, B and C are read in place, whatever their strides over
batch, time and heads; all arithmetic is float32. Not timed on a GPU yet.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from m2rec.ops.contracts import (
    first_derivative_only,
    make_last_dim_contiguous,
    needs_gradient,
    refuse_float64,
)

# Steps of a chunk, and channels of a block at most: with 32 states the compiled backward pass then just fits
# into a thread's 255 registers, and with chunks of 32 it does not. `tl.dot` takes no side below 16.
_CHUNK = 16
_MAX_BLOCK_P = 32
_MIN_BLOCK = 16


def ssd_triton(
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
    """Arguments and result as in `ssd_ref`, computed in float32.

    Raises:
        ValueError: x is float64, for which the kernels are not made.
    """
    refuse_float64(x)
    dt = dt.float()
    if dt_bias is not None:
        dt = dt + dt_bias.float()
    dt = F.softplus(dt) if dt_softplus else dt
    D = None if D is None else D.float()
    state = None if initial_state is None else initial_state.float()
    save = needs_gradient(x, dt, A, B, C, D, state)
    y, last, _ = _ssd(x, dt, A.float(), B, C, D, state, save)
    return (y, last) if return_last_state else y


@torch.library.custom_op("m2rec::ssd", mutates_args=())
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, H, P), the last state (B, H, P, N) and, with `save`, the states before every chunk."""
    y, last, saved = _make_outputs(x, dt, B, save)
    x, B, C = (make_last_dim_contiguous(t) for t in (x, B, C))
    batch, length, heads, width = x.shape
    sizes = _choose_block_sizes(x, B)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _forward_kernel[(batch, heads, triton.cdiv(width, sizes["BLOCK_P"]))](
            x, dt.contiguous(), A.contiguous(), B, C, _make_contiguous(D), _make_contiguous(state),
            y, last, saved, length, saved.shape[2], heads, *_get_strides(x, B, C), **sizes,
            num_warps=_choose_warps(sizes), num_stages=1,
        )  # fmt: skip
    return y, last, saved


@_ssd.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _make_outputs(x, dt, B, others[-1])


def _make_outputs(x: Tensor, dt: Tensor, B: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = x.shape
    state = (width, B.shape[2])
    chunks = -(-length // _CHUNK) if save else 0
    y, last = x.new_empty(x.shape), dt.new_empty(batch, heads, *state)
    return y, last, dt.new_empty(batch, heads, chunks, *state)


@torch.library.custom_op("m2rec::ssd_backward", mutates_args=())
def _ssd_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and the first state; that of D is empty without D."""
    x, B, C, dy = (make_last_dim_contiguous(t) for t in (x, B, C, dy))
    batch, length, heads, width = x.shape
    states = B.shape[2]
    sizes = _choose_block_sizes(x, B)
    blocks = triton.cdiv(width, sizes["BLOCK_P"])
    dx, ddt = x.new_empty(x.shape), dt.new_empty(blocks, *dt.shape)
    dA = dt.new_empty(blocks, batch, heads)
    dB, dC = (dt.new_empty(heads * blocks, batch, length, states) for _ in range(2))
    dD = None if D is None else dt.new_empty(blocks, batch, heads)
    dstate = dt.new_empty(batch, heads, width, states)
    with torch.cuda.device_of(x):
        _backward_kernel[(batch, heads, blocks)](
            x, dt.contiguous(), A.contiguous(), B, C, _make_contiguous(D), saved, dy, _make_contiguous(dlast),
            dx, ddt, dA, dB, dC, dD, dstate, batch, length, saved.shape[2], heads,
            *_get_strides(x, B, C, dy), **sizes, num_warps=_choose_warps(sizes), num_stages=1,
        )  # fmt: skip
    dD_sum = dt.new_empty(0) if dD is None else dD.sum((0, 1))
    return dx, ddt.sum(0), dA.sum((0, 1)), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD_sum, dstate


@_ssd_backward.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, saved: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    dx, ddt, dA, dB, dC = (t.new_empty(t.shape) for t in (x, dt, A, B, C))
    dD = A.new_empty(0 if D is None else len(A))
    return dx, ddt, dA, dB, dC, dD, dt.new_empty(*saved.shape[:2], *saved.shape[3:])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, state, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.has_state = state is not None
    ctx.set_materialize_grads(False)


@first_derivative_only("ssd", "scan_backend: torch or reference")
def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Tensor | None) -> Any:
    x, dt, A, B, C, D, saved = ctx.saved_tensors
    dy = x.new_zeros(x.shape) if dy is None else dy
    dx, ddt, dA, dB, dC, dD, dstate = _ssd_backward(x, dt, A, B, C, D, saved, dy, dlast)
    return dx, ddt, dA, dB, dC, None if D is None else dD, dstate if ctx.has_state else None, None


_ssd.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _make_contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _choose_block_sizes(x: Tensor, B: Tensor) -> dict[str, int]:
    """The constants that both kernels are compiled with."""
    width, states = x.shape[3], B.shape[2]
    return {
        "P": width,
        "N": states,
        "CHUNK": _CHUNK,
        "BLOCK_P": min(_MAX_BLOCK_P, max(_MIN_BLOCK, triton.next_power_of_2(width))),
        "BLOCK_N": max(_MIN_BLOCK, triton.next_power_of_2(states)),
    }


def _choose_warps(sizes: dict[str, int]) -> int:
    """More threads for wider tiles, so that they stay in registers."""
    return 8 if sizes["BLOCK_N"] > 64 else 4


def _get_strides(x: Tensor, B: Tensor, C: Tensor, dy: Tensor | None = None) -> tuple[int, ...]:
    """Elements from one sequence, one step and, for x and dy, one head to the next."""
    found = (*x.stride()[:3], *B.stride()[:2], *C.stride()[:2])
    return found if dy is None else (*found, *dy.stride()[:3])


@triton.jit
def _dot(a, b):
    """The product of two matrices, in float32 throughout: by default a GPU would round what it multiplies."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load_tile(start, row, column, in_row, in_column, stride):
    """(rows, columns) in float32; zero outside."""
    inside = in_row[:, None] & in_column[None, :]
    return tl.load(start + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _compute_decays(step, a, row):
    """Of a chunk: from position j to i >= j (CHUNK, CHUNK), to each position, from it to the end, of all."""
    log_decay = step * a
    until = tl.cumsum(log_decay, 0)
    whole = tl.sum(log_decay, 0)
    before = row[None, :] < row[:, None]
    gap = tl.where(before, until[:, None] - until[None, :], 0.0)
    between = tl.where(row[None, :] <= row[:, None], tl.exp(gap), 0.0)
    return between, tl.exp(until), tl.exp(whole - until), tl.exp(whole)


@triton.jit
def _forward_kernel(
    x, dt, A, B, C, D, h0, y, last, saved,
    L, chunks, H,
    x_b, x_l: tl.constexpr, x_h, B_b, B_l: tl.constexpr, C_b, C_l: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    n, row = tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    in_p, in_n = p < P, n < N
    inside = in_p[:, None] & in_n[None, :]
    place = p[:, None] * N + n[None, :]  # in a state (P, N)
    x += b * x_b + h * x_h
    B += b * B_b
    C += b * C_b
    y += (b * L * H + h) * P
    dt += b * L * H + h
    a = tl.load(A + h)
    d = 0.0
    if D is not None:
        d = tl.load(D + h)
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if h0 is not None:
        state = tl.load(h0 + (b * H + h) * P * N + place, mask=inside, other=0.0)
    for start in range(0, L, CHUNK):
        if chunks > 0:
            here = ((b * H + h) * chunks + start // CHUNK) * P * N
            tl.store(saved + here + place, state, mask=inside)
        t = start + row
        in_t = t < L
        u = _load_tile(x, t, p, in_t, in_p, x_l)
        key = _load_tile(B, t, n, in_t, in_n, B_l)
        query = _load_tile(C, t, n, in_t, in_n, C_l)
        step = tl.load(dt + t * H, mask=in_t, other=0.0)
        between, until, after, whole = _compute_decays(step, a, row)
        weights = between * _dot(query, tl.trans(key)) * step[None, :]
        out = _dot(weights, u) + _dot(query * until[:, None], tl.trans(state)) + d * u
        tl.store(y + t[:, None] * (H * P) + p[None, :], out, mask=in_t[:, None] & in_p[None, :])
        state = whole * state + _dot(tl.trans(u), key * (after * step)[:, None])
    tl.store(last + (b * H + h) * P * N + place, state, mask=inside)


@triton.jit
def _backward_kernel(
    x, dt, A, B, C, D, saved, dy, dlast,
    dx, ddt, dA, dB, dC, dD, dstate,
    batch, L, chunks, H,
    x_b, x_l: tl.constexpr, x_h, B_b, B_l: tl.constexpr, C_b, C_l: tl.constexpr,
    dy_b, dy_l: tl.constexpr, dy_h,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    n, row = tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    in_p, in_n = p < P, n < N
    inside = in_p[:, None] & in_n[None, :]
    place = p[:, None] * N + n[None, :]
    earlier = row[:, None] < row[None, :]  # True where the first index is before the second
    x += b * x_b + h * x_h
    B += b * B_b
    C += b * C_b
    dy += b * dy_b + h * dy_h
    dx += (b * L * H + h) * P
    dt += b * L * H + h
    ddt += (block * batch + b) * L * H + h  # this block's share
    partial = ((h * tl.num_programs(2) + block) * batch + b) * L * N  # its share of dB and dC
    dB += partial
    dC += partial
    a = tl.load(A + h)
    d = 0.0
    if D is not None:
        d = tl.load(D + h)
    sum_a = 0.0
    sum_d = 0.0
    g = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)  # the gradient of the state after the chunk
    if dlast is not None:
        g = tl.load(dlast + (b * H + h) * P * N + place, mask=inside, other=0.0)
    for done in range(chunks):
        chunk = chunks - 1 - done
        t = chunk * CHUNK + row
        in_t = t < L
        u = _load_tile(x, t, p, in_t, in_p, x_l)
        grad = _load_tile(dy, t, p, in_t, in_p, dy_l)
        key = _load_tile(B, t, n, in_t, in_n, B_l)
        query = _load_tile(C, t, n, in_t, in_n, C_l)
        step = tl.load(dt + t * H, mask=in_t, other=0.0)
        state = tl.load(saved + ((b * H + h) * chunks + chunk) * P * N + place, mask=inside, other=0.0)
        between, until, after, whole = _compute_decays(step, a, row)
        similarity = _dot(query, tl.trans(key))
        to_end = after * step

        weights = between * similarity * step[None, :]
        du = _dot(tl.trans(weights), grad) + _dot(key * to_end[:, None], tl.trans(g)) + d * grad
        tl.store(dx + t[:, None] * (H * P) + p[None, :], du, mask=in_t[:, None] & in_p[None, :])

        decayed = _dot(grad, tl.trans(u)) * between  # of the weights, without step
        dsimilarity = decayed * step[None, :]
        read = _dot(grad, state) * until[:, None]
        dquery = _dot(dsimilarity, key) + read
        added = _dot(u, g)
        dkey = _dot(tl.trans(dsimilarity), query) + added * to_end[:, None]
        in_tile = in_t[:, None] & in_n[None, :]
        tl.store(dC + t[:, None] * N + n[None, :], dquery, mask=in_tile)
        tl.store(dB + t[:, None] * N + n[None, :], dkey, mask=in_tile)

        # what each decay is part of: pairs around it, the past that later positions read, what earlier
        # positions leave in the state, the state itself
        pairs = _dot(dsimilarity * similarity, tl.where(earlier, 1.0, 0.0))  # (i, t): of i with all before t
        per_added = tl.sum(added * key, 1)
        dlog_decay = tl.sum(tl.where(earlier, 0.0, pairs), 0)
        dlog_decay += tl.sum(tl.where(earlier, 0.0, tl.sum(read * query, 1)[:, None]), 0)
        dlog_decay += tl.sum(tl.where(earlier, (per_added * to_end)[:, None], 0.0), 0)
        dlog_decay += whole * tl.sum(tl.sum(state * g, 1), 0)
        dstep = tl.sum(decayed * similarity, 0) + per_added * after + a * dlog_decay
        tl.store(ddt + t * H, dstep, mask=in_t)
        sum_a += tl.sum(dlog_decay * step, 0)
        sum_d += tl.sum(tl.sum(grad * u, 1), 0)
        g = whole * g + _dot(tl.trans(grad), query * until[:, None])
    tl.store(dstate + (b * H + h) * P * N + place, g, mask=inside)
    tl.store(dA + (block * batch + b) * H + h, sum_a)
    if D is not None:
        tl.store(dD + (block * batch + b) * H + h, sum_d)
