"""Metrics of a saved model by the number of items that it gets."""

from typing import Any

from m2rec.evaluation.breakdown import HISTORY_BUCKETS
from m2rec.evaluation.metrics import RankedLists, compute_metrics
from m2rec.evaluation.protocols import Protocol
from m2rec.evaluation.saved_model import EvaluationCases, Scorer, rank_cases

INPUT_LENGTHS = (10, 20, 50, 100, 200, 500, 1000)
_METRICS = ("hit", "ndcg")
_K = 10
_DIGITS = 6


def measure_input_lengths(scorer: Scorer, cases: EvaluationCases) -> list[dict[str, Any]]:
    """One row per number of items: users and metrics, of all and by length of the history.

    The whole history is removed from each ranking, and a target that is in it is a miss.

    Args:
        scorer: a saved model that accepts histories of any length.
        cases: test users.
    """
    lengths = cases.lengths
    groups = {"all": lengths >= 0}
    groups |= HISTORY_BUCKETS.group_numbers(lengths)
    inputs = [n for n in INPUT_LENGTHS if n < lengths.max()]
    table = []
    for shown in (*inputs, None):
        ranks, _ = rank_cases(scorer, cases, _K, shown).select_rows(Protocol.UNSEEN)
        row: dict[str, Any] = {"shown": shown or "all"}
        for name, users in groups.items():
            row[f"{name}: users"] = int(users.sum())
            metrics = compute_metrics(RankedLists(ranks[users]), _METRICS, [_K], digits=_DIGITS)
            for metric, mean in metrics.items():
                row[f"{name}: {metric}"] = mean
        table.append(row)
    return table
