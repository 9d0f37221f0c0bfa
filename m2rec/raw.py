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
from m2rec.raw_rows import Condition, find_column, find_nested, is_path, keep_rows, take_apart
from m2rec.raw_times import TIME_NAMES, FileOrder, TimeReader
from m2rec.raw_values import IdReader, LabelCounter, is_missing, names, one_line, prose, read_rating
from m2rec.rows import (
    HEADER,
    Layout,
    Malformed,
    Row,
    Rows,
    Tally,
    csv_rows,
    delimited_rows,
    json_rows,
    loose_rows,
    parquet_rows,
    sequence_rows,
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
    """Empty: the order of the file is the time."""
    rating: Keys = ()
    item_rows: Callable[[Tally], Rows] | None = None
    """None: as `rows`."""
    token: Keys = ()
    """Names of an item's token in the file of items."""
    texts: tuple[Text, ...] = ()
    time_format: str | None = None
    """Of dates, in strptime's codes, where they don't say themselves which number is what."""
    keep: tuple[Condition, ...] = ()
    """What rows of interactions must fulfil."""

    def interactions(self, tally: Tally, time_unit: str | None = None) -> Iterator[Interaction]:
        """The interactions of the file that `tally` names, in file order.

        Args:
            tally: names the file; at the end it is told how times and ids were read.
            time_unit: one of `UNITS`; by default as `TimeReader` finds it.

        Raises:
            ValueError: the file can't be read, too much of it is malformed, or its times are of several
                units.
        """
        times, ids, order = TimeReader(tally.path, time_unit, self.time_format), IdReader(), FileOrder()
        used = {*self.user, *self.item, *self.time, *self.rating, *(part.column for part in self.keep)}
        labels = LabelCounter(used)

        def parse(line: int, row: Row) -> Interaction:
            user = ids.read(_needed(row, self.user), line)
            item = ids.read(_needed(row, self.item), line)
            rating = read_rating(_value(row, self.rating)) if self.rating else None
            # last, so that a line which is malformed elsewhere does not settle the unit
            time = times.read(_needed(row, self.time), line) if self.time else order.next(row)
            labels.count(row)
            return Interaction(user, item, time, rating)

        rows = _flatten(self.rows(tally), used, tally)
        if self.keep:
            rows = keep_rows(rows, self.keep, tally)
        yield from _records(rows, parse, tally)
        tally.notes += [*times.remarks(), *order.remarks(), *ids.remarks(), *labels.remarks()]

    def items(self, tally: Tally) -> Iterator[Item]:
        """The items of the file that `tally` names; the same token may come again.

        Raises:
            ValueError: as for `interactions`.
        """
        ids = IdReader()

        def parse(line: int, row: Row) -> Item:
            texts = (one_line(text.convert(_value(row, text.keys))) for text in self.texts)
            return Item(ids.read(_needed(row, self.token), line), tuple(texts))

        rows = (self.item_rows or self.rows)(tally)
        used = {*self.token, *(key for text in self.texts for key in text.keys)}
        yield from _records(_flatten(rows, used, tally), parse, tally)
        tally.notes += ids.remarks()


def _flatten(rows: Rows, used: Collection[str], tally: Tally) -> Rows:
    """The rows with a value for each of the paths among the names that are used."""
    return take_apart(rows, sorted(used), tally) if any(map(is_path, used)) else rows


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
        if any(key in row for key in keys):
            raise Malformed(f"{keys[0]!r} is empty")
        hint = f"; did you mean {nested!r}?" if (nested := find_nested(row, keys[0])) else ""
        raise Malformed(f"no {keys[0]!r}, only {short(', '.join(row))}{hint}")
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


def _mind_clicks(tally: Tally) -> Rows:
    """behaviors.tsv: an impression is a list of news, N1-1 for what was clicked and N2-0 for the rest."""
    columns, unused = ("impression", "user", "time", "history", "impressions"), 0
    for line, row in delimited_rows(tally, "\t", columns):
        shown = row["impressions"].split()
        if not all(news.endswith(("-0", "-1")) for news in shown):
            tally.reject(line, "impressions without -0 or -1, as in the test set")
            continue
        unused += bool(row["history"].strip())
        yield line, {**row, "clicks": [news[:-2] for news in shown if news.endswith("-1")]}
    if unused:
        tally.notes.append(f"the history column, which has no times, is not used: {unused:,} lines have one")


_NEWS = ("news", "category", "subcategory", "title", "abstract", "url", "entities", "more entities")
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
    "mind": Format(
        about="behaviors.tsv and news.tsv; an interaction is a click on what was shown",
        rows=_mind_clicks,
        user=("user",),
        item=("clicks[]",),
        time=("time",),
        time_format="%m/%d/%Y %I:%M:%S %p",
        item_rows=partial(delimited_rows, separator="\t", columns=_NEWS),
        token=("news",),
        texts=(
            Text("title", ("title",)),
            Text("category", ("category",), "token"),
            Text("subcategory", ("subcategory",), "token"),
            Text("abstract", ("abstract",)),
        ),
    ),
    "sequences": Format(
        about="USER ITEM ITEM ... in each line, oldest first, as of S3-Rec, FMLP-Rec, BSARec and WEARec",
        rows=sequence_rows,
        user=("user",),
        item=("items[]",),
        time=(),
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
    time: str | None = None,
    rating: str | None = None,
    item_kind: str = "csv",
    item_id: str = "",
    texts: Sequence[str] = (),
    layout: Layout = HEADER,
    item_layout: Layout = HEADER,
    time_format: str | None = None,
    keep: Sequence[Condition] = (),
) -> Format:
    """The format of tables with named columns.

    Args:
        kind: of the interactions, one of `TABLES`.
        user, item, time, rating: columns of the interactions, or paths into them (see raw_rows.py);
            without a time the order of the file is it.
        item_kind: of the file of items.
        item_id, texts: columns of the items.
        layout, item_layout: of the two files, where they are CSV.
        time_format: of dates, in strptime's codes.
        keep: what rows of interactions must fulfil.
    """
    paths = [user, item, *filter(None, (time, rating)), *(part.column for part in keep)]
    return Format(
        about="",
        rows=_reader(kind, paths, layout, "--columns", LABELS if time else LABELS | TIME_NAMES),
        user=(user,),
        item=(item,),
        time=(time,) if time else (),
        rating=(rating,) if rating else (),
        item_rows=_reader(item_kind, [item_id, *texts], item_layout, "--item-columns"),
        token=(item_id,),
        texts=tuple(Text("_".join(text.split()), (text,)) for text in texts),
        time_format=time_format,
        keep=tuple(keep),
    )


def _reader(
    kind: str, paths: Sequence[str], layout: Layout, option: str, optional: Collection[str] = ()
) -> Callable[[Tally], Rows]:
    columns = list(dict.fromkeys(map(find_column, paths)))
    if kind == "jsonl":
        return json_rows
    if kind == "parquet":
        return partial(parquet_rows, columns=columns, optional=optional)
    cure = f"name one of them, or all with {option} if line 1 is no header"
    return partial(csv_rows, columns=columns, layout=layout, cure=cure)
