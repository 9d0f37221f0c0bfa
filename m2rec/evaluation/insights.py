"""What a trained model does on its test rows: which branch the gate trusts, what the filter hears, examples.

letter  meaning
B, L    rows, sequence length
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
from m2rec.evaluation.ranking import (
    POPULARITY_BUCKETS,
    compute_target_ranks,
    format_bucket_names,
    mask_history_scores,
)
from m2rec.nn.encoder import Encoder
from m2rec.nn.filters import CausalFilter

_POSITION_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200)
_MAX_GATE_ROWS = 512  # test rows that the gate is looked at on
_POSITIONS_PER_BATCH = 4096
_N_EXAMPLES = 6
_MAX_HISTORY_ITEMS = 8  # items of an example's history
_N_RECOMMENDED = 5
_DIGITS = 5


@torch.no_grad()
def collect_insights(
    model: nn.Module, score: Callable[[Interaction], Tensor], test: HistoryDataset, whole: HistoryDataset
) -> dict[str, Any]:
    """Everything that the report shows beside the metrics, as plain numbers and texts.

    Args:
        model: trained; gate and filter are looked at if it has them.
        score: rows -> (b, V) scores, padding's -inf.
        test: the test rows.
        whole: the data set, with the gaps between interactions.

    Returns:
        `examples`, and where there are such: `gap_quartiles` between interactions, `gate` and, by layer,
        `filter`.
    """
    model.eval()
    encoder = getattr(model, "encoder", None)
    found: dict[str, Any] = {"examples": _collect_examples(score, test)}
    if whole.gap_quartiles is not None:
        found["gaps"] = dict(
            zip(("lower_quartile", "median", "upper_quartile"), whole.gap_quartiles, strict=True)
        )
    if isinstance(encoder, Encoder):
        if len(encoder.branches) > 1:
            found["gate"] = _summarize_gate(encoder, test)
        filters = [layer.filter for layer in encoder.layers if isinstance(layer.filter, CausalFilter)]
        if filters:
            longest = test.inter_feat[test.history_field].shape[1]
            found["filter"] = [_summarize_filter(own, longest) for own in filters]
    return found


def _summarize_gate(encoder: Encoder, test: HistoryDataset) -> dict[str, Any]:
    """The gate's weights, mean over channels, by layer, position and popularity."""
    assert test.histories is not None
    device = encoder.id_embedding.weight.device
    counts = torch.from_numpy(test.histories.training_counts(test.item_num))
    positions, popularity = _BucketMeans(_POSITION_BUCKETS), _BucketMeans(POPULARITY_BUCKETS)
    layers: list[_BucketMeans] = [_BucketMeans(()) for _ in encoder.layers]
    size = max(1, _POSITIONS_PER_BATCH // test.inter_feat[test.history_field].shape[1])
    for rows in _sample_evenly(len(test), _MAX_GATE_ROWS).split(size):
        batch = test.inter_feat[rows]
        lengths = batch[test.item_list_length_field]
        items = batch[test.history_field][:, : int(lengths.max())]
        _, weights = encoder.encode_with_gate_weights(items.to(device), lengths.to(device))
        there = torch.arange(items.shape[1]) < lengths[:, None]
        by_layer = [layer.mean(-1).cpu()[there] for layer in weights]  # (n, K) each
        for means, own in zip(layers, by_layer, strict=True):
            means.add(own, torch.zeros(len(own), dtype=torch.int64))
        mean = torch.stack(by_layer).mean(0)
        place = torch.arange(1, items.shape[1] + 1).expand_as(items)[there]
        positions.add(mean, place)
        popularity.add(mean, counts[items[there]])
    return {
        "branches": encoder.branches,
        "by_layer": {
            str(n): own for n, means in enumerate(layers, 1) for own in means.format_means(1).values()
        },
        "by_position": positions.format_means(1),
        "by_popularity": popularity.format_means(0),
    }


class _BucketMeans:
    """Means of weights by buckets of a number.

    Args:
        ends: the last number of each bucket but the last one.
    """

    def __init__(self, ends: tuple[int, ...]) -> None:
        self.ends = ends
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def add(self, weights: Tensor, numbers: Tensor) -> None:
        """Weights (n, K) at numbers (n,)."""
        bucket = torch.bucketize(numbers, torch.tensor(self.ends))
        for key in bucket.unique().tolist():
            own = weights[bucket == key]
            self.sums[key] = self.sums.get(key, 0) + own.double().sum(0)
            self.counts[key] = self.counts.get(key, 0) + len(own)

    def format_means(self, low: int) -> dict[str, list[float]]:
        """Means by the bucket's name; `low` is the smallest number."""
        names = format_bucket_names(self.ends, low)
        return {
            names[key]: [round(w, _DIGITS) for w in (self.sums[key] / self.counts[key]).tolist()]
            for key in sorted(self.sums)
        }


def _summarize_filter(layer: CausalFilter, longest: int) -> dict[str, Any]:
    """How much of each period a layer's channels let through, and the periods of their modes."""
    size = max(2 * longest, 8)
    gain = torch.fft.rfft(layer.kernel(size).double(), dim=1).abs()[:, 1:].cpu()  # (D, size / 2)
    period = size / np.arange(1, gain.shape[1] + 1)
    quartiles = gain.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
    kept = np.unique(np.geomspace(1, gain.shape[1], 80).round().astype(int)) - 1
    # a mode's gain at its own frequency; slower than the longest history is no period any more
    amplitude = torch.hypot(layer.cosine, layer.sine) / -torch.expm1(-layer.log_damping.exp())
    own = 2 * math.pi / layer.frequency.abs().clamp(min=1e-9)
    edges = np.geomspace(2, max(longest, 4), 13)
    inside = own.flatten().clamp(2, max(longest, 4)).double().cpu().numpy()
    strength, _ = np.histogram(inside, edges, weights=amplitude.flatten().double().cpu().numpy())
    return {
        "period": _round_values(period[kept]),
        "lower": _round_values(quartiles[0].numpy()[kept]),
        "median": _round_values(quartiles[1].numpy()[kept]),
        "upper": _round_values(quartiles[2].numpy()[kept]),
        "edges": _round_values(edges),
        "strength": _round_values(strength / max(strength.sum(), 1e-12)),
    }


def _collect_examples(score: Callable[[Interaction], Tensor], test: HistoryDataset) -> list[dict[str, Any]]:
    """Some test users: the end of the history, the best items that are not in it, and what was next.

    `place` is 0 where the user had the next item before.
    """
    assert test.histories is not None and test.part is not None
    rows = _sample_evenly(len(test), _N_EXAMPLES)
    if not len(rows):
        return []
    batch: Interaction = test.inter_feat[rows]
    scores = score(batch).cpu()
    mask_history_scores(scores, batch, test)
    users, targets = batch[test.uid_field].numpy(), batch[test.iid_field]
    places = compute_target_ranks(scores, targets)
    best = scores.topk(min(_N_RECOMMENDED, scores.shape[1] - 1))
    owners = batch[test.owner_field].numpy()
    owner, seen = test.histories.items_before_target(owners, test.part)
    tokens = test.field2id_token[test.iid_field]
    lengths = test.histories.lengths_before_target(owners, test.part)
    return [
        {
            "user": str(test.field2id_token[test.uid_field][user]),
            "history": [str(tokens[i]) for i in seen[owner == row][-_MAX_HISTORY_ITEMS:]],
            "length": int(lengths[row]),
            "recommended": [
                str(tokens[i])
                for i, value in zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)
                if value > -math.inf
            ],
            "next": str(tokens[targets[row]]),
            "place": int(places[row]),
        }
        for row, user in enumerate(users)
    ]


def _sample_evenly(n: int, most: int) -> Tensor:
    """At most so many of n row numbers, evenly spread."""
    return torch.from_numpy(np.unique(np.linspace(0, max(n - 1, 0), min(n, most)).round().astype(np.int64)))


def _round_values(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
