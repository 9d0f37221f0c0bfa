"""A placeholder or a giant among users or items is said, with its count, its share and a cure."""

import numpy as np
import pytest

from m2rec.data.dominant import describe_dominant_entity, is_placeholder


@pytest.mark.parametrize(
    "name",
    ["NA", "N/A", "nan", "NaN", "null", "NULL", "None", "undefined", "Unknown", "-", "--", "", "  ", "<NA>",
     "(null)", "(not set)", "\\N", "'none'"],
)  # fmt: skip
def test_placeholders(name: str):
    assert is_placeholder(name)
    said = describe_dominant_entity("item", ["a", name, "b"], [2, 3, 2])
    assert said == (
        f"item {name!r} has 3 of 7 interactions (42.9%) and is named like a missing value; "
        "remove these lines, or they train as one item"
    )


@pytest.mark.parametrize("name", ["Nana", "banana", "0", "-1", "none of us", "n", "nullam", "N/A 12", "u-1"])
def test_names_that_only_look_like_one(name: str):
    assert not is_placeholder(name)
    assert describe_dominant_entity("user", ["a", name, "b"], [2, 3, 2]) is None


def test_more_than_half():
    said = describe_dominant_entity("user", ["a", "shop", "b"], [500, 1001, 500])
    assert said == (
        "user 'shop' has 1,001 of 2,001 interactions (50.0%), more than half; "
        "if it stands for many users or for none, remove these lines"
    )
    assert describe_dominant_entity("user", ["a", "shop", "b"], [500, 1000, 500]) is None


def test_a_placeholder_counts_only_where_it_is_the_most_frequent():
    assert describe_dominant_entity("user", ["a", "NA"], [3, 2]) == (
        "user 'a' has 3 of 5 interactions (60.0%), more than half; "
        "if it stands for many users or for none, remove these lines"
    )
    assert describe_dominant_entity("user", ["a", "NA", "b"], [3, 2, 3]) is None


def test_arrays_and_nothing():
    said = describe_dominant_entity("user", np.array(["a", "NA"], dtype=object), np.array([2, 3]))
    assert said is not None and "'NA' has 3 of 5" in said
    assert describe_dominant_entity("user", [], []) is None
    counts = {7: 3, 8: 1}
    assert "user '7' has 3 of 4" in str(describe_dominant_entity("user", list(counts), list(counts.values())))
