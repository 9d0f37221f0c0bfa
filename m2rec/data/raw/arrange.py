"""Arrange the interactions of a whole file: k-core, user by user, times from a user's first."""

from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

from m2rec.data.raw.formats import RawInteraction


class Core(NamedTuple):
    """What a k-core keeps."""

    interactions: list[RawInteraction]
    rounds: int
    """Passes over the interactions that removed some."""


def select_core(interactions: Sequence[RawInteraction], k: int) -> Core:
    """The largest part in which every user and every item has at least `k` interactions, in file order.

    To drop an item may leave one of its users with fewer than `k`, and so on until nothing changes.
    """
    kept, rounds = list(interactions), 0
    while True:
        users = Counter(interaction.user for interaction in kept)
        items = Counter(interaction.item for interaction in kept)
        remaining = [x for x in kept if users[x.user] >= k and items[x.item] >= k]
        if len(remaining) == len(kept):
            return Core(kept, rounds)
        kept, rounds = remaining, rounds + 1


def sort_by_user(interactions: Sequence[RawInteraction]) -> list[RawInteraction]:
    """User by user as they first appear, each user's interactions by time; ties stay in file order."""
    histories: dict[str, list[RawInteraction]] = {}
    for interaction in interactions:
        histories.setdefault(interaction.user, []).append(interaction)
    return [x for history in histories.values() for x in sorted(history, key=lambda x: x.time)]


def subtract_first_times(interactions: Sequence[RawInteraction]) -> list[RawInteraction]:
    """The same interactions, each time as the distance from its user's first."""
    first: dict[str, Decimal] = {}
    for interaction in interactions:
        first[interaction.user] = min(interaction.time, first.get(interaction.user, interaction.time))
    return [x._replace(time=x.time - first[x.user]) for x in interactions]
