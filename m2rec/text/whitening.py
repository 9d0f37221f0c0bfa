"""Whitening of text vectors, and how anisotropic they are."""

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.errors import UserError


def fit_whitening(raw: Tensor, whitening: str, width: int) -> tuple[Tensor, Tensor]:
    """Mean (T0,) and basis (T0, T) such that (raw - mean) @ basis is whitened, mean length 1.

    Args:
        raw: (n, T0).
        whitening: `none`, `pca` or `zca`.
        width: number of components to keep, 0 for as many as there can be.

    Raises:
        ValueError: `width` is larger than the vectors allow.
    """
    mean = raw.mean(0)
    centred = (raw - mean).double()
    is_constant = centred.norm() <= 1e-6 * raw.norm()
    if is_constant:  # one item, or all alike: nothing to decorrelate
        length = mean.norm().clamp(min=1e-12)
        return torch.zeros_like(mean), torch.eye(len(mean)) / length
    if whitening == "none":
        basis = torch.eye(raw.shape[1], dtype=torch.float64)
    else:
        components, singular = _find_principal_components(centred, width)
        basis = components.T / singular
        if whitening == "zca":
            basis = basis @ components
    whitened = centred @ basis
    length = whitened.norm(dim=1).mean().clamp(min=1e-12)
    return mean, (basis / length).float()


def _find_principal_components(centred: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The largest components (T, T0) of vectors (n, T0) and their singular values (T,).

    At most n / 4 are kept: whitening n vectors in n dimensions would put all of them at the same
    distance from each other.
    """
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    n_nonzero = int((singular > 1e-6 * singular[0]).sum())
    allowed = min(n_nonzero, len(centred) // 4)
    rank = max(allowed, 1)
    if width > rank:
        raise UserError(
            f"text_width: {width} is more than the {rank} components that {len(centred)} vectors of "
            f"width {centred.shape[1]} allow; lower it, or set 0"
        )
    kept = width or rank
    return components[:kept], singular[:kept]


def compute_mean_cosine(vectors: Tensor) -> float:
    """Mean cosine over all pairs of (n, T) vectors, 0 where there is no pair: how anisotropic they are."""
    n = len(vectors)
    if n < 2:
        return 0.0
    unit = F.normalize(vectors.double(), dim=1)
    all_pairs = unit.sum(0).square().sum()
    pair_sum = all_pairs - unit.square().sum()  # without each vector's pair with itself
    n_pairs = n * (n - 1)
    return float(pair_sum / n_pairs)
