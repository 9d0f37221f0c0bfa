"""Selective scan, the recurrence of Mamba (arXiv 2312.00752, algorithm 2).

    h[t] = exp(delta[t] * A) * h[t-1] + delta[t] * u[t] * B[t]        state (B, E, N)
    y[t] = <C[t], h[t]> + D * u[t],   times silu(z[t]) if there is a z

Meaning and argument names are those of `mamba_ssm`'s `selective_scan_fn`; the layout is
(B, L, E) where that function has (B, E, L). Like it, the input is discretised with Euler's
rule (delta * B) and the decay exactly (exp(delta * A)).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.ops.backend import Implementations, load_implementation
from m2rec.ops.contracts import LOG2_E, check_arguments, drop_time, first_derivative_only, without_autocast
from m2rec.ops.selective_scan_native import selective_scan_native

# Steps between two saved states: L / _CHUNK are kept, 2 * _CHUNK are recomputed at a time.
_CHUNK = 4

_SHAPES = {
    "u": "BLE", "delta": "BLE", "A": "EN", "B": "BLN", "C": "BLN", "D": "E", "z": "BLE", "delta_bias": "E",
    "state": "BEN",
}  # fmt: skip
_STEP_SHAPES = drop_time(_SHAPES)


def selective_scan_ref(
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
    """The recurrence as it is written, one step after the other under autograd.

    Args:
        u, delta, z: (B, L, E).
        A: (E, N), negative for a decaying state.
        B, C: (B, L, N).
        D, delta_bias: (E,).
        delta_softplus: pass delta (after the bias) through softplus.
        initial_state: (B, E, N), zero if absent.
        return_last_state: return the state after the last step too.

    Returns:
        y (B, L, E) in the type of u; with `return_last_state` also the state (B, E, N)
        in the type of the computation, float32 at least.

    Raises:
        ValueError: an argument is not of its shape, or complex or integer.
    """
    check_arguments("selective_scan", _SHAPES, (u, delta, A, B, C, D, z, delta_bias, initial_state))
    x, delta, A, B, C, h = _prepare_scan_inputs(u, delta, A, B, C, delta_bias, delta_softplus, initial_state)
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + (delta[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1))
    y = _apply_skip_and_gate(torch.stack(outputs, dim=1), x, D, z).to(u.dtype)
    return (y, h) if return_last_state else y


def selective_scan(
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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan on the chosen backend; arguments and result as in `selective_scan_ref`."""
    check_arguments("selective_scan", _SHAPES, (u, delta, A, B, C, D, z, delta_bias, initial_state))
    run = load_implementation(_IMPLEMENTATIONS, backend, u.device)
    with without_autocast(u.device):
        return run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, return_last_state)  # type: ignore[no-any-return]


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step after `state` (B, E, N): u, delta, z (B, E) and B, C (B, N) -> y (B, E), new state."""
    check_arguments("selective_scan_step", _STEP_SHAPES, (u, delta, A, B, C, D, z, delta_bias, state))
    with without_autocast(u.device):
        x, delta, A, B, C, h = _prepare_scan_inputs(u, delta, A, B, C, delta_bias, delta_softplus, state)
        h = torch.exp(delta[..., None] * A) * h + (delta * x)[..., None] * B[:, None]
        y = (h @ C[..., None])[..., 0]
        return _apply_skip_and_gate(y, x, D, z).to(u.dtype), h


def _selective_scan_torch(
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
    """The (B, L, E) parts under autograd, the (B, L, E, N) recurrence in `_Scan`."""
    x, delta, A, B, C, h = _prepare_scan_inputs(u, delta, A, B, C, delta_bias, delta_softplus, initial_state)
    save = torch.is_grad_enabled()
    y, last_state = _Scan.apply(delta * x, delta, A, B, C, h, save)  # type: ignore[no-untyped-call]
    y = _apply_skip_and_gate(y, x, D, z).to(u.dtype)
    return (y, last_state) if return_last_state else y


def _selective_scan_native(u: Tensor, *others: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Our C code; float64, which it does not have, goes to PyTorch."""
    run = _selective_scan_torch if u.dtype == torch.float64 else selective_scan_native
    return run(u, *others)


def _prepare_scan_inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything in float32 at least, delta with its bias and softplus, and the first state."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)
    if initial_state is None:
        initial_state = x.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    return x, delta, A, B, C, initial_state.to(dtype)


def _apply_skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """y + D x, times silu(z)."""
    if D is not None:
        y = y + D.to(y.dtype) * x
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y


class _Scan(torch.autograd.Function):
    """The bare recurrence h = exp(delta A) h + x B, y = <C, h>, with its own backward.

    Forward keeps one state in `_CHUNK`; backward recomputes a chunk's states and walks it
    from its end, so memory grows with L / _CHUNK blocks of state instead of several L.
    Inside, the state is (B, N, E): sums over N then run along contiguous rows. Decays are
    powers of two, because exp2 is several times faster than exp on a CPU. Every step works
    in place on buffers and on views made beforehand: a step is some twenty calls of a few
    dozen microseconds, so what surrounds them counts.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, save: bool
    ) -> Any:
        """x, delta (B, L, E); A (E, N); B, C (B, L, N); h (B, E, N) -> y (B, L, E), last h."""
        A2 = A.T.contiguous() * LOG2_E
        h = h.mT.clone(memory_format=torch.contiguous_format)
        decay, y, saved = torch.empty_like(h), torch.empty_like(x), []
        xs, deltas, Cs, ys = map(_split_into_row_vectors, (x, delta, C, y))
        B_columns = _split_into_column_vectors(B)
        for t in range(x.shape[1]):
            if save and t % _CHUNK == 0:
                saved.append(h.clone())
            torch.mul(deltas[t], A2, out=decay).exp2_()
            h.mul_(decay).addcmul_(B_columns[t], xs[t])
            ys[t].copy_(torch.bmm(Cs[t], h))  # bmm into a strided view goes row by row
        ctx.save_for_backward(x, delta, A, B, C, *saved)
        return y, h.mT.contiguous()

    @staticmethod
    @first_derivative_only("selective_scan", "scan_backend: reference")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x, delta, A, B, C and the initial state."""
        x, delta, A, B, C, *saved = ctx.saved_tensors
        dy, g = grads[0], grads[1].mT.clone(memory_format=torch.contiguous_format)
        A1 = A.T.contiguous()
        A2 = A1 * LOG2_E
        dx, ddelta, dB, dC = (torch.empty_like(t) for t in (x, delta, B, C))
        xs, deltas, dys, B_rows, dxs, dBs, dCs = map(_split_into_row_vectors, (x, delta, dy, B, dx, dB, dC))
        B_columns, C_columns = _split_into_column_vectors(B), _split_into_column_vectors(C)
        ddeltas = ddelta.unbind(1)
        dA, work = torch.zeros_like(g), torch.empty_like(g)
        states = g.new_empty(_CHUNK + 1, *g.shape).unbind()
        decays = g.new_empty(_CHUNK, *g.shape).unbind()
        for start in reversed(range(0, x.shape[1], _CHUNK)):
            steps = list(enumerate(range(start, min(start + _CHUNK, x.shape[1]))))
            states[0].copy_(saved[start // _CHUNK])
            for k, t in steps:
                torch.mul(deltas[t], A2, out=decays[k]).exp2_()
                torch.mul(states[k], decays[k], out=states[k + 1]).addcmul_(B_columns[t], xs[t])
            for k, t in reversed(steps):
                g.addcmul_(C_columns[t], dys[t])
                dCs[t].copy_(torch.bmm(dys[t], states[k + 1].mT))
                dBs[t].copy_(torch.bmm(xs[t], g.mT))
                dxs[t].copy_(torch.bmm(B_rows[t], g))
                g.mul_(decays[k])
                torch.mul(states[k], g, out=work)  # the gradient of delta A
                dA.addcmul_(work, deltas[t])
                ddeltas[t].copy_(work.mul_(A1).sum(1))
        return dx, ddelta, dA.sum(0).T, dB, dC, g.mT, None


def _split_into_row_vectors(x: Tensor) -> tuple[Tensor, ...]:
    """(B, L, K) -> L views (B, 1, K)."""
    return x[:, :, None].unbind(1)


def _split_into_column_vectors(x: Tensor) -> tuple[Tensor, ...]:
    """(B, L, K) -> L views (B, K, 1)."""
    return x[..., None].unbind(1)


_IMPLEMENTATIONS: Implementations = {
    "reference": selective_scan_ref,
    "torch": _selective_scan_torch,
    "native": _selective_scan_native,
    "triton": "selective_scan_triton:selective_scan_triton",
    "mamba_ssm": "mamba_ssm_backend:selective_scan_mamba_ssm",
}
