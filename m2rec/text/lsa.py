"""Text vectors without a language model: latent semantic analysis (Deerwester et al. 1990).

TF-IDF over words and pairs of words, then a truncated SVD. Needs no download and takes seconds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from m2rec.errors import UserError
from m2rec.text.partial import PartialVectors
from m2rec.text.vector_file import LSA_NAME

RARE_WORD_MIN_TEXTS = 100  # from this many texts on, words of a single text are left out
MAX_FEATURES = 100_000  # most frequent words and pairs that are kept, to save memory


class LsaEncoder:
    """Vectors of at most `width` components, fewer where the texts do not have as many."""

    def __init__(self, width: int = 256) -> None:
        if width < 1:
            raise UserError(f"width: expected an integer >= 1, got {width}")
        self.width = width
        self.fingerprint_fields = {
            "model": LSA_NAME,
            "features": f"words and pairs, sublinear, rare from {RARE_WORD_MIN_TEXTS}, "
            f"at most {MAX_FEATURES}",
            "width": str(width),
        }

    def describe(self) -> dict[str, str]:
        """The version that made the vectors."""
        import sklearn

        return {"scikit-learn": sklearn.__version__}

    def encode(self, texts: Sequence[str], partial: PartialVectors | None = None) -> np.ndarray:
        """(n,) texts -> (n, T) vectors of unit length, zero where a text has no word; always the same.

        Args:
            partial: not used; all texts are encoded at once.

        Raises:
            ValueError: no text has a word.
        """
        from sklearn.decomposition import TruncatedSVD

        counts = _fit_tf_idf(texts)
        if counts.shape[1] == 1:  # one word in all of them, for which scikit-learn has no SVD
            return np.asarray(counts.toarray() > 0, dtype=np.float32)
        width = min(self.width, *counts.shape)
        svd = TruncatedSVD(width, n_iter=7, random_state=0).fit(counts)
        is_nonzero = svd.singular_values_ > 1e-6 * svd.singular_values_[0]  # the rest is rounding
        vectors = counts @ svd.components_[is_nonzero].T
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.where(length > 1e-9, length, np.inf), dtype=np.float32)


def _fit_tf_idf(texts: Sequence[str]) -> Any:
    """(n,) texts -> sparse (n, F).

    Raises:
        ValueError: no text has a word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    thresholds = (2, 1) if len(texts) >= RARE_WORD_MIN_TEXTS else (1,)
    for min_df in thresholds:
        tf_idf = TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, min_df=min_df, max_features=MAX_FEATURES,
            strip_accents="unicode", token_pattern=r"(?u)\b\w+\b",
        )  # fmt: skip
        try:
            return tf_idf.fit_transform(texts)
        except ValueError:  # no word is left
            continue
    raise UserError("text_encoder: lsa finds no word in any text; name other columns")
