"""Selective scan in C (`selective_scan_native.c`), for a CPU: two registered operators of PyTorch.

`m2rec::selective_scan` is the whole scan with skip, gate and softplus; `m2rec::selective_scan_backward` its
gradients. As registered operators they have shapes that PyTorch can compute without running them, so
`torch.compile`, `torch.export` and hooks see one call. Everything inside is float32.
"""

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from m2rec.ops.contracts import first_derivative_only, make_last_dim_contiguous
from m2rec.ops.native import SCAN, load_library

_CHUNK = 16  # steps between two saved states, as in the C code
_WIDEST = 16  # channels in a block, at most: 512 bits
# the fields of `Scan` in the C code, in its order
_STRIDED = ("u", "delta", "B", "C", "z", "dy")
_POINTERS = (
    "u", "delta", "z", "B", "C", "A", "D", "bias", "state", "y", "last", "saved", "dy", "dlast",
    "du", "ddelta", "dz", "dB", "dC", "dA", "dstate", "dD", "dbias",
)  # fmt: skip


def selective_scan_native(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Arguments and result as in `selective_scan_ref`, computed in float32."""
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    inputs = (None if t is None else t.float() for t in tensors)
    y, last, _ = _scan(*inputs, delta_softplus, save)
    y = y.to(u.dtype)
    return (y, last) if return_last_state else y


@torch.library.custom_op("m2rec::selective_scan", mutates_args=(), device_types="cpu")
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E), the last state (B, E, N) and, with `save`, the states before every chunk."""
    y, last, saved = _make_scan_outputs(u, A, save)
    arguments = _collect_arguments(u, delta, A, B, C, D, z, bias, softplus)
    arguments |= {
        "groups": _count_groups(u),
        "state": _make_contiguous(state),
        "y": y,
        "last": last,
        "saved": saved if save else None,
    }
    _call("scan_forward", u, A, arguments)
    return y, last, saved


@_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _make_scan_outputs(u, A, others[-1])


def _make_scan_outputs(u: Tensor, A: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    states = A.shape[1]
    chunks = -(-length // _CHUNK) if save else 0
    padded = -(-channels // _WIDEST) * _WIDEST
    y, last = u.new_empty(u.shape), u.new_empty(batch, channels, states)
    return y, last, u.new_empty(batch, chunks, padded, states)


@torch.library.custom_op("m2rec::selective_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, bias and the first state; empty for what is left out."""
    batch, groups = len(u), _count_groups(u)
    du, ddelta = u.new_empty(u.shape), u.new_empty(u.shape)
    dz = u.new_empty(u.shape if z is not None else 0)
    dA, dstate = u.new_empty(batch, *A.shape), u.new_empty(batch, *A.shape)
    dB, dC = u.new_empty(groups, *B.shape), u.new_empty(groups, *C.shape)
    dD, dbias = (u.new_empty(batch, len(A) if t is not None else 0) for t in (D, bias))
    arguments = _collect_arguments(u, delta, A, B, C, D, z, bias, softplus)
    arguments |= {"groups": groups}  # counted once: threads may change meanwhile
    arguments |= {"saved": saved, "dy": make_last_dim_contiguous(dy), "dlast": _make_contiguous(dlast)}
    arguments |= {"du": du, "ddelta": ddelta, "dA": dA, "dB": dB, "dC": dC}
    arguments |= {"dD": dD, "dz": dz, "dbias": dbias, "dstate": dstate}
    _call("scan_backward", u, A, arguments)
    return du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dz, dbias.sum(0), dstate


@_scan_backward.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, bias: Any, *others: Any
) -> tuple[Tensor, ...]:
    du, ddelta, dA, dB, dC = (t.new_empty(t.shape) for t in (u, delta, A, B, C))
    dD, dbias = (u.new_empty(len(A) if t is not None else 0) for t in (D, bias))
    dz = u.new_empty(u.shape if z is not None else 0)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, u.new_empty(len(u), *A.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, state, softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.softplus, ctx.has_state = softplus, state is not None
    ctx.set_materialize_grads(False)


@first_derivative_only("selective_scan", "scan_backend: reference")
def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Tensor | None) -> Any:
    u, delta, A, B, C, D, z, bias, saved = ctx.saved_tensors
    dy = u.new_zeros(u.shape) if dy is None else dy
    found = _scan_backward(u, delta, A, B, C, D, z, bias, saved, dy, dlast, ctx.softplus)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dstate = found
    optional = zip((dD, dz, dbias, dstate), (D, z, bias, ctx.has_state or None), strict=True)
    return du, ddelta, dA, dB, dC, *(None if t is None else d for d, t in optional), None, None


_scan.register_autograd(_differentiate, setup_context=_keep_for_backward)


class _Arguments(ctypes.Structure):
    """`Scan` in the C code: sizes, strides, pointers."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("rows", "L", "E", "N", "groups", "with_softplus")),
        *((f"{name}_strides", ctypes.c_int64 * 2) for name in _STRIDED),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


def _collect_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> dict[str, Any]:
    """What both C functions read, as they can read it."""
    strided = {"u": u, "delta": delta, "B": B, "C": C, "z": z}
    found: dict[str, Any] = {
        name: None if t is None else make_last_dim_contiguous(t) for name, t in strided.items()
    }
    return found | {
        "A": A.contiguous(),
        "D": _make_contiguous(D),
        "bias": _make_contiguous(bias),
        "with_softplus": softplus,
    }


def _make_contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _call(name: str, u: Tensor, A: Tensor, arguments: dict[str, Any]) -> None:
    """Call a C function with the arguments of these names; one that is left out is NULL.

    Raises:
        MemoryError: there is none for the states of a chunk.
    """
    fields: dict[str, Any] = dict(zip(("rows", "L", "E", "N"), (*u.shape, A.shape[1]), strict=True))
    for key, value in arguments.items():
        fields[key] = value.data_ptr() if isinstance(value, Tensor) else value
        if key in _STRIDED and value is not None:
            fields[f"{key}_strides"] = (ctypes.c_int64 * 2)(*value.stride()[:2])
    function = getattr(load_library(SCAN), name)
    if function(ctypes.byref(_Arguments(**fields))):
        raise MemoryError(f"selective_scan: {name} has no memory for the states of a chunk")


def _count_groups(u: Tensor) -> int:
    """Parts of a sequence's channels, so that few sequences have work for all threads."""
    batch, _, channels = u.shape
    wanted = -(-4 * torch.get_num_threads() // max(batch, 1))
    return max(1, min(wanted, channels // _WIDEST))
