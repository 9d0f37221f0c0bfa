"""NAME.item: the texts and titles of items."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from m2rec.data import inter_file

TITLE_WORDS = ("title", "name")


@dataclass(frozen=True)
class ItemTexts:
    """Items with text, in the order of their tokens.

    Attributes:
        tokens, texts: (n,) each.
        columns: the columns that were used.
        template: how they were combined; empty when they were joined.
    """

    tokens: list[str]
    texts: list[str]
    columns: list[str]
    template: str = ""

    def sha256(self) -> str:
        """Hash every token with its text, in order."""
        digest = hashlib.sha256()
        for pair in zip(self.tokens, self.texts, strict=True):
            digest.update(json.dumps(pair).encode())
        return digest.hexdigest()


def read_item_titles(path: Path, id_column: str, separator: str = "\t") -> dict[str, str]:
    """Titles by item token; empty where the file or such a column does not exist.

    The column is `title` or `name`, or the first whose name has one of these words in it.

    Raises:
        ValueError: the file can't be read.
    """
    if not path.is_file():
        return {}
    header = inter_file.read_header(path, separator)
    title_column = _find_title_column([column for column in header if column != id_column])
    if id_column not in header or title_column is None:
        return {}
    frame = inter_file.read_text_columns(path, separator, header)[[id_column, title_column]].dropna()
    titles = frame.set_index(id_column)[title_column].str.strip()
    return dict(titles[titles != ""])


def _find_title_column(columns: list[str]) -> str | None:
    for word in TITLE_WORDS:
        if word in columns:
            return word
    for word in TITLE_WORDS:
        for column in columns:
            if word in column.lower():
                return column
    return None
