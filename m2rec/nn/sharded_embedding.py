"""An embedding whose rows are shared out over the processes, in contiguous blocks.

No process holds the whole table, nor a gradient of its size. A lookup sends ids to the processes that own
them and brings rows back, by PyTorch's differentiable `all_to_all_single`; the backward pass takes the same
way back, so that the gradient of a row arrives, from all processes, where its optimiser is. PyTorch's DTensor
shards an embedding, too, but has no sparse gradient for it: its backward pass costs V / n rows.

All processes must call the same methods, in the same order.

letter  meaning
V, D    items including padding, model width
n       processes
R       rows of this process, V / n rounded up or down
b       rows of a batch
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2rec import distributed

_BLOCK_ROWS = 8_192  # a multiple of the 16 values that PyTorch draws at a time


class Rows(Protocol):
    """A tensor (V, D), or a part of a file, of which rows can be read."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class ShardedEmbedding(nn.Module):
    """As `nn.Embedding(V, D, padding_idx=0)` over all processes, with sparse gradients.

    Args:
        n_items: V.
        width: D.

    Attributes:
        rows: (R, D), the rows of this process; ids in it are from 0 to R - 1.
        start: the id of the first of them.
    """

    sparse = True

    def __init__(self, n_items: int, width: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = n_items, width
        rank, n = distributed.process_rank(), distributed.world_size()
        self.bounds = [n_items * k // n for k in range(n + 1)]
        self.start, self.end = self.bounds[rank], self.bounds[rank + 1]
        padding = 0 if self.start == 0 < self.end else None
        n_rows = self.end - self.start
        weight = torch.empty(n_rows, width)
        self.rows = nn.Embedding(n_rows, width, padding_idx=padding, sparse=True, _weight=weight)
        self.draw_weight(1.0)  # as `nn.Embedding` does, so that what is drawn next is the same

    @torch.no_grad()
    def draw_weight(self, std: float) -> None:
        """Draw normal values for all V rows, keep this process's, and set padding to 0.

        Values and generator are those of `nn.init.normal_` on the whole table, which is never held.
        """
        for start, end in _split_rows(self.num_embeddings):
            drawn = torch.empty(end - start, self.embedding_dim).normal_(std=std)
            first, last = max(start, self.start), min(end, self.end)
            if first < last:
                own = self.rows.weight[first - self.start : last - self.start]
                own.copy_(drawn[first - start : last - start])
        if self.rows.padding_idx is not None:
            self.rows.weight[0] = 0

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> their rows (..., D); a process that needs none gives ids of shape (0,)."""
        # here, since a PyTorch without processes lacks it
        from torch.distributed import _functional_collectives as collectives

        flat, order = ids.flatten().sort()
        ends = torch.searchsorted(flat, torch.tensor(self.bounds[1:], device=flat.device))
        asked = ends.diff(prepend=ends.new_zeros(1))  # of each process
        given = torch.empty_like(asked)  # to each process
        dist.all_to_all_single(given, asked)
        n_asked, n_given = asked.tolist(), given.tolist()
        wanted = flat.new_empty(sum(n_given))
        dist.all_to_all_single(wanted, flat, n_given, n_asked)
        assert dist.group.WORLD is not None
        found = collectives.all_to_all_single_autograd(
            self.rows(wanted - self.start), n_asked, n_given, dist.group.WORLD
        )
        return found.index_select(0, order.argsort()).view(*ids.shape, self.embedding_dim)

    def score_items(self, x: Tensor, table: Tensor) -> Tensor:
        """Compare the vectors of each process with the rows of all processes; no gradient.

        A process holds twice its scores for a moment.

        Args:
            x: (b, D), this process's vectors; b differs by process and may be 0.
            table: (R, D), this process's part of the item table.

        Returns:
            (b, V).
        """
        parts = distributed.gather_on_device(x)
        scores = torch.cat(parts) @ table.T
        sizes = [end - start for start, end in pairwise(self.bounds)]
        received = scores.new_empty(len(x) * self.num_embeddings)
        sent_sizes = [len(part) * len(table) for part in parts]
        dist.all_to_all_single(received, scores.view(-1), [len(x) * size for size in sizes], sent_sizes)
        del scores
        blocks = received.split([len(x) * size for size in sizes])
        return torch.cat([block.view(len(x), size) for block, size in zip(blocks, sizes, strict=True)], dim=1)

    @torch.no_grad()
    def gather_blocks(self) -> Iterator[Tensor]:
        """All V rows in their order, in blocks (k, D), for the main process; all others get none.

        All must iterate to the end.
        """
        rank = distributed.process_rank()
        for owner, start, end in self._split_shards():
            own = self.rows.weight[start - self.start : end - self.start]
            if owner == rank == 0:
                yield own.detach().cpu()
            elif owner == rank:
                dist.send(own.contiguous(), 0)
            elif rank == 0:
                block = own.new_empty(end - start, self.embedding_dim)
                dist.recv(block, owner)
                yield block.cpu()

    @torch.no_grad()
    def scatter_rows(self, whole: Rows | None) -> None:
        """Give each process its rows of the main process's whole table (V, D); None in all others."""
        rank = distributed.process_rank()
        for owner, start, end in self._split_shards():
            own = self.rows.weight[start - self.start : end - self.start]
            if whole is not None and owner == rank:
                own.copy_(whole[start:end])
            elif whole is not None:
                dist.send(whole[start:end].to(self.rows.weight.device).contiguous(), owner)
            elif owner == rank:
                block = own.new_empty(end - start, self.embedding_dim)
                dist.recv(block, 0)
                own.copy_(block)

    def _split_shards(self) -> Iterator[tuple[int, int, int]]:
        """Process, start and end of blocks of rows, of all V."""
        for rank, (first, last) in enumerate(pairwise(self.bounds)):
            for start in range(first, last, _BLOCK_ROWS):
                yield rank, start, min(start + _BLOCK_ROWS, last)


def _split_rows(n_rows: int) -> Iterator[tuple[int, int]]:
    """Start and end of blocks; the last is not small, since PyTorch draws its last 16 values anew."""
    start = 0
    while start < n_rows:
        end = n_rows if n_rows - start < 2 * _BLOCK_ROWS else start + _BLOCK_ROWS
        yield start, end
        start = end
