"""The one place that decides which implementation of the operators runs.

To add a backend: give it a name in `BACKENDS`, say in `resolve_backend` when it can
run, and add its branch to each operator's public function.
"""

from typing import NamedTuple

import torch

BACKENDS = ("reference", "torch")


class Backend(NamedTuple):
    """A backend's name and, for the log, why it was taken."""

    name: str
    reason: str


def resolve_backend(requested: str, device: torch.device | str) -> Backend:
    """Turn `auto` or a backend's name into the backend that runs on `device`.

    Raises:
        ValueError: `requested` is no backend. A named backend is never replaced silently.
    """
    if requested == "auto":
        kind = torch.device(device).type
        return Backend("torch", f"auto: the fastest here for device type {kind}")
    if requested not in BACKENDS:
        raise ValueError(
            f"scan_backend: {requested!r} can't run here; choose one of auto, {', '.join(BACKENDS)}"
        )
    return Backend(requested, "named by scan_backend")
