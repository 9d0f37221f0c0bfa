"""Users and items as codes or counts, without a Python object for each."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

_MIN_MERGED = 1 << 20  # tokens of batches that are held before they are merged


class _TokenParts:
    """Dictionaries of batches, merged when the later ones have as many tokens as the merged one.

    So a token is hashed a few times at most, and memory is that of the distinct tokens' texts.
    """

    def __init__(self) -> None:
        self._dictionaries = [pa.array([], pa.large_string())]
        """Of all batches before, merged, and then of each batch."""
        self._parts: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
        """What is known of these tokens or of their batches."""
        self._n_pending = 0

    def _append(self, dictionary: pa.Array, part: np.ndarray) -> None:
        self._dictionaries.append(dictionary.cast(pa.large_string()))
        self._parts.append(part)
        self._n_pending += len(dictionary)
        if self._n_pending > max(_MIN_MERGED, len(self._dictionaries[0])):
            self._merge()

    def _merge(self) -> None:
        if len(self._dictionaries) == 1:
            return
        encoded = pa.concat_arrays(self._dictionaries).dictionary_encode()
        ends = np.cumsum([len(dictionary) for dictionary in self._dictionaries])
        codes = np.split(encoded.indices.to_numpy(), ends[:-1])
        self._parts = self._merge_parts(codes, len(encoded.dictionary))
        self._dictionaries, self._n_pending = [encoded.dictionary], 0

    def _merge_parts(self, codes: list[np.ndarray], n_tokens: int) -> list[np.ndarray]:
        """The parts of the merged dictionary.

        Args:
            codes: of each dictionary's tokens in the merged one.
            n_tokens: of the merged one.
        """
        raise NotImplementedError

    @property
    def tokens(self) -> pa.LargeStringArray:
        """The distinct tokens, in the order of first appearance."""
        self._merge()
        return self._dictionaries[0]


class TokenCounts(_TokenParts):
    """Tokens in the order of first appearance, with their counts."""

    def add(self, tokens: pa.DictionaryArray) -> None:
        """Count tokens whose dictionary has no others, in the order of first appearance."""
        self._append(tokens.dictionary, np.bincount(tokens.indices, minlength=len(tokens.dictionary)))

    def _merge_parts(self, codes: list[np.ndarray], n_tokens: int) -> list[np.ndarray]:
        counts = np.bincount(np.concatenate(codes), np.concatenate(self._parts), n_tokens)
        return [counts.astype(np.int64)]

    @property
    def counts(self) -> np.ndarray:
        """How often each of `tokens` occurs."""
        self._merge()
        return self._parts[0]

    def __len__(self) -> int:
        return len(self.tokens)

    def items(self) -> Iterator[tuple[str, int]]:
        """Each token with its count."""
        return zip(self.tokens.to_pylist(), self.counts.tolist(), strict=True)


class TokenCodes(_TokenParts):
    """A column of tokens as codes."""

    def add(self, tokens: pa.DictionaryArray) -> None:
        """Add tokens whose dictionary is in the order of first appearance."""
        self._append(tokens.dictionary, tokens.indices.to_numpy())

    def _merge_parts(self, codes: list[np.ndarray], n_tokens: int) -> list[np.ndarray]:
        parts = [own[part] for own, part in zip(codes[1:], self._parts[1:], strict=True)]
        return [np.concatenate([self._parts[0], *parts]).astype(np.int32)]

    @property
    def codes(self) -> np.ndarray:
        """The place in `tokens` of each token that was added, (n,)."""
        self._merge()
        return self._parts[0]
