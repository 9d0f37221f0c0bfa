"""selective_scan, ssd and causal_conv1d: every backend against its reference, outputs and all gradients."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.ops import (
    Backend,
    causal_conv1d,
    causal_conv1d_ref,
    causal_conv1d_step,
    resolve_backend,
    selective_scan,
    selective_scan_ref,
    selective_scan_step,
    ssd,
    ssd_last,
    ssd_ref,
    ssd_step,
)

LENGTHS = [1, 2, 63, 200]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}
FLOAT32_ONLY = ("native", "triton")
Inputs = dict[str, Any]
OVER_TIME = {"u", "x", "delta", "dt", "B", "C", "z"}


def scan_inputs(length: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> Inputs:
    E, N = 5, 3
    shapes = {
        "u": (batch, length, E),
        "delta": (batch, length, E),
        "A": (E, N),
        "B": (batch, length, N),
        "C": (batch, length, N),
        "D": (E,),
        "z": (batch, length, E),
        "delta_bias": (E,),
        "initial_state": (batch, E, N),
    }
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    inputs["A"] = -inputs["A"].exp()
    return {name: value.to(dtype) for name, value in inputs.items()}


def ssd_inputs(
    length: int,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: tuple[int, int, int] = (3, 4, 5),
) -> Inputs:
    H, P, N = heads
    shapes = {
        "x": (batch, length, H, P),
        "dt": (batch, length, H),
        "A": (H,),
        "B": (batch, length, N),
        "C": (batch, length, N),
        "D": (H,),
        "dt_bias": (H,),
        "initial_state": (batch, H, P, N),
    }
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    inputs["A"] = -inputs["A"].exp()
    return {name: value.to(dtype) for name, value in inputs.items()}


def conv_inputs(length: int, channels: int = 5) -> Inputs:
    shapes = {"x": (2, length, channels), "weight": (channels, 4), "bias": (channels,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def outputs_and_gradients(function: Callable[..., Any], inputs: Inputs, **options: Any) -> list[Tensor]:
    """Results, then the gradient of every input under fixed random cotangents."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    results = function(**leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    total = sum((r.double().cpu() * torch.randn(r.shape, generator=generator)).sum() for r in results)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [*results, *(g for g in gradients if g is not None)]


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        a, e = a.double().cpu(), e.double().cpu()
        assert a.shape == e.shape
        assert ((a - e).abs().max() / e.abs().max().clamp(min=1)) < TOLERANCE[dtype]


def needs(backend: str) -> None:
    """Skip, with the reason, where a backend can't run."""
    try:
        resolve_backend(backend, DEVICE)
    except ValueError as error:
        pytest.skip(str(error))


def on_device(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.to(DEVICE, dtype) for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan_torch_equals_reference(length: int, dtype: torch.dtype):
    inputs = scan_inputs(length, dtype)
    options = {"delta_softplus": True, "return_last_state": True}
    wide = {name: value.double() for name, value in inputs.items()}
    expected = outputs_and_gradients(selective_scan_ref, wide, **options)
    actual = outputs_and_gradients(selective_scan, inputs, backend="torch", **options)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.promote_types(dtype, torch.float32)
    assert_close(actual, expected, dtype)


# the interpreter takes seconds for a hundred steps: on a CPU only what differs in kind
KERNEL_LENGTHS = [*LENGTHS, 8, 9, 64, 1000] if GPU else [1, 8, 19]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", KERNEL_LENGTHS)
def test_selective_scan_triton_equals_reference(length: int, dtype: torch.dtype):
    needs("triton")
    inputs = on_device(scan_inputs(length), dtype)
    options = {"delta_softplus": True, "return_last_state": True}
    wide = {name: value.double() for name, value in inputs.items()}
    expected = outputs_and_gradients(selective_scan_ref, wide, **options)
    actual = outputs_and_gradients(selective_scan, inputs, backend="triton", **options)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [*LENGTHS, 15, 16, 17])
def test_selective_scan_native_equals_reference(length: int, dtype: torch.dtype):
    """Chunks that are full and not; float64 as well, which goes to PyTorch."""
    needs("native")
    inputs = scan_inputs(length, dtype)
    options = {"delta_softplus": True, "return_last_state": True}
    wide = {name: value.double() for name, value in inputs.items()}
    expected = outputs_and_gradients(selective_scan_ref, wide, **options)
    actual = outputs_and_gradients(selective_scan, inputs, backend="native", **options)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.promote_types(dtype, torch.float32)
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("backend", FLOAT32_ONLY)
@pytest.mark.parametrize(("channels", "states"), [(70, 3), (1, 1), (33, 17)])
def test_selective_scan_of_awkward_sizes(channels: int, states: int, backend: str):
    """Several blocks of channels, blocks that are not full, strided inputs as a mixer's splits give them."""
    needs(backend)
    length = 2 if backend == "triton" and not GPU else 9  # sizes, not steps, are awkward here
    wide = torch.randn(2, length, 2 * channels + 2 * states + 1, dtype=torch.float64)
    x, delta, B, C, _ = wide.split([channels, channels, states, states, 1], dim=-1)
    inputs = {"u": x, "delta": delta.abs(), "A": -torch.rand(channels, states).double(), "B": B, "C": C}
    expected = outputs_and_gradients(selective_scan_ref, inputs)

    joined = wide.to(DEVICE, torch.float32)
    x, delta, B, C, _ = joined.split([channels, channels, states, states, 1], dim=-1)
    actual = {"u": x, "delta": delta.abs(), "A": inputs["A"].to(DEVICE, torch.float32), "B": B, "C": C}
    assert not x.is_contiguous()
    y = selective_scan(**actual, backend=backend)
    assert_close([y], expected[:1], torch.float32)
    assert_close(outputs_and_gradients(selective_scan, actual, backend=backend), expected, torch.float32)


@pytest.mark.parametrize("backend", FLOAT32_ONLY)
def test_selective_scan_keeps_small_steps_exact(backend: str):
    """softplus of -12 is 6e-6: log(1 + exp(x)) in float32 would be off by a hundredth of it."""
    needs(backend)
    inputs = on_device(scan_inputs(3), torch.float32)
    inputs["delta"] = torch.full_like(inputs["delta"], -12.0)
    del inputs["delta_bias"], inputs["D"], inputs["initial_state"]
    y = selective_scan(**inputs, delta_softplus=True, backend=backend).double()
    wide = {name: value.double() for name, value in inputs.items()}
    expected = selective_scan_ref(**wide, delta_softplus=True)
    assert ((y - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_selective_scan_without_gradients(backend: str):
    """The same result where no states are kept for a backward pass."""
    needs(backend)
    inputs = on_device(scan_inputs(20), torch.float32)
    inputs["delta"] = inputs["delta"].abs()
    del inputs["delta_bias"]
    expected = selective_scan(**inputs, backend=backend)
    with torch.no_grad():
        assert torch.equal(selective_scan(**inputs, backend=backend), expected)


def test_ssd_triton_refuses_float64():
    needs("triton")
    with pytest.raises(ValueError, match="scan_backend: 'triton' computes in float32, got float64"):
        ssd(**ssd_inputs(2), backend="triton")


@pytest.mark.parametrize("op", [selective_scan, causal_conv1d])
def test_triton_refuses_float64(op: Callable[..., Any]):
    needs("triton")
    x = torch.randn(1, 2, 3, dtype=torch.float64, device=DEVICE)
    others = [x, x[0, 0, :, None], x[..., :1], x[..., :1]] if op is selective_scan else [x[0].T]
    with pytest.raises(ValueError, match="scan_backend: 'triton' computes in float32, got float64"):
        op(x, *others, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["scan", "ssd", "conv"])
def test_mamba_ssm_equals_reference(name: str, length: int, dtype: torch.dtype):
    """Outputs, those of SSD with an initial state; gradients of y without one, as their backward covers."""
    needs("mamba_ssm")
    op, ref, inputs, options = {
        "scan": (selective_scan, selective_scan_ref, scan_inputs(length), {"delta_softplus": True}),
        "ssd": (ssd, ssd_ref, ssd_inputs(length, heads=(2, 16, 16)), {"dt_softplus": True}),
        "conv": (causal_conv1d, causal_conv1d_ref, conv_inputs(length, channels=8), {}),
    }[name]
    inputs = on_device(inputs, dtype)
    if name == "scan":
        with pytest.raises(ValueError, match="'mamba_ssm' cannot continue from a state"):
            op(**inputs, **options, backend="mamba_ssm")
        del inputs["initial_state"]
    wide = {key: value.double() for key, value in inputs.items()}
    if name != "conv":
        both = {**options, "return_last_state": True}
        assert_close([*op(**inputs, **both, backend="mamba_ssm")], [*ref(**wide, **both)], dtype)
        inputs.pop("initial_state", None)
        wide.pop("initial_state", None)
    actual = outputs_and_gradients(op, inputs, backend="mamba_ssm", **options)
    assert_close(actual, outputs_and_gradients(ref, wide, **options), dtype)


@pytest.mark.parametrize("left_out", [("D",), ("z",), ("delta_bias",), ("initial_state",), ("D", "z")])
@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_selective_scan_optional_arguments(backend: str, left_out: tuple[str, ...]):
    needs(backend)
    dtype = torch.float32 if backend in FLOAT32_ONLY else torch.float64
    length = 9 if backend == "triton" else 17  # a chunk and a step
    inputs = {k: v for k, v in scan_inputs(length).items() if k not in left_out}
    inputs["delta"] = inputs["delta"].abs()
    expected = outputs_and_gradients(selective_scan_ref, inputs)
    actual = outputs_and_gradients(selective_scan, on_device(inputs, dtype), backend=backend)
    assert_close(actual, expected, dtype)


def test_selective_scan_of_one_step_by_hand():
    """One step: y = C (delta u B) + D u, times silu(z)."""
    u, delta, B, C, z = (torch.full((1, 1, 1), v) for v in (2.0, 0.5, 3.0, 0.25, 1.0))
    A, D = torch.tensor([[-1.0]]), torch.tensor([4.0])
    y = selective_scan_ref(u, delta, A, B, C, D, z)
    assert torch.allclose(y, (0.25 * 0.5 * 2 * 3 + 4 * 2) * F.silu(z))


@pytest.mark.parametrize("name", ["scan", "ssd"])
def test_steps_equal_the_reference(name: str):
    """All arguments, one position at a time, from an initial state."""
    if name == "scan":
        inputs, ref, step, option = scan_inputs(12), selective_scan_ref, selective_scan_step, "delta_softplus"
    else:
        inputs, ref, step, option = ssd_inputs(12), ssd_ref, ssd_step, "dt_softplus"
    expected, last = ref(**inputs, **{option: True}, return_last_state=True)
    state = inputs.pop("initial_state")
    outputs = []
    for t in range(12):
        here = {key: value[:, t] if key in OVER_TIME else value for key, value in inputs.items()}
        y, state = step(state, **here, **{option: True})
        outputs.append(y)
    assert torch.allclose(torch.stack(outputs, 1), expected)
    assert torch.allclose(state, last)


@pytest.mark.parametrize("silu", [True, False])
def test_causal_conv1d_step_equals_the_reference(silu: bool):
    x, weight, bias = conv_inputs(9).values()
    expected = causal_conv1d_ref(x, weight, bias, silu)
    assert torch.allclose(causal_conv1d_step(x[:, 3:7], weight, bias, silu), expected[:, 6])


def test_selective_scan_continues_from_its_state():
    inputs = scan_inputs(40)
    halves = [
        {k: v if v.dim() < 3 or k == "initial_state" else v[:, part] for k, v in inputs.items()}
        for part in (slice(0, 23), slice(23, None))
    ]
    whole, last = selective_scan(**inputs, return_last_state=True)
    first, middle = selective_scan(**halves[0], return_last_state=True)
    second, end = selective_scan(**{**halves[1], "initial_state": middle}, return_last_state=True)
    assert torch.allclose(torch.cat([first, second], 1), whole)
    assert torch.allclose(end, last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [*LENGTHS, 64, 65])
def test_ssd_chunked_equals_reference(length: int, dtype: torch.dtype):
    inputs = ssd_inputs(length, dtype)
    options = {"dt_softplus": True, "return_last_state": True}
    wide = {name: value.double() for name, value in inputs.items()}
    expected = outputs_and_gradients(ssd_ref, wide, **options)
    actual = outputs_and_gradients(ssd, inputs, backend="torch", **options)
    assert actual[0].dtype == dtype
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("left_out", [("D",), ("dt_bias",), ("initial_state",)])
def test_ssd_optional_arguments(left_out: tuple[str, ...]):
    inputs = {k: v for k, v in ssd_inputs(17).items() if k not in left_out}
    inputs["dt"] = inputs["dt"].abs()
    expected = outputs_and_gradients(ssd_ref, inputs)
    assert_close(outputs_and_gradients(ssd, inputs, backend="torch"), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
def test_ssd_last_equals_the_reference_at_each_rows_end(length: int, dtype: torch.dtype):
    inputs = {k: v for k, v in ssd_inputs(length, dtype, batch=3).items() if k != "initial_state"}
    lengths = torch.tensor([length, 1, -(-length // 2)])

    def at_the_end(**given: Any) -> Tensor:
        return ssd_ref(**given)[torch.arange(3), lengths - 1]

    wide = {k: v.double() for k, v in inputs.items()}
    expected = outputs_and_gradients(at_the_end, wide, dt_softplus=True)
    assert_close(outputs_and_gradients(ssd_last, inputs, lengths=lengths, dt_softplus=True), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [*LENGTHS, 15, 16, 17, 256] if GPU else [1, 16, 35])
def test_ssd_triton_equals_reference(length: int, dtype: torch.dtype):
    needs("triton")
    inputs = on_device(ssd_inputs(length), dtype)
    options = {"dt_softplus": True, "return_last_state": True}
    wide = {name: value.double() for name, value in inputs.items()}
    expected = outputs_and_gradients(ssd_ref, wide, **options)
    actual = outputs_and_gradients(ssd, inputs, backend="triton", **options)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize(("heads", "width", "states"), [(1, 1, 1), (2, 33, 17), (1, 16, 128)])
def test_ssd_triton_of_awkward_sizes(heads: int, width: int, states: int):
    """Several blocks of a head, blocks that are not full, strided inputs as a mixer's split gives them."""
    needs("triton")
    inner, length = heads * width, 18
    wide = torch.randn(2, length, inner + 2 * states + 1, dtype=torch.float64)
    others = {"dt": torch.rand(2, length, heads).double(), "A": -torch.rand(heads).double()}

    def run(operator: Callable[..., Tensor], mixed: Tensor, **given: Any) -> Tensor:
        x, B, C, _ = mixed.split([inner, states, states, 1], dim=-1)
        return operator(x.unflatten(-1, (heads, width)), given.pop("dt"), given.pop("A"), B, C, **given)

    inputs = {"mixed": wide, **others}
    expected = outputs_and_gradients(partial(run, ssd_ref), inputs)
    actual = outputs_and_gradients(partial(run, ssd), on_device(inputs, torch.float32), backend="triton")
    assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("left_out", [("D",), ("dt_bias",), ("initial_state",), ("D", "initial_state")])
def test_ssd_triton_optional_arguments(left_out: tuple[str, ...]):
    needs("triton")
    inputs = {k: v for k, v in ssd_inputs(17).items() if k not in left_out}
    inputs["dt"] = inputs["dt"].abs()
    expected = outputs_and_gradients(ssd_ref, inputs)
    actual = outputs_and_gradients(ssd, on_device(inputs, torch.float32), backend="triton")
    assert_close(actual, expected, torch.float32)


def test_ssd_triton_of_which_a_part_is_used():
    """The last state alone; and nothing that needs a gradient."""
    needs("triton")
    inputs = ssd_inputs(19)
    inputs["dt"] = inputs["dt"].abs()
    del inputs["D"], inputs["C"]

    def run(operator: Callable[..., Any], **given: Any) -> Tensor:
        return operator(**given, C=given["B"].detach(), return_last_state=True)[1]

    made = on_device(inputs, torch.float32)
    expected = outputs_and_gradients(partial(run, ssd_ref), inputs)
    kernels = partial(run, partial(ssd, backend="triton"))
    assert_close(outputs_and_gradients(kernels, made), expected, torch.float32)
    assert_close([kernels(**made)], expected[:1], torch.float32)


def test_ssd_triton_keeps_the_gradient_of_A_exact_where_decay_is_fast():
    """As `test_ssd_gradient_of_A_stays_exact_where_decay_is_fast`, over several chunks."""
    needs("triton")
    inputs = {key: value.abs() for key, value in ssd_inputs(40, heads=(4, 2, 3)).items()}
    inputs["A"], inputs["dt"] = (
        -torch.tensor([1.0, 4.0, 8.0, 16.0]).double(),
        torch.full((2, 40, 4), 0.69).double(),
    )
    del inputs["dt_bias"], inputs["initial_state"]
    made = on_device(inputs, torch.float32)
    inputs = {key: value.double().cpu() for key, value in made.items()}
    gradients = []
    for given, options in ((made, {"backend": "triton"}), (inputs, {"backend": "reference"})):
        A = given["A"].clone().requires_grad_()
        gradients.append(torch.autograd.grad(ssd(**{**given, "A": A}, **options).sum(), A)[0].double().cpu())
    assert ((gradients[0] - gradients[1]) / gradients[1]).abs().max() < 2e-6


@pytest.mark.parametrize(("length", "width", "states"), [(257, 1, 1), (2, 129, 1), (2, 1, 129)])
def test_ssd_triton_leaves_what_is_too_large_to_pytorch(length: int, width: int, states: int):
    needs("triton")
    inputs = on_device(ssd_inputs(length, heads=(1, width, states)), torch.float32)
    results = [ssd(**inputs, dt_softplus=True, backend=backend) for backend in ("triton", "torch")]
    assert torch.equal(*results)


def test_ssd_takes_its_kernels_only_where_they_are_named(monkeypatch: pytest.MonkeyPatch):
    """They are not timed yet."""
    needs("triton")
    calls: list[str] = []
    known = sys.modules["m2rec.ops.ssd"]._IMPLEMENTATIONS
    for name in ("torch", "triton"):
        run = partial(lambda run, name, *given: calls.append(name) or run(*given), known[name], name)
        monkeypatch.setitem(known, name, run)
    monkeypatch.setattr("m2rec.ops.backend._choose_backend", lambda kind, has_native: Backend("triton", ""))
    inputs = on_device(ssd_inputs(2), torch.float32)
    for backend in ("auto", "triton"):
        ssd(**inputs, backend=backend)
    assert calls == ["torch", "triton"]


def test_ssd_triton_is_one_call_to_a_compiler():
    """Traced whole, and shapes without running it."""
    needs("triton")
    inputs = on_device(ssd_inputs(5), torch.float32)
    whole = torch.compile(
        partial(ssd, dt_softplus=True, backend="triton"), backend="aot_eager", fullgraph=True
    )
    expected = outputs_and_gradients(ssd, inputs, dt_softplus=True, backend="triton")
    assert_close(outputs_and_gradients(whole, inputs), expected, torch.float32)
    torch.compiler.reset()
    tensors = [inputs[key] for key in ("x", "dt", "A", "B", "C", "D", "initial_state")]
    torch.library.opcheck(
        torch.ops.m2rec.ssd, (*tensors, True), test_utils=("test_schema", "test_faketensor")
    )


def test_ssd_is_the_selective_scan_with_one_decay_per_head():
    inputs = ssd_inputs(31)
    x, dt, A, B, C, D = (inputs[k] for k in ("x", "dt", "A", "B", "C", "D"))
    H, P, N = x.shape[2], x.shape[3], B.shape[2]
    spread = A[:, None, None].expand(H, P, N).reshape(H * P, N)
    by_scan = selective_scan_ref(
        x.flatten(2), dt.abs().repeat_interleave(P, 2), spread, B, C, D.repeat_interleave(P)
    )
    assert torch.allclose(ssd(x, dt.abs(), A, B, C, D).flatten(2), by_scan)


def test_ssd_survives_strong_decay():
    """Sums of dt * A far below -80, where exp of a plain cumulative sum would underflow."""
    inputs = {k: v.float() for k, v in ssd_inputs(200).items()}
    inputs["A"] = torch.full_like(inputs["A"], -16.0)
    results = outputs_and_gradients(ssd, inputs, dt_softplus=True)
    assert all(torch.isfinite(r).all() for r in results)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dt", [0.1, 0.69, 1.5])
def test_ssd_gradient_of_A_stays_exact_where_decay_is_fast(dt: float, last: bool):
    """With A dt up to 24 a head's gradient is 1e10 times smaller than what has no decay.

    All terms have one sign, so that the true sums don't cancel and float32 can be right to its last digits.
    """
    batch, length, heads = 4, 130, (4, 8, 16)
    inputs = {key: value.abs() for key, value in ssd_inputs(length, torch.float32, batch, heads).items()}
    inputs["A"], inputs["dt"] = -torch.tensor([1.0, 4.0, 8.0, 16.0]), torch.full_like(inputs["dt"], dt)
    del inputs["dt_bias"], inputs["initial_state"]
    lengths = torch.tensor([length, 3, 64, 65])

    def gradient(operator: Callable[..., Tensor], inputs: Inputs, **options: Any) -> Tensor:
        A = inputs["A"].clone().requires_grad_()
        total = operator(**{**inputs, "A": A}, **options).sum()
        return torch.autograd.grad(total, A)[0].double()

    def at_the_end(**given: Any) -> Tensor:
        return ssd_ref(**given)[torch.arange(batch), lengths - 1]

    expected = gradient(at_the_end if last else ssd_ref, {key: v.double() for key, v in inputs.items()})
    operator, options = (ssd_last, {"lengths": lengths}) if last else (ssd, {"backend": "torch"})
    assert ((gradient(operator, inputs, **options) - expected) / expected).abs().max() < 2e-6


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_causal_conv1d_equals_reference(length: int, silu: bool):
    inputs = conv_inputs(length)
    expected = outputs_and_gradients(causal_conv1d_ref, inputs, silu=silu)
    actual = outputs_and_gradients(causal_conv1d, inputs, silu=silu, backend="torch")
    assert_close(actual, expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    ("length", "channels", "taps"), [(1, 5, 4), (16, 70, 4), (17, 64, 3), (35, 5, 1), (9, 5, 6)]
)
def test_causal_conv1d_triton_equals_reference(
    length: int, channels: int, taps: int, silu: bool, dtype: torch.dtype
):
    needs("triton")
    inputs = conv_inputs(length, channels)
    inputs["weight"] = torch.randn(channels, taps, dtype=torch.float64)
    if taps == 1:
        del inputs["bias"]
    inputs = on_device(inputs, dtype)
    wide = {name: value.double() for name, value in inputs.items()}
    expected = outputs_and_gradients(causal_conv1d_ref, wide, silu=silu)
    actual = outputs_and_gradients(causal_conv1d, inputs, silu=silu, backend="triton")
    assert actual[0].dtype == dtype
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("left_out", [(), ("bias",)])
@pytest.mark.parametrize(("rows", "length", "taps"), [(5, 3, 1), (5, 2, 6), (4, 7, 3), (1, 1, 4)])
def test_causal_conv1d_in_blocks(
    rows: int, length: int, taps: int, left_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    """Two rows a block, the last of one; a part of a wider tensor, as a mixer's split gives it."""
    monkeypatch.setattr(sys.modules["m2rec.ops.causal_conv1d"], "_BLOCK_BYTES", 2 * length * 5 * 8 + 1)
    wide = torch.randn(rows, length, 9, dtype=torch.float64)
    inputs = {"x": wide[..., 2:7], "weight": torch.randn(5, taps).double(), "bias": torch.randn(5).double()}
    inputs = {name: value for name, value in inputs.items() if name not in left_out}
    expected = outputs_and_gradients(causal_conv1d_ref, inputs)
    assert_close(outputs_and_gradients(causal_conv1d, inputs), expected, torch.float64)
    with torch.no_grad():
        assert_close([causal_conv1d(**inputs)], expected[:1], torch.float64)


@pytest.mark.parametrize("trained", ["x", "weight", "bias"])
def test_causal_conv1d_of_which_a_part_is_trained(trained: str):
    inputs = conv_inputs(6)
    inputs[trained].requires_grad_()
    results = [op(**inputs) for op in (causal_conv1d_ref, causal_conv1d)]
    gradients = [torch.autograd.grad(y.square().sum(), inputs[trained])[0] for y in results]
    assert torch.allclose(*gradients)


def test_causal_conv1d_is_torch_conv1d():
    conv = torch.nn.Conv1d(5, 5, 4, groups=5, padding=3)
    x = torch.randn(2, 9, 5)
    expected = F.silu(conv(x.mT)[..., :9].mT)
    assert torch.allclose(causal_conv1d_ref(x, conv.weight[:, 0], conv.bias), expected, atol=1e-6)


@pytest.mark.parametrize(("name", "backend"), [("scan", "torch"), ("scan", "native"), ("ssd", "torch")])
def test_autocast_does_not_reach_the_recurrence(name: str, backend: str):
    """Under bfloat16 autocast the result keeps float32 precision."""
    needs(backend)
    if name == "scan":
        inputs, op, ref = scan_inputs(100, torch.float32), selective_scan, selective_scan_ref
        inputs["delta_softplus"] = True
    else:
        inputs, op, ref = ssd_inputs(100, torch.float32), ssd, ssd_ref
        inputs["dt_softplus"] = True
    expected = ref(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = op(**inputs, backend=backend)
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["scan", "ssd"])
def test_autocast_does_not_reach_a_step(name: str):
    made, step = (scan_inputs, selective_scan_step) if name == "scan" else (ssd_inputs, ssd_step)
    inputs = {
        key: value[:, 0] if key in OVER_TIME else value for key, value in made(1, torch.float32).items()
    }
    state = inputs.pop("initial_state")
    expected = step(state, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = step(state, **inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "torch", "native", "triton"])
@pytest.mark.parametrize("name", ["scan", "ssd", "conv"])
def test_the_future_does_not_reach_the_past(name: str, backend: str):
    def run(x: Tensor) -> Tensor:
        if name == "conv":
            return causal_conv1d(x, weight, backend=backend)
        return (selective_scan if name == "scan" else ssd)(x, *inputs[1:5], backend=backend)

    needs(backend)
    dtype = torch.float32 if backend in FLOAT32_ONLY else torch.float64
    weight = torch.randn(5, 4).to(DEVICE, dtype)
    made = ssd_inputs(20) if name == "ssd" else scan_inputs(20)
    made = on_device(made, dtype)
    inputs = [value.abs() if key in ("delta", "dt") else value for key, value in made.items()]
    changed = inputs[0].clone()
    changed[:, 12:] += 1
    before, after = run(inputs[0]), run(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])
