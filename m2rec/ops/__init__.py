"""Sequence operators: one public function each, beside a short reference twin.

Layout is batch first and channels last, (B, L, E), everywhere.
"""

from m2rec.ops.backend import BACKENDS, Backend, resolve_backend
from m2rec.ops.causal_conv1d import causal_conv1d, causal_conv1d_ref, causal_conv1d_step
from m2rec.ops.selective_scan import selective_scan, selective_scan_ref, selective_scan_step
from m2rec.ops.ssd import ssd, ssd_last, ssd_ref, ssd_step

__all__ = [
    "BACKENDS",
    "Backend",
    "causal_conv1d",
    "causal_conv1d_ref",
    "causal_conv1d_step",
    "resolve_backend",
    "selective_scan",
    "selective_scan_ref",
    "selective_scan_step",
    "ssd",
    "ssd_last",
    "ssd_ref",
    "ssd_step",
]
