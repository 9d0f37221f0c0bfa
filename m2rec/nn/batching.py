"""Rows of similar length go through a network together, so that little of a batch is padding."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# lengths at which a batch is cut into groups on a CPU; finer steps cost more in calls than they save
_LENGTH_BOUNDARIES = (8, 16, 32, 64, 128, 256, 512, 1024)

# of a padded batch, as parts of the longest history and of all its positions: their product bounds the shapes
_LENGTH_PARTS = (8, 4, 2, 1)
_POSITION_PARTS = 8
MAX_PADDED_SHAPES = len(_LENGTH_PARTS) * _POSITION_PARTS


class PaddedBatch(NamedTuple):
    """Training rows in one of at most `MAX_PADDED_SHAPES` shapes, for code that is recorded once for each.

    A row of padding has no items and the length 1; a position of padding has the target 0.
    """

    items: Tensor
    """(B, L)"""
    lengths: Tensor
    """(B,)"""
    positions: Tensor
    """(S,), row * L + time of each target."""
    targets: Tensor
    """(S,), ids from 1; 0 is padding."""
    negatives: Tensor | None
    """(S,), one negative for each target, if the data set has drawn them."""

    @property
    def rows(self) -> Tensor:
        """(S,), the row of each position."""
        return self.positions // self.items.shape[1]

    @property
    def times(self) -> Tensor:
        """(S,), the time of each position in its row, from 0."""
        return self.positions % self.items.shape[1]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, L, S."""
        return *self.items.shape, len(self.positions)


def pad_training_rows(
    items: Tensor,
    lengths: Tensor,
    targets: Tensor,
    n_rows: int,
    negatives: Tensor | None = None,
) -> PaddedBatch:
    """Pad rows to few shapes: full batches, a part of the longest history, eighths of all positions.

    The shape depends on the rows alone, never on what came before, so that a resumed run computes as one that
    was never stopped.

    Args:
        items: (b, L).
        lengths: (b,), at least 1 each.
        targets: (b, L), 0 where there is none; or (b,), one for each row's last position.
        n_rows: B of full batches; more rows are padded to a multiple of B.
        negatives: (b,), beside targets (b,).
    """
    rows = n_rows * -(-len(items) // n_rows)
    longest = int(lengths.max())
    length = next(n for n in (-(-items.shape[1] // part) for part in _LENGTH_PARTS) if longest <= n)
    if targets.dim() == 1:
        row, time, most = torch.arange(len(items)), lengths - 1, rows
    else:
        row, time = targets.nonzero(as_tuple=True)
        targets, most = targets[row, time], rows * length
    step = -(-most // _POSITION_PARTS)
    missing = step * max(1, -(-len(targets) // step)) - len(targets)
    return PaddedBatch(
        F.pad(items[:, :length], (0, 0, 0, rows - len(items))),
        F.pad(lengths, (0, rows - len(items)), value=1),
        F.pad(row * length + time, (0, missing)),
        F.pad(targets, (0, missing)),
        None if negatives is None else F.pad(negatives, (0, missing)),
    )


def group_rows_by_length(lengths: Tensor, longest: int) -> Iterator[tuple[Tensor, int]]:
    """Cut a padded batch into groups of rows of similar length.

    Where most histories are short and a few are long, this is most of the work saved. On a GPU,
    where a few big calls cost less than many small ones, padding is only cut to the longest row.

    Args:
        lengths: (B,), at least 1 each.
        longest: L, the padded length.

    Yields:
        Row numbers (b,) and the padded length that is enough for them.
    """
    if lengths.is_cuda:
        yield torch.arange(len(lengths), device=lengths.device), int(lengths.max())
        return
    steps = [step for step in _LENGTH_BOUNDARIES if step < longest] + [longest]
    group = torch.bucketize(lengths, torch.tensor(steps, device=lengths.device))
    for number in group.unique().tolist():
        rows = (group == number).nonzero().squeeze(1)
        yield rows, int(lengths[rows].max())


def batch_rows_by_length(lengths: Sequence[int], max_positions: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, short rows first; rows of length 0 are left out.

    Args:
        lengths: of the rows.
        max_positions: positions of a batch, padding included; a longer row is a batch by itself.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > max_positions:
            yield batch
            batch = []
        if lengths[row]:
            batch.append(row)
    if batch:
        yield batch
