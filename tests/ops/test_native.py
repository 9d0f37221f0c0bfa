"""Our C code: how it is compiled and kept, its numbers at the edges, the operators as PyTorch sees them."""

import ctypes
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2rec.nn.mamba import Mamba
from m2rec.ops import native, selective_scan, selective_scan_native, selective_scan_ref
from m2rec.threads import use_one_thread
from tests.ops.test_scans import assert_close, outputs_and_gradients, scan_inputs

ROOT = Path(__file__).parents[2]
SOURCE = """
int count_threads(void) {
    int found = 0;
#pragma omp parallel reduction(+ : found)
    found++;
    return found;
}
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small C file, and a cache folder that has nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._try_library.cache_clear()
    path = tmp_path / "small.c"
    path.write_text(SOURCE)
    return path


def needs_compiler() -> None:
    if obstacle := native.find_obstacle(native.SCAN):
        pytest.skip(obstacle)


def load_again(source: Path) -> ctypes.CDLL:
    """As another process does."""
    native._try_library.cache_clear()
    return native.load_library(source)


def start_process(source: Path) -> BaseProcess:
    """A process that loads the library and ends: a fork, which has imported PyTorch already."""
    process = get_context("fork").Process(target=native.load_library, args=(source,))
    process.start()
    return process


def wait(process: BaseProcess) -> int | None:
    """The exit status."""
    process.join(60)
    return process.exitcode


def forbid_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_run_compiler", lambda command: pytest.fail("compiled again"))


def test_a_library_is_compiled_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    needs_compiler()
    assert load_again(source).count_threads() == torch.get_num_threads()
    (kept,) = (tmp_path / "cache" / "m2rec").glob("*small*")
    assert kept.suffix == ".so"
    forbid_compiler(monkeypatch)
    load_again(source)


@pytest.mark.parametrize("change", ["code", "compiler", "CPU"])
def test_a_change_compiles_again(change: str, source: Path, monkeypatch: pytest.MonkeyPatch):
    needs_compiler()
    load_again(source)
    before = native._compute_key(source, ["gcc"])
    if change == "code":
        source.write_text(SOURCE + "\n")
    elif change == "CPU":
        monkeypatch.setattr(native, "_read_cpu_flags", lambda: ["flags: another"])
    compiler = ["gcc", "-O1"] if change == "compiler" else ["gcc"]
    assert native._compute_key(source, compiler) != before


def test_a_damaged_library_is_compiled_again(source: Path, tmp_path: Path):
    needs_compiler()
    assert wait(start_process(source)) == 0  # this process would keep the library that it has
    (kept,) = (tmp_path / "cache" / "m2rec").glob("*small*")
    kept.write_bytes(b"not a library")
    assert load_again(source).count_threads() == torch.get_num_threads()
    assert kept.stat().st_size > 1_000


def test_a_cache_folder_that_cannot_be_written_is_done_without(source: Path, monkeypatch: pytest.MonkeyPatch):
    needs_compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file
    assert load_again(source).count_threads() == torch.get_num_threads()


def test_processes_at_once_do_not_collide(source: Path, tmp_path: Path):
    needs_compiler()
    started = [start_process(source) for _ in range(3)]
    assert [wait(process) for process in started] == [0, 0, 0]
    (kept,) = (tmp_path / "cache" / "m2rec").glob("*small*")
    ctypes.CDLL(str(kept))


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("", r"^a C compiler: install gcc, or set CC$"),
        ('gcc "x', r"^a C compiler, and CC is not a command \(.*\): set CC=gcc$"),
        ("no-such-compiler -O", "a C compiler that works, and no-such-compiler does not: .*No such file"),
        ("false", "a C compiler that works, and false does not: .*non-zero exit status 1"),
        ("true", "a C compiler that works, and true does not: .*cannot open shared object file"),
    ],
)
def test_what_is_missing_is_said(
    compiler: str, message: str, source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setattr(native, "which", lambda name: None)
    with pytest.raises(OSError, match=message):
        native.load_library(source)
    assert native.find_obstacle(source).startswith("a C compiler") and "\n" not in native.find_obstacle(
        source
    )
    assert capfd.readouterr() == ("", "")


def test_code_that_does_not_compile_names_the_first_error(source: Path):
    needs_compiler()
    source.write_text("int broken(void) { return nothing; }")
    obstacle = native.find_obstacle(source)
    assert "error:" in obstacle and "nothing" in obstacle


def test_another_system_takes_torch(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native.sys, "platform", "darwin")
    assert native.find_obstacle(source) == "Linux and this is darwin: choose torch"


def test_the_threads_are_those_of_pytorch(source: Path):
    needs_compiler()
    library = load_again(source)
    torch.set_num_threads(2)
    assert library.count_threads() == 2
    with use_one_thread():
        assert library.count_threads() == torch.get_num_threads()


# the scan


@pytest.fixture
def _scan_compiles() -> None:
    needs_compiler()


native_scan = pytest.mark.usefixtures("_scan_compiles")


def scan(*values: Tensor, **options: Any) -> Tensor:
    return selective_scan(*values, backend="native", **options)


def decay_by(exponents: Tensor) -> Tensor:
    """exp of each number, as the decay of a state of 1 over one step."""
    count = len(exponents)
    one, nothing = torch.ones(1, 1, count), torch.zeros(1, 1, 1)
    state, A = torch.ones(1, count, 1), exponents[:, None]
    _, last = scan(one, one, A, nothing, nothing, initial_state=state, return_last_state=True)
    return last[0, :, 0]


@native_scan
def test_decays_are_exact():
    exponents = torch.cat([torch.linspace(-87, 88, 10_001), torch.linspace(-1e-3, 1e-3, 101)])
    expected = exponents.double().exp()
    error = (decay_by(exponents).double() / expected - 1).abs()
    assert (error < 1.5e-7 + 1e-7 * exponents.abs()).all()  # the exponent is rounded, too


@native_scan
def test_decays_at_the_edges():
    inf = math.inf
    exponents = torch.tensor([0.0, -0.0, -88.5, -104.0, -1e4, -2e7, -1e30, 89.5, 1e4, 1e30, math.nan])
    found = decay_by(exponents).tolist()
    assert found[:10] == [1, 1, 0, 0, 0, 0, 0, inf, inf, inf]
    assert math.isnan(found[10])


@native_scan
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_a_nan_stays(name: str):
    inputs = scan_inputs(20, torch.float32)
    inputs[name].view(-1)[0] = math.nan
    y, last = scan(**inputs, delta_softplus=True, return_last_state=True)
    expected = selective_scan_ref(**inputs, delta_softplus=True, return_last_state=True)
    assert torch.equal(y.isnan(), expected[0].isnan()) and torch.equal(last.isnan(), expected[1].isnan())


@native_scan
@pytest.mark.parametrize("raw", [-200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4])
def test_softplus_and_gate_over_all_sizes(raw: float):
    inputs = {name: value.abs() for name, value in scan_inputs(3).items() if name != "delta_bias"}
    inputs["A"] = -inputs["A"]
    inputs |= {"delta": torch.full_like(inputs["delta"], raw), "z": torch.full_like(inputs["z"], raw)}
    expected = outputs_and_gradients(selective_scan_ref, inputs, delta_softplus=True)
    narrow = {name: value.float() for name, value in inputs.items()}
    actual = outputs_and_gradients(scan, narrow, delta_softplus=True)
    for a, e in zip(actual, expected, strict=True):
        a, e = a.detach().double(), e.detach()
        assert torch.allclose(a, e, rtol=1e-5, atol=1e-6 * float(e.abs().max()) + 1e-36)  # no denormals


@native_scan
@pytest.mark.parametrize("batch", [1, 3, 70])
@pytest.mark.parametrize("threads", [1, 3])
def test_few_sequences_and_many(batch: int, threads: int):
    """Channels in groups or not, with more threads than cores; the same digits on each run."""
    torch.set_num_threads(threads)
    shapes = [(batch, 35, 50), (batch, 35, 50), (50, 7), (batch, 35, 7), (batch, 35, 7)]
    u, delta, A, B, C = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    inputs = {"u": u, "delta": delta.abs(), "A": -A.exp(), "B": B, "C": C}
    narrow = {name: value.float() for name, value in inputs.items()}
    actual = outputs_and_gradients(scan, narrow)
    assert_close(actual, outputs_and_gradients(selective_scan_ref, inputs), torch.float32)
    again = outputs_and_gradients(scan, narrow)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@native_scan
def test_callers_on_several_threads():
    inputs = scan_inputs(50, torch.float32, batch=5)
    inputs["delta"] = inputs["delta"].abs()
    expected = scan(**inputs)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: scan(**inputs), range(40)))
    assert all(torch.equal(y, expected) for y in found)


def test_python_and_c_agree_on_the_chunk():
    """Python allocates the memory that the C code writes."""
    assert f"#define CHUNK {selective_scan_native._CHUNK} " in native.SCAN.read_text()


@native_scan
def test_no_sequence_at_all():
    inputs = scan_inputs(4, torch.float32, batch=0)
    y, last, *gradients = outputs_and_gradients(scan, inputs, return_last_state=True)
    assert y.shape == (0, 4, 5) and last.shape == (0, 5, 3)
    assert all((gradient == 0).all() for gradient in gradients)


@native_scan
@pytest.mark.parametrize("part", ["y", "last"])
def test_the_gradient_of_one_result(part: str):
    """The other result has no gradient at all."""
    inputs = {name: value for name, value in scan_inputs(20).items() if name not in ("D", "z")}
    inputs["delta"] = inputs["delta"].abs() + 2

    def run_reference(**inputs: Tensor) -> Tensor:
        y, last = selective_scan_ref(**inputs, return_last_state=True)
        return y if part == "y" else last + 0 * y.sum()

    def run_native(**inputs: Tensor) -> Tensor:
        return scan(**inputs, return_last_state=True)[part == "last"]

    expected = outputs_and_gradients(run_reference, inputs)
    narrow = {name: value.float() for name, value in inputs.items()}
    assert_close(outputs_and_gradients(run_native, narrow), expected, torch.float32)


@native_scan
def test_expanded_inputs_and_gradients():
    """Strides of zero, as a broadcast makes them."""
    inputs = scan_inputs(20)
    inputs["u"] = inputs["u"][:1, :, :1].expand(2, 20, 5)
    inputs["B"] = inputs["B"][:, :1].expand(2, 20, 3)
    leaves = [
        {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}
        for dtype in (torch.float64, torch.float32)
    ]
    ys = [f(**x, delta_softplus=True) for f, x in zip((selective_scan_ref, scan), leaves, strict=True)]
    gradients = [torch.autograd.grad(y.sum(), list(x.values())) for y, x in zip(ys, leaves, strict=True)]
    assert_close([ys[1], *gradients[1]], [ys[0], *gradients[0]], torch.float32)


@native_scan
def test_without_gradients_nothing_is_saved(monkeypatch: pytest.MonkeyPatch):
    saved = []
    call = selective_scan_native._call
    monkeypatch.setattr(
        selective_scan_native, "_call", lambda *a: (saved.append(a[3]["saved"] is not None), call(*a))
    )
    inputs = scan_inputs(20, torch.float32)
    scan(**inputs)
    leaf = inputs["A"].requires_grad_()
    with torch.no_grad():
        scan(**inputs)
    y = scan(**inputs)
    y.sum().backward()
    assert saved == [False, False, True, True] and leaf.grad is not None


# the operators as PyTorch sees them


def samples() -> list[tuple[Any, ...]]:
    """Arguments of the operator, all and few; whole blocks of channels, as the rest of `saved` is not set."""
    shapes = [
        (2, 20, 16),
        (2, 20, 16),
        (16, 3),
        (2, 20, 3),
        (2, 20, 3),
        (16,),
        (2, 20, 16),
        (16,),
        (2, 16, 3),
    ]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[1], tensors[2] = tensors[1].abs(), -tensors[2].exp()
    return [(*tensors, True, False), (*tensors[:5], None, None, None, None, False, False)]


@native_scan
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("gradients", [True, False])
def test_the_operators_keep_pytorchs_rules(index: int, gradients: bool):
    *tensors, softplus, _ = samples()[index]
    if gradients:
        tensors = [None if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(selective_scan_native._scan, (*tensors, softplus, gradients))


@native_scan
@pytest.mark.parametrize("index", [0, 1])
def test_the_backward_operator_keeps_pytorchs_rules(index: int):
    *tensors, state, softplus, _ = samples()[index]
    y, last, saved = selective_scan_native._scan(*tensors, state, softplus, True)
    for dlast in (torch.ones_like(last), None):
        arguments = (*tensors, saved, torch.ones_like(y), dlast, softplus)
        torch.library.opcheck(selective_scan_native._scan_backward, arguments)


@native_scan
@pytest.mark.parametrize(
    ("backend", "compiler", "sizes"),
    [("native", "aot_eager", ((2, 3), (3, 21))), ("auto", "eager", ((2, 3), (1, 40)))],
    ids=["native", "auto"],
)
def test_one_graph_of_any_batch_and_length(backend: str, compiler: str, sizes: tuple[tuple[int, int], ...]):
    """Forward and backward without a break; no code is generated, so no compiler is needed for that.

    PyTorch makes a graph of its own for a batch of one.
    """
    mixer = Mamba(16, 4, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(mixer, backend=compiler, fullgraph=True, dynamic=True)
    for batch, length in sizes:
        x = torch.randn(batch, length, 16, requires_grad=True)
        leaves = [x, *mixer.parameters()]
        results = [(y, *torch.autograd.grad(y.square().sum(), leaves)) for y in (mixer(x), compiled(x))]
        for expected, found in zip(*results, strict=True):
            assert torch.allclose(found, expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(compiled(x), mixer(x), atol=1e-6)


@native_scan
def test_export_keeps_one_call():
    mixer = Mamba(16, 4, backend="native").requires_grad_(False)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2)}
    program = torch.export.export(mixer, (torch.randn(3, 5, 16),), dynamic_shapes=(sizes,))
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    called = [str(node.target) for graph in graphs for node in graph.nodes if "_scan" in str(node.target)]
    assert called == ["m2rec.selective_scan.default"]
    x = torch.randn(2, 30, 16)
    assert torch.allclose(program.module()(x), mixer(x), atol=1e-6)


@native_scan
def test_hooks_see_the_gradient():
    seen = []
    mixer = Mamba(16, 4, backend="native")
    mixer.register_full_backward_hook(lambda module, given, out: seen.append(given[0].shape))
    mixer(torch.randn(2, 3, 16, requires_grad=True)).sum().backward()
    assert seen == [(2, 3, 16)] and mixer.A_log.grad is not None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is nothing to compile")
def test_without_a_compiler_a_run_says_so_and_uses_torch(tmp_path: Path):
    code = (
        "import torch\n"
        "from m2rec.ops import resolve_backend\n"
        "from m2rec.nn.mamba import Mamba\n"
        "print(resolve_backend('auto', 'cpu'))\n"
        "Mamba(8, 2)(torch.randn(1, 3, 8)).sum().backward()\n"
    )
    environment = {**os.environ, "CC": "/nowhere/gcc", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment, check=True
    )
    assert "name='torch'" in done.stdout and "native would be faster, but needs a C compiler" in done.stdout
