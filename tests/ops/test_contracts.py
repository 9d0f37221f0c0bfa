"""What the operators promise alike on every backend."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from m2rec.ops import causal_conv1d, selective_scan, ssd
from tests.ops.test_scans import conv_inputs, needs, on_device, scan_inputs, ssd_inputs

OPERATORS = {
    "selective_scan": (selective_scan, scan_inputs),
    "ssd": (ssd, ssd_inputs),
    "causal_conv1d": (causal_conv1d, conv_inputs),
}

# whose backward pass is written by hand
BY_HAND = {("selective_scan", "torch"), ("selective_scan", "triton"), ("causal_conv1d", "triton")}


def gradient_penalty(function: Callable[..., Any], inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The gradients of |d sum(y^2) / d inputs|^2, which go through second derivatives."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    total = function(**leaves, **options).square().sum()
    first = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values())))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_second_derivatives_are_right_or_refused(name: str, backend: str):
    """Never silently wrong: either those of the reference, or one line that names the way out."""
    needs(backend)
    operator, inputs = OPERATORS[name][0], OPERATORS[name][1](5)
    for decayed in ("delta", "dt"):
        if decayed in inputs:
            inputs[decayed] = inputs[decayed].abs()
    inputs = on_device(inputs, torch.float32 if backend == "triton" else torch.float64)
    if (name, backend) in {
        ("selective_scan", "torch"),
        ("selective_scan", "triton"),
        ("causal_conv1d", "triton"),
    }:
        with pytest.raises(ValueError, match=rf"^{name} has no second derivative .*; use scan_backend: "):
            gradient_penalty(operator, inputs, backend=backend)
        return
    expected = gradient_penalty(operator, inputs, backend="reference")
    actual = gradient_penalty(operator, inputs, backend=backend)
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-4 if backend == "triton" else 1e-8, atol=1e-6)
