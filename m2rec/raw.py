"""Raw data sets, in the formats in which they are published, as typed records.

`FORMATS` is the table of them, `movielens` finds out which of three a folder holds, and
`table` makes one for any table. To add a format, add an entry.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple, TypeVar

from m2rec.dominant import LABELS
from m2rec.raw_times import TimeReader
from m2rec.raw_values import IdReader, LabelCounter, is_missing, names, one_line, prose, read_rating
from m2rec.rows import (
    Malformed,
    Row,
    Rows,
    Tally,
    csv_rows,
    delimited_rows,
    json_rows,
    loose_rows,
    parquet_rows,
)

Record = TypeVar("Record")

Keys = tuple[str, ...]
"""Names of a value in a row; the first that is there counts."""


class Interaction(NamedTuple):
    """One event."""

    user: str
    item: str
    time: Decimal
    """Seconds since 1970 where the raw data has dates or unix time, else its own number."""
    rating: Decimal | None


class Item(NamedTuple):
    """One item; its texts are one line each, in the format's order."""

    token: str
    texts: tuple[str, ...]


class Text(NamedTuple):
    """A text column of NAME.item."""

    column: str
    keys: Keys
    kind: str = "token_seq"
    convert: Callable[[object], str] = names


@dataclass(frozen=True)
class Format:
    """Where a raw format has what is needed."""

    about: str
    rows: Callable[[Tally], Rows]
    user: Keys
    item: Keys
    time: Keys
    rating: Keys = ()
    item_rows: Callable[[Tally], Rows] | None = None
    """None: as `rows`."""
    token: Keys = ()
    """Names of an item's token in the file of items."""
    texts: tuple[Text, ...] = ()

    def interactions(self, tally: Tally, time_unit: str | None = None) -> Iterator[Interaction]:
        """The interactions of the file that `tally` names, in file order.

        Args:
            tally: names the file; at the end it is told how times and ids were read.
            time_unit: one of `UNITS`; by default as `TimeReader` finds it.

        Raises:
            ValueError: the file can't be read, too much of it is malformed, or its times are of several
                units.
        """
        times, ids = TimeReader(tally.path, time_unit), IdReader()
        labels = LabelCounter({*self.user, *self.item, *self.time, *self.rating})

        def parse(line: int, row: Row) -> Interaction:
            user = ids.read(_needed(row, self.user), line)
            item = ids.read(_needed(row, self.item), line)
            rating = read_rating(_value(row, self.rating)) if self.rating else None
            # last, so that a line which is malformed elsewhere does not settle the unit
            record = Interaction(user, item, times.read(_needed(row, self.time), line), rating)
            labels.count(row)
            return record

        yield from _records(self.rows(tally), parse, tally)
        tally.notes += [*times.remarks(), *ids.remarks(), *labels.remarks()]

    def items(self, tally: Tally) -> Iterator[Item]:
        """The items of the file that `tally` names; the same token may come again.

        Raises:
            ValueError: as for `interactions`.
        """
        ids = IdReader()

        def parse(line: int, row: Row) -> Item:
            texts = (one_line(text.convert(_value(row, text.keys))) for text in self.texts)
            return Item(ids.read(_needed(row, self.token), line), tuple(texts))

        yield from _records((self.item_rows or self.rows)(tally), parse, tally)
        tally.notes += ids.remarks()


def _records(rows: Rows, parse: Callable[[int, Row], Record], tally: Tally) -> Iterator[Record]:
    """Parse row by row; what is malformed goes to the tally."""
    for line, row in rows:
        try:
            record = parse(line, row)
        except Malformed as error:
            tally.reject(line, error)
        else:
            yield record
    tally.finish()


def _value(row: Row, keys: Keys) -> object:
    """The first value that is not missing, or None."""
    return next((row[key] for key in keys if not is_missing(row.get(key))), None)


def _needed(row: Row, keys: Keys) -> object:
    value = _value(row, keys)
    if value is None:
        present = any(key in row for key in keys)
        raise Malformed(
            f"{keys[0]!r} is empty" if present else f"no {keys[0]!r}, only {short(', '.join(row))}"
        )
    return value


def _genres(value: object) -> str:
    """MovieLens's Comedy|Drama."""
    return "" if value == "(no genres listed)" else names(str(value or "").split("|"))


def _amazon_title(value: object) -> str:
    """Some titles of 2018 are pieces of the page's JavaScript."""
    return "" if "getTime" in str(value) else names(value)


# the flags of u.item after its first, "unknown"
_FLAGS = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


def _ml_100k_films(tally: Tally) -> Rows:
    """u.item: a film's genres are flags."""
    columns = ("movieId", "title", "released", "video", "url", "unknown", *_FLAGS)
    for line, row in delimited_rows(tally, "|", columns):
        row["genres"] = "|".join(flag for flag in _FLAGS if row[flag] == "1")
        yield line, row


_RATING = ("userId", "movieId", "rating", "timestamp")
_FILM = ("movieId", "title", "genres")


def _movielens(about: str, rows: Callable[[Tally], Rows], item_rows: Callable[[Tally], Rows]) -> Format:
    return Format(
        about=about,
        rows=rows,
        user=("userId",),
        item=("movieId",),
        time=("timestamp",),
        rating=("rating",),
        item_rows=item_rows,
        token=("movieId",),
        texts=(Text("title", ("title",)), Text("genres", ("genres",), convert=_genres)),
    )


# by the files of the folder
MOVIELENS = {
    ("u.data", "u.item"): _movielens(
        "ml-100k", partial(delimited_rows, separator="\t", columns=_RATING), _ml_100k_films
    ),
    ("ratings.dat", "movies.dat"): _movielens(
        "ml-1m, ml-10m",
        partial(delimited_rows, separator="::", columns=_RATING),
        partial(delimited_rows, separator="::", columns=_FILM),
    ),
    ("ratings.csv", "movies.csv"): _movielens(
        "ml-20m, ml-25m, ml-latest", partial(csv_rows, columns=_RATING), partial(csv_rows, columns=_FILM)
    ),
}


def _amazon(
    about: str, rows: Callable[[Tally], Rows], categories: str, title: Callable[[object], str] = names
) -> Format:
    """Amazon's reviews before 2023."""
    return Format(
        about=about,
        rows=rows,
        user=("reviewerID",),
        item=("asin",),
        time=("unixReviewTime",),
        rating=("overall",),
        token=("asin",),
        texts=(
            Text("title", ("title",), convert=title),
            Text("brand", ("brand",), "token"),
            Text("categories", (categories,)),
            Text("description", ("description",), convert=prose),
        ),
    )


FORMATS = {
    "amazon-2014": _amazon(
        "reviews_CATEGORY.json.gz and meta_CATEGORY.json.gz (Python dicts)", loose_rows, "categories"
    ),
    "amazon-2018": _amazon(
        "CATEGORY.json.gz or CATEGORY_5.json.gz, and meta_CATEGORY.json.gz",
        json_rows,
        "category",
        _amazon_title,
    ),
    "amazon-2023": Format(
        about="CATEGORY.jsonl.gz and meta_CATEGORY.jsonl.gz; an item is its parent_asin",
        rows=json_rows,
        user=("user_id",),
        item=("parent_asin", "asin"),
        time=("timestamp",),
        rating=("rating",),
        token=("parent_asin",),
        texts=(
            Text("title", ("title",)),
            Text("store", ("store",), "token"),
            Text("categories", ("categories",)),
            Text("features", ("features",), convert=prose),
            Text("description", ("description",), convert=prose),
        ),
    ),
    "google-local": Format(
        about="2021: review-STATE.json.gz and meta-STATE.json.gz",
        rows=json_rows,
        user=("user_id",),
        item=("gmap_id",),
        time=("time",),
        rating=("rating",),
        token=("gmap_id",),
        texts=(
            Text("title", ("name",)),
            Text("categories", ("category",)),
            Text("description", ("description",), convert=prose),
            Text("address", ("address",)),
        ),
    ),
    "yelp": Format(
        about="yelp_academic_dataset_review.json and yelp_academic_dataset_business.json",
        rows=json_rows,
        user=("user_id",),
        item=("business_id",),
        time=("date",),
        rating=("stars",),
        token=("business_id",),
        texts=(
            Text("title", ("name",)),
            Text("categories", ("categories",)),
            Text("city", ("city",), "token"),
        ),
    ),
    "steam": Format(
        about="steam_reviews.json.gz and steam_games.json.gz; a user is a username, as in SASRec's data",
        rows=loose_rows,
        user=("username", "user_id"),
        item=("product_id",),
        time=("date",),
        token=("id",),
        texts=(
            Text("title", ("title", "app_name")),
            Text("genres", ("genres",)),
            Text("tags", ("tags",)),
            Text("developer", ("developer",), "token"),
        ),
    ),
}
TABLES = ("csv", "parquet", "jsonl")


def movielens(folder: Path) -> tuple[Format, Path, Path | None]:
    """The format of an unpacked MovieLens folder, its ratings, and its films if they are there.

    Raises:
        ValueError: there are no ratings in it.
    """
    for (ratings, films), found in MOVIELENS.items():
        if (folder / ratings).is_file():
            items = folder / films
            return found, folder / ratings, items if items.is_file() else None
    raise ValueError(
        f"{folder}: no {', '.join(ratings for ratings, _ in MOVIELENS)} in it; "
        f"give the folder that MovieLens's zip file unpacks to"
    )


def table(
    kind: str,
    user: str,
    item: str,
    time: str,
    rating: str | None = None,
    item_kind: str = "csv",
    item_id: str = "",
    texts: Sequence[str] = (),
) -> Format:
    """The format of tables with named columns.

    Args:
        kind: of the interactions, one of `TABLES`.
        user, item, time, rating: columns of the interactions.
        item_kind: of the file of items.
        item_id, texts: columns of the items.
    """
    columns = [user, item, time, *([rating] if rating else [])]
    return Format(
        about="",
        rows=_reader(kind, columns, LABELS),
        user=(user,),
        item=(item,),
        time=(time,),
        rating=(rating,) if rating else (),
        item_rows=_reader(item_kind, [item_id, *texts]),
        token=(item_id,),
        texts=tuple(Text("_".join(text.split()), (text,)) for text in texts),
    )


def _reader(kind: str, columns: list[str], optional: Collection[str] = ()) -> Callable[[Tally], Rows]:
    if kind == "jsonl":
        return json_rows
    if kind == "parquet":
        return partial(parquet_rows, columns=columns, optional=optional)
    return partial(csv_rows, columns=columns)
