"""Text vectors without a language model: latent semantic analysis (Deerwester et al. 1990).

TF-IDF over words and pairs of words, then a truncated SVD. Needs no download and takes seconds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from m2rec.errors import UserError

RARE_WORD_MIN_TEXTS = 100  # from so many texts on, a word that only one of them has is left out
MAX_FEATURES = 100_000  # most frequent words and pairs that are kept, for memory's sake
LSA_NAME = "lsa"


class LsaEncoder:
    """Vectors of at most `width` components, fewer where the texts have fewer to tell."""

    def __init__(self, width: int = 256) -> None:
        if width < 1:
            raise UserError(f"width: {width} is no width; give a whole number from 1 on, such as 256")
        self.width = width
        self.fingerprint_fields = {
            "model": LSA_NAME,
            "features": f"words and pairs, sublinear, rare from {RARE_WORD_MIN_TEXTS}, "
            f"at most {MAX_FEATURES}",
            "width": str(width),
        }

    def versions(self) -> dict[str, str]:
        """What made the vectors."""
        import sklearn

        return {"scikit-learn": sklearn.__version__}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) texts -> (n, T) vectors of unit length, zero where a text has no word; always the same.

        Raises:
            ValueError: no text has a word.
        """
        from sklearn.decomposition import TruncatedSVD

        counts = _fit_tf_idf(texts)
        if counts.shape[1] == 1:  # one word in all of them, for which scikit-learn has no SVD
            return np.asarray(counts.toarray() > 0, dtype=np.float32)
        width = min(self.width, *counts.shape)
        svd = TruncatedSVD(width, n_iter=7, random_state=0).fit(counts)
        real = svd.singular_values_ > 1e-6 * svd.singular_values_[0]  # the rest is rounding
        vectors = counts @ svd.components_[real].T
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.where(length > 1e-9, length, np.inf), dtype=np.float32)


def _fit_tf_idf(texts: Sequence[str]) -> Any:
    """Sparse (n, F)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    for rare in (2, 1) if len(texts) >= RARE_WORD_MIN_TEXTS else (1,):
        tf_idf = TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, min_df=rare, max_features=MAX_FEATURES,
            strip_accents="unicode", token_pattern=r"(?u)\b\w+\b",
        )  # fmt: skip
        try:
            return tf_idf.fit_transform(texts)
        except ValueError:  # no word is left
            continue
    raise UserError("text_encoder: lsa finds no word in any text; name other columns")
