"""The neighbours of a trained network: counted and compared once, their weights chosen on validation targets.

letter  meaning
b, V    rows of a batch, items including padding
R, k    neighbours of a history's end, items that are ranked
P       candidates of a row, R + k
"""

import logging
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec import distributed
from m2rec.compat import Interaction
from m2rec.data.dataset import HistoryDataset
from m2rec.data.transitions import count_transitions
from m2rec.evaluation.measurement import measure_protocol
from m2rec.evaluation.protocols import Protocol
from m2rec.evaluation.ranking import Ranking
from m2rec.evaluation.saved_model import sample_evenly
from m2rec.nn.encoder import Encoder
from m2rec.nn.neighbors import Neighbors, NeighborTable, choose_width, find_similar_items

logger = logging.getLogger(__name__)

# the weights that are tried, every pair of them
_WEIGHTS: dict[str, tuple[float, ...]] = {
    "transitions": (0, 0.12, 0.25, 0.5, 1, 2, 3, 4, 6),
    "text": (0, 0.5, 1, 2, 4, 6, 9, 12),
}

_MAX_USERS = 20_000  # whose validation targets choose
_MAX_SCORES = 4_000_000_000  # of the network, for them
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


def choose_weights(neighbors: Neighbors, score: Score, loader: Any) -> WeightChoice:
    """The weights with which the validation metric is best; at equal metrics the smaller ones.

    One process chooses for all.

    Args:
        neighbors: the tables.
        score: of the network without neighbours.
        loader: of the validation rows.
    """
    choice = _choose_weights(neighbors, score, loader) if distributed.is_main_process() else None
    chosen: WeightChoice = distributed.broadcast_value(choice)
    return chosen


@torch.no_grad()
def _choose_weights(neighbors: Neighbors, score: Score, loader: Any) -> WeightChoice:
    part: HistoryDataset = loader.dataset
    config = loader.config
    rows = sample_evenly(len(part), min(_MAX_USERS, max(1, _MAX_SCORES // part.item_num)))
    grid = list(product(*(_WEIGHTS[kind] for kind in neighbors)))
    best_items: list[list[Tensor]] = [[] for _ in grid]
    for batch in torch.from_numpy(rows).split(max(1, _BATCH_SCORES // part.item_num)):
        interaction = loader.collate_fn(batch.numpy())[0]
        candidates = _find_candidates(neighbors, score(interaction), interaction, part, max(config["topk"]))
        for found, weights in zip(best_items, grid, strict=True):
            found.append(candidates.rank(weights, max(config["topk"])))
    targets = part.inter_feat[part.iid_field][rows].numpy()
    owners = part.inter_feat[part.owner_field][rows].numpy()
    assert part.histories is not None and part.part is not None
    returning = part.histories.target_returns(owners, part.part)
    sign = 1 if config["valid_metric_bigger"] else -1
    results = []
    for found in best_items:
        ranking = Ranking(targets, returning, {Protocol.ALL: torch.cat(found).long().numpy()})
        results.append(measure_protocol(ranking, Protocol.ALL, part)[config["valid_metric"].lower()])
    best = max(range(len(grid)), key=lambda i: (sign * results[i], -sum(grid[i])))
    return WeightChoice(dict(zip(neighbors, grid[best], strict=True)), results[0], results[best], len(rows))


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


def add_neighbors(encoder: Encoder, train: HistoryDataset, score: Score, loader: Any) -> WeightChoice:
    """Give a trained network the neighbours that its validation targets ask for; none if they ask for none.

    Args:
        encoder: the network; its `neighbors` are set.
        train: the training part.
        score: of the network.
        loader: of the validation rows, one at least.
    """
    encoder.neighbors = None
    neighbors = build_neighbors(encoder, train)
    choice = choose_weights(neighbors, score, loader)
    for kind, weight in choice.weights.items():
        if weight:
            table = neighbors[kind]
            assert isinstance(table, NeighborTable)
            table.weight.fill_(weight)
        else:
            del neighbors[kind]
    encoder.neighbors = neighbors if len(neighbors) else None
    return choice
