"""Which backend runs, and what is said of one that can't."""

import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from m2rec.ops import BACKENDS, backend, resolve_backend, selective_scan
from m2rec.settings import ModelSettings
from tests.ops.test_scans import scan_inputs


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    """No answer remembered from another environment."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend._look_for_requirement.cache_clear()
    yield
    backend._look_for_requirement.cache_clear()


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: object() if name in names else None)
    monkeypatch.setattr(backend, "_find_missing_compiler", lambda: "")


def test_auto_on_a_cpu_is_native_where_it_compiles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "find_obstacle", lambda source: "")
    assert resolve_backend("auto", torch.device("cpu")).name == "native"
    backend._look_for_requirement.cache_clear()
    monkeypatch.setattr(backend, "find_obstacle", lambda source: "a C compiler: install gcc, or set CC")
    chosen = resolve_backend("auto", torch.device("cpu"))
    assert chosen.name == "torch" and "native would be faster, but needs a C compiler" in chosen.reason
    with pytest.raises(
        ValueError, match=r"^scan_backend: 'native' needs a C compiler: install gcc, .* or set"
    ):
        resolve_backend("native", "cpu")


def test_auto_compiles_nothing_for_an_operator_without_c_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "find_obstacle", lambda source: pytest.fail("looked for a compiler"))
    chosen = resolve_backend("auto", "cpu", has_native=False)
    assert chosen.name == "torch" and "auto" in chosen.reason
    implementations = {"torch": len}
    assert backend.load_implementation(implementations, "auto", torch.device("cpu")) is len


def test_an_operator_without_c_code_takes_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "find_obstacle", lambda source: "")
    assert backend.load_implementation({"torch": len}, "native", torch.device("cpu")) is len


def test_auto_on_cuda_is_triton_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch, "triton")
    assert resolve_backend("auto", "cuda:0").name == "triton"
    backend._look_for_requirement.cache_clear()
    installed(monkeypatch)
    chosen = resolve_backend("auto", "cuda:0")
    assert chosen.name == "torch" and "pip install triton" in chosen.reason


@pytest.mark.parametrize("missing", ["compiler", "header"])
def test_auto_does_without_triton_where_it_can_not_compile(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backend, "find_spec", lambda name: object())
    monkeypatch.setattr(backend, "which", lambda name: None if missing == "compiler" else f"/bin/{name}")
    monkeypatch.setattr(backend.sysconfig, "get_default_scheme", lambda: "posix_local")
    headers = {("include", "posix_prefix"): tmp_path}
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda *which: headers[which])
    chosen = resolve_backend("auto", "cuda")
    assert chosen.name == "torch"
    assert ("install gcc" if missing == "compiler" else "install python3-dev") in chosen.reason
    with pytest.raises(ValueError, match=r"scan_backend: 'triton' needs .*: install .*, or set"):
        resolve_backend("triton", "cuda")
    if missing == "header":
        (tmp_path / "Python.h").touch()
        backend._look_for_requirement.cache_clear()
        assert resolve_backend("auto", "cuda").name == "triton"


@pytest.mark.parametrize(
    ("name", "device", "packages", "cure"),
    [
        ("native", "cuda", [], "needs a CPU and this is cuda: run on a CPU, or set"),
        ("triton", "cpu", ["triton"], "needs a CUDA device and this is cpu: run on a GPU, or set"),
        ("triton", "cuda", [], "needs triton, which is not installed: pip install triton, or set"),
        ("mamba_ssm", "cpu", ["mamba_ssm", "causal_conv1d"], "needs a CUDA device and this is cpu"),
        ("mamba_ssm", "cuda", [], "needs mamba_ssm, which is not installed: pip install mamba-ssm causal"),
        (
            "mamba_ssm",
            "cuda",
            ["mamba_ssm"],
            "needs causal_conv1d, which is not installed: pip install causal",
        ),
    ],
)
def test_a_named_backend_that_cannot_run_says_how_to_get_it(
    name: str, device: str, packages: list[str], cure: str, monkeypatch: pytest.MonkeyPatch
):
    installed(monkeypatch, *packages)
    with pytest.raises(ValueError, match=re.escape(f"scan_backend: {name!r} {cure}")):
        resolve_backend(name, device)


def test_a_named_backend_that_can_run_is_taken(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch, "triton", "mamba_ssm", "causal_conv1d")
    names = [name for name in BACKENDS if name != "native"]
    assert [resolve_backend(name, "cuda").name for name in names] == names


def test_the_interpreter_lets_triton_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", "cpu").name == "triton"


@pytest.mark.parametrize("name", ["Torch", "", "cuda"])
def test_an_unknown_backend_is_an_error(name: str):
    known = "auto, reference, torch, native, triton, mamba_ssm"
    message = f"scan_backend: {name!r} is not a backend; choose one of {known}"
    with pytest.raises(ValueError, match=re.escape(message)):
        selective_scan(**scan_inputs(2), backend=name)


def test_the_setting_allows_what_there_is():
    assert get_args(ModelSettings.model_fields["scan_backend"].annotation) == ("auto", *BACKENDS)
