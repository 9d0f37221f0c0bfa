"""What every operator keeps alike, whatever the backend."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Backward = Callable[..., Any]


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
                raise ValueError(f"{name} has no second derivative (create_graph=True); use {cure}")
            return once(ctx, *grads)

        return checked

    return decorate
