"""Items by what a person types: the token, the title, a part of it, or something like it."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rapidfuzz import fuzz, process

MAX_WANTED = 100
"""Characters of a text that are compared with titles."""
_MAX_CHOICES = 8  # titles to choose from, where more than one fits
# similarities from 0 to 100
_MIN_SIMILARITY = 60  # of a misspelt title
_MIN_PART_SIMILARITY = 75  # of a part of a title
_CONFIDENT_SIMILARITY = 85  # from here on, only titles within the margin of the best are offered
_SIMILARITY_MARGIN = 10
_SLICE = 128  # names that are compared in one call, which keeps other threads from running: milliseconds


class TitleSearch:
    """Finds items by token or by a part of the title, misspelt too.

    Args:
        tokens: of all items.
        titles: by token, of the items that have one.
    """

    def __init__(self, tokens: Iterable[str], titles: Mapping[str, str]) -> None:
        self.names = {token: titles.get(token, token) for token in tokens}
        # in the order of the items
        self._tokens = list(self.names)
        self._normalized_names = [normalize_title(name) for name in self.names.values()]
        self._plain_names = [strip_year(name) for name in self._normalized_names]

    def find(self, text: str) -> list[str]:
        """Tokens of the items that fit, best first: the token, the whole title, a part, or a similar one.

        If there is none, titles with a part that is similar. Of a long text the first `MAX_WANTED`
        characters count.
        """
        if text in self.names:
            return [text]
        wanted = normalize_title(text)[:MAX_WANTED].rstrip()
        if not wanted:
            return []
        found = self._find_parts(wanted) or self._find_similar(wanted) or self._find_misspelt_parts(wanted)
        return [self._tokens[position] for position in found[:_MAX_CHOICES]]

    def _find_parts(self, wanted: str) -> list[int]:
        """Items of exactly this name, or else those whose name has all the words."""
        words = wanted.split()
        exact: list[int] = []
        parts: dict[int, tuple[bool, int]] = {}
        for position, name in enumerate(self._normalized_names):
            if name == wanted:
                exact.append(position)
            elif all(word in name for word in words):
                parts[position] = (not name.startswith(wanted), len(name))
        return exact or sorted(parts, key=parts.__getitem__)

    def _find_similar(self, wanted: str) -> list[int]:
        """Items whose name, with or without its year, is close to the wanted one."""
        found: dict[int, float] = {}
        for names in (self._normalized_names, self._plain_names):
            for position, similarity in _compare(wanted, names, fuzz.ratio, _MIN_SIMILARITY):
                found[position] = max(similarity, found.get(position, 0))
        best = max(found.values(), default=0)
        lowest = best - _SIMILARITY_MARGIN if best >= _CONFIDENT_SIMILARITY else 0
        return sorted((p for p in found if found[p] > lowest), key=lambda p: (-found[p], p))

    def _find_misspelt_parts(self, wanted: str) -> list[int]:
        """Items a part of whose name is close to the wanted one; of equally close ones the shortest first."""
        # rapidfuzz would also find a shorter name within the wanted text
        longer = [p for p, name in enumerate(self._normalized_names) if len(name) >= len(wanted)]
        names = [self._normalized_names[position] for position in longer]
        found = list(_compare(wanted, names, fuzz.partial_ratio, _MIN_PART_SIMILARITY))
        found.sort(key=lambda entry: (-entry[1], len(names[entry[0]])))
        return [longer[place] for place, _ in found]


def _compare(wanted: str, names: Sequence[str], scorer: Any, lowest: float) -> Iterator[tuple[int, float]]:
    """The places of the names that are at least so similar, ascending, and their similarities.

    Between slices of the names other threads may run.
    """
    for start in range(0, len(names), _SLICE):
        part = names[start : start + _SLICE]
        (row,) = process.cdist([wanted], part, scorer=scorer, score_cutoff=lowest, dtype=np.float64)
        for place in np.flatnonzero(row).tolist():
            yield start + place, float(row[place])


def normalize_title(text: str) -> str:
    """Lower case, words only."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def strip_year(name: str) -> str:
    """A normalized film title without the year at its end."""
    return re.sub(r" \d{4}$", "", name)
