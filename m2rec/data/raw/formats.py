"""Published data sets, in the formats in which they are published, as typed records.

To add a format, add one entry to `FORMATS`: a `RawFormat` names the columns of user, item, time and
rating, the reader of the file's rows, and the text columns of its items. A reader raises `MalformedRowError`
for a line that cannot be used. The command line and its help follow this table; `PUBLISHED` in
tests/test_raw.py needs an example of each format, and docs/data.md names the formats. `find_movielens_files`
finds out which of MovieLens's three formats a folder has, and `build_table_format` makes the format of
any other table.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from m2rec.data.column_names import LABEL_COLUMNS, TIME_COLUMNS
from m2rec.data.raw.batches import InteractionBatch, build_batches, read_block_batches
from m2rec.data.raw.blocks import BlockReader
from m2rec.data.raw.delimited import (
    HEADER_LAYOUT,
    CsvLayout,
    read_csv_records,
    read_delimited_rows,
    read_sequence_rows,
)
from m2rec.data.raw.filters import RowCondition, get_path_column, is_value_path
from m2rec.data.raw.interactions import (
    ColumnNames,
    InteractionColumns,
    InteractionParser,
    RawInteraction,
    expand_used_paths,
    get_first_value,
    parse_records,
    require_value,
)
from m2rec.data.raw.json_blocks import open_json_blocks
from m2rec.data.raw.json_rows import read_json_or_literal_rows, read_json_rows
from m2rec.data.raw.parquet import open_parquet_blocks, read_parquet_rows
from m2rec.data.raw.tally import NumberedRows, RawRow, Tally
from m2rec.data.raw.text_blocks import open_csv_blocks, open_delimited_blocks
from m2rec.data.raw.values import (
    IdReader,
    clean_text,
    join_texts,
    join_unique_texts,
)
from m2rec.errors import UserError

RowReader = Callable[[Tally], NumberedRows]


class RawItem(NamedTuple):
    """One item; its texts are one line each, in the format's order."""

    token: str
    texts: tuple[str, ...]


class TextColumn(NamedTuple):
    """A text column of NAME.item."""

    column: str
    keys: ColumnNames
    field_type: str = "token_seq"
    convert: Callable[[object], str] = join_unique_texts


@dataclass(frozen=True)
class RawFormat:
    """Columns and readers of one raw format."""

    about: str
    rows: RowReader
    user: ColumnNames
    item: ColumnNames
    time: ColumnNames
    """Empty: file order is used as time."""
    rating: ColumnNames = ()
    item_rows: RowReader | None = None
    """Of the file of items; by default `rows`."""
    token: ColumnNames = ()
    """Names of an item's token in the file of items; empty: there is no such file."""
    texts: tuple[TextColumn, ...] = ()
    time_format: str | None = None
    """Of dates that are ambiguous, in strptime's codes."""
    keep: tuple[RowCondition, ...] = ()
    """Conditions on rows of interactions."""
    blocks: BlockReader | None = None
    """Reads the rows of interactions as columns, with the same result."""

    @property
    def columns(self) -> InteractionColumns:
        """The columns of interactions."""
        return InteractionColumns(self.user, self.item, self.time, self.rating, self.time_format, self.keep)

    def batches(self, tally: Tally, time_unit: str | None = None) -> Iterator[InteractionBatch]:
        """The same as `interactions`, batch by batch."""
        parser = InteractionParser(tally, self.columns, time_unit)
        has_paths = any(map(is_value_path, self.columns.used))
        opened = nullcontext() if self.blocks is None or has_paths else self.blocks(tally, self.columns.used)
        with opened as blocks:
            if blocks is None:
                yield from build_batches(parser.read_rows(self.rows(tally)))
            else:
                yield from read_block_batches(parser, blocks)
        parser.finish()

    def interactions(self, tally: Tally, time_unit: str | None = None) -> Iterator[RawInteraction]:
        """The interactions of the file that `tally` names, in file order.

        Args:
            tally: names the file; gets notes on how times and ids were read.
            time_unit: one of `TIME_UNITS`; by default inferred, see `TimestampReader`.

        Raises:
            ValueError: the file can't be read, too much of it is malformed, or its times have several
                units.
        """
        parser = InteractionParser(tally, self.columns, time_unit)
        yield from parser.read_rows(self.rows(tally))
        parser.finish()

    def items(self, tally: Tally) -> Iterator[RawItem]:
        """The items of the file that `tally` names; a token may occur several times.

        Raises:
            ValueError: as for `interactions`.
        """
        ids = IdReader(tally.name_line)

        def parse(line: int, row: RawRow) -> RawItem:
            token = ids.read(require_value(row, self.token), line)
            texts = []
            for column in self.texts:
                texts.append(clean_text(column.convert(get_first_value(row, column.keys))))
            return RawItem(token, tuple(texts))

        read_rows = self.item_rows or self.rows
        used = set(self.token).union(*(column.keys for column in self.texts))
        yield from parse_records(expand_used_paths(read_rows(tally), used, tally), parse, tally)
        tally.finish()
        tally.notes += ids.remarks()


def _format_genres(value: object) -> str:
    """Genres in MovieLens's form, Comedy|Drama."""
    return "" if value == "(no genres listed)" else join_unique_texts(str(value or "").split("|"))


def _clean_amazon_title(value: object) -> str:
    """A title; some of 2018 are pieces of the page's JavaScript and become empty."""
    return "" if "getTime" in str(value) else join_unique_texts(value)


# the flags of u.item after its first, "unknown"
_ML_100K_GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


def _read_ml_100k_movies(tally: Tally) -> NumberedRows:
    """u.item: a film's genres are flags."""
    columns = ("movieId", "title", "released", "video", "url", "unknown", *_ML_100K_GENRES)
    for line, row in read_delimited_rows(tally, "|", columns):
        row["genres"] = "|".join(flag for flag in _ML_100K_GENRES if row[flag] == "1")
        yield line, row


def _read_mind_clicks(tally: Tally) -> NumberedRows:
    """behaviors.tsv: an impression is a list of news, N1-1 for a click and N2-0 for none."""
    columns = ("impression", "user", "time", "history", "impressions")
    n_histories = 0
    for line, row in read_delimited_rows(tally, "\t", columns):
        impressions = row["impressions"].split()
        if not all(news.endswith(("-0", "-1")) for news in impressions):
            tally.reject(line, "impressions without -0 or -1, as in the test set")
            continue
        n_histories += bool(row["history"].strip())
        row["clicks"] = [news[:-2] for news in impressions if news.endswith("-1")]
        yield line, row
    if n_histories:
        tally.notes.append(f"the history column has no times and is not used: {n_histories:,} lines have one")


_MIND_NEWS_COLUMNS = (
    "news", "category", "subcategory", "title", "abstract", "url", "entities", "more entities",
)  # fmt: skip
_RATING_COLUMNS = ("userId", "movieId", "rating", "timestamp")
_MOVIE_COLUMNS = ("movieId", "title", "genres")


def _build_movielens_format(
    about: str, rows: RowReader, item_rows: RowReader, blocks: BlockReader
) -> RawFormat:
    return RawFormat(
        about=about,
        rows=rows,
        blocks=blocks,
        user=("userId",),
        item=("movieId",),
        time=("timestamp",),
        rating=("rating",),
        item_rows=item_rows,
        token=("movieId",),
        texts=(TextColumn("title", ("title",)), TextColumn("genres", ("genres",), convert=_format_genres)),
    )


# by the files of the folder
MOVIELENS_FORMATS = {
    ("u.data", "u.item"): _build_movielens_format(
        "ml-100k",
        partial(read_delimited_rows, separator="\t", columns=_RATING_COLUMNS),
        _read_ml_100k_movies,
        partial(open_delimited_blocks, separator="\t", columns=_RATING_COLUMNS),
    ),
    ("ratings.dat", "movies.dat"): _build_movielens_format(
        "ml-1m, ml-10m",
        partial(read_delimited_rows, separator="::", columns=_RATING_COLUMNS),
        partial(read_delimited_rows, separator="::", columns=_MOVIE_COLUMNS),
        partial(open_delimited_blocks, separator="::", columns=_RATING_COLUMNS),
    ),
    ("ratings.csv", "movies.csv"): _build_movielens_format(
        "ml-20m, ml-25m, ml-latest",
        partial(read_csv_records, columns=_RATING_COLUMNS),
        partial(read_csv_records, columns=_MOVIE_COLUMNS),
        partial(open_csv_blocks, columns=_RATING_COLUMNS),
    ),
}


def _build_amazon_format(
    about: str,
    rows: RowReader,
    categories: str,
    title: Callable[[object], str] = join_unique_texts,
) -> RawFormat:
    """The format of Amazon's reviews before 2023."""
    return RawFormat(
        about=about,
        rows=rows,
        blocks=open_json_blocks if rows is read_json_rows else None,
        user=("reviewerID",),
        item=("asin",),
        time=("unixReviewTime",),
        rating=("overall",),
        token=("asin",),
        texts=(
            TextColumn("title", ("title",), convert=title),
            TextColumn("brand", ("brand",), "token"),
            TextColumn("categories", (categories,)),
            TextColumn("description", ("description",), convert=join_texts),
        ),
    )


FORMATS = {
    "amazon-2014": _build_amazon_format(
        "reviews_CATEGORY.json.gz and meta_CATEGORY.json.gz (Python dicts)",
        read_json_or_literal_rows,
        "categories",
    ),
    "amazon-2018": _build_amazon_format(
        "CATEGORY.json.gz or CATEGORY_5.json.gz, and meta_CATEGORY.json.gz",
        read_json_rows,
        "category",
        _clean_amazon_title,
    ),
    "amazon-2023": RawFormat(
        about="CATEGORY.jsonl.gz and meta_CATEGORY.jsonl.gz; an item is its parent_asin",
        rows=read_json_rows,
        blocks=open_json_blocks,
        user=("user_id",),
        item=("parent_asin", "asin"),
        time=("timestamp",),
        rating=("rating",),
        token=("parent_asin",),
        texts=(
            TextColumn("title", ("title",)),
            TextColumn("store", ("store",), "token"),
            TextColumn("categories", ("categories",)),
            TextColumn("features", ("features",), convert=join_texts),
            TextColumn("description", ("description",), convert=join_texts),
        ),
    ),
    "google-local": RawFormat(
        about="2021: review-STATE.json.gz and meta-STATE.json.gz",
        rows=read_json_rows,
        blocks=open_json_blocks,
        user=("user_id",),
        item=("gmap_id",),
        time=("time",),
        rating=("rating",),
        token=("gmap_id",),
        texts=(
            TextColumn("title", ("name",)),
            TextColumn("categories", ("category",)),
            TextColumn("description", ("description",), convert=join_texts),
            TextColumn("address", ("address",)),
        ),
    ),
    "yelp": RawFormat(
        about="yelp_academic_dataset_review.json and yelp_academic_dataset_business.json",
        rows=read_json_rows,
        blocks=open_json_blocks,
        user=("user_id",),
        item=("business_id",),
        time=("date",),
        rating=("stars",),
        token=("business_id",),
        texts=(
            TextColumn("title", ("name",)),
            TextColumn("categories", ("categories",)),
            TextColumn("city", ("city",), "token"),
        ),
    ),
    "steam": RawFormat(
        about="steam_reviews.json.gz and steam_games.json.gz; a user is a username, as in SASRec's data",
        rows=read_json_or_literal_rows,
        user=("username", "user_id"),
        item=("product_id",),
        time=("date",),
        token=("id",),
        texts=(
            TextColumn("title", ("title", "app_name")),
            TextColumn("genres", ("genres",)),
            TextColumn("tags", ("tags",)),
            TextColumn("developer", ("developer",), "token"),
        ),
    ),
    "mind": RawFormat(
        about="behaviors.tsv and news.tsv; an interaction is a click on what was shown",
        rows=_read_mind_clicks,
        user=("user",),
        item=("clicks[]",),
        time=("time",),
        time_format="%m/%d/%Y %I:%M:%S %p",
        item_rows=partial(read_delimited_rows, separator="\t", columns=_MIND_NEWS_COLUMNS),
        token=("news",),
        texts=(
            TextColumn("title", ("title",)),
            TextColumn("category", ("category",), "token"),
            TextColumn("subcategory", ("subcategory",), "token"),
            TextColumn("abstract", ("abstract",)),
        ),
    ),
    "sequences": RawFormat(
        about="USER ITEM ITEM ... in each line, oldest first, as of S3-Rec, FMLP-Rec, BSARec and WEARec",
        rows=read_sequence_rows,
        user=("user",),
        item=("items[]",),
        time=(),
    ),
}
TABLE_KINDS = ("csv", "parquet", "jsonl")


def find_movielens_files(folder: Path) -> tuple[RawFormat, Path, Path | None]:
    """The format of an unpacked MovieLens folder, its ratings, and its films if they exist.

    Raises:
        ValueError: it has no ratings.
    """
    for (ratings, films), movielens_format in MOVIELENS_FORMATS.items():
        if (folder / ratings).is_file():
            items = folder / films
            return movielens_format, folder / ratings, items if items.is_file() else None
    names = ", ".join(ratings for ratings, _ in MOVIELENS_FORMATS)
    raise UserError(f"{folder}: no {names} in it; give the folder that MovieLens's zip file unpacks to")


def build_table_format(
    kind: str,
    user: str,
    item: str,
    time: str | None = None,
    rating: str | None = None,
    item_kind: str = "csv",
    item_id: str = "",
    texts: Sequence[str] = (),
    layout: CsvLayout = HEADER_LAYOUT,
    item_layout: CsvLayout = HEADER_LAYOUT,
    time_format: str | None = None,
    keep: Sequence[RowCondition] = (),
) -> RawFormat:
    """The format of tables with named columns.

    Args:
        kind: of the interactions, one of `TABLE_KINDS`.
        user, item, time, rating: columns of the interactions, or paths into them (see `filters`);
            without a time file order is used.
        item_kind: of the file of items.
        item_id, texts: columns of the items.
        layout, item_layout: of the two files, where they are CSV.
        time_format: of dates, in strptime's codes.
        keep: conditions on rows of interactions.
    """
    paths = [user, item, *filter(None, (time, rating)), *(condition.column for condition in keep)]
    optional = LABEL_COLUMNS if time else LABEL_COLUMNS | TIME_COLUMNS
    return RawFormat(
        about="",
        rows=_build_table_reader(kind, paths, layout, "columns", optional),
        blocks=_build_block_reader(kind, paths, layout, optional),
        user=(user,),
        item=(item,),
        time=(time,) if time else (),
        rating=(rating,) if rating else (),
        item_rows=_build_table_reader(item_kind, [item_id, *texts], item_layout, "item_columns"),
        token=(item_id,),
        texts=tuple(TextColumn(name_text_column(text), (text,)) for text in texts),
        time_format=time_format,
        keep=tuple(keep),
    )


def name_text_column(column: str) -> str:
    """The name that a text column of a table gets in NAME.item."""
    return "_".join(column.split())


def _build_table_reader(
    kind: str, paths: Sequence[str], layout: CsvLayout, argument: str, optional: Collection[str] = ()
) -> RowReader:
    """The reader of a table.

    Args:
        paths: columns that the table must have, or paths into them.
        argument: the name of the argument for `layout.column_names`, for errors.
        optional: columns that are read too where they exist.
    """
    if kind == "jsonl":
        return read_json_rows
    if kind == "parquet":
        return partial(read_parquet_rows, paths=paths, optional=optional)
    columns = list(dict.fromkeys(map(get_path_column, paths)))
    return partial(read_csv_records, columns=columns, layout=layout, cure=_describe_cure(argument))


def _describe_cure(argument: str) -> str:
    return f"name one of them, or all with {argument}=NAME,... if line 1 is not a header"


def _build_block_reader(
    kind: str, paths: Sequence[str], layout: CsvLayout, optional: Collection[str]
) -> BlockReader:
    """The reader of a table of interactions as columns, see `_build_table_reader`."""
    if kind == "parquet":
        return partial(open_parquet_blocks, paths=paths, optional=optional)
    if kind == "jsonl":
        return open_json_blocks
    columns = list(dict.fromkeys(map(get_path_column, paths)))
    return partial(open_csv_blocks, columns=columns, layout=layout, cure=_describe_cure("columns"))
