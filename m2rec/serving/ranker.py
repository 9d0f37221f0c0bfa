"""How a trained model ranks: histories of internal ids in, items with names and scores out.

letter  meaning
B, D    histories, model width
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

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
    """An item, its score, of which only the order means something, and its title, empty where unknown."""

    item: str
    score: float
    title: str = ""


class CandidateSet(NamedTuple):
    """Which items may be recommended."""

    candidate_ids: Tensor | None = None
    """Ascending ids of the candidates; None for all items."""
    excluded_ids: Tensor | None = None
    """Ids of the others; None for none."""


class HistoryItems(NamedTuple):
    """Which items a history holds, each once."""

    all_ids: Collection[int]
    visible_ids: Collection[int]
    """Those of the part that the model is shown, to which its repeat bias applies."""


@dataclass(frozen=True)
class Ranker:
    """Ranks one model's items; what it was given does not change."""

    model: SavedModel
    whole_history: bool = False
    """Whether all of a history counts, or at most the last `max_length` items."""
    index: ItemIndex | None = None
    """Finds items where scoring all takes too long; None to score all."""

    def truncate_history(self, ids: list[int]) -> list[int]:
        """The part of a history that the model is shown."""
        return ids if self.whole_history else ids[-self.model.max_length :]

    def limit_threads(self, positions: int, rows: int) -> AbstractContextManager[None]:
        """Where to compute so many positions of histories and rank all items for so many rows.

        What is small takes one thread: several would win little, and on a busy machine lose much.
        """
        model = self.model
        if model.inference_encoder.id_embedding.weight.is_cuda:  # made here, if it was not yet
            return nullcontext()
        work = positions * model.n_layer_parameters + rows * model.table.numel()
        return use_one_thread() if work <= _MAX_SINGLE_THREAD_WORK else nullcontext()

    def rank_in_batches(
        self,
        histories: Iterator[list[int]],
        k: int,
        exclude_seen: bool,
        choice: CandidateSet,
        remarks: InputWarnings,
    ) -> Iterator[list[Recommendation]]:
        """By history, a batch at a time; the log has its remarks at the end.

        Raises:
            ValueError: a history is empty, and the run does not say what is popular.
        """
        try:
            while part := list(islice(histories, _RANKING_BATCH_SIZE)):
                yield from self._rank_batch(part, k, exclude_seen, choice, remarks)
        finally:
            remarks.log_warnings()

    def _rank_batch(
        self,
        histories: list[list[int]],
        k: int,
        exclude_seen: bool,
        choice: CandidateSet,
        remarks: InputWarnings,
    ) -> list[list[Recommendation]]:
        known = [row for row in histories if row]
        best = []
        if known:
            seen = [HistoryItems(set(row), set(self.truncate_history(row))) for row in known]
            with self.limit_threads(sum(map(len, known)), len(known)):
                best = self.rank_vectors(self.encode_histories(known), seen, k, exclude_seen, choice)
        return self.add_popular_fallback([bool(row) for row in histories], best, k, choice, remarks)

    @torch.no_grad()
    def rank_vectors(
        self, vectors: Tensor, seen: Sequence[HistoryItems], k: int, exclude_seen: bool, choice: CandidateSet
    ) -> list[list[Recommendation]]:
        """The best items for vectors (B, D) of histories that hold these items."""
        model = self.model
        best: dict[int, list[Recommendation]] = {}

        def keep(rows: Sequence[int], found: tuple[Tensor, Tensor]) -> None:
            for row, scores, items in zip(rows, *(part.tolist() for part in found), strict=True):
                best[row] = self.build_recommendations(scores, items)

        def adjustments(rows: Sequence[int]) -> ScoreAdjustments:
            hidden = [seen[row].all_ids if exclude_seen else () for row in rows]
            return self.build_adjustments([seen[row].visible_ids for row in rows], hidden)

        left_out = 0 if choice.excluded_ids is None else len(choice.excluded_ids)
        index = self.index if choice.candidate_ids is None else None
        needs = [k + left_out + len(items.all_ids) for items in seen]
        for rows, near in index.search_by_need(vectors, needs) if index is not None else ():
            own = [torch.tensor([*seen[row].visible_ids], dtype=torch.int64) for row in rows]
            pools = torch.cat([near, nn.utils.rnn.pad_sequence(own, batch_first=True)], dim=1)
            pools = pools.to(model.table.device)
            keep(
                rows,
                select_top_k_in_pools(
                    vectors[rows], model.table, k, adjustments(rows), pools, choice.excluded_ids
                ),
            )
        if rest := [row for row in range(len(seen)) if row not in best]:
            keep(rest, select_top_k(vectors[rest], model.table, k, adjustments(rest), *choice))
        return [best[row] for row in range(len(seen))]

    def build_adjustments(
        self, counted: Sequence[Collection[int]], hidden: Sequence[Collection[int]]
    ) -> ScoreAdjustments:
        """What is added to scores, by history: for the items that the model was shown, and to hide some."""
        bias = self.model.inference_encoder.repeat_bias
        return ScoreAdjustments(
            counted, hidden, 0.0 if bias is None else bias.item(), self.model.table.device
        )

    @torch.no_grad()
    def encode_histories(self, histories: list[list[int]]) -> Tensor:
        """The vectors (B, D) of histories that hold at least one item each."""
        model = self.model
        histories = [self.truncate_history(row) for row in histories]
        vectors = model.table.new_empty(len(histories), model.table.shape[1])
        for row, own in enumerate(histories):
            if len(own) > model.max_length:  # in pieces, however long
                memory = SessionState()
                session.advance_session(model.inference_encoder, own, memory)
                assert memory.vector is not None
                vectors[row] = memory.vector[0]
        device = model.table.device
        at_once = _POSITION_BUDGETS.get(device.type, _DEFAULT_POSITION_BUDGET)
        short = [len(row) if len(row) <= model.max_length else 0 for row in histories]
        for rows in batch_rows_by_length(short, at_once):
            lengths = torch.tensor([len(histories[row]) for row in rows])
            items = [torch.tensor(histories[row]) for row in rows]
            padded = nn.utils.rnn.pad_sequence(items, batch_first=True)
            vectors[rows] = model.inference_encoder.last(padded.to(device), lengths.to(device))
        return vectors

    def add_popular_fallback(
        self,
        known: list[bool],
        best: list[list[Recommendation]],
        k: int,
        choice: CandidateSet,
        remarks: InputWarnings,
    ) -> list[list[Recommendation]]:
        """`best` for who is known, and what is popular for who is not.

        Raises:
            ValueError: somebody is not known, and the run does not say what is popular.
        """
        if all(known):
            return best
        remarks.n_empty += known.count(False)
        popular, ranked = self._rank_by_popularity(k, choice), iter(best)
        return [next(ranked) if is_known else list(popular) for is_known in known]

    def _rank_by_popularity(self, k: int, choice: CandidateSet) -> list[Recommendation]:
        """What training met most often, the lower id first where two were met as often."""
        model = self.model
        if not model.item_counts:
            raise UserError("history: empty, and this run does not say what is popular; give an item")
        order = model.popularity_order
        if choice.candidate_ids is not None:
            order = order[torch.isin(order, choice.candidate_ids.cpu())]
        if choice.excluded_ids is not None:
            order = order[~torch.isin(order, choice.excluded_ids.cpu())]
        best = order[:k].tolist()
        return self.build_recommendations([float(model.item_counts[item]) for item in best], best)

    def build_recommendations(self, scores: Sequence[float], items: Sequence[int]) -> list[Recommendation]:
        """Items by name, without those whose score is minus infinity."""
        tokens, titles = self.model.tokens, self.model.titles
        pairs = [(tokens[i], score) for score, i in zip(scores, items, strict=True) if score > -torch.inf]
        return [Recommendation(token, score, titles.get(token, "")) for token, score in pairs]
