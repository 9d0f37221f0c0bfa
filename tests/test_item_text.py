"""Texts from NAME.item: joined columns, templates, unusable files; the items of NAME.inter."""

import logging
import re
from pathlib import Path

import pytest

from m2rec.data.item_file import read_item_titles, read_item_tokens
from m2rec.text.item_text import fill_template, parse_template, read_item_texts

ITEMS = (
    "item_id:token\ttitle:token_seq\tgenre:token_seq\n2\tHeat\t\n1\tToy Story\tComedy\n3\t\t\n4\t\tDrama\n"
)


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "toy.item"
    path.write_text(ITEMS)
    return path


def test_titles_come_from_the_column_that_says_so(tmp_path: Path):
    path = tmp_path / "toy.item"
    for header, expected in (
        ("item_id:token\tbrand_name:token\ttitle:token_seq", {"1": "b"}),
        ("item_id:token\tbrand:token\tmovie_Title:token_seq", {"1": "b"}),
        ("item_id:token\tname:token\tbrand_name:token_seq", {"1": "a", "2": "c"}),
        ("item_id:token\tbrand:token\tgenre:token_seq", {}),
        ("sku:token\tbrand:token\ttitle:token_seq", {}),
    ):
        path.write_text(f"{header}\n1\ta\t b \n2\tc\t\n\td\te\n")
        assert read_item_titles(path, "item_id") == expected
    assert read_item_titles(tmp_path / "none.item", "item_id") == {}


def test_texts_join_the_chosen_columns(items: Path):
    made = read_item_texts(items, "item_id", None)
    assert made.tokens == ["1", "2", "4"] and made.texts == ["Toy Story. Comedy", "Heat", "Drama"]
    assert made.columns == ["title", "genre"]
    assert read_item_texts(items, "item_id", ["genre"]).tokens == ["1", "4"]
    assert read_item_texts(items, "item_id", ["genre", "title"]).texts[0] == "Comedy. Toy Story"


def test_numbers_are_no_text_unless_they_are_named(items: Path, caplog: pytest.LogCaptureFixture):
    lines = ["item_id:token\ttitle:token_seq\tprice:float\tsizes:float_seq", "1\tTea\t9.5\t1 2"]
    items.write_text("\n".join(lines) + "\n")
    caplog.set_level(logging.INFO)
    read = read_item_texts(items, "item_id", None)
    assert (read.texts, read.columns) == (["Tea"], ["title"])
    assert f"{items}: numbers are no text, left out: price, sizes" in caplog.text
    caplog.clear()
    assert read_item_texts(items, "item_id", ["title", "price"]).texts == ["Tea. 9.5"]
    assert read_item_texts(items, "item_id", None, "{title} for {price}").texts == ["Tea for 9.5"]
    assert not caplog.text
    items.write_text("item_id:token\tprice:float\n1\t9.5\n")
    with pytest.raises(ValueError, match="no item has text in a column of type token or token_seq; add one"):
        read_item_texts(items, "item_id", None)


def test_a_template_leaves_out_what_is_empty(items: Path):
    made = read_item_texts(items, "item_id", None, "title: {title}; genre: {genre}")
    assert made.texts == ["title: Toy Story; genre: Comedy", "title: Heat", "genre: Drama"]
    assert made.columns == ["title", "genre"]


@pytest.mark.parametrize(
    ("template", "whole", "without_b", "without_a"),
    [
        ("{a} ({b}), {c}", "A (B), C", "A, C", "(B), C"),
        ("{a} by {b}.", "A by B.", "A", "by B."),
        ("film '{a}', price {b}$", "film 'A', price B$", "film 'A'", "price B$"),
        ("{{{a}}} {b}", "{A} B", "{A}", "B"),
        ("{a}\n\n{b}", "A\n\nB", "A", "B"),
        ("{a}{b}", "AB", "A", "B"),
    ],
)
def test_parts_keep_what_is_theirs(template: str, whole: str, without_b: str, without_a: str):
    parts = parse_template(template)
    row = {"a": "A", "b": "B", "c": "C"}
    assert fill_template(parts, row) == whole
    assert fill_template(parts, row | {"b": ""}) == without_b
    assert fill_template(parts, row | {"a": ""}) == without_a


@pytest.mark.parametrize("template", ["no column", "{title", "title}", "{}", "{title!r}", "{title:>9}"])
def test_templates_that_cannot_be_read(template: str):
    with pytest.raises(ValueError, match=re.escape(f"template: {template!r}")):
        parse_template(template)


def test_the_hash_knows_tokens_and_texts_but_not_their_order_in_the_file(items: Path):
    before = read_item_texts(items, "item_id", None).sha256()
    header, *lines = ITEMS.splitlines()
    items.write_text("\n".join([header, *reversed(lines)]) + "\n")
    assert read_item_texts(items, "item_id", None).sha256() == before
    for old, new in (("Heat", "Heap"), ("2\tHeat", "5\tHeat")):
        items.write_text(ITEMS.replace(old, new))
        assert read_item_texts(items, "item_id", None).sha256() != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("item_id:token\ttitle:token\n1\tA\n1\tB\n", r"duplicate item '1' \(line 3\); keep one"),
        ("item_id:token\ttitle:token\n1\tA\tB\n", "line 2 has more than the 2 columns"),
        ("item_id:token\ttitle:token\n1\t\n", "no item has text in title"),
    ],
)
def test_unusable_item_files(items: Path, content: str, message: str):
    items.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_item_texts(items, "item_id", None)


def test_columns_that_are_not_there(items: Path):
    with pytest.raises(ValueError, match="column 'plot' is missing, the file has item_id, title, genre"):
        read_item_texts(items, "item_id", None, "{plot}")
    with pytest.raises(ValueError, match=r"^columns: not together with template"):
        read_item_texts(items, "item_id", ["title"], "{title}")


def test_items_of_the_interactions(tmp_path: Path):
    path = tmp_path / "toy.inter"
    assert read_item_tokens(path, "item_id") is None
    rows = "".join(f"u{k}\ti{k % 7}\n" for k in range(50))
    path.write_text(f"user_id:token\titem_id:token\n{rows}u\tNA\n")
    assert read_item_tokens(path, "item_id") == [*(f"i{k}" for k in range(7)), "NA"]
    assert read_item_tokens(path, "asin") is None


def test_separators_of_several_characters(items: Path):
    """They are not patterns."""
    items.write_text(ITEMS.replace("\t", "||"))
    assert read_item_texts(items, "item_id", None, separator="||").texts[0] == "Toy Story. Comedy"
    assert read_item_titles(items, "item_id", "||") == {"1": "Toy Story", "2": "Heat"}
    assert read_item_tokens(items, "item_id", "||") == ["2", "1", "3", "4"]
