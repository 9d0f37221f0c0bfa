"""Data-parallel helpers under torchrun; no-ops in a single process.

Every process builds the same data and the same batches and takes its own rows of each, so a step equals
that of one process at the same batch size, up to the order of floating-point sums, wherever the
loss is a mean over targets. Random numbers, of dropout and of sampled negatives, differ by process.
"""

import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from socket import gethostname
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2rec.errors import UserError

if TYPE_CHECKING:
    import psutil

# With PyTorch 2.13 processes that torchrun starts again find the addresses of those before in its store, try
# to reach them, and end or wait for ever; with this variable each start has a store of its own.
_FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@contextmanager
def join_process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes, by NCCL on CUDA and by gloo on a CPU, until the end of the block."""
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of NCCL's buffers
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    destroys_group = True
    try:
        yield
        with suppress(RuntimeError):  # another process failed and reports why
            dist.barrier()  # gloo aborts if a process leaves while another one sends
    except Exception:
        destroys_group = device.type != "cuda"  # NCCL would wait for processes that wait for this one
        raise
    finally:
        if destroys_group:
            dist.destroy_process_group()


def process_rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int | None:
    """The number of this process on this machine; None without torchrun.

    Raises:
        ValueError: something other than torchrun set RANK.
    """
    if "RANK" not in os.environ:
        return None
    if not os.environ.get("LOCAL_RANK", "").isdigit():
        raise UserError(
            "RANK is set, but not LOCAL_RANK: start several processes with torchrun, or unset RANK"
        )
    return int(os.environ["LOCAL_RANK"])


def read_launch() -> tuple[int, int]:
    """Number of this process and how many torchrun has started, also where they form no group."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_gpus() -> None:
    """Check that each of this machine's processes has its own GPU.

    Raises:
        ValueError: there are fewer GPUs than processes.
    """
    rank, count = local_rank(), torch.cuda.device_count()
    if rank is not None and rank >= count:
        raise UserError(
            f"torchrun: more processes than GPUs ({count}); lower --nproc_per_node, or set use_gpu: false"
        )


def find_launch_start() -> float | None:
    """When this machine's `torchrun` started, in seconds since 1970; None without torchrun.

    It stays while it starts its processes again. It counts these restarts only where its own process ended
    first: the other machines' start anew with a count of 0.
    """
    return _find_torchrun().create_time() if "TORCHELASTIC_RUN_ID" in os.environ else None


def describe_unsafe_restart() -> str | None:
    """A warning where torchrun may restart processes that would meet at the addresses of those before."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0 or os.environ.get(_FRESH_STORE) == "1":
        return None
    return f"torchrun: set {_FRESH_STORE}=1 before torchrun, or a restart by --max-restarts may fail or hang"


def name_launch() -> str | None:
    """A name of the `torchrun` command that is the same after a restart; None without torchrun.

    It is its rendezvous id if it has one, else the process that started this one.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None or name not in ("", "none"):
        return name
    torchrun = _find_torchrun()
    return f"{gethostname()} {torchrun.pid} {torchrun.create_time():.2f}"


def _find_torchrun() -> "psutil.Process":
    """The process that has started this one."""
    import psutil  # here, since it is seldom needed

    return psutil.Process(os.getppid())


def require_same(value: Hashable, describe_difference: Callable[[int], str]) -> None:
    """Check that all processes have the same value.

    Args:
        value: this process's.
        describe_difference: a message for the first process that has another value than the main one.

    Raises:
        ValueError: in all processes, one has another value.
    """
    if world_size() == 1:
        return
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UserError(describe_difference(rank))


def is_lost_process(error: Exception) -> bool:
    """Whether an error says that another process, or its machine, is gone."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def is_main_process() -> bool:
    """Whether this process writes the files."""
    return process_rank() == 0


def broadcast_value(value: Any) -> Any:
    """The main process's value, in all processes."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def reduce_max(value: int, device: torch.device) -> int:
    """The largest of all processes' values."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def wait_for_all() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def gather_rows(local_rows: Tensor) -> Tensor:
    """The rows of all processes, concatenated by rank; their numbers may differ."""
    if world_size() == 1:
        return local_rows
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, local_rows.cpu())
    return torch.cat(parts).to(local_rows.device)


def broadcast_weights(model: nn.Module, own: Collection[str] = ()) -> None:
    """Copy the main process's parameters and buffers, but for those that each has for itself, to all."""
    if world_size() == 1:
        return
    for name, tensor in model.state_dict().items():
        if name in own:
            continue
        contiguous = tensor.contiguous()  # NCCL needs it
        dist.broadcast(contiguous, 0)
        tensor.copy_(contiguous)


def sum_gradients(parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Replace each gradient by its sum over the processes, and return the sum of their losses.

    A parameter that has no gradient in any process keeps none.
    """
    if world_size() == 1:
        return loss
    trained = [p for p in parameters if p.requires_grad]
    has_gradient = torch.tensor([float(p.grad is not None) for p in trained], device=loss.device)
    gradients = []
    for p in trained:
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        gradients.append(gradient.flatten())
    flat = torch.cat([loss.detach().reshape(1), has_gradient, *gradients])
    dist.all_reduce(flat)
    total, has_any, *sums = flat.split([1, len(trained), *(p.numel() for p in trained)])
    for p, exists, gradient in zip(trained, has_any.tolist(), sums, strict=True):
        p.grad = gradient.view_as(p).clone() if exists else None
    return torch.squeeze(total)


def sum_sparse_gradient(parameter: nn.Parameter) -> None:
    """Replace the sparse gradient (V, D) by its sum over the processes, at the cost of the rows in it.

    A process may have none. The sum is the same to the last digit in all processes.
    """
    if world_size() == 1:
        return
    ids = torch.zeros(0, dtype=torch.long, device=parameter.device)
    rows = parameter.new_zeros(0, parameter.shape[1])
    if parameter.grad is not None:
        gradient = parameter.grad.coalesce()
        ids, rows = gradient.indices()[0], gradient.values()
    all_ids, all_rows = torch.cat(gather_on_device(ids)), torch.cat(gather_on_device(rows))
    total = torch.sparse_coo_tensor(all_ids[None], all_rows, parameter.shape, check_invariants=False)
    parameter.grad = total.coalesce()


def gather_on_device(local_rows: Tensor) -> list[Tensor]:
    """The rows of each process, by rank; their numbers may differ."""
    count = torch.tensor([len(local_rows)], device=local_rows.device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    longest = max(int(n) for n in counts)
    padded = local_rows.new_zeros(longest, *local_rows.shape[1:])
    padded[: len(local_rows)] = local_rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[: int(n)] for part, n in zip(parts, counts, strict=True)]
