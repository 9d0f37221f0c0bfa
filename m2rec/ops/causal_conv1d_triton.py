"""Causal depthwise convolution with SiLU as Triton kernels, reading and writing (B, L, E) as it lies.

A program takes one sequence and one block of channels and walks over time in tiles. All
arithmetic is float32. The weight's gradient is a partial sum per sequence, added up by torch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2rec.ops.contracts import first_derivative_only, make_last_dim_contiguous, refuse_float64

_BLOCK_L = 16
_BLOCK_E = 64


def causal_conv1d_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    """Arguments and result as in `causal_conv1d_ref`, computed in float32.

    Raises:
        ValueError: x is float64, for which the kernels are not made.
    """
    refuse_float64(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device; backward runs on that of forward
        return _Conv.apply(x, weight, bias, silu)  # type: ignore[no-any-return]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        """x (B, L, E), weight (E, K), bias (E,) -> (B, L, E)."""
        x, weight = make_last_dim_contiguous(x), make_last_dim_contiguous(weight)
        batch, length, channels = x.shape
        y = x.new_empty(x.shape)
        _forward_kernel[(batch, triton.cdiv(channels, _BLOCK_E))](
            x, weight, bias, y, length, x.stride(0), x.stride(1), weight.stride(0),
            E=channels, K=weight.shape[1], SILU=silu, BLOCK_L=_BLOCK_L, BLOCK_E=_BLOCK_E, num_warps=2,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias)
        ctx.silu = silu
        return y

    @staticmethod
    @first_derivative_only("causal_conv1d", "scan_backend: torch or reference")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x, weight and bias."""
        x, weight, bias = ctx.saved_tensors
        batch, length, channels = x.shape
        dy = make_last_dim_contiguous(grads[0])
        dx, taps = x.new_empty(x.shape), weight.shape[1]
        dweight = x.new_empty(batch, taps, channels, dtype=torch.float32)
        dbias = x.new_empty(batch, channels, dtype=torch.float32)
        _backward_kernel[(batch, triton.cdiv(channels, _BLOCK_E))](
            x, weight, bias, dy, dx, dweight, dbias,
            length, x.stride(0), x.stride(1), weight.stride(0), dy.stride(0), dy.stride(1),
            E=channels, K=taps, SILU=ctx.silu, BLOCK_L=_BLOCK_L, BLOCK_E=_BLOCK_E,
            BLOCK_K=triton.next_power_of_2(taps), num_warps=4,
        )  # fmt: skip
        dbias = None if bias is None else dbias.sum(0).to(bias.dtype)
        return dx, dweight.sum(0).T.to(weight.dtype), dbias, None


@triton.jit
def _convolve_tile(
    x, weight, shift, t, e, L, x_l: tl.constexpr, w_e: tl.constexpr, E: tl.constexpr, K: tl.constexpr
):
    """bias + sum_k weight[k] x[t - (K - 1) + k] for a tile of steps t and channels e."""
    total = tl.zeros([t.shape[0], e.shape[0]], tl.float32) + shift[None, :]
    for k in tl.static_range(K):
        source = t - (K - 1) + k
        inside = ((source >= 0) & (source < L))[:, None] & (e < E)[None, :]
        tap = tl.load(weight + e * w_e + k, mask=e < E, other=0.0).to(tl.float32)
        value = tl.load(x + source[:, None] * x_l + e[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tap[None, :] * value
    return total


@triton.jit
def _forward_kernel(
    x, weight, bias, y, L, x_b, x_l: tl.constexpr, w_e: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    shift = tl.zeros([BLOCK_E], tl.float32)
    if bias is not None:
        shift = tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    for start in range(0, L, BLOCK_L):
        t = start + tl.arange(0, BLOCK_L)
        value = _convolve_tile(x + b * x_b, weight, shift, t, e, L, x_l, w_e, E, K)
        if SILU:
            value *= tl.sigmoid(value)
        inside = (t < L)[:, None] & (e < E)[None, :]
        tl.store(y + b * L * E + t[:, None] * E + e[None, :], value, mask=inside)


@triton.jit
def _backward_kernel(
    x, weight, bias, dy, dx, dweight, dbias,
    L, x_b, x_l: tl.constexpr, w_e: tl.constexpr, dy_b, dy_l: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    in_e = e < E
    x += b * x_b
    taps = tl.arange(0, BLOCK_K)[:, None]
    sum_weight = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    sum_bias = tl.zeros([BLOCK_E], tl.float32)
    shift = tl.zeros([BLOCK_E], tl.float32)
    if bias is not None:
        shift = tl.load(bias + e, mask=in_e, other=0.0).to(tl.float32)
    for start in range(0, L, BLOCK_L):
        t = start + tl.arange(0, BLOCK_L)
        total = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
        for k in tl.static_range(K):
            # x[t] reached the output at t + K - 1 - k through tap k
            target = t + (K - 1 - k)
            inside = (target < L)[:, None] & in_e[None, :]
            grad = tl.load(dy + b * dy_b + target[:, None] * dy_l + e[None, :], mask=inside, other=0.0)
            grad = grad.to(tl.float32)
            if SILU:
                value = _convolve_tile(x, weight, shift, target, e, L, x_l, w_e, E, K)
                sigmoid = tl.sigmoid(value)
                grad *= sigmoid * (1.0 + value * (1.0 - sigmoid))
            tap = tl.load(weight + e * w_e + k, mask=in_e, other=0.0).to(tl.float32)
            total += tap[None, :] * grad
            here = tl.load(
                x + t[:, None] * x_l + e[None, :], mask=(t < L)[:, None] & in_e[None, :], other=0.0
            )
            share = tl.sum(here.to(tl.float32) * grad, axis=0)
            sum_weight += tl.where(taps == k, share[None, :], 0.0)
            if k == K - 1:
                sum_bias += tl.sum(grad, axis=0)
        inside = (t < L)[:, None] & in_e[None, :]
        tl.store(dx + b * L * E + t[:, None] * E + e[None, :], total, mask=inside)
    tl.store(dweight + b * K * E + taps * E + e[None, :], sum_weight, mask=(taps < K) & in_e[None, :])
    tl.store(dbias + b * E + e, sum_bias, mask=in_e)
