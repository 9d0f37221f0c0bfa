"""The one place that decides which implementation of the operators runs.

    reference   the definition, a plain loop
    torch       plain PyTorch with a backward pass of its own, for any device
    triton      our kernels for CUDA; TRITON_INTERPRET=1 runs them on a CPU, slowly, for tests
    mamba_ssm   the kernels of the packages mamba-ssm and causal-conv1d, for CUDA

To add a backend: name it in `BACKENDS`, say in `_find_missing_requirement` what it needs, and name its
functions in each operator's `_IMPLEMENTATIONS`.
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

BACKENDS = ("reference", "torch", "triton", "mamba_ssm")

# by backend: the function, or `module:function` of m2rec.ops, imported at the first call
Implementations = Mapping[str, Callable[..., Any] | str]


class Backend(NamedTuple):
    """A backend's name and, for the log, why it was taken."""

    name: str
    reason: str


def resolve_backend(requested: str, device: torch.device | str) -> Backend:
    """Turn `auto` or a backend's name into the backend that runs on `device`.

    Raises:
        ValueError: `requested` is not a backend or can't run. A named backend is never replaced
            silently.
    """
    kind = torch.device(device).type
    if requested == "auto":
        return _choose_backend(kind)
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
    found = implementations[resolve_backend(requested, device).name]
    if not isinstance(found, str):
        return found
    module, name = found.split(":")
    function: Callable[..., Any] = getattr(import_module(f"m2rec.ops.{module}"), name)
    return function


def _choose_backend(kind: str) -> Backend:
    """Our kernels on CUDA, else plain PyTorch."""
    if kind != "cuda":
        return Backend("torch", f"auto: the fastest here for device type {kind}")
    if obstacle := _find_missing_requirement("triton", kind):
        return Backend("torch", f"auto: triton would be faster, but needs {obstacle}")
    return Backend("triton", "auto: the fastest here for device type cuda")


@lru_cache
def _find_missing_requirement(name: str, kind: str) -> str:
    """What a backend lacks to run on a device of this type, with the cure; empty if nothing."""
    if name in ("reference", "torch"):
        return ""
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
