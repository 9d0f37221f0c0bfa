"""Insights of a trained model: mean gate weights, filter gains and example recommendations.

letter  meaning
B, L    rows, sequence length
n       positions of histories
K, D    branches of a layer, model width
M       modes of a channel's filter
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from m2rec.compat import Interaction
from m2rec.data.dataset import HistoryDataset
from m2rec.evaluation.breakdown import POPULARITY_BUCKETS, Buckets
from m2rec.evaluation.metrics import FloatArray, IntArray
from m2rec.evaluation.ranking import NO_ITEM, compute_full_ranks, mask_history_scores, select_top_items
from m2rec.evaluation.saved_model import collect_cases, sample_evenly
from m2rec.nn.encoder import Encoder
from m2rec.nn.filters import CausalFilter

_POSITION_BUCKETS = Buckets(1, (1, 2, 5, 10, 20, 50, 100, 200))
_MAX_GATE_ROWS = 512  # test rows whose gate weights are averaged
_POSITIONS_PER_BATCH = 4096
_N_EXAMPLES = 6
_MAX_HISTORY_ITEMS = 8  # items of an example's history
_N_RECOMMENDED = 5
_DIGITS = 5
_N_PERIODS = 80  # points of the gain curve
_N_PERIOD_BINS = 12


@torch.no_grad()
def collect_insights(
    model: nn.Module, score: Callable[[Interaction], Tensor], test: HistoryDataset, whole: HistoryDataset
) -> dict[str, Any]:
    """Everything that the report shows beside the metrics, as plain numbers and texts.

    Args:
        model: trained; gate and filter are analysed if it has them.
        score: rows -> (b, V) scores, padding's -inf.
        test: the test rows.
        whole: the data set, with the gaps between interactions.

    Returns:
        `examples`, and where they exist `gaps` (quartiles of the time between interactions), `gate`, if it is
        learned, and, by layer, `filter`.
    """
    model.eval()
    insights: dict[str, Any] = {"examples": _collect_examples(score, test)}
    if whole.gap_quartiles is not None:
        names = ("lower_quartile", "median", "upper_quartile")
        insights["gaps"] = dict(zip(names, whole.gap_quartiles, strict=True))
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, Encoder):
        return insights
    if encoder.has_learned_gate:
        insights["gate"] = _summarize_gate(encoder, test)
    filters = [layer.filter for layer in encoder.layers if isinstance(layer.filter, CausalFilter)]
    if filters:
        longest = _measure_width(test)
        insights["filter"] = [_summarize_filter(causal_filter, longest) for causal_filter in filters]
    return insights


def _measure_width(part: HistoryDataset) -> int:
    """The length L to which histories are padded."""
    return int(part.inter_feat[:1][part.history_field].shape[1])


def _summarize_gate(encoder: Encoder, test: HistoryDataset) -> dict[str, Any]:
    """Weights of the gate, mean over channels, by layer, position and popularity."""
    assert test.histories is not None
    device = encoder.device
    counts = test.histories.training_counts(test.item_num)
    layers = [_BucketMeans(Buckets(1, ())) for _ in encoder.layers]
    positions, popularity = _BucketMeans(_POSITION_BUCKETS), _BucketMeans(POPULARITY_BUCKETS)
    rows = torch.from_numpy(sample_evenly(len(test), _MAX_GATE_ROWS))
    batch_size = max(1, _POSITIONS_PER_BATCH // _measure_width(test))
    for batch_rows in rows.split(batch_size):
        batch = test.inter_feat[batch_rows]
        lengths = batch[test.item_list_length_field]
        items = batch[test.history_field][:, : int(lengths.max())]
        _, gate_weights = encoder.encode_with_gate_weights(items.to(device), lengths.to(device))
        position = torch.arange(1, items.shape[1] + 1).expand_as(items)
        is_item = position <= lengths[:, None]
        by_layer = torch.stack(gate_weights).mean(-1).cpu()[:, is_item]  # layers, positions, K
        numbers = position[is_item].numpy()
        for means, weights in zip(layers, by_layer.numpy(), strict=True):
            means.add_weights(weights, numbers)
        mean = by_layer.mean(0).numpy()
        item_counts = counts[items[is_item].numpy()]
        positions.add_weights(mean, numbers)
        popularity.add_weights(mean, item_counts)
    return {
        "branches": encoder.branches,
        "by_layer": {str(n): means.format_means()["1+"] for n, means in enumerate(layers, 1)},
        "by_position": positions.format_means(),
        "by_popularity": popularity.format_means(),
    }


class _BucketMeans:
    """Means of weights by buckets of a number."""

    def __init__(self, buckets: Buckets) -> None:
        self.buckets = buckets
        self.sums: dict[str, FloatArray] = {}
        self.counts: dict[str, int] = {}

    def add_weights(self, weights: FloatArray, numbers: IntArray) -> None:
        """Add weights (n, K) at numbers (n,)."""
        for name, rows in self.buckets.group_numbers(numbers):
            self.sums[name] = self.sums.get(name, 0) + weights[rows].sum(0, dtype=np.float64)
            self.counts[name] = self.counts.get(name, 0) + int(rows.sum())

    def format_means(self) -> dict[str, list[float]]:
        """Means by the bucket's name, in order."""
        means = {}
        for name in self.buckets.names:
            if name in self.sums:
                mean = self.sums[name] / self.counts[name]
                means[name] = [round(weight, _DIGITS) for weight in mean.tolist()]
        return means


def _summarize_filter(layer: CausalFilter, longest: int) -> dict[str, Any]:
    """How much of each period a layer's channels let through, and the periods of their modes."""
    size = max(2 * longest, 8)
    response = torch.fft.rfft(layer.kernel(size).double(), dim=1)
    gain = response.abs()[:, 1:].cpu().numpy()  # (D, size / 2)
    period = size / np.arange(1, gain.shape[1] + 1)
    lower, median, upper = np.quantile(gain, [0.25, 0.5, 0.75], axis=0)
    shown = np.unique(np.geomspace(1, gain.shape[1], _N_PERIODS).round().astype(int)) - 1
    amplitude = torch.hypot(layer.cosine, layer.sine)  # (D, M)
    gain_at_mode = amplitude / -torch.expm1(-layer.log_damping.exp())
    mode_period = 2 * math.pi / layer.frequency.abs().clamp(min=1e-9)
    # a period longer than the longest history can't be observed
    slowest = max(longest, 4)
    edges = np.geomspace(2, slowest, _N_PERIOD_BINS + 1)
    clipped = mode_period.clamp(2, slowest).double().cpu().numpy()
    weights = gain_at_mode.double().cpu().numpy()
    strength, _ = np.histogram(clipped, edges, weights=weights)
    curves = {
        "period": period[shown],
        "lower": lower[shown],
        "median": median[shown],
        "upper": upper[shown],
        "edges": edges,
        "strength": strength / max(strength.sum(), 1e-12),
    }
    return {name: _round_values(values) for name, values in curves.items()}


def _collect_examples(score: Callable[[Interaction], Tensor], test: HistoryDataset) -> list[dict[str, Any]]:
    """Some test users: the end of the history, the best items that are not in it, and the next item.

    `place` is the rank of the next item without the history; 0 where the user had the item before.
    """
    assert test.histories is not None and test.part is not None
    sample = sample_evenly(len(test), _N_EXAMPLES)
    if not len(sample):
        return []
    cases = collect_cases(test, sample)
    batch: Interaction = test.inter_feat[sample]
    scores = score(batch)
    mask_history_scores(scores, batch, test)
    # as many as the metrics use, so that ranks are those of test_ranks.csv
    k = max(_N_RECOMMENDED, *test.config["topk"])
    top_items = select_top_items(scores, k)
    ranks = compute_full_ranks(scores, top_items, batch[test.iid_field])
    tokens = test.field2id_token[test.iid_field]
    examples = []
    for row, history in enumerate(cases.histories):
        recommended = [item for item in top_items[row, :_N_RECOMMENDED] if item != NO_ITEM]
        examples.append(
            {
                "user": cases.users[row],
                "history": history[-_MAX_HISTORY_ITEMS:],
                "length": len(history),
                "recommended": tokens[recommended].tolist(),
                "next": cases.targets[row],
                "place": int(ranks[row]),
            }
        )
    return examples


def _round_values(values: FloatArray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
