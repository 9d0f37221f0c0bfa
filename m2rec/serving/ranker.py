"""How a trained model ranks: histories of internal ids in, items with names and scores out.

letter  meaning
B, D    histories, model width
V       items including padding
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.errors import UserError
from m2rec.nn.batching import batch_rows_by_length
from m2rec.serving import session
from m2rec.serving.arguments import InputWarnings
from m2rec.serving.item_index import ItemIndex
from m2rec.serving.saved_model import SavedModel
from m2rec.serving.session import SessionState
from m2rec.serving.top_k import ScoreAdjustments, select_top_k, select_top_k_in_pools
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


class RankingOptions(NamedTuple):
    """How many items to recommend, and which ones may be."""

    k: int
    exclude_seen: bool
    excluded_ids: Tensor
    """Ids of items that are never recommended."""
    candidate_ids: Tensor | None
    """Ascending ids of the candidates; None for all items."""


class HistoryItems(NamedTuple):
    """The distinct items of a history."""

    all_ids: Collection[int]
    visible_ids: Collection[int]
    """Those in the part that the model sees, to which its repeat bias applies."""


@dataclass(frozen=True)
class Ranker:
    """Ranks one model's items; immutable, so a ranking under way ends as it began."""

    model: SavedModel
    whole_history: bool = False
    """Whether all of a history counts, or at most the last `max_length` items."""
    index: ItemIndex | None = None
    """Finds items where scoring all takes too long; None to score all."""

    def with_index(self, probes: int) -> "Ranker":
        """A ranker that searches an index, built if there is none, of which `probes` lists are searched.

        Raises:
            ValueError: faiss is not installed.
        """
        table = self.model.table
        index = self.index.extended(table) if self.index else ItemIndex(table)
        index.set_probes(probes)
        return replace(self, index=index)

    def with_more_items(self, model: SavedModel) -> "Ranker":
        """A ranker of the same model with new items; its index takes them in."""
        index = self.index.extended(model.table) if self.index else None
        return replace(self, model=model, index=index)

    def truncate_history(self, ids: list[int]) -> list[int]:
        """The part of a history that the model sees."""
        return ids if self.whole_history else ids[-self.model.max_length :]

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
        known = list(filter(None, histories))
        seen = self._list_items(known)
        with self.limit_threads(sum(map(len, known)), len(known)):
            vectors = self.encode_histories(known)
            ranked = self._rank_vectors(vectors, seen, options)
        return self._add_popular(histories, ranked, options, warnings)

    def _list_items(self, histories: list[list[int]]) -> list[HistoryItems]:
        listed = []
        for history in histories:
            visible = self.truncate_history(history)
            listed.append(HistoryItems(set(history), set(visible)))
        return listed

    def rank_sessions(self, states: Sequence[SessionState], options: RankingOptions) -> list[Ranking]:
        """Rank the items after each live user's events, in one pass.

        Raises:
            ValueError: a user has no events, and the run has no item counts to fall back on.
        """
        warnings = InputWarnings()
        vectors = [self.model.table[:0]]
        seen = []
        for state in states:
            if state.vector is not None:
                vectors.append(state.vector)
                seen.append(HistoryItems(state.seen, state.seen))
        with self.limit_threads(0, len(seen)):
            ranked = self._rank_vectors(torch.cat(vectors), seen, options)
        histories = [state.seen for state in states]
        ranked = self._add_popular(histories, ranked, options, warnings)
        warnings.log_warnings()
        return ranked

    @torch.no_grad()
    def score_items(self, histories: list[list[int]]) -> Tensor:
        """Scores (B, V) of all items after histories, at least one item each; padding's are -inf."""
        with self.limit_threads(sum(map(len, histories)), len(histories)):
            scores = F.linear(self.encode_histories(histories), self.model.table)
            seen = self._list_items(histories)
            adjustments = self._build_adjustments(seen, range(len(seen)), exclude_seen=False)
            adjustments.apply(scores, adjustments.items, 0)
        scores[:, 0] = -torch.inf
        return scores

    def rank_similar(self, item: int, k: int) -> Ranking:
        """The items whose rows of the item table have the highest cosine with an item's row."""
        table = self.model.table
        with self.limit_threads(0, 1):
            cosines = F.cosine_similarity(table, table[item], dim=1)
            cosines[[0, item]] = -torch.inf
            best = cosines.topk(min(k, len(cosines)))
        return self._name_items(best.values.tolist(), best.indices.tolist())

    @torch.no_grad()
    def _rank_vectors(
        self, vectors: Tensor, seen: Sequence[HistoryItems], options: RankingOptions
    ) -> list[Ranking]:
        """The best items for vectors (B, D) of histories that hold these items."""
        ranked: dict[int, Ranking] = {}
        if self.index is not None and options.candidate_ids is None:
            ranked = self._rank_by_index(self.index, vectors, seen, options)
        rest = [row for row in range(len(seen)) if row not in ranked]
        if rest:
            best = select_top_k(
                vectors[rest],
                self.model.table,
                options.k,
                self._build_adjustments(seen, rest, options.exclude_seen),
                options.excluded_ids,
                options.candidate_ids,
            )
            ranked |= self._name_rows(rest, *best)
        return [ranked[row] for row in range(len(seen))]

    def _rank_by_index(
        self, index: ItemIndex, vectors: Tensor, seen: Sequence[HistoryItems], options: RankingOptions
    ) -> dict[int, Ranking]:
        """Rankings by row, without the rows that the index can't answer."""
        table = self.model.table
        n_ranked = options.k + len(options.excluded_ids)
        min_results = [n_ranked + len(items.all_ids) for items in seen]
        ranked: dict[int, Ranking] = {}
        for rows, retrieved in index.search_by_need(vectors, min_results):
            # a history's repeat bias may lift items that the index does not find
            visible = _pad_rows([[*seen[row].visible_ids] for row in rows])
            pools = torch.cat([retrieved, visible], dim=1)
            best = select_top_k_in_pools(
                vectors[rows],
                table,
                options.k,
                self._build_adjustments(seen, rows, options.exclude_seen),
                options.excluded_ids,
                pools.to(table.device),
            )
            ranked |= self._name_rows(rows, *best)
        return ranked

    def _build_adjustments(
        self, seen: Sequence[HistoryItems], rows: Sequence[int], exclude_seen: bool
    ) -> ScoreAdjustments:
        """For these rows of `seen`: the repeat bias for visible items, and all items of a history removed."""
        bias = self.model.inference_encoder.repeat_bias
        boost = 0.0 if bias is None else bias.item()
        boosted: list[Collection[int]] = []
        hidden: list[Collection[int]] = []
        for row in rows:
            boosted.append(seen[row].visible_ids)
            hidden.append(seen[row].all_ids if exclude_seen else ())
        return ScoreAdjustments(boosted, hidden, boost, self.model.table.device)

    @torch.no_grad()
    def encode_histories(self, histories: list[list[int]]) -> Tensor:
        """The vectors (B, D) of histories that hold at least one item each."""
        encoder = self.model.inference_encoder
        table = self.model.table
        histories = list(map(self.truncate_history, histories))
        vectors = table.new_empty(len(histories), table.shape[1])
        batched_lengths = []  # 0 for a history that is encoded alone
        for row, history in enumerate(histories):
            if len(history) <= self.model.max_length:
                batched_lengths.append(len(history))
                continue
            batched_lengths.append(0)
            memory = SessionState()
            session.advance_session(encoder, history, memory)  # in pieces, however long
            assert memory.vector is not None
            vectors[row] = memory.vector[0]
        at_once = _POSITION_BUDGETS.get(table.device.type, _DEFAULT_POSITION_BUDGET)
        lengths = torch.tensor(batched_lengths, device=table.device)
        for rows in batch_rows_by_length(batched_lengths, at_once):
            items = _pad_rows([histories[row] for row in rows])
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
        best = order[: options.k].tolist()
        return self._name_items([float(model.item_counts[item]) for item in best], best)

    def _name_rows(self, rows: Sequence[int], scores: Tensor, items: Tensor) -> dict[int, Ranking]:
        """Recommendations by row of scores and ids (B, k)."""
        named = map(self._name_items, scores.tolist(), items.tolist())
        return dict(zip(rows, named, strict=True))

    def _name_items(self, scores: Sequence[float], items: Sequence[int]) -> Ranking:
        """Items by name, without those whose score is minus infinity."""
        found = []
        for score, item in zip(scores, items, strict=True):
            if score > -torch.inf:
                token = self.model.tokens[item]
                title = self.model.titles.get(token, "")
                found.append(Recommendation(token, score, title))
        return found


def _pad_rows(rows: Iterable[Sequence[int]]) -> Tensor:
    """Ids as (B, n), shorter rows padded on the right."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True)
