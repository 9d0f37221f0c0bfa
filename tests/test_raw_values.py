"""Ids, numbers and texts as they stand in raw files."""

from m2rec.data.raw import values


def test_text_is_one_line():
    assert values.clean_text(" a\tb\r\n\u2028c\0d\x1be ") == "a b c d e"
    assert (
        values.clean_text("Salt &amp; Vinegar&nbsp;&#39;x&#39; &lt;b&gt; &#10;") == "Salt & Vinegar 'x' <b>"
    )
    assert values.clean_text("\ud83d\ude00 \ud83d") == "😀 \ufffd"
    assert values.clean_text('5" "nail') == '5" "nail'


def test_values_as_text():
    nested = [["Beauty", "Skin"], ["Beauty", ["Face"]], None, float("nan"), " ", 7, {"a": "b"}]
    assert values.join_unique_texts(nested) == "Beauty, Skin, Face, 7"
    assert values.join_texts(["One.", None, "Two.", "One."]) == "One. Two. One."
    assert (
        values.join_unique_texts(None) == values.join_unique_texts({}) == values.join_unique_texts([]) == ""
    )


def test_ids_from_tables():
    assert [values.parse_id(value) for value in (7, 7.0, "007", "7.0", 2**70, " x")] == [
        "7", "7", "007", "7.0", str(2**70), " x",
    ]  # fmt: skip


def test_lists_in_lists_of_any_depth():
    deep: list[object] = ["x"]
    for _ in range(100_000):
        deep = [deep]
    assert values.join_unique_texts(deep) == "x"
    while isinstance(deep[0], list):
        deep = deep[0]
