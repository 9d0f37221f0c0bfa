"""Text vectors of a model that is trained further: old items keep theirs, new ones come into their space.

letter  meaning
V, C    items including padding, items that both the file and the model have
T0, T   width of the text vectors in their file, in the model
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.errors import UserError
from m2rec.text.vector_file import TextVectors, format_missing_items, match_item_vectors
from m2rec.text.whitening import compute_mean_cosine, fit_whitening

logger = logging.getLogger(__name__)

# median cosines between what a file's vectors become and what the model has
_SAME_SPACE = 0.99
_SIMILAR_SPACE = 0.5


def continue_text_vectors(
    path: Path, id_tokens: Sequence[str], old: Tensor, mean: Tensor, basis: Tensor
) -> TextVectors:
    """The vectors of a data set's items, in the space of a model that has those of some items.

    The file's vectors are whitened as the model's were. Where this does not give the model's vectors again,
    as for word counts that were fitted to other texts, a linear map is fitted to the items that both have.

    Args:
        path: the text-vector file.
        id_tokens: the data set's item tokens by internal id; id 0 is padding.
        old: (V, T), the model's vectors by the data set's ids, zero where it has none.
        mean, basis: (T0,) and (T0, T), with which the model's vectors were whitened.

    Raises:
        ValueError: the file is unusable (see `match_item_vectors`), or no map fits.
    """
    file = match_item_vectors(path, id_tokens)
    ids = torch.tensor(file.ids)
    in_model = old[ids].any(1)
    common, targets = file.raw[in_model], old[ids[in_model]]
    is_same = common.shape[1] == len(mean) and _compare((common - mean) @ basis, targets) >= _SAME_SPACE
    if not is_same:
        mean, basis = _fit_map(path, file.raw, in_model, targets)
    vectors = old.clone()
    vectors[ids[~in_model]] = (file.raw[~in_model] - mean) @ basis
    has_text = vectors.any(1).tolist()
    missing = tuple(str(token) for token, has in zip(id_tokens[1:], has_text[1:], strict=True) if not has)
    n_with_text = sum(has_text)
    logger.info(
        "text for %s of %s items, %s of them new in %s%s",
        f"{n_with_text:,}", f"{len(id_tokens) - 1:,}", f"{int((~in_model).sum()):,}", path,
        format_missing_items(missing),
    )  # fmt: skip
    mean_cosine = round(compute_mean_cosine(vectors[vectors.any(1)]), 4)
    provenance = {**file.provenance, "matched": n_with_text, "mean_cosine_whitened": mean_cosine}
    return TextVectors(vectors, missing, mean, basis, provenance)


def _compare(mapped: Tensor, targets: Tensor) -> float:
    """The median cosine between two vectors of an item, (C, T) each; the texts of some may have changed."""
    return float(F.cosine_similarity(mapped, targets).median()) if len(targets) else 0.0


def _fit_map(path: Path, raw: Tensor, is_common: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (T0,) and basis (T0, T) that bring a file's vectors nearest to the model's, by least squares.

    Args:
        path: of the file.
        raw: (n, T0), its vectors.
        is_common: (n,), which of them belong to items that the model has vectors of.
        targets: (C, T), the vectors of these items in the model.

    Raises:
        ValueError: the fit is bad, or there is no such item.
    """
    similarity = 0.0
    if len(targets):
        mean, components = fit_whitening(raw, "pca", 0)  # few enough components that the fit does not overfit
        inputs = (raw[is_common] - mean) @ components
        centre, target_centre = inputs.mean(0), targets.mean(0)
        weights = torch.linalg.lstsq((inputs - centre).double(), (targets - target_centre).double()).solution
        basis = components @ weights.float()
        # a mean such that (mean of the inputs - mean) @ basis is the centre of the targets
        shift = torch.linalg.lstsq(basis.T.double(), target_centre.double()[:, None]).solution[:, 0]
        mean = raw[is_common].mean(0) - shift.float()
        similarity = _compare((raw[is_common] - mean) @ basis, targets)
    if similarity < _SIMILAR_SPACE:
        raise UserError(
            f"text_vectors: {path} does not fit the vectors that the run was trained with (median cosine "
            f"{similarity:.2f} on {len(targets):,} items); make it with the run's text_encoder"
        )
    logger.info(
        "text vectors of another fit: a linear map brings them to the run's, median cosine %.2f on %s items",
        similarity, f"{len(targets):,}",
    )  # fmt: skip
    return mean, basis
