"""NAME.item: the texts and titles of items; and which items NAME.inter has."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from m2rec.data import inter_file
from m2rec.data.columns import list_tokens

TITLE_WORDS = ("title", "name")


@dataclass(frozen=True)
class ItemTexts:
    """Items with text, in the order of their tokens.

    Attributes:
        tokens, texts: (n,) each.
        columns: the columns of the texts.
        template: how they were joined; empty without one.
        file_stamp: of NAME.item when it was read (`format_file_stamp`).
    """

    tokens: list[str]
    texts: list[str]
    columns: list[str]
    template: str = ""
    file_stamp: str = ""

    def sha256(self) -> str:
        """Hash every token with its text, in order."""
        digest = hashlib.sha256()
        for pair in zip(self.tokens, self.texts, strict=True):
            digest.update(json.dumps(pair).encode())
        return digest.hexdigest()


def format_file_stamp(path: Path) -> str:
    """Size and modification time of a file: while both stay, its content is taken to be unchanged."""
    status = path.stat()
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"


def read_item_tokens(path: Path, id_column: str, separator: str = "\t") -> list[str] | None:
    """Every item token of NAME.inter, in order of appearance; None when there is no such file or column.

    Raises:
        ValueError: the file can't be read.
    """
    if not path.is_file():
        return None
    header = inter_file.read_header(path, separator)
    if id_column not in header:
        return None
    frame = inter_file.read_token_columns(path, separator, header, [id_column])
    return list_tokens(frame[id_column])


def read_item_titles(path: Path, id_column: str, separator: str = "\t") -> dict[str, str]:
    """The titles of items by token; empty where there is no such file or column.

    The column is `title` or `name`, or the first whose name contains one of these words.

    Raises:
        ValueError: the file can't be read.
    """
    if not path.is_file():
        return {}
    header = inter_file.read_header(path, separator)
    columns = [column for column in header if column != id_column]
    title_column = min(columns, key=_rank_title_column, default="")
    if id_column not in header or _rank_title_column(title_column) == 4:
        return {}
    frame = inter_file.read_text_columns(path, separator, header)[[id_column, title_column]].dropna()
    titles = {}
    for token, title in zip(frame[id_column], frame[title_column].str.strip(), strict=True):
        if title:
            titles[token] = title
    return titles


def _rank_title_column(column: str) -> int:
    """0 for `title`, 1 for `name`, 2 and 3 for columns that contain these words, 4 for the rest."""
    if column in TITLE_WORDS:
        return TITLE_WORDS.index(column)
    for rank, word in enumerate(TITLE_WORDS, start=2):
        if word in column.lower():
            return rank
    return 4
