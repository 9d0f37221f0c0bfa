"""How a trained model ranks: histories of internal ids in, items with names and scores out.

letter  meaning
B, D    histories, model width
V       items including padding
"""

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.errors import UserError
from m2rec.nn.batching import batch_rows_by_length
from m2rec.nn.neighbors import N_RECENT
from m2rec.serving import session
from m2rec.serving.arguments import InputWarnings
from m2rec.serving.id_lists import IdLists
from m2rec.serving.int8_table import Int8Table
from m2rec.serving.item_index import ItemIndex
from m2rec.serving.ranking_options import RankingOptions
from m2rec.serving.saved_model import SavedModel
from m2rec.serving.session import SessionState
from m2rec.serving.top_k import NeighborScores, ScoreAdjustment, select_top_k, select_top_k_in_pools
from m2rec.threads import use_one_thread

# histories that are ranked together
_RANKING_BATCH_SIZE = 1024

# multiplications that one thread does in ten milliseconds or so, and two hardly faster
_MAX_SINGLE_THREAD_WORK = 2**26

# positions that go through the network together: on a CPU what its caches hold
_POSITION_BUDGETS = {"cpu": 2**13}
_DEFAULT_POSITION_BUDGET = 2**18


class Recommendation(NamedTuple):
    """An item, its score and its title, empty where unknown; compare scores within one ranking only."""

    item: str
    score: float
    title: str = ""


Ranking = list[Recommendation]
"""Best first."""


class SeenItems(NamedTuple):
    """The items of histories; duplicates are allowed."""

    all_ids: IdLists
    visible_ids: IdLists
    """Those in the part that the model sees, to which its repeat bias applies."""
    recent_ids: IdLists
    """The last ones of that part in their order, whose neighbours' scores are raised."""

    @classmethod
    def build(cls, histories: IdLists, n_visible: int) -> "SeenItems":
        """Of whole histories, of which the model sees the last so many items."""
        visible = histories.truncate(n_visible)
        return cls(histories, visible, visible.truncate(N_RECENT))

    def select(self, rows: Sequence[int]) -> "SeenItems":
        """Those of these histories."""
        return SeenItems(*(ids.select(rows) for ids in self))

    def remove_duplicates(self) -> "SeenItems":
        """Each item once, without an order, but those of `recent_ids`."""
        once = (self.all_ids.remove_duplicates(), self.visible_ids.remove_duplicates())
        return SeenItems(*once, self.recent_ids)


@dataclass(frozen=True)
class Ranker:
    """Ranks one model's items; immutable, so a ranking under way ends as it began."""

    model: SavedModel
    whole_history: bool = False
    """Whether all of a history counts, or at most the last `max_length` items."""
    index: ItemIndex | Int8Table | None = None
    """Finds items where scoring all takes too long; None to score all."""

    def with_index(self, probes: int) -> "Ranker":
        """A ranker that searches an index, built if there is none, of which `probes` lists are searched.

        Raises:
            ValueError: faiss is not installed.
        """
        table = self.model.table
        index = self.index.extended(table) if isinstance(self.index, ItemIndex) else ItemIndex(table)
        index.set_probes(probes)
        return replace(self, index=index)

    def with_more_items(self, model: SavedModel) -> "Ranker":
        """A ranker of the same model with new items; its index takes them in."""
        index = self.index.extended(model.table) if self.index else None
        return replace(self, model=model, index=index)

    @property
    def visible_length(self) -> int:
        """How many of a history's last items the model sees."""
        return sys.maxsize if self.whole_history else self.model.max_length

    def limit_threads(self, positions: int, rows: int) -> AbstractContextManager[None]:
        """Context manager: one thread for small work.

        Several threads would win little there, and lose much on a busy machine.

        Args:
            positions: of histories to encode.
            rows: histories to rank all items for.
        """
        model = self.model
        if model.table.is_cuda:
            return nullcontext()
        work = positions * model.n_layer_parameters + rows * model.table.numel()
        return use_one_thread() if work <= _MAX_SINGLE_THREAD_WORK else nullcontext()

    def rank_in_batches(
        self, histories: Iterator[list[int]], options: RankingOptions, warnings: InputWarnings
    ) -> Iterator[Ranking]:
        """Rank the items after each history, a batch at a time; log the warnings at the end.

        Raises:
            ValueError: a history is empty, and the run has no item counts to fall back on.
        """
        try:
            while batch := list(islice(histories, _RANKING_BATCH_SIZE)):
                yield from self._rank_histories(batch, options, warnings)
        finally:
            warnings.log_warnings()

    def _rank_histories(
        self, histories: list[list[int]], options: RankingOptions, warnings: InputWarnings
    ) -> list[Ranking]:
        known = IdLists.build(filter(None, histories))
        seen = SeenItems.build(known, self.visible_length)
        with self.limit_threads(len(known.ids), len(known)):
            vectors = self._encode_histories(seen.visible_ids)
            ranked = self._rank_vectors(vectors, seen, options)
        return self._add_popular(histories, ranked, options, warnings)

    def rank_sessions(self, states: Sequence[SessionState], options: RankingOptions) -> list[Ranking]:
        """Rank the items after each live user's events, in one pass.

        Raises:
            ValueError: a user has no events, and the run has no item counts to fall back on.
        """
        warnings = InputWarnings()
        vectors = [self.model.table[:0], *(state.vector for state in states if state.vector is not None)]
        histories = [state.seen for state in states]
        known = IdLists.build(filter(None, histories))
        seen = SeenItems(known, known, IdLists.build(state.recent for state in states if state.seen))
        with self.limit_threads(0, len(known)):
            ranked = self._rank_vectors(torch.cat(vectors), seen, options)
        ranked = self._add_popular(histories, ranked, options, warnings)
        warnings.log_warnings()
        return ranked

    @torch.no_grad()
    def score_items(self, histories: list[list[int]]) -> Tensor:
        """Scores (B, V) of all items after histories, at least one item each; padding's are -inf."""
        seen = SeenItems.build(IdLists.build(histories), self.visible_length)
        with self.limit_threads(sum(map(len, histories)), len(histories)):
            scores = F.linear(self._encode_histories(seen.visible_ids), self.model.table)
            for adjustment in self._build_adjustments(seen, False, self._find_neighbors(seen)):
                adjustment.apply(scores, adjustment.items, 0)
        scores[:, 0] = -torch.inf
        return scores

    def rank_similar(self, item: int, k: int) -> Ranking:
        """The items whose rows of the item table have the highest cosine with an item's row."""
        table = self.model.table
        with self.limit_threads(0, 1):
            cosines = F.cosine_similarity(table, table[item], dim=1)
            cosines[[0, item]] = -torch.inf
            best = cosines.topk(min(k, len(cosines)))
        (ranking,) = self._name_items(best.values[None], best.indices[None])
        return ranking

    @torch.no_grad()
    def _rank_vectors(self, vectors: Tensor, seen: SeenItems, options: RankingOptions) -> list[Ranking]:
        """The best items for vectors (B, D) of histories that hold these items."""
        ranked: dict[int, Ranking] = {}
        if self.index is not None and options.candidate_ids is None:
            ranked = self._rank_by_index(self.index, vectors, seen, options)
        rest = [row for row in range(len(vectors)) if row not in ranked]
        if rest:
            selected = seen.select(rest)
            best = select_top_k(
                vectors[rest],
                self.model.table,
                options.k,
                self._build_adjustments(selected, options.exclude_seen, self._find_neighbors(selected)),
                options.excluded_ids,
                options.candidate_ids,
            )
            ranked |= zip(rest, self._name_items(*best), strict=True)
        return [ranked[row] for row in range(len(ranked))]

    def _rank_by_index(
        self, index: ItemIndex | Int8Table, vectors: Tensor, seen: SeenItems, options: RankingOptions
    ) -> dict[int, Ranking]:
        """Rankings by row, without the rows that the index can't answer."""
        table = self.model.table
        seen = seen.remove_duplicates()
        n_ranked = options.k + len(options.excluded_ids)
        ranked: dict[int, Ranking] = {}
        for rows, retrieved in index.search_by_need(vectors, (n_ranked + seen.all_ids.lengths).tolist()):
            selected = seen.select(rows)
            near = self._find_neighbors(selected)
            # a history's repeat bias or neighbours may lift items that the index does not find
            lifted = [selected.visible_ids.pad(), *(ids.cpu() for ids, _ in near)]
            pools = torch.cat([retrieved, *lifted], dim=1)
            best = select_top_k_in_pools(
                vectors[rows],
                table,
                options.k,
                self._build_adjustments(selected, options.exclude_seen, near),
                options.excluded_ids,
                pools.to(table.device),
            )
            ranked |= zip(rows, self._name_items(*best), strict=True)
        return ranked

    def _build_adjustments(
        self, seen: SeenItems, exclude_seen: bool, near: Sequence[tuple[Tensor, Tensor]]
    ) -> list[ScoreAdjustment]:
        """What neighbours add; all items of a history removed, or else the repeat bias for visible items."""
        device = self.model.table.device
        adjustments: list[ScoreAdjustment] = [NeighborScores(*found) for found in near]
        if exclude_seen:
            return [*adjustments, ScoreAdjustment(seen.all_ids, -torch.inf, device)]
        bias = self.model.inference_encoder.repeat_bias
        return [*adjustments, ScoreAdjustment(seen.visible_ids, 0.0 if bias is None else bias.item(), device)]

    def _find_neighbors(self, seen: SeenItems) -> list[tuple[Tensor, Tensor]]:
        """The neighbours of each history's end, and what they add, (B, R) each; empty without neighbours."""
        neighbors = self.model.encoder.neighbors
        if neighbors is None:
            return []
        recent, device = seen.recent_ids, self.model.table.device
        lengths = torch.from_numpy(recent.lengths).to(device)
        return [neighbors.find_scores(recent.pad().to(device), lengths)]

    @torch.no_grad()
    def _encode_histories(self, histories: IdLists) -> Tensor:
        """The vectors (B, D) of histories that hold at least one item each."""
        encoder = self.model.inference_encoder
        table = self.model.table
        vectors = table.new_empty(len(histories), table.shape[1])
        is_long = histories.lengths > self.model.max_length
        for row in is_long.nonzero()[0].tolist():
            memory = SessionState()
            session.advance_session(encoder, histories.select([row]).ids.tolist(), memory)  # in pieces
            assert memory.vector is not None
            vectors[row] = memory.vector[0]
        at_once = _POSITION_BUDGETS.get(table.device.type, _DEFAULT_POSITION_BUDGET)
        batched_lengths = histories.lengths * ~is_long  # 0 for a history that is encoded alone
        lengths = torch.from_numpy(batched_lengths).to(table.device)
        for rows in batch_rows_by_length(batched_lengths.tolist(), at_once):
            items = histories.select(rows).pad()
            vectors[rows] = encoder.last(items.to(table.device), lengths[rows])
        return vectors

    def _add_popular(
        self,
        histories: Sequence[Collection[int]],
        ranked: list[Ranking],
        options: RankingOptions,
        warnings: InputWarnings,
    ) -> list[Ranking]:
        """By history its ranking in `ranked`, which has the next one for each history that is not empty.

        An empty history gets the most popular items.

        Raises:
            ValueError: a history is empty, and the run has no item counts to fall back on.
        """
        n_empty = len(histories) - len(ranked)
        if not n_empty:
            return ranked
        warnings.n_empty += n_empty
        popular = self._rank_by_popularity(options)
        rankings = iter(ranked)
        return [next(rankings) if history else list(popular) for history in histories]

    def _rank_by_popularity(self, options: RankingOptions) -> Ranking:
        """The items with the most occurrences in training; at equal counts the lower id first."""
        model = self.model
        if not model.item_counts:
            raise UserError("history: empty, and this run has no item counts to fall back on; give an item")
        order = model.popularity_order
        order = order[~torch.isin(order, options.excluded_ids.cpu())]
        if options.candidate_ids is not None:
            order = order[torch.isin(order, options.candidate_ids.cpu())]
        best = order[: options.k]
        counts = torch.tensor([model.item_counts[item] for item in best.tolist()], dtype=torch.float64)
        (ranking,) = self._name_items(counts[None], best[None])
        return ranking

    def _name_items(self, scores: Tensor, items: Tensor) -> list[Ranking]:
        """Items by name: scores and ids (B, k), without the items whose score is minus infinity."""
        values, ids = scores.double().numpy(force=True), items.numpy(force=True)
        is_found = values > -np.inf
        names, titles = self.model.names[:, ids[is_found]].tolist()
        found = map(Recommendation._make, zip(names, values[is_found].tolist(), titles, strict=True))
        return [list(islice(found, n)) for n in is_found.sum(1).tolist()]


def measure_recall(rankings: Iterable[Ranking], exact: Iterable[Ranking]) -> float:
    """The share of the exact best items that are in the rankings, mean over those that are not empty.

    Raises:
        ValueError: all exact rankings are empty.
    """
    shares = []
    for found, best in zip(rankings, exact, strict=True):
        if best:
            expected = {entry.item for entry in best}
            shares.append(sum(entry.item in expected for entry in found) / len(expected))
    if not shares:
        raise UserError("recall: nothing can be recommended after these histories; give another one")
    return sum(shares) / len(shares)
