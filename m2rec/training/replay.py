"""The loader of a run that continues another one: new rows, and in each epoch other old rows."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m2rec.compat import Interaction, TrainDataLoader


class ReplayLoader(TrainDataLoader):
    """RecBole's loader of training rows, which draws an epoch's rows from its generator as the epoch begins.

    Args:
        loader: that of all rows.
        is_new: (rows,), which of them every epoch has.
        share: of the other rows, how many each epoch draws.

    Attributes:
        new: the numbers of the new rows.
        n_replayed: how many old rows each epoch has.
    """

    def __init__(self, loader: TrainDataLoader, is_new: NDArray[np.bool_], share: float) -> None:
        self.new, self._old = np.flatnonzero(is_new), np.flatnonzero(~is_new)
        self.n_replayed = round(share * len(self._old))
        self._rows = self.new
        super().__init__(loader.config, loader.dataset, loader._sampler, shuffle=loader.shuffle)

    def _init_batch_size_and_step(self) -> None:
        super()._init_batch_size_and_step()
        self.sample_size = len(self.new) + self.n_replayed

    def draw_rows(self) -> NDArray[np.int64]:
        """The numbers of an epoch's rows, ascending."""
        drawn = torch.randperm(len(self._old), generator=self.generator)[: self.n_replayed].numpy()
        return np.sort(np.concatenate([self.new, self._old[drawn]]))

    def __iter__(self) -> Iterator[Interaction]:
        self._rows = self.draw_rows()
        batches: Iterator[Interaction] = super().__iter__()
        return batches

    def collate_fn(self, index: Any) -> Interaction:
        """The rows at these places of the epoch's rows."""
        rows: Interaction = super().collate_fn(self._rows[np.asarray(index)])
        return rows
