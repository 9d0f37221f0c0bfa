"""Which branches the gate weighs most, event by event.

letter  meaning
L, K    length of the history, branches
"""

from typing import NamedTuple

import torch

from m2rec.serving.saved_model import SavedModel


class Explanation(NamedTuple):
    """Gate weight of each branch at one event of a history."""

    item: str
    title: str
    weights: dict[str, float]
    """By branch, mean over layers and channels; they add up to 1."""
    by_layer: list[dict[str, float]]
    """The same for each layer."""


@torch.no_grad()
def explain_history(model: SavedModel, ids: list[int]) -> list[Explanation]:
    """Explain each event of a history of internal ids, at least one."""
    encoder = model.encoder
    device = model.table.device
    items = torch.tensor([ids], device=device)
    lengths = torch.tensor([len(ids)], device=device)
    _, gates = encoder.encode_with_gate_weights(items, lengths)
    means = torch.stack(gates, dim=2)[0].mean(-1)  # (L, layers, K)
    explained = []
    for item, layers in zip(ids, means.tolist(), strict=True):
        by_layer = [dict(zip(encoder.branches, layer, strict=True)) for layer in layers]
        weights = {}
        for branch in encoder.branches:
            total = sum(layer[branch] for layer in by_layer)
            weights[branch] = total / len(by_layer)
        token = model.tokens[item]
        title = model.titles.get(token, "")
        explained.append(Explanation(token, title, weights, by_layer))
    return explained
