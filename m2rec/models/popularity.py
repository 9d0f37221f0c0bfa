"""Popularity baselines: rank items by their count in training, or in its last days."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from m2rec.compat import Config, Interaction, SequentialRecommender
from m2rec.data.dataset import HistoryDataset
from m2rec.errors import UserError


class Popularity(SequentialRecommender):
    """The same ranking for every user; of items with equal counts the lower id is first.

    RecBole's Pop is not a sequential model: it is evaluated without each user's history and on
    RecBole's own split. This one is evaluated as every sequential model is.

    Args:
        config: a RecBole Config.
        dataset: the training data.
    """

    supports_dense_rows = True
    # it never improves, and RecBole takes an equal score for an improvement
    fixed_settings: ClassVar[dict[str, Any]] = {"epochs": 1, "loss_type": "CE"}

    def __init__(self, config: Config, dataset: HistoryDataset) -> None:
        super().__init__(config, dataset)
        self.register_buffer("ranked", self._rank_items(dataset))
        self.nothing = nn.Parameter(torch.zeros(1))  # the optimiser needs one parameter

    def _rank_items(self, dataset: HistoryDataset) -> Tensor:
        """A score for each item, (V,), without ties."""
        assert dataset.histories is not None
        counts = torch.from_numpy(dataset.histories.training_counts(self.n_items)).double()
        scores: Tensor = counts - torch.arange(self.n_items) / self.n_items
        return scores

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Zero: there is nothing to learn."""
        return 0 * self.nothing.sum()

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """The same scores for each row, (B, V)."""
        scores: Tensor = self.ranked.repeat(len(interaction), 1)
        return scores


class RecentPopularity(Popularity):
    """Popularity in the last days of training (`count_recent_items`), then in all of training.

    Args:
        config: a RecBole Config.
        dataset: the training data, with `split: global_time`.

    Raises:
        UserError: another split, which has no last days.
    """

    def _rank_items(self, dataset: HistoryDataset) -> Tensor:
        if dataset.recent_counts is None:
            raise UserError(
                f"model: RecentPopularity needs one moment that ends training, which split: {dataset.split} "
                f"does not have; set split: global_time, or model: Popularity"
            )
        overall = super()._rank_items(dataset)
        order = overall.argsort()
        position = torch.empty_like(overall)
        position[order] = torch.arange(self.n_items, dtype=overall.dtype)
        scores: Tensor = torch.from_numpy(dataset.recent_counts.counts) + position / self.n_items
        return scores
