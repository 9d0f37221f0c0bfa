"""What the operators promise alike on every backend."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from m2rec.ops import (
    causal_conv1d,
    causal_conv1d_ref,
    causal_conv1d_step,
    selective_scan,
    selective_scan_ref,
    selective_scan_step,
    ssd,
    ssd_last,
    ssd_ref,
    ssd_step,
)
from m2rec.ops.native import SCAN, find_obstacle
from tests.ops.test_scans import (
    DEVICE,
    FLOAT32_ONLY,
    OVER_TIME,
    conv_inputs,
    needs,
    on_device,
    scan_inputs,
    ssd_inputs,
)

OPERATORS = {
    "selective_scan": (selective_scan, scan_inputs),
    "ssd": (ssd, ssd_inputs),
    "causal_conv1d": (causal_conv1d, conv_inputs),
}

TRITON = find_spec("triton") is not None
REFERENCES = {"selective_scan": selective_scan_ref, "ssd": ssd_ref, "causal_conv1d": causal_conv1d_ref}
# whose backward pass is written by hand
BY_HAND = {
    ("selective_scan", "torch"),
    ("selective_scan", "native"),
    ("selective_scan", "triton"),
    ("ssd", "triton"),
    ("causal_conv1d", "triton"),
}


def gradient_penalty(function: Callable[..., Any], inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The gradients of |d sum(y^2) / d inputs|^2, which go through second derivatives."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    total = function(**leaves, **options).square().sum()
    first = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values())))


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_second_derivatives_are_right_or_refused(name: str, backend: str):
    """Never silently wrong: either those of the reference, or one line that names the way out."""
    needs(backend)
    operator, inputs = OPERATORS[name][0], OPERATORS[name][1](5)
    for decayed in ("delta", "dt"):
        if decayed in inputs:
            inputs[decayed] = inputs[decayed].abs()
    inputs = on_device(inputs, torch.float32 if backend in FLOAT32_ONLY else torch.float64)
    if (name, backend) in BY_HAND:
        with pytest.raises(ValueError, match=rf"^{name} has no second derivative .*; use scan_backend: "):
            gradient_penalty(operator, inputs, backend=backend)
        return
    expected = gradient_penalty(operator, inputs, backend="reference")
    actual = gradient_penalty(operator, inputs, backend=backend)
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-4 if backend in FLOAT32_ONLY else 1e-8, atol=1e-6)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("others", [None, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton", "step"])
def test_causal_conv1d_of_any_types(
    backend: str, dtype: torch.dtype, others: torch.dtype | None, autocast: bool
):
    """x, weight and bias as they are given, summed in float32 at least; the result in the type of x.

    The bias's gradient is a sum over 400 positions: in half precision it would be off by a hundredth.
    """
    needs("triton" if backend == "triton" else "torch")
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels compute in float32")
    length = 4 if backend == "step" else 20 if backend == "triton" else 200
    x, weight, bias = on_device(conv_inputs(length), torch.float32).values()
    if backend == "triton" and not torch.cuda.is_available():
        x = x[:1]  # the interpreter takes a tenth of a second for a row
    x, weight, bias = x.to(dtype), weight.to(others or dtype), bias.to(others or dtype).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        if backend == "step":
            y = causal_conv1d_step(x, weight, bias)
        else:
            y = causal_conv1d(x, weight, bias, backend=backend)
    wide = bias.detach().double().requires_grad_()
    expected = causal_conv1d_ref(x.double(), weight.double(), wide)
    if backend == "step":
        expected = expected[:, -1]
    assert y.dtype == dtype
    assert torch.allclose(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    (found,), (true,) = torch.autograd.grad(y.sum(), bias), torch.autograd.grad(expected.sum(), wide)
    assert found.dtype == bias.dtype
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rounding = torch.finfo(bias.dtype).eps + 100 * eps
    assert ((found.double() - true).abs() <= rounding * true.abs().clamp(min=1)).all()


# what is given in an argument's place; some backend once broadcast, cut or rounded each
WRONG = {
    "selective_scan": {
        "u": (2, 0, 5), "delta": (1, 7, 5), "A": (1, 3), "B": (1, 7, 3), "C": (2, 1, 3), "D": (1,),
        "z": (2, 7, 1), "delta_bias": (1,), "initial_state": (1, 5, 3),
    },
    "ssd": {
        "x": (2, 0, 3, 4), "dt": (2, 7, 1), "A": (1,), "B": (1, 7, 5), "C": (2, 1, 5), "D": (3, 4),
        "dt_bias": (1,), "initial_state": (1, 3, 4, 5),
    },
    "causal_conv1d": {"x": (2, 0, 5), "weight": (1, 4), "bias": (1,)},
}  # fmt: skip


def spoilt(name: str, argument: str, what: str) -> tuple[dict[str, Tensor], str]:
    """An operator's arguments with one that it can't take, and what it should say."""
    inputs = on_device(OPERATORS[name][1](7), torch.float64)
    called = argument.removeprefix("initial_")
    if what != "shape":
        inputs[argument] = inputs[argument].to(getattr(torch, what))
        return inputs, f"{called} is torch.{what}, expected real floating-point numbers"
    shape = WRONG[name][argument]
    inputs[argument] = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    if 0 not in shape:
        return inputs, f"{called} has shape {shape}, expected ("
    nothing = {key: value[:, :0] if key in OVER_TIME else value for key, value in inputs.items()}
    return nothing, "the sequence is empty (L = 0); expected at least one position"


@pytest.mark.parametrize("what", ["shape", "complex64", "int64"])
@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, wrong in WRONG.items() for argument in wrong]
)
def test_operators_refuse_alike(name: str, argument: str, what: str):
    """One line on every backend, and by the reference itself."""
    inputs, message = spoilt(name, argument, what)
    expected = "^" + re.escape(f"{name}: {message}")
    with pytest.raises(ValueError, match=expected):
        REFERENCES[name](**inputs)
    for backend in ("reference", "torch", "native", "triton"):
        if (backend == "triton" and not TRITON) or (backend == "native" and find_obstacle(SCAN)):
            continue
        with pytest.raises(ValueError, match=expected):
            OPERATORS[name][0](**inputs, backend=backend)


@pytest.mark.parametrize("what", ["shape", "complex64", "int64"])
@pytest.mark.parametrize("argument", ["A", "D", "initial_state"])
@pytest.mark.parametrize("name", ["selective_scan", "ssd"])
def test_steps_and_ssd_last_refuse_as_the_operators(name: str, argument: str, what: str):
    inputs, message = spoilt(name, argument, what)
    step = selective_scan_step if name == "selective_scan" else ssd_step
    now = {key: value[:, 0] if key in OVER_TIME else value for key, value in inputs.items()}
    with pytest.raises(ValueError, match="^" + re.escape(f"{name}_step: {message}")):
        step(now.pop("initial_state"), **now)
    del inputs["initial_state"]
    if name == "ssd" and argument != "initial_state":
        with pytest.raises(ValueError, match="^" + re.escape(f"ssd_last: {message}")):
            ssd_last(**inputs, lengths=torch.ones(2, dtype=torch.int64, device=DEVICE))


def test_lengths_of_another_batch_are_refused():
    inputs = {key: value for key, value in ssd_inputs(7).items() if key != "initial_state"}
    with pytest.raises(ValueError, match=r"^ssd_last: lengths has shape \(1,\), expected \(B = 2\)"):
        ssd_last(**inputs, lengths=torch.ones(1, dtype=torch.int64))
