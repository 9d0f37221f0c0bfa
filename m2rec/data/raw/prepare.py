"""Raw data to RecBole's files: NAME.inter, and NAME.item with the texts of the items that occur."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from m2rec.data.dominant import describe_dominant_entity
from m2rec.data.raw.arrange import select_core, sort_by_user, subtract_first_times
from m2rec.data.raw.formats import RawInteraction
from m2rec.data.raw.options import PreparationOptions, RawSource, select_source
from m2rec.data.raw.tally import Tally, iterate_with_progress
from m2rec.data.raw.values import format_decimal
from m2rec.errors import UserError
from m2rec.storage import write_atomically

logger = logging.getLogger(__name__)


@dataclass
class DatasetStatistics:
    """Sizes of a data set."""

    name: str
    users: Counter[str] = field(default_factory=Counter)
    items: Counter[str] = field(default_factory=Counter)
    """Interactions of each."""
    interactions: int = 0
    texts: int | None = None
    """Items with text; None without a file of items."""

    def __str__(self) -> str:
        users, items, n = len(self.users), len(self.items), self.interactions
        return (
            f"data set: {self.name}\n"
            f"users: {users:,}\n"
            f"items: {items:,}\n"
            f"interactions: {n:,}\n"
            f"average length: {n / users:.2f}\n"
            f"sparsity: {1 - n / (users * items):.2%}\n"
            f"items with text: {'-' if self.texts is None else f'{self.texts:,}'}"
        )


def prepare_dataset(
    options: PreparationOptions, log: Callable[[str], object] = logger.warning
) -> DatasetStatistics:
    """Write the files of a data set, all of them or none.

    Args:
        options: what to read and how.
        log: gets one line for each thing that was left out, changed or reinterpreted.

    Raises:
        ValueError: options contradict each other, a file can't be read, or nothing of it is left.
    """
    source = select_source(options)
    inter = _choose_output(options, source)
    writer = _DatasetWriter(options, source, log)
    inter.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(inter, lambda temporary: writer.write(temporary, inter.with_suffix(".item")))
    finally:
        with suppress(OSError):  # the folder stays unless it is empty
            inter.parent.rmdir()
    return writer.statistics


def _choose_output(options: PreparationOptions, source: RawSource) -> Path:
    """The path of NAME.inter, which must not be a raw file."""
    name = options.dataset
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(
            f"dataset: {name!r} is not a valid folder name; the folder it is created in is data_path"
        )
    inter = options.data_path / name / f"{name}.inter"
    for raw_file in filter(None, (source.interactions, source.items)):
        for target in (inter, inter.with_suffix(".item")):
            if target.exists() and raw_file.samefile(target):
                raise UserError(f"{raw_file}: the result would replace it; choose another dataset=NAME")
    return inter


class _DatasetWriter:
    """Writes the files and counts what is in them."""

    def __init__(self, options: PreparationOptions, source: RawSource, log: Callable[[str], object]) -> None:
        self.options, self.source, self.log = options, source, log
        self.statistics = DatasetStatistics(options.dataset)

    def write(self, inter: Path, item: Path) -> None:
        """Write `inter`, and `item` atomically: the caller moves `inter` into place last."""
        self._write_interactions(inter)
        if self.source.items is not None:
            write_atomically(item, self._write_items)

    def _write_interactions(self, path: Path) -> None:
        has_rating = bool(self.source.format.rating) and not self.options.no_rating
        columns = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
        if not has_rating:
            columns.remove("rating:float")
        tally = Tally(self.source.interactions, self.options.max_bad)
        records = self.source.format.interactions(tally, self.options.time_unit)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            _write_row(file.write, columns)
            selected = self._select_interactions(iterate_with_progress(records, tally), tally)
            for record in self._arrange_interactions(selected, tally):
                cells = [record.user, record.item]
                if has_rating:
                    cells.append("" if record.rating is None else format_decimal(record.rating))
                _write_row(file.write, [*cells, format_decimal(record.time)])
                self.statistics.users[record.user] += 1
                self.statistics.items[record.item] += 1
                self.statistics.interactions += 1
        for kind, counts in (("user", self.statistics.users), ("item", self.statistics.items)):
            warning = describe_dominant_entity(kind, list(counts), list(counts.values()))
            if warning:
                tally.notes.append(warning)
        tally.log_remarks(self.log)
        if not self.statistics.interactions:
            is_limited = self.options.keep or self.options.min_rating is not None or self.options.core
            limits = "keep=CONDITION or min_rating=NUMBER" + (" or core=NUMBER" if self.options.core else "")
            cure = f"loosen {limits}" if is_limited else "is it the right file?"
            raise UserError(f"{tally.path}: no interactions are left; {cure}")

    def _select_interactions(
        self, records: Iterator[RawInteraction], tally: Tally
    ) -> Iterator[RawInteraction]:
        """The interactions with enough rating, and one of exact duplicates with `drop_repeats`."""
        min_rating, seen, n_duplicates = self.options.min_rating, set[bytes](), 0
        for record in records:
            if min_rating is not None and (record.rating is None or float(record.rating) < min_rating):
                continue
            if self.options.drop_repeats:
                digest = _hash_interaction(record)
                if digest in seen:
                    n_duplicates += 1
                    continue
                seen.add(digest)
            yield record
        if n_duplicates:
            tally.notes.append(f"exact duplicates removed: {n_duplicates:,}")

    def _arrange_interactions(
        self, interactions: Iterable[RawInteraction], tally: Tally
    ) -> Iterable[RawInteraction]:
        """The interactions of the core, in the order and with the times that the options ask for."""
        options = self.options
        if not (options.core or options.by_user or options.relative_times):
            return interactions  # one at a time, not held in memory
        arranged = list(interactions)
        if options.core:
            core = select_core(arranged, options.core)
            removed = len(arranged) - len(core.interactions)
            tally.notes.append(
                f"removed for a {options.core}-core: {removed:,} interactions in {core.rounds:,} rounds"
            )
            arranged = core.interactions
        if options.by_user:
            arranged = sort_by_user(arranged)
        if options.relative_times:
            arranged = subtract_first_times(arranged)
            tally.notes.append("times are written as the distance from each user's first interaction")
        return arranged

    def _write_items(self, path: Path) -> None:
        """Write the items that occur and have text; of several lines for one the first with text."""
        assert self.source.items is not None
        tally = Tally(self.source.items, self.options.max_bad)
        any_occurs, written = False, set[str]()
        with path.open("w", encoding="utf-8", newline="\n") as file:
            texts = [f"{column.column}:{column.field_type}" for column in self.source.format.texts]
            _write_row(file.write, ["item_id:token", *texts])
            for item in iterate_with_progress(self.source.format.items(tally), tally):
                if item.token not in self.statistics.items:
                    continue
                any_occurs = True
                if item.token not in written and any(item.texts):
                    written.add(item.token)
                    cut = [text[: self.options.text_limit].rstrip() for text in item.texts]
                    _write_row(file.write, [item.token, *cut])
        tally.log_remarks(self.log)
        if not any_occurs:
            raise UserError(
                f"{tally.path}: none of its items occurs in {self.source.interactions}; "
                f"are these files of the same data set?"
            )
        self.statistics.texts = len(written)


def _write_row(write: Callable[[str], object], cells: Sequence[str]) -> None:
    write("\t".join(cells) + "\n")


def _hash_interaction(record: RawInteraction) -> bytes:
    text = "\t".join((record.user, record.item, format_decimal(record.time)))
    return blake2b(text.encode(), digest_size=12).digest()
