"""The metrics of a ranked part under every protocol, as the config of its data set names them."""

from dataclasses import dataclass
from functools import cache, partial

import pandas as pd

from m2rec.data.dataset import HistoryDataset
from m2rec.evaluation.breakdown import tabulate_rows
from m2rec.evaluation.metrics import DEFAULT_TAIL_RATIO, RankedLists, compute_metrics
from m2rec.evaluation.protocols import Protocol
from m2rec.evaluation.ranking import Ranking

Metrics = dict[str, float]


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics by part and protocol, such as `test_unseen`, and the rows that they are made of."""

    metrics: dict[str, Metrics]
    rows: pd.DataFrame


def measure_protocols(ranking: Ranking, part: HistoryDataset) -> EvaluationResult:
    """Metrics under every protocol, from one ranking; those of NEW are empty without new targets.

    Args:
        ranking: of all rows of the part, as `rank_rows` returns it.
        part: validation or test rows.
    """
    assert part.part is not None
    metrics = {p.get_name(part.part): measure_protocol(ranking, p, part) for p in Protocol}
    return EvaluationResult(metrics, tabulate_rows(ranking, part))


def measure_protocol(ranking: Ranking, protocol: Protocol, part: HistoryDataset) -> Metrics:
    """The metrics that the config names, rounded, as `metric_definitions` defines them."""
    assert part.histories is not None
    config, tail_ratio = part.config, part.config["tail_ratio"]
    lists = RankedLists(
        *ranking.select_rows(protocol),
        n_items=part.item_num,
        count_targets=cache(partial(part.histories.count_training_targets, part.item_num)),
        tail_ratio=tail_ratio if tail_ratio and tail_ratio > 0 else DEFAULT_TAIL_RATIO,
    )
    return compute_metrics(
        lists,
        config["metrics"],
        config["topk"],
        config["metric_definitions"],
        config["metric_decimal_place"],
    )
