"""The operators on the kernels of `mamba-ssm` and `causal-conv1d`, in our layout and signatures.

Gradients through the last state are not computed.
"""

from causal_conv1d import causal_conv1d_fn
from torch import Tensor

from m2rec.errors import UserError

# the sizes that mamba-ssm's chunks and causal-conv1d's taps may have
_CHUNK = 64
_SUPPORTED_TAPS = (2, 3, 4)


def selective_scan_mamba_ssm(
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
    """Arguments and result as in `selective_scan_ref`.

    Raises:
        ValueError: mamba-ssm was built without its CUDA scan, as it is by default, or there is an
            initial state, which its scan does not take.
    """
    if initial_state is not None:
        raise UserError("scan_backend: 'mamba_ssm' cannot continue from a state; set scan_backend: auto")
    try:
        import selective_scan_cuda  # noqa: F401
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise UserError(
            f"scan_backend: 'mamba_ssm' lacks the selective scan ({error}); build it with "
            f"MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-binary mamba-ssm mamba-ssm, "
            f"or set scan_backend: auto"
        ) from None
    y, last = selective_scan_fn(
        u.mT.contiguous(),
        delta.mT.contiguous(),
        A.float(),
        B.mT.contiguous(),
        C.mT.contiguous(),
        _to_float32(D),
        None if z is None else z.mT.contiguous(),
        _to_float32(delta_bias),
        delta_softplus,
        return_last_state=True,
    )
    return (y.mT, last) if return_last_state else y.mT


def ssd_mamba_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Arguments and result as in `ssd_ref`."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, last = mamba_chunk_scan_combined(
        x,
        dt,
        A.float(),
        B.unsqueeze(2),
        C.unsqueeze(2),
        chunk_size=_CHUNK,
        D=_to_float32(D),
        dt_bias=_to_float32(dt_bias),
        initial_states=initial_state,
        dt_softplus=dt_softplus,
        return_final_states=True,
    )
    return (y, last) if return_last_state else y


def causal_conv1d_mamba_ssm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True
) -> Tensor:
    """Arguments and result as in `causal_conv1d_ref`.

    Raises:
        ValueError: the kernel is not made for this number of taps.
    """
    if weight.shape[1] not in _SUPPORTED_TAPS:
        raise UserError(
            f"d_conv: {weight.shape[1]} is not among {_SUPPORTED_TAPS}, which causal-conv1d takes; "
            f"change it, or set scan_backend: auto"
        )
    x = x.mT.contiguous()  # channels last, as they lie, needs strides that are multiples of 8
    return causal_conv1d_fn(x, weight, bias, activation="silu" if silu else None).mT  # type: ignore[no-any-return]


def _to_float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()
