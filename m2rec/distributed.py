"""Work shared out over the processes that torchrun starts; in a single process all of this is nothing.

Every process builds the same data and the same batches and takes its own rows of each, so a step
is that of one process at the same batch size, up to the order of floating-point sums, wherever the
loss is a mean over targets. What is drawn at random, dropout and sampled negatives, each draws itself.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2rec.errors import UserError


@contextmanager
def join_process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes, by NCCL on CUDA and by gloo on a CPU, and leave them at the end."""
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL puts what it sends
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    leaves = True
    try:
        yield
        with suppress(RuntimeError):  # another one failed, and says why
            dist.barrier()  # gloo aborts where a process leaves while another one still talks
    except Exception:
        leaves = device.type != "cuda"  # NCCL would wait for the others, who wait for this one
        raise
    finally:
        if leaves:
            dist.destroy_process_group()


def process_rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int | None:
    """Which of this machine's processes torchrun says this is; None if it did not start it.

    Raises:
        ValueError: something else set RANK.
    """
    if "RANK" not in os.environ:
        return None
    if not os.environ.get("LOCAL_RANK", "").isdigit():
        raise UserError(
            "RANK is set, but not LOCAL_RANK: start several processes with torchrun, or unset RANK"
        )
    return int(os.environ["LOCAL_RANK"])


def check_gpus() -> None:
    """Each of this machine's processes needs a GPU of its own.

    Raises:
        ValueError: there are fewer.
    """
    number, count = local_rank(), torch.cuda.device_count()
    if number is not None and number >= count:
        raise UserError(
            f"torchrun: more processes than GPUs ({count}); lower --nproc_per_node, or set use_gpu: false"
        )


def is_main_process() -> bool:
    """Whether this process writes the files."""
    return process_rank() == 0


def broadcast_value(value: Any) -> Any:
    """The first process's value, for all."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def reduce_max(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return number
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gather_rows(own: Tensor) -> Tensor:
    """Every process's rows, one process after the other; they may have different numbers of them."""
    if world_size() == 1:
        return own
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, own.cpu())
    return torch.cat(parts).to(own.device)


def broadcast_weights(model: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers."""
    if world_size() > 1:
        for tensor in model.state_dict().values():
            sent = tensor.contiguous()  # as NCCL wants it
            dist.broadcast(sent, 0)
            tensor.copy_(sent)


def sum_gradients(parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Replace each gradient by its sum over the processes, and return the sum of their losses.

    A parameter that has no gradient in any process keeps none.
    """
    if world_size() == 1:
        return loss
    trained = [p for p in parameters if p.requires_grad]
    head = torch.tensor([float(p.grad is not None) for p in trained], device=loss.device)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([loss.detach().reshape(1), head, *(part.flatten() for part in parts)])
    dist.all_reduce(flat)
    total, present, values = flat[0], flat[1 : 1 + len(trained)], flat[1 + len(trained) :]
    for p, there, value in zip(
        trained, present.tolist(), values.split([p.numel() for p in trained]), strict=True
    ):
        p.grad = value.view_as(p).clone() if there else None
    return total
