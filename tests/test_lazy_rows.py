"""Rows that are cut when they are drawn, against the same rows held as tensors."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from m2rec.compat import Interaction
from m2rec.data.lazy_rows import LazyRows
from tests.conftest import built

Change = Callable[[Interaction], object]


@pytest.fixture(params=["dense", "prefix"])
def rows(toy: Path, request: pytest.FixtureRequest) -> LazyRows:
    feat = built(toy, rows=request.param)[0].inter_feat
    assert isinstance(feat, LazyRows) and len(feat) > 9
    return feat


def hold(rows: LazyRows) -> Interaction:
    """The same rows as RecBole has them."""
    return Interaction({name: rows[name].clone() for name in rows.columns})


def assert_same_rows(ours: Interaction, expected: Interaction) -> None:
    assert ours.columns == expected.columns and len(ours) == len(expected)
    for name in expected.columns:
        assert ours[name].dtype == expected[name].dtype
        assert torch.equal(ours[name], expected[name]), name


@pytest.mark.parametrize(
    "index",
    [
        slice(2, 7), slice(None, None, 3), slice(5, 5), [0, 3, 3, -1], [],
        np.array([4, 1]), torch.tensor([8, 0, 8]), 5, -2, np.int64(3),
    ],
    ids=str,
)  # fmt: skip
def test_any_index_gives_the_rows_of_tensors(rows: LazyRows, index: object):
    ours, expected = rows[index], hold(rows)[index]
    if isinstance(index, (int, np.integer)):
        for name in expected.columns:
            assert torch.equal(ours[name], expected[name])
    else:
        assert_same_rows(ours, expected)


def test_a_mask_chooses_rows(rows: LazyRows):
    mask = torch.arange(len(rows)) % 2 == 0
    assert_same_rows(rows[mask], hold(rows)[mask])


def test_a_slice_is_not_cut(rows: LazyRows):
    assert isinstance(rows[2:7], LazyRows)
    assert_same_rows(rows[2:7][[0, 2]], hold(rows)[[2, 4]])


@pytest.mark.parametrize(
    "change",
    [
        lambda feat: feat.sort(by=["item_id", "user_id"]),
        lambda feat: feat.sort(by="item_length"),
        lambda feat: (torch.manual_seed(1), feat.shuffle()),
        lambda feat: feat.drop("timestamp_list"),
        lambda feat: feat.update(Interaction({"label": torch.arange(len(feat)), "item_id": -feat.item_id})),
        lambda feat: (feat.update(Interaction({"label": -torch.arange(len(feat))})), feat.sort(by="label")),
        lambda feat: feat.add_prefix("neg_"),
    ],
    ids=["sort by two", "sort by length", "shuffle", "drop", "update", "set and sort", "prefix"],
)
def test_changes_are_those_of_tensors(rows: LazyRows, change: Change):
    ours, expected = rows[:], hold(rows)
    change(ours)
    change(expected)
    assert_same_rows(ours, expected)
    assert_same_rows(ours[[3, 1]], expected[[3, 1]])
    assert_same_rows(rows, hold(rows))


def test_what_makes_new_rows_cuts_them(rows: LazyRows):
    expected = hold(rows)
    assert_same_rows(rows.to("cpu"), expected.to("cpu"))
    assert_same_rows(rows.repeat(2), expected.repeat(2))
    assert_same_rows(copy.deepcopy(rows), expected)
    assert str(rows) == str(expected)
    assert "item_id" in rows and "nothing" not in rows
    assert torch.equal(rows.item_id, expected.item_id)
    with pytest.raises(KeyError):
        del rows["nothing"]
    with pytest.raises(ValueError, match="nothing"):
        rows.drop("nothing")


def test_memory_does_not_grow_with_the_length(toy: Path):
    """A row is two positions, whatever L is."""
    sizes = []
    for length in (5, 5_000):
        columns = built(toy, rows="prefix", MAX_ITEM_LIST_LENGTH=length)[0].inter_feat.interaction
        sizes.append(sum(array.nbytes for array in vars(columns).values() if isinstance(array, np.ndarray)))
    assert sizes[0] == sizes[1] > 0
