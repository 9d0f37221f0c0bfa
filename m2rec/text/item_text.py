"""NAME.item -> one text per item, by a template or by joining columns."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from m2rec.data import inter_file
from m2rec.data.item_file import ItemTexts, format_file_stamp
from m2rec.errors import UserError

logger = logging.getLogger(__name__)

# the text between two columns: what closes the first, what separates them, what opens the second
LITERAL_BETWEEN_COLUMNS = re.compile(r"""([)\]}"'»]*)([^\w([{"'«]*)(.*)""", re.S)
TEMPLATE_EXAMPLE = "'{title}; genre: {genre}'"


@dataclass
class TemplatePart:
    """One column of a template: what separates it from the part before it, and the text around it."""

    separator: str
    prefix: str
    column: str
    suffix: str = ""


def read_item_texts(
    path: Path, id_column: str, columns: Sequence[str] | None, template: str = "", separator: str = "\t"
) -> ItemTexts:
    """The text of every item that has one.

    Args:
        path: NAME.item.
        id_column: column of the item token.
        columns: columns to join by ". ", in order; all that are no numbers by default. Not with a template.
        template: such as `title: {title}; genre: {genre}`; a part whose column is empty is left out.
        separator: between columns.

    Raises:
        ValueError: the file, a column or the template is unusable, a token is duplicated, or no item
            has text.
    """
    if not path.is_file():
        raise UserError(f"no item file {path}; its first line must name columns, such as item_id:token")
    if template and columns:
        raise UserError("columns: not together with template, which names its own; leave one out")
    file_stamp = format_file_stamp(path)
    header = inter_file.read_header(path, separator)
    if template:
        parts = parse_template(template)
    else:
        names = columns or _choose_text_columns(path, header, id_column)
        parts = [TemplatePart(". ", "", column) for column in dict.fromkeys(names)]
    used = list(dict.fromkeys(part.column for part in parts))
    for column in (id_column, *used):
        if column not in header:
            hint = inter_file.suggest_separator(header)
            raise UserError(f"{path}: column {column!r} is missing, the file has {', '.join(header)}{hint}")
    frame = inter_file.read_text_columns(path, separator, header).dropna(subset=[id_column]).fillna("")
    for line, token in frame[id_column][frame[id_column].duplicated()].items():
        raise UserError(f"{path}: duplicate item {token!r} (line {line + 2}); keep one")
    text_of = {}
    for token, *values in frame[[id_column, *used]].itertuples(index=False, name=None):
        text = fill_template(parts, dict(zip(used, values, strict=True)))
        if text:
            text_of[token] = text
    if not text_of:
        where = f"in {', '.join(used)}" if used else "in a column of type token or token_seq; add one"
        raise UserError(f"{path}: no item has text {where}")
    tokens = sorted(text_of)
    return ItemTexts(tokens, [text_of[token] for token in tokens], used, template, file_stamp)


def _choose_text_columns(path: Path, header: Mapping[str, str], id_column: str) -> list[str]:
    """What `list_text_columns` lists; the log says which columns are left out."""
    names = list_text_columns(header, id_column)
    numbers = [column for column in header if column not in (id_column, *names)]
    if numbers:
        logger.info("%s: numbers are no text, left out: %s", path, ", ".join(numbers))
    return names


def list_text_columns(header: Mapping[str, str], id_column: str) -> list[str]:
    """The columns that are an item's text where nobody names any: all but the item token and numbers.

    Args:
        header: names of the columns with their types.
        id_column: column of the item token.
    """
    return [name for name, kind in header.items() if name != id_column and not kind.startswith("float")]


def parse_template(template: str) -> list[TemplatePart]:
    """The parts of a template, one per `{column}`; `{{` is a brace.

    Raises:
        ValueError: it has no column, a brace alone, or a format or conversion.
    """
    parts: list[TemplatePart] = []
    literal = ""
    try:
        for text, column in _iterate_template(template):
            literal += text
            if column is None:
                continue
            separator, prefix = "", literal
            if parts:
                parts[-1].suffix, separator, prefix = LITERAL_BETWEEN_COLUMNS.findall(literal)[0]
            parts.append(TemplatePart(separator, prefix, column))
            literal = ""
    except ValueError as error:
        raise UserError(f"template: {template!r} can't be read ({error}); write {TEMPLATE_EXAMPLE}") from None
    if not parts:
        raise UserError(f"template: {template!r} has no column; write {TEMPLATE_EXAMPLE}")
    parts[-1].suffix = literal
    return parts


def _iterate_template(template: str) -> Iterator[tuple[str, str | None]]:
    """Literals, each with the column behind it; None where only another literal is."""
    for literal, column, form, conversion in Formatter().parse(template):
        if column is not None and (form or conversion or not column):
            raise UserError("braces must hold a column name only")
        yield literal, column


def fill_template(parts: Sequence[TemplatePart], row: Mapping[str, str]) -> str:
    """The text of one item; parts whose column is empty are left out."""
    text = ""
    for part in parts:
        value = row[part.column].strip()
        if value:
            separator = part.separator if text else ""
            text += separator + part.prefix + value + part.suffix
    return text
