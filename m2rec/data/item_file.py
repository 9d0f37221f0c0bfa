"""NAME.item: the texts and titles of items."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from m2rec.data import inter_file

TITLE_WORDS = ("title", "name")


@dataclass(frozen=True)
class ItemTexts:
    """Items that have text, in the order of their tokens.

    Attributes:
        tokens, texts: (n,) each.
        columns: those that were used.
        template: how they were put together; empty when they were joined.
    """

    tokens: list[str]
    texts: list[str]
    columns: list[str]
    template: str = ""

    def sha256(self) -> str:
        """A hash of every token with its text, whatever the order of the file."""
        digest = hashlib.sha256()
        for pair in zip(self.tokens, self.texts, strict=True):
            digest.update(json.dumps(pair).encode())
        return digest.hexdigest()


def read_item_titles(path: Path, id_column: str, separator: str = "\t") -> dict[str, str]:
    """What people call the items, by token; empty where there is no such file or column.

    The column is `title` or `name`, or the first whose name has one of these words in it.

    Raises:
        ValueError: the file can't be read.
    """
    if not path.is_file() or id_column not in (header := inter_file.read_header(path, separator)):
        return {}
    columns = [column for column in header if column != id_column]
    ranked = [[c for c in columns if c == word] for word in TITLE_WORDS]
    ranked += [[c for c in columns if word in c.lower()] for word in TITLE_WORDS]
    if not (named := [column for group in ranked for column in group]):
        return {}
    frame = inter_file.read_text_columns(path, separator, header)[[id_column, named[0]]].dropna()
    titles = zip(frame[id_column], frame[named[0]].str.strip(), strict=True)
    return {token: title for token, title in titles if title}
