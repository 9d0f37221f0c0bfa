"""Checks and conversions that all operators share, whatever the backend."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2rec.errors import UserError

Backward = Callable[..., Any]

LOG2_E = 1.4426950408889634


def first_derivative_only(name: str, cure: str) -> Callable[[Backward], Backward]:
    """Decorate a backward pass that autograd can't differentiate again, so that it says so.

    `once_differentiable` alone lets second derivatives come out wrong: it raises only if the incoming
    gradient has a history and autograd then walks as far as its node.

    Args:
        name: what is differentiated, for the message.
        cure: what to use instead where second derivatives are wanted.

    Raises:
        ValueError: the gradient is asked for with a graph of its own (`create_graph=True`).
    """

    def decorate(backward: Backward) -> Backward:
        once: Backward = once_differentiable(backward)

        def checked(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():  # only under create_graph
                raise UserError(f"{name} has no second derivative (create_graph=True); use {cure}")
            return once(ctx, *grads)

        return checked

    return decorate


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a result of these tensors will be differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def differentiate_reference(
    reference: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """A backward pass that autograd can differentiate again, for `create_graph=True`.

    Args:
        reference: computes from the inputs as many results as there are gradients.
        inputs: those of a `torch.autograd.Function`, as its backward pass finds them.
        grads: the gradients of the results.

    Returns:
        The gradients of the inputs, None for one that needs none.
    """
    with torch.enable_grad():
        # views, so that each argument has its own gradient where two are one tensor
        views = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [view for view in views if view is not None and view.requires_grad]
        found = iter(torch.autograd.grad(reference(*views), wanted, grads, create_graph=True))
        return [next(found) if view is not None and view.requires_grad else None for view in views]


def check_arguments(operator: str, shapes: Mapping[str, str], tensors: Iterable[Tensor | None]) -> None:
    """Refuse tensors that an operator would broadcast, cut or round silently.

    Args:
        operator: for the message.
        shapes: by argument name, the letters of its dimensions. A letter is one size in all of them;
            L is at least 1.
        tensors: the arguments in the order of `shapes`; None for one that is left out.

    Raises:
        ValueError: one is not of real floating-point numbers, or not of its shape.
    """
    sizes: dict[str, int] = {}
    for (name, letters), tensor in zip(shapes.items(), tensors, strict=True):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise UserError(f"{operator}: {name} is {tensor.dtype}, expected real floating-point numbers")
        fits = tensor.dim() == len(letters)
        for letter, size in zip(letters, tensor.shape, strict=False):
            fits = sizes.setdefault(letter, size) == size and fits
        if not fits:
            expected = ", ".join(f"{letter} = {sizes.get(letter, 'any')}" for letter in letters)
            raise UserError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected ({expected})")
    if sizes.get("L") == 0:
        raise UserError(f"{operator}: the sequence is empty (L = 0); expected at least one position")


def drop_time(shapes: Mapping[str, str]) -> dict[str, str]:
    """The shapes of one step."""
    return {name: letters.replace("L", "") for name, letters in shapes.items()}


def refuse_float64(x: Tensor) -> None:
    """Refuse a type that the Triton kernels are not made for.

    Raises:
        ValueError: x is float64.
    """
    if x.dtype == torch.float64:
        raise UserError("scan_backend: 'triton' computes in float32, got float64; use torch or reference")


def make_last_dim_contiguous(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off, on devices that have it: half-precision states lose the sum."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
