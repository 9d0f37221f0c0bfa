"""Raw data to RecBole's files: NAME.inter, and NAME.item with the texts of the items that occur."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from m2rec.data.dominant import describe_dominant_entity
from m2rec.data.raw.arrange import arrange_batches
from m2rec.data.raw.batches import InteractionBatch
from m2rec.data.raw.inter_rows import format_header, format_rows
from m2rec.data.raw.options import PreparationOptions, RawSource, select_source
from m2rec.data.raw.tally import Tally, iterate_with_progress
from m2rec.data.raw.token_counts import TokenCounts
from m2rec.errors import UserError
from m2rec.storage import write_atomically

logger = logging.getLogger(__name__)


@dataclass
class DatasetStatistics:
    """Sizes of a data set."""

    name: str
    users: TokenCounts = field(default_factory=TokenCounts)
    items: TokenCounts = field(default_factory=TokenCounts)
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
        tally = Tally(self.source.interactions, self.options.max_bad)
        read = self.source.format.batches(tally, self.options.time_unit)
        selected = self._select_rated(iterate_with_progress(read, tally, rows_between_updates=1))
        with path.open("wb") as file:
            file.write(format_header(has_rating))
            for batch in arrange_batches(selected, self.options, tally):
                file.write(format_rows(batch, has_rating))
                self.statistics.users.add(batch.users)
                self.statistics.items.add(batch.items)
                self.statistics.interactions += len(batch.users)
        for kind, counts in (("user", self.statistics.users), ("item", self.statistics.items)):
            warning = describe_dominant_entity(kind, counts.tokens, counts.counts)
            if warning:
                tally.notes.append(warning)
        tally.log_remarks(self.log)
        if not self.statistics.interactions:
            is_limited = self.options.keep or self.options.min_rating is not None or self.options.core
            limits = "keep=CONDITION or min_rating=NUMBER" + (" or core=NUMBER" if self.options.core else "")
            cure = f"loosen {limits}" if is_limited else "is it the right file?"
            raise UserError(f"{tally.path}: no interactions are left; {cure}")

    def _select_rated(self, batches: Iterator[InteractionBatch]) -> Iterator[InteractionBatch]:
        """The interactions with enough rating."""
        least = self.options.min_rating
        for batch in batches:
            if least is None:
                yield batch
                continue
            is_enough = [
                rating != "" and float(rating) >= least for rating in batch.ratings.dictionary.to_pylist()
            ]
            yield batch.select(np.array(is_enough, dtype=bool)[batch.ratings.indices.to_numpy()])

    def _write_items(self, path: Path) -> None:
        """Write the items that occur and have text; of several lines for one the first with text."""
        assert self.source.items is not None
        tally = Tally(self.source.items, self.options.max_bad)
        occurring, any_occurs, written = set(self.statistics.items.tokens.to_pylist()), False, set[str]()
        with path.open("w", encoding="utf-8", newline="\n") as file:
            texts = [f"{column.column}:{column.field_type}" for column in self.source.format.texts]
            _write_row(file.write, ["item_id:token", *texts])
            for item in iterate_with_progress(self.source.format.items(tally), tally):
                if item.token not in occurring:
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
