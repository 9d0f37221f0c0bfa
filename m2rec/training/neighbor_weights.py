"""The neighbours of a trained network: counted and compared once, their weights chosen on validation targets.

letter  meaning
b, V    rows of a batch, items including padding
R, k    neighbours of a history's end, items that are ranked
P       candidates of a row, R + k
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec import distributed
from m2rec.compat import Interaction
from m2rec.data.dataset import HistoryDataset
from m2rec.data.transitions import count_transitions
from m2rec.evaluation.measurement import measure_protocol
from m2rec.evaluation.protocols import Protocol
from m2rec.evaluation.ranking import Ranking, mask_history_scores
from m2rec.evaluation.saved_model import sample_evenly
from m2rec.nn.encoder import Encoder
from m2rec.nn.neighbors import Neighbors, NeighborTable, choose_width, find_similar_items

logger = logging.getLogger(__name__)

# the weights that are tried, every pair of them; with the greatest next to nothing is left of the network
_WEIGHTS: dict[str, tuple[float, ...]] = {
    "transitions": (0, 0.12, 0.25, 0.5, 1, 2, 3, 4, 6, 15, 60, 600),
    "text": (0, 0.5, 1, 2, 4, 6, 9, 12, 30, 120, 1200),
}
# with which the best pair is multiplied, up to the greatest weights that are tried
_FACTORS = (1.5, 2, 3, 5, 10, 30, 100)
_N_FOLDS = 20  # of the users, for the standard error of a difference
_MIN_USERS_TO_MULTIPLY = 100  # of fewer the error is not known well enough

_MAX_USERS = 20_000  # whose validation targets choose
_MAX_SCORES = 4_000_000_000  # of the network, for them, in each of two passes
_BATCH_SCORES = 2**22  # in a batch of rows

# all pairs of items with this many numbers each take some minutes of one thread
_MAX_SIMILARITY_WORK = 30_000_000_000_000

Score = Callable[[Interaction], Tensor]
"""Rows -> (b, V) scores of the network, padding's -inf."""


class WeightChoice(NamedTuple):
    """What the validation targets say."""

    weights: dict[str, float]
    """By kind."""
    without: float
    """The validation metric without neighbours."""
    best: float
    """The same with these weights."""
    n_users: int
    """How many users' targets chose."""
    factor: float = 1
    """With which the best pair was multiplied."""


@torch.no_grad()
def build_neighbors(encoder: Encoder, train: HistoryDataset) -> Neighbors:
    """The tables for a network, by what it is trained on: histories, and texts if it has some.

    Args:
        encoder: the network.
        train: the training part.
    """
    assert train.histories is not None
    device = encoder.device
    neighbors = Neighbors()
    neighbors["transitions"] = _tabulate_transitions(train).to(device)
    vectors = encoder.vectors
    if vectors is not None:
        work = len(vectors) ** 2 * vectors.shape[1]
        if work <= _MAX_SIMILARITY_WORK or vectors.is_cuda:
            neighbors["text"] = find_similar_items(vectors)
        else:
            n_items = f"{len(vectors):,}"
            logger.warning("neighbors: none by text: to compare %s items would take too long", n_items)
    return neighbors


def _tabulate_transitions(train: HistoryDataset) -> NeighborTable:
    assert train.histories is not None
    graph = count_transitions(train.histories, train.item_num, choose_width(train.item_num))
    offsets, targets, strengths = map(torch.from_numpy, graph)
    n_edges = offsets.diff()
    width = max(1, int(n_edges.max()))
    table = NeighborTable(train.item_num, width)
    source = torch.arange(train.item_num).repeat_interleave(n_edges)
    place = torch.arange(len(targets)) - offsets[source]
    table.ids[source, place] = targets.int()
    table.strengths[source, place] = strengths.float()
    return table


def choose_weights(neighbors: Neighbors, score: Score, loader: Any, protocol: Protocol) -> WeightChoice:
    """The weights that the validation targets ask for.

    Of the pairs of `_WEIGHTS` the one with the best metric, at equal metrics the smaller one. Then both
    weights are multiplied by the greatest of `_FACTORS` with which the metric is not worse than the best one
    by more than a standard error, and no weight is greater than the greatest of `_WEIGHTS`; not with few
    users. Validation flatters the network: it was trained on the
    last item of each of these histories, as part of the same history, and will not have been on those of the
    test.

    One process chooses for all.

    Args:
        neighbors: the tables.
        score: of the network without neighbours.
        loader: of the validation rows.
        protocol: by which the rankings are judged, ALL or UNSEEN.
    """
    choice = None
    if distributed.is_main_process():
        choice = _choose_weights(_Trial(neighbors, score, loader, protocol))
    chosen: WeightChoice = distributed.broadcast_value(choice)
    return chosen


def _choose_weights(trial: "_Trial") -> WeightChoice:
    kinds = list(trial.neighbors)
    grid = list(product(*(_WEIGHTS[kind] for kind in kinds)))
    results = [trial.measure(ranking) for ranking in trial.rank(grid)]
    best = max(range(len(grid)), key=lambda i: (trial.sign * results[i], -sum(grid[i])))
    chosen, result, factor = grid[best], results[best], 1.0
    if any(chosen) and len(trial.rows) >= _MIN_USERS_TO_MULTIPLY:
        factors = (1.0, *_find_possible_factors(kinds, chosen))
        multiples = [tuple(factor * weight for weight in chosen) for factor in factors]
        rankings = list(trial.rank(multiples))
        number = _find_greatest_good_multiple(trial, rankings)
        chosen, result, factor = multiples[number], trial.measure(rankings[number]), factors[number]
    weights = dict(zip(kinds, chosen, strict=True))
    return WeightChoice(weights, results[0], result, len(trial.rows), factor)


def _find_possible_factors(kinds: list[str], weights: tuple[float, ...]) -> list[float]:
    """The factors with which no weight exceeds the greatest of its kind: ties are left to the network."""
    by_kind = list(zip(kinds, weights, strict=True))
    return [f for f in _FACTORS if all(f * weight <= max(_WEIGHTS[kind]) for kind, weight in by_kind)]


def _find_greatest_good_multiple(trial: "_Trial", rankings: list[Ranking]) -> int:
    """The last ranking whose metric is not worse than the best one by more than a standard error."""
    results = [trial.sign * trial.measure(ranking) for ranking in rankings]
    best = int(np.argmax(results))
    by_fold = np.array([trial.measure_folds(ranking) for ranking in rankings])
    lost = trial.sign * (by_fold[best] - by_fold)
    errors = lost.std(axis=1, ddof=1) / math.sqrt(_N_FOLDS)
    is_good = results[best] - np.array(results) <= errors
    return int(np.flatnonzero(is_good)[-1])


class _Trial:
    """Rankings of validation rows with some weights, and their metric.

    Args:
        neighbors, score, loader, protocol: as in `choose_weights`.
    """

    def __init__(self, neighbors: Neighbors, score: Score, loader: Any, protocol: Protocol) -> None:
        self.neighbors, self.score, self.loader, self.protocol = neighbors, score, loader, protocol
        self.part: HistoryDataset = loader.dataset
        self.rows = sample_evenly(len(self.part), min(_MAX_USERS, max(1, _MAX_SCORES // self.part.item_num)))
        self.sign = 1 if loader.config["valid_metric_bigger"] else -1

    @torch.no_grad()
    def rank(self, grid: Sequence[tuple[float, ...]]) -> Iterator[Ranking]:
        """The ranking of the rows with each of these weights, one at a time."""
        part, k = self.part, max(self.loader.config["topk"])
        best_items: list[list[Tensor]] = [[] for _ in grid]
        for batch in torch.from_numpy(self.rows).split(max(1, _BATCH_SCORES // part.item_num)):
            interaction = self.loader.collate_fn(batch.numpy())[0]
            scores = self.score(interaction)
            if self.protocol is Protocol.UNSEEN:
                mask_history_scores(scores, interaction, part)
            candidates = _find_candidates(self.neighbors, scores, interaction, part, k)
            for found, weights in zip(best_items, grid, strict=True):
                found.append(candidates.rank(weights, k))
        targets = part.inter_feat[part.iid_field][self.rows].numpy()
        owners = part.inter_feat[part.owner_field][self.rows].numpy()
        assert part.histories is not None and part.part is not None
        returning = part.histories.target_returns(owners, part.part)
        for found in best_items:
            yield Ranking(targets, returning, {self.protocol: torch.cat(found).long().numpy()})

    def measure(self, ranking: Ranking) -> float:
        """The metric by which the training is judged."""
        name = self.loader.config["valid_metric"].lower()
        return measure_protocol(ranking, self.protocol, self.part)[name]

    def measure_folds(self, ranking: Ranking) -> list[float]:
        """The same of parts of the rows that are alike in size."""
        folds = []
        for first in range(_N_FOLDS):
            fold = slice(first, None, _N_FOLDS)
            items = {self.protocol: ranking.items[self.protocol][fold]}
            folds.append(self.measure(Ranking(ranking.targets[fold], ranking.returning[fold], items)))
        return folds


class _Candidates(NamedTuple):
    """The only items that can be among the k best of their row, whatever the weights."""

    ids: Tensor
    """(b, P)."""
    scores: Tensor
    """(b, P), of the network; -inf for a duplicate and for padding."""
    added: list[Tensor]
    """By kind (b, P), before the weight."""

    def rank(self, weights: tuple[float, ...], k: int) -> Tensor:
        """The ids of the best items with these weights, (b, k)."""
        total = self.scores
        for weight, added in zip(weights, self.added, strict=True):
            total = total + weight * added
        best = total.topk(min(k, total.shape[1]))
        items = self.ids.gather(1, best.indices).masked_fill(best.values == -torch.inf, 0)
        return items.int().cpu()  # one of many rankings that are kept


def _find_candidates(
    neighbors: Neighbors, scores: Tensor, interaction: Interaction, part: HistoryDataset, k: int
) -> _Candidates:
    """A row's neighbours, and the k best of all other items."""
    device = scores.device
    items = interaction[part.history_field].to(device)
    lengths = interaction[part.item_list_length_field].to(device)
    by_kind = neighbors.find_scores_by_kind(items, lengths)
    near = torch.cat([ids for ids, _ in by_kind.values()], 1).sort(1).values  # (b, R)
    others = scores.scatter(1, near, -torch.inf).topk(min(k, scores.shape[1]))
    ids = torch.cat([near, others.indices], 1)
    is_duplicate = F.pad(near.diff() == 0, (1, 0))
    is_hidden = torch.cat([is_duplicate, others.values == -torch.inf], 1)
    added = []
    for kind_ids, kind_scores in by_kind.values():
        total = torch.zeros_like(scores).scatter_add_(1, kind_ids, kind_scores.to(scores.dtype))
        added.append(total.gather(1, ids))
    return _Candidates(ids, scores.gather(1, ids).masked_fill(is_hidden, -torch.inf), added)


def add_neighbors(
    encoder: Encoder, train: HistoryDataset, score: Score, loader: Any, protocol: Protocol
) -> WeightChoice:
    """Give a trained network the neighbours that its validation targets ask for; none if they ask for none.

    Args:
        encoder: the network; its `neighbors` are set.
        train: the training part.
        score: of the network.
        loader: of the validation rows, one at least.
        protocol: by which the weights are chosen.
    """
    encoder.neighbors = None
    neighbors = build_neighbors(encoder, train)
    choice = choose_weights(neighbors, score, loader, protocol)
    for kind, weight in choice.weights.items():
        if weight:
            table = neighbors[kind]
            assert isinstance(table, NeighborTable)
            table.weight.fill_(weight)
        else:
            del neighbors[kind]
    encoder.neighbors = neighbors if len(neighbors) else None
    return choice
