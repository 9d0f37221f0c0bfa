"""Causal depthwise convolution over time, the short filter in front of each scan."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.ops.backend import Implementations, load_implementation
from m2rec.ops.contracts import (
    check_arguments,
    differentiate_reference,
    needs_gradient,
    without_autocast,
)

_SHAPES = {"x": "BLE", "weight": "EK", "bias": "E"}

# of one operand of a block of rows; several operands of this size still share a third-level cache
_BLOCK_BYTES = 2**21


def causal_conv1d_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    """The definition: y[t] = bias + sum_k weight[k] * x[t - (K - 1) + k], then SiLU.

    Args:
        x: (B, L, E). Positions before the first count as zero.
        weight: (E, K); its last tap weighs the present position, as in `nn.Conv1d`.
        bias: (E,) or None.
        silu: apply SiLU to the result.

    Returns:
        (B, L, E) in the type of x, computed in float32 at least, whatever the types of the others.

    Raises:
        ValueError: an argument is not of its shape, or complex or integer.
    """
    check_arguments("causal_conv1d", _SHAPES, (x, weight, bias))
    dtype = torch.promote_types(x.dtype, torch.float32)
    length, taps = x.shape[1], weight.shape[1]
    padded = F.pad(x.to(dtype), (0, 0, taps - 1, 0))
    y = torch.zeros_like(x, dtype=dtype)
    for k in range(taps):
        y = y + weight[:, k].to(dtype) * padded[:, k : k + length]
    return _add_bias_and_activate(y, bias, silu).to(x.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Causal depthwise convolution; arguments and result as in `causal_conv1d_ref`."""
    check_arguments("causal_conv1d", _SHAPES, (x, weight, bias))
    run = load_implementation(_IMPLEMENTATIONS, backend, x.device)
    with without_autocast(x.device):
        return run(x, weight, bias, silu)  # type: ignore[no-any-return]


def causal_conv1d_step(
    inputs: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True
) -> Tensor:
    """The last position of a whole window: inputs (B, K, E) -> y (B, E); types as in `causal_conv1d_ref`."""
    check_arguments("causal_conv1d_step", {**_SHAPES, "x": "BKE"}, (inputs, weight, bias))
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    y = (inputs.to(dtype) * weight.to(dtype).T).sum(1)
    return _add_bias_and_activate(y, bias, silu).to(inputs.dtype)


def _add_bias_and_activate(y: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    if bias is not None:
        y = y + bias.to(y.dtype)
    return F.silu(y) if silu else y


def _causal_conv1d_torch(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Shifted sums on a CPU; elsewhere and in an exported program PyTorch's convolution.

    Compiled code gets the reference, whose sums a compiler fuses into one loop.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    given = (x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        y = _convolve_channels_first(*given, silu)
    elif torch.compiler.is_compiling():
        y = causal_conv1d_ref(*given, silu)
    elif needs_gradient(*given):
        y = _ShiftedSums.apply(*given, silu)  # type: ignore[no-untyped-call]
    else:
        y = _compute_in_blocks(*given, silu)
    return y.to(x.dtype)


def _convolve_channels_first(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    length, taps = x.shape[1], weight.shape[1]
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=taps - 1, groups=x.shape[2])
    y = y[..., :length].transpose(1, 2)
    return F.silu(y) if silu else y


def _compute_in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The result alone, for inference."""
    y, taps = torch.empty_like(x, memory_format=torch.contiguous_format), weight.T.contiguous()
    for rows in _cut_into_blocks(x):
        _add_shifted(x[rows], taps, bias, y[rows])
        if silu:
            F.silu(y[rows], inplace=True)
    return y


def _cut_into_blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x (B, L, E), each of a size that stays in a cache over all taps."""
    size = max(1, _BLOCK_BYTES // (x.shape[1] * x.shape[2] * x.itemsize))
    return (slice(start, start + size) for start in range(0, len(x), size))


def _add_shifted(x: Tensor, taps: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The sum over the taps (K, E) into out, for rows x (b, L, E); every pass reads whole rows."""
    if bias is None:
        torch.mul(x, taps[-1], out=out)
    else:
        torch.addcmul(bias, x, taps[-1], out=out)
    for shift in range(1, min(len(taps), x.shape[1])):
        out[:, shift:].addcmul_(x[:, :-shift], taps[-1 - shift])


class _ShiftedSums(torch.autograd.Function):
    """The convolution and SiLU without a change of layout, a block of rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        """Arguments as of `causal_conv1d_ref`, in one type of float32 at least."""
        before = _compute_in_blocks(x, weight, bias, silu=False)
        ctx.save_for_backward(x, weight, bias, before)
        ctx.silu = silu
        return F.silu(before) if silu else before

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x, weight and bias."""
        x, weight, bias, before = ctx.saved_tensors
        if torch.is_grad_enabled():
            reference = partial(causal_conv1d_ref, silu=ctx.silu)
            return *differentiate_reference(reference, (x, weight, bias), grads), None
        dx, taps = torch.empty_like(before), weight.T.contiguous()
        dtaps, dbias = torch.zeros_like(taps), before.new_zeros(len(weight))
        for rows in _cut_into_blocks(x):
            g = grads[0][rows]
            if ctx.silu:
                g = torch.ops.aten.silu_backward(g, before[rows])
            _add_block_gradients(x[rows], g, taps, dx[rows], dtaps)
            dbias += g.sum((0, 1))
        return dx, dtaps.T, None if bias is None else dbias, None


def _add_block_gradients(x: Tensor, g: Tensor, taps: Tensor, dx: Tensor, dtaps: Tensor) -> None:
    """The gradient g (b, L, E) of a block's sums: its dx is written, its dtaps (K, E) is added."""
    torch.mul(g, taps[-1], out=dx)
    dtaps[-1] += (g * x).sum((0, 1))
    for shift in range(1, min(len(taps), x.shape[1])):
        later, earlier = g[:, shift:], x[:, :-shift]
        dx[:, :-shift].addcmul_(later, taps[-1 - shift])
        dtaps[-1 - shift] += (later * earlier).sum((0, 1))


_IMPLEMENTATIONS: Implementations = {
    "reference": causal_conv1d_ref,
    "torch": _causal_conv1d_torch,
    "triton": "causal_conv1d_triton:causal_conv1d_triton",
    "mamba_ssm": "mamba_ssm_backend:causal_conv1d_mamba_ssm",
}
