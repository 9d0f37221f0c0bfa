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
    encoder = model.inference_encoder
    items = torch.tensor([ids], device=model.table.device)
    _, gates = encoder.encode_with_gate_weights(items, torch.tensor([len(ids)], device=items.device))
    means = torch.stack([gate[0].mean(-1) for gate in gates], dim=1)  # (L, layers, K)
    explained = []
    for item, layers in zip(ids, means.tolist(), strict=True):
        by_layer = [dict(zip(encoder.branches, layer, strict=True)) for layer in layers]
        weights = {}
        for branch in encoder.branches:
            weights[branch] = sum(layer[branch] for layer in by_layer) / len(by_layer)
        token = model.tokens[item]
        explained.append(Explanation(token, model.titles.get(token, ""), weights, by_layer))
    return explained
