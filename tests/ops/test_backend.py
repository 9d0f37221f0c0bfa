"""Which backend runs, and what is said of one that can't."""

import re

import pytest
import torch

from m2rec.ops import resolve_backend, selective_scan
from tests.ops.test_scans import scan_inputs


def test_auto_gives_a_reason():
    backend = resolve_backend("auto", torch.device("cpu"))
    assert backend.name == "torch"
    assert "auto" in backend.reason


@pytest.mark.parametrize("name", ["triton", "mamba_ssm", "Torch", ""])
def test_a_named_backend_is_never_replaced(name: str):
    message = f"scan_backend: {name!r} can't run here; choose one of auto, reference, torch"
    with pytest.raises(ValueError, match=re.escape(message)):
        selective_scan(**scan_inputs(2), backend=name)
