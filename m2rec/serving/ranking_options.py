"""Which items a ranking may have, and how many: from the arguments of `Recommender`'s methods."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from m2rec.serving.arguments import InputWarnings, parse_whole_number, tokens_to_ids
from m2rec.serving.saved_model import SavedModel


class RankingOptions(NamedTuple):
    """How many items to recommend, and which ones may be."""

    k: int
    exclude_seen: bool
    excluded_ids: Tensor
    """Ids of items that are never recommended."""
    candidate_ids: Tensor | None
    """Ascending ids of the candidates; None for all items."""


def parse_ranking_options(
    model: SavedModel,
    k: int,
    exclude_seen: bool | None,
    candidates: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    warnings: InputWarnings | None = None,
) -> RankingOptions:
    """The options of a ranking by a model.

    Args:
        model: that ranks.
        k, exclude_seen, candidates, exclude: as in `Recommender.recommend`.
        warnings: counts unknown candidates that are skipped; None to refuse them.

    Raises:
        ValueError: k is less than 1, or a candidate is unknown.
    """
    k = parse_whole_number("k", k, 1)
    excluded_ids = _to_sorted_ids(model, exclude, InputWarnings(skip_unknown=True), "exclude")
    candidate_ids = None
    if candidates is not None:
        candidate_ids = _to_sorted_ids(model, candidates, warnings, "candidates")
    if exclude_seen is None:  # a run of before the key did
        exclude_seen = model.config.get("exclude_seen") is not False
    return RankingOptions(k, exclude_seen, excluded_ids, candidate_ids)


def _to_sorted_ids(
    model: SavedModel, tokens: Iterable[str] | None, warnings: InputWarnings | None, argument: str
) -> Tensor:
    ids = tokens_to_ids(model.ids, () if tokens is None else tokens, warnings, argument)
    return torch.tensor(sorted(set(ids)), dtype=torch.int64, device=model.table.device)
