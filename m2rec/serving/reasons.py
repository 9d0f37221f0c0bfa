"""Why an item has its rank: which items of the history raise it, and which are nearest to it by text.

letter  meaning
C       leave-one-out histories
N, V    explained items, items including padding
T       width of the text vectors
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.serving.arguments import tokens_to_ids
from m2rec.serving.ranker import Ranker, Ranking

N_REASONS = 3
"""Items of the history of each kind, for one item, unless told otherwise."""
MAX_LEFT_OUT = 50
"""Distinct items of the history, the last ones, that are left out in turn; each costs a pass."""
_MAX_SCORES = 2**22  # held at a time


class Influence(NamedTuple):
    """An item of the history, and what it does to another item."""

    item: str
    title: str
    effect: float
    """The item's log-probability among all items, less that without all events of this one; exact."""


class TextNeighbor(NamedTuple):
    """An item of the history, and the cosine of its text vector with that of another item."""

    item: str
    title: str
    cosine: float


class Reasons(NamedTuple):
    """Of one item."""

    item: str
    influences: list[Influence]
    """The strongest raising ones first; empty where the history has one item only."""
    nearest_by_text: list[TextNeighbor]
    """The nearest first, without the item itself; empty where the model, or the item, has no text."""
    title: str = ""


class ExplainedItem(NamedTuple):
    """A recommended item, its score and title as in `Recommendation`, and why it is recommended."""

    item: str
    score: float
    title: str
    influences: list[Influence]
    """As in `Reasons`."""
    nearest_by_text: list[TextNeighbor]
    """As in `Reasons`."""


def explain_ranking(ranker: Ranker, history: Sequence[int], ranking: Ranking, n: int) -> list[ExplainedItem]:
    """A ranking with at most n reasons of each kind beside each item; none after an empty history."""
    if not history or not ranking:
        return [ExplainedItem(*entry, [], []) for entry in ranking]
    ids = tokens_to_ids(ranker.model.ids, [entry.item for entry in ranking], argument="ranking")
    explained = []
    for entry, reasons in zip(ranking, find_reasons(ranker, history, ids, n), strict=True):
        explained.append(ExplainedItem(*entry, reasons.influences, reasons.nearest_by_text))
    return explained


@torch.no_grad()
def find_reasons(ranker: Ranker, history: Sequence[int], items: Sequence[int], n: int) -> list[Reasons]:
    """The reasons for each of some items after a history of internal ids, at least one.

    Leave-one-out: the history is ranked once more for each of its items, without all events of that item.
    """
    history = list(history)[-ranker.visible_length :]
    distinct = list(dict.fromkeys(reversed(history)))
    tried = distinct[:MAX_LEFT_OUT] if len(distinct) > 1 else []
    effects = measure_effects(ranker, history, tried, items)
    cosines = compare_texts(ranker.model.encoder.vectors, distinct, items)
    model = ranker.model

    def name(item: int) -> tuple[str, str]:
        token = model.tokens[item]
        return token, model.titles.get(token, "")

    found = []
    for column, item in enumerate(items):
        raised = sorted(zip(effects[:, column].tolist(), tried, strict=True), reverse=True)
        influences = [Influence(*name(other), effect) for effect, other in raised if effect > 0][:n]
        near = sorted(zip(cosines[:, column].tolist(), distinct, strict=True), reverse=True)
        others = [(cosine, other) for cosine, other in near if cosine > 0 and other != item]
        neighbors = [TextNeighbor(*name(other), cosine) for cosine, other in others[:n]]
        token, title = name(item)
        found.append(Reasons(token, influences, neighbors, title))
    return found


def measure_effects(
    ranker: Ranker, history: Sequence[int], tried: Sequence[int], items: Sequence[int]
) -> Tensor:
    """What each tried item of the history adds to the log-probability of each item: (C, N)."""
    shortened = [[item for item in history if item != left_out] for left_out in tried]
    whole = _score(ranker, [list(history)], items)
    at_once = max(1, _MAX_SCORES // len(ranker.model.tokens))
    parts = [whole[:0]]
    for start in range(0, len(shortened), at_once):
        parts.append(_score(ranker, shortened[start : start + at_once], items))
    return whole - torch.cat(parts)


def _score(ranker: Ranker, histories: list[list[int]], items: Sequence[int]) -> Tensor:
    """Log-probabilities of items after histories: (histories, N)."""
    return ranker.score_items(histories).log_softmax(dim=1)[:, list(items)].cpu()


def compare_texts(vectors: Tensor | None, others: Sequence[int], items: Sequence[int]) -> Tensor:
    """Cosines of text vectors (V, T): (others, N), 0 where one has no text."""
    if vectors is None:
        return torch.zeros(len(others), len(items))
    first, second = F.normalize(vectors[list(others)], dim=1), F.normalize(vectors[list(items)], dim=1)
    return (first @ second.T).cpu()
