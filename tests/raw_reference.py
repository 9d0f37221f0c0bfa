"""What scripts/prepare_data.py makes of a file, computed row by row and with plain lists and dicts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from types import ModuleType

import pytest

from m2rec.data.dominant import describe_dominant_entity
from m2rec.data.raw import batches, tally
from m2rec.data.raw.formats import RawInteraction
from m2rec.data.raw.options import PreparationOptions, select_source
from m2rec.data.raw.prepare import prepare_dataset
from m2rec.data.raw.tally import Tally
from m2rec.data.raw.values import format_decimal


@dataclass
class Outcome:
    """Everything that a user sees of a preparation."""

    lines: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    error: str = ""
    users: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)


@contextmanager
def use_small_blocks(*sizes: tuple[ModuleType, str, int]) -> Iterator[None]:
    """Within the block, blocks of a few lines, so that a small file has many.

    Args:
        sizes: module, name and value of each size that belongs to one format.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BATCH_ROWS", 3)
        patch.setattr(tally, "MIN_LINES_BEFORE_STOP", 10)
        for module, name, value in sizes:
            patch.setattr(module, name, value)
        yield


def prepare(options: PreparationOptions) -> Outcome:
    """The outcome of the real preparation."""
    outcome = Outcome()
    inter = options.data_path / options.dataset / f"{options.dataset}.inter"
    inter.unlink(missing_ok=True)
    try:
        statistics = prepare_dataset(options, outcome.remarks.append)
    except ValueError as error:
        outcome.error = str(error)
        assert not inter.exists()
        return outcome
    outcome.lines = inter.read_bytes().decode().split("\n")
    outcome.users, outcome.items = dict(statistics.users.items()), dict(statistics.items.items())
    return outcome


def prepare_by_rows(options: PreparationOptions) -> Outcome:
    """The outcome that is expected."""
    outcome, source = Outcome(), select_source(options)
    tally = Tally(source.interactions, options.max_bad)
    try:
        interactions = list(source.format.interactions(tally, options.time_unit))
    except ValueError as error:
        outcome.error = str(error)
        return outcome
    arranged = _arrange(_select(interactions, options, tally), options, tally)
    users, items = Counter(x.user for x in arranged), Counter(x.item for x in arranged)
    for kind, counts in (("user", users), ("item", items)):
        warning = describe_dominant_entity(kind, list(counts), list(counts.values()))
        tally.notes += [warning] if warning else []
    tally.log_remarks(outcome.remarks.append)
    if arranged:
        has_rating = bool(source.format.rating) and not options.no_rating
        outcome.lines, outcome.users, outcome.items = _write(arranged, has_rating), dict(users), dict(items)
    else:
        outcome.error = f"{tally.path}: no interactions are left"
    return outcome


def _write(interactions: Sequence[RawInteraction], has_rating: bool) -> list[str]:
    lines = ["user_id:token\titem_id:token\t" + ("rating:float\t" if has_rating else "") + "timestamp:float"]
    for user, item, time, rating in interactions:
        written = [] if not has_rating else ["" if rating is None else format_decimal(rating)]
        lines.append("\t".join([user, item, *written, format_decimal(time)]))
    return [*lines, ""]


def _select(
    interactions: list[RawInteraction], options: PreparationOptions, tally: Tally
) -> list[RawInteraction]:
    least = options.min_rating
    if least is not None:
        interactions = [x for x in interactions if x.rating is not None and float(x.rating) >= least]
    if options.drop_repeats:
        distinct = {(x.user, x.item, x.time): x for x in reversed(interactions)}
        kept = [x for x in interactions if distinct[x[:3]] is x]
        if len(kept) < len(interactions):
            tally.notes.append(f"exact duplicates removed: {len(interactions) - len(kept):,}")
        interactions = kept
    return interactions


def _arrange(
    interactions: list[RawInteraction], options: PreparationOptions, tally: Tally
) -> list[RawInteraction]:
    if options.core:
        core, rounds = select_core(interactions, options.core)
        removed = len(interactions) - len(core)
        tally.notes.append(f"removed for a {options.core}-core: {removed:,} interactions in {rounds} rounds")
        interactions = core
    if options.by_user:
        histories: dict[str, list[RawInteraction]] = {}
        for x in interactions:
            histories.setdefault(x.user, []).append(x)
        interactions = [x for own in histories.values() for x in sorted(own, key=lambda x: x.time)]
    if options.relative_times:
        first: dict[str, Decimal] = {}
        for x in interactions:
            first[x.user] = min(x.time, first.get(x.user, x.time))
        interactions = [x._replace(time=x.time - first[x.user]) for x in interactions]
        tally.notes.append("times are written as the distance from each user's first interaction")
    return interactions


def select_core(interactions: list[RawInteraction], k: int) -> tuple[list[RawInteraction], int]:
    """The k-core, and the rounds that removed interactions."""
    rounds = 0
    while True:
        users, items = Counter(x.user for x in interactions), Counter(x.item for x in interactions)
        kept = [x for x in interactions if users[x.user] >= k and items[x.item] >= k]
        if len(kept) == len(interactions):
            return interactions, rounds
        interactions, rounds = kept, rounds + 1


def assert_same(options: PreparationOptions) -> Outcome:
    """Check that both agree, and return the outcome."""
    outcome, expected = prepare(options), prepare_by_rows(options)
    assert outcome.error.startswith(expected.error) and bool(outcome.error) == bool(expected.error)
    if not expected.error:
        assert list(outcome.users.items()) == list(expected.users.items())
        assert list(outcome.items.items()) == list(expected.items.items())
    assert outcome.lines == expected.lines
    assert outcome.remarks == expected.remarks
    return outcome
