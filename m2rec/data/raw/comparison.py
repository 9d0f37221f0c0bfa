"""Compare a prepared data set with the data of the results tables: counts, and hashes of its rows."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from m2rec.data.raw.prepare import DatasetStatistics
from m2rec.data.raw.public_data import Preset, PresetSource


class Comparison(NamedTuple):
    """A fact about the prepared data, and what the tables' data has."""

    what: str
    found: str
    expected: str

    @property
    def is_same(self) -> bool:
        """Whether both agree."""
        return self.found == self.expected

    def __str__(self) -> str:
        verdict = "as in the tables" if self.is_same else f"NOT as in the tables, which have {self.expected}"
        return f"{self.what}: {self.found}, {verdict}"


def compare_dataset(
    inter: Path, statistics: DatasetStatistics, preset: Preset, source: PresetSource
) -> list[Comparison]:
    """Everything of NAME.inter that can be compared with the data of the tables."""
    counts = {
        "users": (len(statistics.users), preset.users),
        "items": (len(statistics.items), preset.items),
        "interactions": (statistics.interactions, preset.interactions),
    }
    comparisons = [
        Comparison(what, f"{found:,}", f"{expected:,}") for what, (found, expected) in counts.items()
    ]
    if source.sha256:
        what = f"sha256 of {inter.name}"
        if source.min_item_count:
            what += f", items with {source.min_item_count} or more interactions"
        items = {item for item, count in statistics.items.items() if count >= source.min_item_count}
        comparisons.append(Comparison(what, hash_rows(inter, items), source.sha256))
    if preset.sequences_sha256:
        what = "sha256 of the sequences, users and items numbered"
        comparisons.append(Comparison(what, hash_sequences(inter), preset.sequences_sha256))
    return comparisons


def hash_rows(inter: Path, items: set[str]) -> str:
    """The SHA-256 of the header of NAME.inter and of its rows of these items."""
    digest = hashlib.sha256()
    with inter.open("rb") as file:
        digest.update(file.readline())
        for line in file:
            if line.split(b"\t", 2)[1].decode() in items:
                digest.update(line)
    return digest.hexdigest()


def hash_sequences(inter: Path) -> str:
    """The SHA-256 of lines `USER ITEM ITEM ...`, users and items numbered from 1 as they first appear.

    It is the same for the same interactions in the same order, whatever the ids and times.
    """
    sequences: dict[str, list[int]] = {}
    numbers: dict[str, int] = {}
    for user, item in _read_pairs(inter):
        sequences.setdefault(user, []).append(numbers.setdefault(item, len(numbers) + 1))
    digest = hashlib.sha256()
    for number, sequence in enumerate(sequences.values(), 1):
        digest.update(f"{number} {' '.join(map(str, sequence))}\n".encode())
    return digest.hexdigest()


def _read_pairs(inter: Path) -> Iterator[tuple[str, str]]:
    """User and item of each row."""
    with inter.open(encoding="utf-8", newline="\n") as file:
        next(file)
        for line in file:
            user, item, _ = line.split("\t", 2)
            yield user, item
