"""Causal depthwise convolution over time, the short filter in front of each scan."""

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.ops.backend import Implementations, load_implementation
from m2rec.ops.contracts import check_arguments, without_autocast

_SHAPES = {"x": "BLE", "weight": "EK", "bias": "E"}


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
    dtype = torch.promote_types(x.dtype, torch.float32)
    length, taps = x.shape[1], weight.shape[1]
    inputs, kernel = x.to(dtype).transpose(1, 2), weight.to(dtype).unsqueeze(1)
    shift = None if bias is None else bias.to(dtype)
    y = F.conv1d(inputs, kernel, shift, padding=taps - 1, groups=x.shape[2])
    y = y[..., :length].transpose(1, 2)
    return (F.silu(y) if silu else y).to(x.dtype)


_IMPLEMENTATIONS: Implementations = {
    "reference": causal_conv1d_ref,
    "torch": _causal_conv1d_torch,
    "triton": "causal_conv1d_triton:causal_conv1d_triton",
    "mamba_ssm": "mamba_ssm_backend:causal_conv1d_mamba_ssm",
}
