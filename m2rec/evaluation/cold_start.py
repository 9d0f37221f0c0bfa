"""Rank cold-start items: items that are unknown to training and have text.

A share of the items with text is removed from the data together with all their interactions, a model is
trained on the rest, and the removed items are added to it by their text vectors alone. These functions choose
the items, write the remaining data, and measure the result.
"""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2rec.data.histories import Histories
from m2rec.errors import UserError
from m2rec.evaluation.metrics import BoolArray, FloatArray, RankedLists, compute_metrics
from m2rec.evaluation.protocols import Protocol
from m2rec.evaluation.saved_model import EvaluationCases, Scorer, rank_cases

logger = logging.getLogger(__name__)

K = 10
GROUPS = ("new", "new_among_new", "old")
MEASURES = ("users", f"hit@{K}", f"ndcg@{K}", f"chance@{K}")
_DIGITS = 6
_MIN_INTERACTIONS = 3  # with two, leave-one-out would train on both, and the second may be a test target


def choose_new_items(with_text: BoolArray, share: float, seed: int) -> BoolArray:
    """Choose items at random among those with text.

    Args:
        with_text: (V,), whether each item has text.
        share: of the items with text, between 0 and 1.
        seed: of the choice.

    Returns:
        (V,), True for a chosen item.

    Raises:
        ValueError: no item is chosen, or no item remains.
    """
    candidates = np.flatnonzero(with_text)
    n_taken = round(share * len(candidates))
    taken = np.zeros_like(with_text)
    taken[np.random.default_rng(seed).permutation(candidates)[:n_taken]] = True
    if not taken.any() or taken[1:].all():
        raise UserError(f"--share: {share} takes out {taken.sum()} of {len(candidates)} items with text")
    return taken


def write_remaining_data(
    folder: Path, name: str, histories: Histories, taken: BoolArray, tokens: NDArray[np.str_]
) -> None:
    """Write the interactions without the taken items as a data set; a time is a position in the history.

    Users with fewer than three remaining interactions are left out.

    Args:
        folder: the data set's folder is made in it.
        name: of the data set.
        histories: the whole data.
        taken: (V,), as `choose_new_items` returns it.
        tokens: (V,), item tokens.
    """
    path = folder / name / f"{name}.inter"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, start, end in zip(histories.users, histories.start, histories.end, strict=True):
            items = histories.items[start:end]
            kept = tokens[items[~taken[items]]]
            if len(kept) >= _MIN_INTERACTIONS:
                file.writelines(f"{user}\t{token}\t{time}\n" for time, token in enumerate(kept))


def evaluate_new_items(scorer: Scorer, cases: EvaluationCases, added: Collection[str]) -> dict[str, Any]:
    """Metrics of users whose target is a new item, among all items and among new ones, and of the others.

    What the user had is removed from the ranking. Items of histories that are unknown to the model are left
    out. So are users without a known item in the history and users whose target is unknown.

    Args:
        scorer: the model, with the new items added.
        cases: test users of the whole data.
        added: tokens of the new items.

    Returns:
        By group and measure, such as `new.hit@10`; a metric is "" for a group without users.
    """
    items = scorer.tokens[1:]
    cases = _drop_unknown_cases(cases, items)
    is_new = np.isin(cases.targets, list(added))
    new = cases.select_cases(np.flatnonzero(is_new))
    old = cases.select_cases(np.flatnonzero(~is_new))
    return {
        **_measure_group("new", scorer, new, items),
        **_measure_group("new_among_new", scorer, new, added),
        **_measure_group("old", scorer, old, items),
    }


def _drop_unknown_cases(cases: EvaluationCases, tokens: Sequence[str]) -> EvaluationCases:
    cases = cases.drop_unknown_items(tokens)
    is_kept = np.isin(cases.targets, tokens) & (cases.lengths > 0)
    kept = cases.select_cases(np.flatnonzero(is_kept))
    total = len(kept.users)
    left_out = len(cases.users) - total
    if left_out:
        logger.warning("%s users are left out, whose items only left-out users have", f"{left_out:,}")
    returning = int(kept.returning.sum())
    if returning:
        logger.warning("%s of %s targets are in the user's history: misses", f"{returning:,}", f"{total:,}")
    return kept


def _measure_group(
    group: str, scorer: Scorer, cases: EvaluationCases, candidates: Collection[str]
) -> dict[str, Any]:
    """Number of users and mean measures of a group, among these candidates."""
    measures: dict[str, Any] = dict.fromkeys(MEASURES, "")
    measures["users"] = len(cases.users)
    if cases.users:
        candidates = set(candidates)
        ranking = rank_cases(scorer, cases, K, candidates=candidates)
        ranks, _ = ranking.select_rows(Protocol.UNSEEN)
        measures |= compute_metrics(RankedLists(ranks), ("hit", "ndcg"), [K], digits=_DIGITS)
        chance = float(_compute_hit_chances(cases, candidates).mean())
        measures[f"chance@{K}"] = round(chance, _DIGITS)
    return {f"{group}.{name}": value for name, value in measures.items()}


def _compute_hit_chances(cases: EvaluationCases, candidates: set[str]) -> FloatArray:
    """Chance that a random ranking of the unseen candidates is a hit, (n,); 0 for a target that returns."""
    n_unseen = []
    for history in cases.histories:
        n_seen = len(candidates.intersection(history))
        n_unseen.append(len(candidates) - n_seen)
    chances = K / np.maximum(n_unseen, K)
    return np.where(cases.returning, 0.0, chances)
