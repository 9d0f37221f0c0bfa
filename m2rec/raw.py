"""Raw data sets, in the formats in which they are published, as typed records.

`FORMATS` is the table of them, `movielens` finds out which of three a folder holds, and
`table` makes one for any table. To add a format, add an entry.
"""

import html
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple, TypeVar

from m2rec.dominant import LABELS
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

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DIGITS = 28  # of a number, what Decimal computes with
UNITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}  # of unix time, with the places by which its point moves
LIMITS = {"s": Decimal(10**11), "ms": Decimal(10**14), "us": Decimal(10**17)}  # of a unit: the year 5138
DATES = "dates"
UNIT_NAMES = {
    "s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds", DATES: DATES,
}  # fmt: skip
BLANKS = " \xa0"  # around ids
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")

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


def names(value: object) -> str:
    """Text of a value; the parts of a list, nested or not, once each and with commas between."""
    return ", ".join(dict.fromkeys(_parts(value)))


def prose(value: object) -> str:
    """Text of a value; the parts of a list with spaces between."""
    return " ".join(_parts(value))


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
            rating = _rating(_value(row, self.rating)) if self.rating else None
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


def _missing(value: object) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    )


def _value(row: Row, keys: Keys) -> object:
    """The first value that is not missing, or None."""
    return next((row[key] for key in keys if not _missing(row.get(key))), None)


def _needed(row: Row, keys: Keys) -> object:
    value = _value(row, keys)
    if value is None:
        present = any(key in row for key in keys)
        raise Malformed(
            f"{keys[0]!r} is empty" if present else f"no {keys[0]!r}, only {short(', '.join(row))}"
        )
    return value


def token(value: object) -> str:
    """An id as it stands; a whole number without its .0.

    Raises:
        Malformed: it is no text or number, or can't stand in a tab-separated file.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise Malformed(f"{short(value)} is no id")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        text = _joined(str(value), "strict")
    except UnicodeDecodeError:
        raise Malformed(f"id {short(value)} has half a character") from None
    if _CONTROL.search(text):
        raise Malformed(f"id {short(value)} has a tab, a newline or another control character")
    return text


def _joined(text: str, errors: str) -> str:
    """Surrogates put together to the characters that they are halves of."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", errors)


def number(value: object) -> Decimal:
    """A number in full precision.

    Raises:
        Malformed: it is none, not finite, or has more than 28 places before or after the point.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise Malformed(f"{short(value)} is no number")
    try:
        exact = Decimal(str(value))
    except (InvalidOperation, ValueError):
        raise Malformed(f"{short(value)} is no number") from None
    _, digits, exponent = exact.as_tuple()
    if not isinstance(exponent, int) or len(digits) > DIGITS or abs(exponent) > DIGITS:
        raise Malformed(f"{short(value)} is no number of up to {DIGITS} digits")
    return exact


def shortest(exact: Decimal) -> str:
    """The shortest decimal that is exactly this number, without exponent."""
    text = format(exact, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


class TimeReader:
    """Seconds since 1970 from the times of one file; the numbers among them are all of one unit.

    Without a given unit the first time decides. Numbers from 10**11 on are taken for milliseconds,
    from 10**14 for microseconds, from 10**17 for nanoseconds; smaller ones stay as they are. A date
    without zone is UTC, and read to the microsecond.

    Args:
        path: the file, for errors.
        unit: one of `UNITS`, for numbers of any size; dates may stand between them.
    """

    def __init__(self, path: Path, unit: str | None = None) -> None:
        self.path, self.given = path, unit
        self.first: tuple[str, int, object] | None = None
        """The first time: its unit or `DATES`, its line, its value."""

    def read(self, value: object, line: int) -> Decimal:
        """The time of one line.

        Raises:
            Malformed: it is neither a number nor a date.
            ValueError: it is of another unit than the times before it.
        """
        time, unit = self._parse(value)
        self.first = self.first or (unit, line, value)
        if self.given is None and unit != self.first[0]:
            raise ValueError(
                f"{self.path}: {_describe_time(*self.first)}, and {_describe_time(unit, line, value)}; say "
                f"which unit all numbers have with --time-unit ({', '.join(UNITS)}), or repair the line"
            )
        places = UNITS.get(unit, 0)
        return time.scaleb(-places) if places else time

    def _parse(self, value: object) -> tuple[Decimal, str]:
        """A number with its unit, or the seconds of a date."""
        if not isinstance(value, date):
            try:
                time = number(value)
            except Malformed:
                value = _date(value)
            else:
                return time, self.given or find_unit(time)
        return _since_1970(value), DATES

    def remarks(self) -> list[str]:
        """How the times were read."""
        if self.first is None:
            return []
        unit = self.given or self.first[0]
        small = " (numbers below 10^11 stay as they are)" if unit == "s" and not self.given else ""
        return [f"timestamps read as {UNIT_NAMES[unit]}{small}"]


def _describe_time(unit: str, line: int, value: object) -> str:
    return f"line {line} has the time {short(str(value))}, which reads as {UNIT_NAMES[unit]}"


def find_unit(time: Decimal) -> str:
    """The unit that a number's size says, `s` for what stays as it is."""
    for unit, limit in LIMITS.items():
        if -limit < time < limit:
            return unit
    return "ns"


def _since_1970(value: date) -> Decimal:
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    since = (value if value.tzinfo else value.replace(tzinfo=UTC)) - EPOCH
    return since.days * 86400 + since.seconds + Decimal(since.microseconds).scaleb(-6)


class IdReader:
    """The ids of one file, without blanks around them; says how many had some."""

    def __init__(self) -> None:
        self.stripped, self.example = 0, ""

    def read(self, value: object, line: int) -> str:
        """The id in a value of this line.

        Raises:
            Malformed: see `token`.
        """
        text = token(value)
        bare = text.strip(BLANKS)
        if len(bare) < len(text):
            self.stripped += 1
            self.example = self.example or f"{text!r} in line {line}"
        return bare

    def remarks(self) -> list[str]:
        """How many ids were changed."""
        if not self.stripped:
            return []
        return [f"blanks around ids were removed: {self.stripped:,}, the first from {self.example}"]


class LabelCounter:
    """Zeros in columns that say whether somebody clicked, where such a column is not used.

    Args:
        used: columns that are.
    """

    def __init__(self, used: Collection[str]) -> None:
        self.others, self.zeros = set(used), Counter[str]()
        """Columns that are no such labels, and the zeros of those that are."""

    def count(self, row: Row) -> None:
        """Look at one line."""
        for name in row.keys() - self.others:
            if name.lower() not in LABELS:
                self.others.add(name)
            elif _is_zero(row[name]):
                self.zeros[name] += 1

    def remarks(self) -> list[str]:
        """How many interactions seem to be none."""
        return [
            f"column {name!r} is 0 in {zeros:,} lines, which count as interactions like all others; "
            f"to leave them out give --rating={name} --min-rating=1"
            for name, zeros in self.zeros.items()
        ]


def _is_zero(value: object) -> bool:
    try:
        return _rating(value) == 0
    except Malformed:
        return False


def _rating(value: object) -> Decimal | None:
    """A rating, which may be a truth value; None where there is none."""
    if _missing(value):
        return None
    return number(int(value) if isinstance(value, bool) else value)


def _date(value: object) -> datetime:
    try:
        return datetime.fromisoformat(str(value).strip())
    except ValueError:
        raise Malformed(f"time {short(value)} is neither a unix number nor an ISO date") from None


def one_line(text: str) -> str:
    """Text without HTML entities, on one line, with single spaces."""
    plain = html.unescape(_joined(text, "replace"))
    return " ".join(_CONTROL.sub(" ", plain).split())


def _parts(value: object) -> Iterator[str]:
    """The texts in a value; objects with names have none."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, list | tuple):
            left.extend(reversed(part))
        elif not _missing(part) and not isinstance(part, dict):
            yield str(part).strip()


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
