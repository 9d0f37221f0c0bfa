"""A baseline without training: what followed the last items in other histories, and text similarity.

letter  meaning
B, L    rows, sequence length
V, T    items including padding, width of the text vectors
E       edges of the graph
"""

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.compat import Config, Interaction, SequentialRecommender
from m2rec.data.dataset import HistoryDataset
from m2rec.data.histories import Histories

# chosen once, on the validation targets of Beauty, Toys, Sports, ml-100k and ml-1m together
_WINDOW = 10  # two items are joined when a user had them at most so many interactions apart
_GAP_POWER = 0.5  # a pair counts 1 / gap ** _GAP_POWER
_BACKWARD = 0.1  # how much a pair counts from the later item to the earlier one
_RECENT = 5  # so many items at the end of the history count
_DECAY = 0.7  # the weight of each in the graph, relative to the item after it
_TEXT_DECAY = 0.5  # the same for its text
_POPULARITY_WEIGHT = 0.001
_MIN_RETURN_SHARE = 0.5  # of training targets; below it items of the history are ranked last
_SCORE_BOUND = 1e6  # more than any score


class _Graph(NamedTuple):
    """Weighted edges, sorted by their source."""

    offsets: Tensor
    """(V + 1,), the edges of item i are offsets[i] to offsets[i + 1]."""
    targets: Tensor
    """(E,), items."""
    strengths: Tensor
    """(E,), log(1 + weighted count of the pair)."""


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
        graph = _build_graph(dataset.histories, self.n_items)
        for name, tensor in graph._asdict().items():  # not saved with the weights
            self.register_buffer(name, tensor, persistent=False)
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
        recent, ages = _select_recent(items, lengths)
        self._add_transitions(scores, recent, _DECAY ** ages.double())
        if self.text is not None:
            self._add_text(scores, recent, _TEXT_DECAY ** ages.float())
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


def _select_recent(items: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The last items of right-padded histories, last first, and 0, 1, ...: (B, K) and (K,); padding is 0."""
    ages = torch.arange(min(_RECENT, items.shape[1]), device=items.device)
    position = lengths[:, None] - 1 - ages
    return items.gather(1, position.clamp(min=0)).masked_fill(position < 0, 0), ages


def _build_graph(histories: Histories, n_items: int) -> _Graph:
    """Edges from each item to the items that users had after it or before it."""
    n_kinds = 2 * _WINDOW
    weights = np.array([1 / (1 + kind % _WINDOW) ** _GAP_POWER for kind in range(n_kinds)])
    weights[_WINDOW:] *= _BACKWARD
    codes = [np.empty(0, dtype=np.int64)]
    for kind in range(_WINDOW):
        earlier, later = histories.training_pairs(kind + 1)
        codes.append((earlier * n_items + later) * n_kinds + kind)
        codes.append((later * n_items + earlier) * n_kinds + kind + _WINDOW)
    ordered = np.concatenate(codes)
    del codes  # of millions of interactions, each array here takes gigabytes
    ordered.sort()  # numbers that hold pair and kind: several times as fast as sorting an index
    pairs, kinds = np.divmod(ordered, n_kinds)
    del ordered
    first = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1])[: len(pairs)])
    counts = np.add.reduceat(weights[kinds], first) if len(first) else np.empty(0)
    sources, targets = np.divmod(pairs[first], n_items)
    offsets = np.searchsorted(sources, np.arange(n_items + 1))
    return _Graph(torch.from_numpy(offsets), torch.from_numpy(targets), torch.from_numpy(np.log1p(counts)))
