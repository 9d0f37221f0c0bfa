"""NAME.item -> one text per item, by a template or by joining columns."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import pandas as pd

from m2rec.data import inter_file
from m2rec.data.item_file import ItemTexts
from m2rec.errors import UserError

INTER_CHUNK_ROWS = 500_000  # lines of NAME.inter that are held at a time


# the text between two columns: what closes the first, what separates them, what opens the second
LITERAL_BETWEEN_COLUMNS = re.compile(r"""([)\]}"'»]*)([^\w([{"'«]*)(.*)""", re.S)


@dataclass(frozen=True)
class TemplatePart:
    """One column of a template: what separates it from the part before, and what stands around it."""

    separator: str
    before: str
    column: str
    after: str


def read_item_texts(
    path: Path, id_column: str, columns: Sequence[str] | None, template: str = "", separator: str = "\t"
) -> ItemTexts:
    """The text of every item that has one.

    Args:
        path: NAME.item.
        id_column: column of the item token.
        columns: columns to join by ". ", in order; all by default. Not with a template.
        template: such as `title: {title}; genre: {genre}`; a part whose column is empty is left out.

    Raises:
        ValueError: the file, a column or the template is unusable, a token comes twice, or nobody
            has text.
    """
    if not path.is_file():
        raise UserError(f"no item file {path}; its first line must name columns, such as item_id:token")
    if template and columns:
        raise UserError("columns: not together with template, which names its own; leave one out")
    header = inter_file.read_header(path, separator)
    parts = parse_template(template) if template else []
    wanted = [part.column for part in parts] or list(columns or [])
    for column in (id_column, *wanted):
        if column not in header:
            hint = inter_file.suggest_separator(header)
            raise UserError(f"{path}: column {column!r} is missing, the file has {', '.join(header)}{hint}")
    used = list(dict.fromkeys(wanted)) or [column for column in header if column != id_column]
    frame = inter_file.read_text_columns(path, separator, header).dropna(subset=[id_column]).fillna("")
    twice = frame[id_column][frame[id_column].duplicated()]
    if len(twice):
        raise UserError(f"{path}: item {twice.iloc[0]!r} comes twice, again in line {twice.index[0] + 2}")
    parts = parts or [TemplatePart(". ", "", column, "") for column in used]
    rows = ({column: value.strip() for column, value in zip(used, row, strict=True)} for row in
            frame[used].to_numpy())  # fmt: skip
    texts = dict(zip(frame[id_column], (fill_template(parts, row) for row in rows), strict=True))
    tokens = sorted(token for token, text in texts.items() if text)
    if not tokens:
        raise UserError(f"{path}: no item has text in {', '.join(used)}")
    return ItemTexts(tokens, [texts[token] for token in tokens], used, template)


def parse_template(template: str) -> list[TemplatePart]:
    """The parts of a template, one per `{column}`; `{{` is a brace.

    Raises:
        ValueError: it has no column, a brace alone, or a format or conversion.
    """
    literals, columns = [""], []
    try:
        for literal, column, form, conversion in Formatter().parse(template):
            literals[-1] += literal
            if column is None:
                continue
            if form or conversion or not column:
                raise UserError("a column stands alone in its braces")
            columns.append(column)
            literals.append("")
    except ValueError as error:
        raise UserError(
            f"template: {template!r} can't be read ({error}); write '{{title}}; genre: {{genre}}'"
        ) from None
    if not columns:
        raise UserError(f"template: {template!r} has no column; write '{{title}}; genre: {{genre}}'")
    between = [LITERAL_BETWEEN_COLUMNS.fullmatch(literal) for literal in literals[1:-1]]
    groups = [match.groups() for match in between if match]  # the pattern matches anything
    after = [closing for closing, _, _ in groups] + [literals[-1]]
    before = [("", literals[0]), *((separator, opening) for _, separator, opening in groups)]
    return [
        TemplatePart(separator, opening, column, closing)
        for (separator, opening), column, closing in zip(before, columns, after, strict=True)
    ]


def fill_template(parts: Sequence[TemplatePart], row: dict[str, str]) -> str:
    """The text of one item; parts whose column is empty are left out."""
    text = ""
    for part in parts:
        if row[part.column]:
            text += (part.separator if text else "") + part.before + row[part.column] + part.after
    return text


def read_item_tokens(path: Path, id_column: str, separator: str = "\t") -> list[str] | None:
    """Every item token of NAME.inter, in order of appearance; None when there is no such file or column.

    Raises:
        ValueError: the file can't be read.
    """
    if not path.is_file() or id_column not in (header := inter_file.read_header(path, separator)):
        return None
    try:
        chunks = pd.read_csv(
            path, sep=separator, dtype=str, keep_default_na=False, na_values=[""], quoting=3,
            encoding="utf-8-sig", usecols=[list(header).index(id_column)], chunksize=INTER_CHUNK_ROWS,
        )  # fmt: skip
        found: dict[str, None] = {}
        for chunk in chunks:
            found |= dict.fromkeys(chunk.iloc[:, 0].dropna().unique())
    except (UnicodeDecodeError, pd.errors.ParserError) as error:
        raise UserError(f"{path}: can't be read ({error}); repair it") from None
    return list(found)
