"""Rows of similar length go through a network together, so that little of a batch is padding."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# lengths at which a batch is cut into groups on a CPU; finer steps cost more in calls than they save
_LENGTH_BOUNDARIES = (8, 16, 32, 64, 128, 256, 512, 1024)


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
