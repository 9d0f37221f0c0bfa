"""The one place that decides which implementation of the operators runs.

    reference   the definition, a plain loop
    torch       plain PyTorch with a backward pass of its own, for any device
    native      C for a CPU, compiled at its first use; operators without C code take torch
    triton      our kernels for CUDA; TRITON_INTERPRET=1 runs them on a CPU, slowly, for tests
    mamba_ssm   the kernels of the packages mamba-ssm and causal-conv1d, for CUDA

To add a backend: name it in `BACKENDS` and in `ModelSettings.scan_backend`, say in
`_find_missing_requirement` what it needs, and name its functions in each operator's `_IMPLEMENTATIONS`.
"""

import os
import sysconfig
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

import torch

from m2rec.errors import UserError
from m2rec.ops.native import SCAN, find_obstacle

BACKENDS = ("reference", "torch", "native", "triton", "mamba_ssm")

# by backend: the function, or `module:function` of m2rec.ops, imported at the first call
Implementations = Mapping[str, Callable[..., Any] | str]


class Backend(NamedTuple):
    """A backend's name and, for the log, why it was taken."""

    name: str
    reason: str


def resolve_backend(requested: str, device: torch.device | str, has_native: bool = True) -> Backend:
    """Turn `auto` or a backend's name into the backend that runs on `device`.

    Args:
        requested: `auto` or one of `BACKENDS`.
        device: where the tensors are.
        has_native: whether the operator has C code; if not, `auto` compiles nothing.

    Raises:
        ValueError: `requested` is not a backend or can't run. A named backend is never replaced
            silently.
    """
    kind = torch.device(device).type
    if requested == "auto":
        return _choose_backend(kind, has_native)
    if requested not in BACKENDS:
        raise UserError(
            f"scan_backend: {requested!r} is not a backend; choose one of auto, {', '.join(BACKENDS)}"
        )
    if obstacle := _find_missing_requirement(requested, kind):
        raise UserError(f"scan_backend: {requested!r} needs {obstacle}, or set scan_backend: auto")
    return Backend(requested, "named by scan_backend")


def load_implementation(
    implementations: Implementations, requested: str, device: torch.device
) -> Callable[..., Any]:
    """An operator's function for the backend that `requested` resolves to."""
    name = resolve_backend(requested, device, "native" in implementations).name
    found = implementations.get(name, implementations["torch"])
    if not isinstance(found, str):
        return found
    module, name = found.split(":")
    function: Callable[..., Any] = getattr(import_module(f"m2rec.ops.{module}"), name)
    return function


def _choose_backend(kind: str, has_native: bool) -> Backend:
    """Our kernels where they run, else plain PyTorch."""
    ours = {"cuda": "triton", "cpu": "native"}.get(kind)
    if ours is None or (ours == "native" and not has_native):
        return Backend("torch", f"auto: the fastest here for device type {kind}")
    if obstacle := _find_missing_requirement(ours, kind):
        return Backend("torch", f"auto: {ours} would be faster, but needs {obstacle}")
    return Backend(ours, f"auto: the fastest here for device type {kind}")


def _find_missing_requirement(name: str, kind: str) -> str:
    """What a backend lacks to run on a device of this type, with the cure; empty if nothing."""
    return _look_for_requirement(name, kind)


# torch.compile takes the answer and does not trace how it is found: torch.compiler.assume_constant_result
# sets the same mark, but takes two seconds to import
_find_missing_requirement._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _look_for_requirement(name: str, kind: str) -> str:
    if name in ("reference", "torch"):
        return ""
    if name == "native":
        return find_obstacle(SCAN) if kind == "cpu" else f"a CPU and this is {kind}: run on a CPU"
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if kind != "cuda" and not interpreted:
        return f"a CUDA device and this is {kind}: run on a GPU"
    packages = ["triton"] if name == "triton" else ["mamba_ssm", "causal_conv1d"]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        names = " ".join(package.replace("_", "-") for package in missing)
        return f"{missing[0]}, which is not installed: pip install {names}"
    return _find_missing_compiler() if name == "triton" and not interpreted else ""


def _find_missing_compiler() -> str:
    """What Triton lacks to compile the launcher of its kernels, with the cure; empty if nothing."""
    if not (os.environ.get("CC") or which("gcc") or which("clang")):
        return "a C compiler: install gcc, or set CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton looks for it
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    return "" if header.is_file() else f"{header}: install python3-dev"
