"""The key `shard_items`: each process holds a part of the ID embedding (`nn/sharded_embedding.py`)."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from m2rec import distributed
from m2rec.errors import UserError
from m2rec.models.m2rec import M2Rec
from m2rec.nn.sharded_embedding import ShardedEmbedding
from m2rec.run_folder import RunFolder
from m2rec.settings import NO_RUN
from m2rec.tensor_files import RowBlocks
from m2rec.training.configuration import RunConfig

logger = logging.getLogger(__name__)


def settle_shard_items(config: RunConfig) -> None:
    """Check what the key needs before the data is loaded; in a single process it has no effect.

    Args:
        config: of a model that is made of M2Rec's parts.

    Raises:
        UserError: another key is in the way.
    """
    if not config["shard_items"]:
        return
    if distributed.world_size() == 1:
        logger.info("shard_items: no effect, a single process holds all rows; start several with torchrun")
        return
    obstacle = _find_obstacle(config)
    if obstacle:
        raise UserError(f"shard_items: True needs {obstacle}; or set shard_items: false")
    parts = distributed.world_size()
    logger.info("shard_items: %d parts of the item table; no neighbors, which compare whole tables", parts)


def _find_obstacle(config: RunConfig) -> str:
    """What a sharded table needs and this run lacks, in words; empty if nothing."""
    if config["neighbors"]:
        return "neighbors: false, as they compare whole item tables"
    if config["sparse_updates"] is False:
        return "sparse_updates: true or auto, not False"
    if config["continue_from"] != NO_RUN:
        return f"a new model, and continue_from: {config['continue_from']} reads a whole one: leave it out"
    if config.model_class.forward is not M2Rec.forward:
        return f"M2Rec's own lookups, and {config.model_class.__name__} has others"
    return ""


def require_shared_folder(folder: Path) -> None:
    """Check that all processes see the run folder, to which each writes its part of checkpoints.

    Raises:
        UserError: in all processes, one does not.
    """
    distributed.require_same(
        folder.is_dir(),
        lambda rank: (
            f"runs_dir: process {rank} does not see {folder}; let all machines share runs_dir, or set "
            f"shard_items: false"
        ),
    )


def list_own_names(model: nn.Module) -> frozenset[str]:
    """The names, in the model's state, of tensors that each process has for itself."""
    return frozenset(f"{name}.rows.weight" for name, _ in _iterate_shards(model))


def describe_shards(model: nn.Module) -> str:
    """For the log: how many rows processes hold."""
    parts = []
    for _, shard in _iterate_shards(model):
        rows = sorted({end - start for start, end in pairwise(shard.bounds)})
        counts = " and ".join(f"{n:,}" for n in rows)
        parts.append(f"{counts} rows of the ID embedding in {len(shard.bounds) - 1} processes")
    return "; ".join(parts)


def count_parameters(model: nn.Module) -> int:
    """How many parameters the model has, in all processes."""
    elsewhere = 0
    for _, shard in _iterate_shards(model):
        elsewhere += (shard.num_embeddings - len(shard.rows.weight)) * shard.embedding_dim
    return elsewhere + sum(p.numel() for p in model.parameters())


def write_weights(files: RunFolder, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write the model's weights, named as in a single process; all processes call it.

    A sharded table goes into the file block by block.
    """
    state: dict[str, Tensor | RowBlocks] = dict(model.state_dict())
    for name, shard in _iterate_shards(model):
        del state[f"{name}.rows.weight"]
        shape, dtype = (shard.num_embeddings, shard.embedding_dim), shard.rows.weight.dtype
        state[f"{name}.weight"] = RowBlocks(shape, dtype, shard.gather_blocks())
    if distributed.is_main_process():
        files.write_weights(state, metadata)
        return
    for tensor in state.values():
        if isinstance(tensor, RowBlocks):
            deque(tensor.blocks, maxlen=0)


def load_weights(files: RunFolder, model: nn.Module) -> None:
    """Give all processes the weights that `write_weights` wrote; the main process reads them."""
    tables = {f"{name}.weight" for name, _ in _iterate_shards(model)}
    with ExitStack() as stack:
        state: dict[str, Tensor] = {}
        file = None
        if distributed.is_main_process():
            file, _ = stack.enter_context(files.open_weights())
            state = {name: file.get_tensor(name) for name in file.keys() if name not in tables}
        for name, shard in _iterate_shards(model):
            shard.scatter_rows(None if file is None else file.get_slice(f"{name}.weight"))
            state[f"{name}.rows.weight"] = shard.rows.weight
        if file is not None:
            model.load_state_dict(state)
    distributed.broadcast_weights(model, list_own_names(model))


def clip_with_own_rows(
    parameters: Sequence[Tensor], own: Tensor, max_norm: float, norm_type: float = 2.0, **options: Any
) -> None:
    """As `clip_grad_norm_`, of gradients that all processes have and of this process's own.

    Args:
        parameters: whose gradients are the same in all processes.
        own: whose gradient is a part of one that is shared out over the processes.
        max_norm, norm_type, options: as for `clip_grad_norm_`.
    """
    assert own.grad is not None
    norm = torch.linalg.vector_norm(own.grad, norm_type) if own.numel() else own.new_zeros(())
    norms = [torch.empty_like(norm) for _ in range(distributed.world_size())]
    dist.all_gather(norms, norm)
    all_norms = torch.empty(len(norms), device=norm.device)
    all_norms.grad = torch.stack(norms)  # so that `parameters` are scaled by the same factor everywhere
    total = clip_grad_norm_([*parameters, all_norms], max_norm, norm_type, **options)
    own.grad.mul_((max_norm / (total + 1e-6)).clamp(max=1.0))


def _iterate_shards(model: nn.Module) -> Iterator[tuple[str, ShardedEmbedding]]:
    for name, module in model.named_modules():
        if isinstance(module, ShardedEmbedding):
            yield name, module
