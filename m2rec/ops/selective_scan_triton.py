"""Selective scan as Triton kernels, for many short sequences on a GPU.

Recommendation has thousands of sequences of a few hundred steps, so programs of one sequence
and one block of channels fill a GPU without splitting time. Forward walks the steps with the
state in registers and saves it every `_CHUNK` steps. Backward takes the chunks from the last
to the first; for each state dimension it makes a chunk's states and their gradients anew, in
registers, by scans along the chunk. The state never exists for all steps. Sums over the batch
and over channel blocks are partial sums, added up by torch: no atomics, so the same result on
every run.

Inputs are read in place as (B, L, E), whatever their strides over B and L; all arithmetic is
float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2rec.ops.contracts import (
    LOG2_E,
    first_derivative_only,
    make_last_dim_contiguous,
    refuse_float64,
)

# Steps between saved states, which are also the steps of a backward tile: such a tile of 8 x 64
# holds 16 values per thread of each of a dozen arrays, about as much as registers hold.
_CHUNK = 8
_FORWARD_BLOCK = 32
_BACKWARD_BLOCK = 64


def selective_scan_triton(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Arguments and result as in `selective_scan_ref`, computed in float32.

    Raises:
        ValueError: u is float64, for which the kernels are not made.
    """
    refuse_float64(u)
    save = torch.is_grad_enabled()
    with torch.cuda.device_of(u):  # Triton launches on the current device; backward runs on that of forward
        y, last = _Scan.apply(
            u, delta, A.float(), B, C, D, z, delta_bias, initial_state, delta_softplus, save
        )
    return (y, last) if return_last_state else y


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
        initial_state: Tensor | None,
        softplus: bool,
        save: bool,
    ) -> Any:
        """The arguments of `selective_scan_ref` -> y (B, L, E), last state (B, E, N)."""
        u, delta, B, C = (make_last_dim_contiguous(t) for t in (u, delta, B, C))
        z = None if z is None else make_last_dim_contiguous(z)
        batch, length, channels = u.shape
        states = A.shape[1]
        A2 = (A.T * LOG2_E).contiguous()  # (N, E), for decays as powers of two
        h = None if initial_state is None else initial_state.float().mT.contiguous()
        y = u.new_empty(u.shape)
        last = A.new_empty(batch, states, channels)
        chunks = triton.cdiv(length, _CHUNK) if save else 0
        saved = A.new_empty(batch, chunks, states, channels)
        block_n = triton.next_power_of_2(states)
        _forward_kernel[(batch, triton.cdiv(channels, _FORWARD_BLOCK))](
            u, delta, A2, B, C, D, z, bias, h, y, last, saved,
            length, chunks, *_get_strides(u), *_get_strides(delta), *_get_strides(B),
            *_get_strides(C), *_get_strides(z),
            E=channels, N=states, SOFTPLUS=softplus, CHUNK=_CHUNK, BLOCK_N=block_n, BLOCK_E=_FORWARD_BLOCK,
            num_warps=max(1, block_n // 64),
        )  # fmt: skip
        ctx.save_for_backward(u, delta, A2, B, C, D, z, bias, saved)
        ctx.softplus, ctx.state_dtype = softplus, None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return y, last.mT

    @staticmethod
    @first_derivative_only("selective_scan", "scan_backend: reference")
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Gradients of all tensors given to forward."""
        u, delta, A2, B, C, D, z, bias, saved = ctx.saved_tensors
        batch, length, channels = u.shape
        states, blocks = len(A2), triton.cdiv(channels, _BACKWARD_BLOCK)
        dy = u.new_zeros(u.shape) if grads[0] is None else make_last_dim_contiguous(grads[0])
        # runs from the last state's gradient to the initial state's
        dstate = A2.new_zeros(batch, states, channels)
        if grads[1] is not None:
            dstate.copy_(grads[1].mT)
        du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
        dz = None if z is None else z.new_empty(z.shape)
        dB, dC = (A2.new_empty(blocks, batch, length, states) for _ in range(2))
        dA = A2.new_zeros(batch, states, channels)
        dD, dbias = (None if t is None else A2.new_empty(batch, channels) for t in (D, bias))
        _backward_kernel[(batch, blocks)](
            u, delta, A2, B, C, D, z, bias, saved, dy, dstate,
            du, ddelta, dA, dB, dC, dD, dz, dbias,
            batch, length, saved.shape[1],
            *_get_strides(u), *_get_strides(delta), *_get_strides(B), *_get_strides(C),
            *_get_strides(z), *_get_strides(dy),
            E=channels, N=states, SOFTPLUS=ctx.softplus, CHUNK=_CHUNK, BLOCK_E=_BACKWARD_BLOCK, num_warps=1,
        )  # fmt: skip
        return (
            du,
            ddelta,
            dA.sum(0).T,
            dB.sum(0).to(B.dtype),
            dC.sum(0).to(C.dtype),
            None if dD is None else dD.sum(0).to(D.dtype),
            dz,
            None if dbias is None else dbias.sum(0).to(bias.dtype),
            None if ctx.state_dtype is None else dstate.mT.to(ctx.state_dtype),
            None,
            None,
        )


def _get_strides(x: Tensor | None) -> tuple[int, int]:
    """Elements from one sequence to the next and from one step to the next."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) = max(x, 0) + 2 artanh(s) by its series, exact to float32 for small steps too."""
    p = tl.exp(-tl.abs(x))
    s = p / (2.0 + p)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q / 13)))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def _compose_steps(decay_1, sum_1, decay_2, sum_2):
    """The step h -> decay h + sum done first with 1, then with 2."""
    return decay_1 * decay_2, decay_2 * sum_1 + sum_2


@triton.jit
def _load_step_sizes(delta, bias, mask, SOFTPLUS: tl.constexpr):
    """Raw and final step sizes (CHUNK, BLOCK_E); zero, which keeps the state, outside the mask."""
    raw = tl.load(delta, mask=mask, other=0.0).to(tl.float32) + bias
    size = raw
    if SOFTPLUS:
        size = _softplus(raw)
    return raw, tl.where(mask, size, 0.0)


@triton.jit
def _forward_kernel(
    u, delta, A2, B, C, D, z, bias, h0, y, last, saved,
    L, chunks,
    u_b, u_l: tl.constexpr, delta_b, delta_l: tl.constexpr, B_b, B_l: tl.constexpr,
    C_b, C_l: tl.constexpr, z_b, z_l: tl.constexpr,
    E: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e, in_n = e < E, n < N
    inside = in_n[:, None] & in_e[None, :]
    place = n[:, None] * E + e[None, :]  # in a state (N, E): threads lie along E, sums over N stay in one

    u += b * u_b + e
    delta += b * delta_b + e
    B += b * B_b + n
    C += b * C_b + n
    y += b * L * E + e
    a = tl.load(A2 + place, mask=inside, other=0.0)
    d = tl.zeros([BLOCK_E], tl.float32)
    shift = tl.zeros([BLOCK_E], tl.float32)
    h = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if D is not None:
        d = tl.load(D + e, mask=in_e, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + e, mask=in_e, other=0.0).to(tl.float32)
    if h0 is not None:
        h = tl.load(h0 + b * N * E + place, mask=inside, other=0.0)
    for start in range(0, L, CHUNK):
        if chunks > 0:
            tl.store(saved + (b * chunks + start // CHUNK) * N * E + place, h, mask=inside)
        for t in range(start, min(start + CHUNK, L)):
            x = tl.load(u + t * u_l, mask=in_e, other=0.0).to(tl.float32)
            _, size = _load_step_sizes(delta + t * delta_l, shift, in_e, SOFTPLUS)
            b_t = tl.load(B + t * B_l, mask=in_n, other=0.0).to(tl.float32)
            c_t = tl.load(C + t * C_l, mask=in_n, other=0.0).to(tl.float32)
            h = tl.exp2(size[None, :] * a) * h + b_t[:, None] * (size * x)[None, :]
            out = tl.sum(h * c_t[:, None], axis=0) + d * x
            if z is not None:
                gate = tl.load(z + b * z_b + t * z_l + e, mask=in_e, other=0.0).to(tl.float32)
                out *= gate * tl.sigmoid(gate)
            tl.store(y + t * E, out, mask=in_e)
    tl.store(last + b * N * E + place, h, mask=inside)


@triton.jit
def _backward_kernel(
    u, delta, A2, B, C, D, z, bias, saved, dy, dstate,
    du, ddelta, dA, dB, dC, dD, dz, dbias,
    batch, L, chunks,
    u_b, u_l: tl.constexpr, delta_b, delta_l: tl.constexpr, B_b, B_l: tl.constexpr,
    C_b, C_l: tl.constexpr, z_b, z_l: tl.constexpr, dy_b, dy_l: tl.constexpr,
    E: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = tl.arange(0, CHUNK)
    is_first, is_last = row[:, None] == 0, row[:, None] == CHUNK - 1
    in_e = e < E

    saved += b * chunks * N * E
    dstate += b * N * E
    dA += b * N * E
    partial = (tl.program_id(1) * batch + b) * L * N  # this block's share of dB and dC
    d = tl.zeros([BLOCK_E], tl.float32)
    shift = tl.zeros([BLOCK_E], tl.float32)
    sum_d = tl.zeros([BLOCK_E], tl.float32)
    sum_shift = tl.zeros([BLOCK_E], tl.float32)
    if D is not None:
        d = tl.load(D + e, mask=in_e, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + e, mask=in_e, other=0.0).to(tl.float32)

    for done in range(chunks):
        chunk = chunks - 1 - done
        t = chunk * CHUNK + row
        in_t = t < L
        inside = in_t[:, None] & in_e[None, :]
        u_t = u + b * u_b + t[:, None] * u_l + e[None, :]
        delta_t = delta + b * delta_b + t[:, None] * delta_l + e[None, :]
        dy_t = dy + b * dy_b + t[:, None] * dy_l + e[None, :]
        z_t = dy_t
        if z is not None:
            z_t = z + b * z_b + t[:, None] * z_l + e[None, :]
        _, size = _load_step_sizes(delta_t, shift[None, :], inside, SOFTPLUS)
        has_next = (t + 1 < L)[:, None] & in_e[None, :]
        _, next_size = _load_step_sizes(delta_t + delta_l, shift[None, :], has_next, SOFTPLUS)
        added = size * tl.load(u_t, mask=inside, other=0.0).to(tl.float32)
        gated = tl.load(dy_t, mask=inside, other=0.0).to(tl.float32)
        if z is not None:
            gate = tl.load(z_t, mask=inside, other=0.0).to(tl.float32)
            gated *= gate * tl.sigmoid(gate)
        out = tl.zeros([CHUNK, BLOCK_E], tl.float32)
        dadded = tl.zeros([CHUNK, BLOCK_E], tl.float32)
        dsize = tl.zeros([CHUNK, BLOCK_E], tl.float32)
        for n in range(N):
            a = tl.load(A2 + n * E + e, mask=in_e, other=0.0)[None, :]
            b_t = tl.load(B + b * B_b + t * B_l + n, mask=in_t, other=0.0).to(tl.float32)[:, None]
            c_t = tl.load(C + b * C_b + t * C_l + n, mask=in_t, other=0.0).to(tl.float32)[:, None]
            before = tl.load(saved + (chunk * N + n) * E + e, mask=in_e, other=0.0)[None, :]
            after = tl.load(dstate + n * E + e, mask=in_e, other=0.0)[None, :]
            # what comes in from outside joins the first step, so that the product of all decays, which
            # a scan carries along, is never used and never made
            decay, fresh = tl.exp2(size * a), b_t * added
            _, h = tl.associative_scan(
                (decay, fresh + tl.where(is_first, decay * before, 0.0)), 0, _compose_steps
            )
            next_decay, g = tl.exp2(next_size * a), c_t * gated
            g += tl.where(is_last, next_decay * after, 0.0)
            _, g = tl.associative_scan((next_decay, g), 0, _compose_steps, reverse=True)  # the gradient of h
            if z is not None:
                out += c_t * h
            dadded += b_t * g
            dexponent = g * (h - fresh)  # of size * A, since decay * (h before) = h - fresh
            dsize += dexponent * a
            first = g
            if chunk == 0:
                first = g * decay
            tl.store(dstate + n * E + e, tl.sum(tl.where(is_first, first, 0.0), axis=0), mask=in_e)
            share = tl.load(dA + n * E + e, mask=in_e, other=0.0)
            tl.store(dA + n * E + e, share + tl.sum(dexponent * size, axis=0), mask=in_e)
            tl.store(dB + partial + t * N + n, tl.sum(g * added, axis=1), mask=in_t)
            tl.store(dC + partial + t * N + n, tl.sum(h * gated, axis=1), mask=in_t)

        # read again what the loop did not need, so that it does not hold registers there
        x = tl.load(u_t, mask=inside, other=0.0).to(tl.float32)
        dsize = dsize * 0.6931471805599453 + dadded * x  # ln 2, for A2
        if SOFTPLUS:
            raw, _ = _load_step_sizes(delta_t, shift[None, :], inside, SOFTPLUS)
            dsize *= tl.sigmoid(raw)
        here = b * L * E + t[:, None] * E + e[None, :]
        tl.store(du + here, dadded * size + d[None, :] * gated, mask=inside)
        tl.store(ddelta + here, dsize, mask=inside)
        if z is not None:
            gate = tl.load(z_t, mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            grad = tl.load(dy_t, mask=inside, other=0.0).to(tl.float32)
            out += d[None, :] * x
            tl.store(dz + here, grad * out * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=inside)
        sum_d += tl.sum(gated * x, axis=0)
        sum_shift += tl.sum(tl.where(inside, dsize, 0.0), axis=0)
    if D is not None:
        tl.store(dD + b * E + e, sum_d, mask=in_e)
    if bias is not None:
        tl.store(dbias + b * E + e, sum_shift, mask=in_e)
