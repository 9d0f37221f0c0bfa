"""A baseline without training: what followed the last items in other histories, and text similarity.

letter  meaning
B, L    rows, sequence length
V, T    items including padding, width of the text vectors
E       edges of the graph
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.compat import Config, Interaction, SequentialRecommender
from m2rec.data.dataset import HistoryDataset
from m2rec.data.transitions import count_transitions
from m2rec.nn.neighbors import Neighbors, select_recent

# chosen once, on the validation targets of Beauty, Toys, Sports, ml-100k and ml-1m together
_POPULARITY_WEIGHT = 0.001
_MIN_RETURN_SHARE = 0.5  # of training targets; below it items of the history are ranked last
_SCORE_BOUND = 1e6  # more than any score


class TransitionGraph(SequentialRecommender):
    """Ranks items by one sum; nothing is learned.

        score(j) = sum_k 0.7^k log(1 + n(s_k, j))      s_0 is the last item, s_1 the one before, up to s_4
                 + sum_k 0.5^k cos(t(s_k), t(j))       t are text vectors, centred
                 + 0.001 log(1 + n(j))

    n(i, j) counts how often j came after i in the training histories, up to ten interactions later, by
    1 / sqrt(gap), and a tenth of how often it came before. n(j) is the count of j in training. Where fewer
    than half of the training targets are items that the user had before, the items of the history are ranked
    last. Equal scores are in the order of the ids.

    So the items that followed the last ones are first, then the similar ones, then the popular ones. Such a
    heuristic is from "An Embarrassingly Simple Graph Heuristic Reveals Shortcut-Solvable Benchmarks for
    Sequential Recommendation", arXiv 2605.07125, whose graph has transitions from one item to the next alone,
    and whose ranking is in rings: one step away, two steps away, the rest. Here it is a sum, longer gaps
    count, and there are no second steps, which did not help on validation.

    Args:
        config: a RecBole Config.
        dataset: the training data; `item_vectors` are its text vectors, or None.
    """

    supports_dense_rows = True
    uses_text = True
    fixed_settings: ClassVar[dict[str, Any]] = {"epochs": 1, "loss_type": "CE", "text_whitening": "none"}

    def __init__(self, config: Config, dataset: HistoryDataset) -> None:
        super().__init__(config, dataset)
        assert dataset.histories is not None
        self.nothing = nn.Parameter(torch.zeros(1))  # the optimiser needs one parameter
        graph = count_transitions(dataset.histories, self.n_items)
        for name, array in graph._asdict().items():  # not saved with the weights
            self.register_buffer(name, torch.from_numpy(array), persistent=False)
        counts = torch.from_numpy(dataset.histories.training_counts(self.n_items)).double()
        popularity = _POPULARITY_WEIGHT * counts.log1p()
        order_by_id = 1e-9 * torch.arange(self.n_items) / self.n_items
        self.register_buffer("base_scores", popularity - order_by_id, persistent=False)
        self.ranks_history_last = dataset.histories.training_returns() < _MIN_RETURN_SHARE
        text = getattr(dataset, "item_vectors", None)
        self.text_source = None if text is None else text.provenance
        unit = None if text is None else F.normalize(text.vectors, dim=1)
        self.register_buffer("text", unit, persistent=False)

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Zero: there is nothing to learn."""
        return 0 * self.nothing.sum()

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """The score of every item for each row, (B, V), in double precision."""
        items, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        scores: Tensor = self.base_scores.repeat(len(items), 1)
        recent, ages = select_recent(items, lengths)
        self._add_transitions(scores, recent, Neighbors.decays["transitions"] ** ages.double())
        if self.text is not None:
            self._add_text(scores, recent, Neighbors.decays["text"] ** ages.float())
        if self.ranks_history_last:
            scores.scatter_(1, items, scores.gather(1, items) - _SCORE_BOUND)
        return scores

    def _add_transitions(self, scores: Tensor, recent: Tensor, weights: Tensor) -> None:
        """Follow the edges of the recent items.

        Args:
            scores: (B, V), changed in place.
            recent: (B, K), items; padding has no edges.
            weights: (K,).
        """
        start = self.offsets[recent].flatten()
        n_edges = self.offsets[recent + 1].flatten() - start
        first = n_edges.cumsum(0) - n_edges  # where the edges of each item begin in the result
        source = torch.arange(len(n_edges), device=n_edges.device).repeat_interleave(n_edges)
        edges = torch.arange(len(source), device=source.device) + (start - first)[source]
        n_recent = recent.shape[1]
        cells = source // n_recent * scores.shape[1] + self.targets[edges]
        scores.view(-1).index_add_(0, cells, self.strengths[edges] * weights[source % n_recent])

    def _add_text(self, scores: Tensor, recent: Tensor, weights: Tensor) -> None:
        """Add the similarity of each item's text to that of the recent items.

        Args:
            scores: (B, V), changed in place.
            recent: (B, K), items; padding has no text.
            weights: (K,).
        """
        query = (self.text[recent] * weights[:, None]).sum(1)
        scores += query @ self.text.T
