"""A run beside the baselines that were evaluated with it, as rows and as sentences."""

from collections.abc import Mapping
from typing import Any

_HIGHER_IS_BETTER = ("hit", "recall", "precision", "ndcg", "mrr", "map")
_DEFAULT_PROTOCOL = "test_unseen"  # of older runs, and of models that recommend nothing
_WITHOUT_NEIGHBORS = "without neighbors"
_TIMES_FROM = 1.5  # a ratio from here on is said as "times as good", a smaller one in per cent


def list_compared_models(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics by protocol of the run, of its network without neighbours, and of each baseline, by name.

    Empty where there is nothing to compare the run with.

    Args:
        metrics: the content of metrics.json.
    """
    others: dict[str, Mapping[str, Any]] = {}
    if alone := metrics.get("without_neighbors"):
        others[f"{metrics['model']} {_WITHOUT_NEIGHBORS}"] = alone
    others |= metrics.get("baselines") or {}
    return {metrics["model"]: metrics, **others} if others else {}


def describe_comparison(metrics: Mapping[str, Any]) -> str:
    """How much better than each baseline the run is, one sentence; empty where that can't be said.

    It is about the run's valid_metric under the protocol that its `recommend()` follows.

    Args:
        metrics: the content of metrics.json.
    """
    models = list_compared_models(metrics)
    if not models:
        return ""
    metric = metrics["valid_metric"]
    if metric.partition("@")[0] not in _HIGHER_IS_BETTER:
        return ""
    protocol = metrics["protocol"].get("recommends_as", _DEFAULT_PROTOCOL)
    ours, *baselines = (values[protocol][metric] for values in models.values())
    name, *names = models
    parts = []
    for other, value in zip(names, baselines, strict=True):
        if value > 0 and not other.endswith(_WITHOUT_NEIGHBORS):
            parts.append(f"{_describe_ratio(ours / value)} {other}")
    if not parts:
        return ""
    return f"{name} is {', and '.join(parts)} in {metric.upper()} on {protocol}"


def _describe_ratio(ratio: float) -> str:
    if ratio >= _TIMES_FROM:
        return f"{ratio:.1f} times as good as"
    percent = round(100 * abs(ratio - 1))
    if percent == 0:
        return "as good as"
    return f"{percent}% {'better' if ratio > 1 else 'worse'} than"
