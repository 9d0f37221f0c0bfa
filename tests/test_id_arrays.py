"""Ids of 4 bytes, counted, taken and ordered in blocks, against NumPy on whole arrays of 8 bytes."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from m2rec.data import id_arrays, time_statistics
from m2rec.data.id_arrays import choose_id_type, count_ids, order_by_time, order_by_user, take
from m2rec.data.time_statistics import measure_gap_quartiles

SIZES = (0, 1, 6, 7, 8, 3000)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (id_arrays, time_statistics):
        monkeypatch.setattr(module, "BLOCK", 7)


def test_ids_have_four_bytes_where_they_fit():
    assert choose_id_type(2**31 - 1) is np.int32 and choose_id_type(2**31) is np.int64


@pytest.mark.usefixtures("_small_blocks")
def test_counting_and_taking_in_blocks():
    rng = np.random.default_rng(0)
    for size in SIZES:
        ids = rng.integers(-1, 20, size).astype(np.int8)
        assert count_ids(ids, 25).tolist() == np.bincount(ids[ids >= 0], minlength=25).tolist()
        values = rng.random((20, 2))
        taken = take(values, ids)
        assert np.array_equal(taken, values[ids]) and taken.shape == (size, 2)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
@pytest.mark.parametrize("n_users", [1, 100, 2**16 + 1, 2**31 - 1, 2**40])
def test_each_users_interactions_stay_in_order(dtype: type[np.integer], n_users: int):
    rng = np.random.default_rng(0)
    n_users = min(n_users, np.iinfo(dtype).max)
    for size in SIZES:
        users = (rng.integers(0, n_users, size) // 2 * 2).astype(dtype)
        times = rng.integers(0, 50, size)
        order = order_by_user(users, times.argsort(kind="stable"))
        assert order.tolist() == np.lexsort((times, users)).tolist()
        assert order_by_user(users).tolist() == users.argsort(kind="stable").tolist()


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(
    "make",
    [
        lambda n: 978_300_000.0 + n,
        lambda n: 1e18 + 256 * n,
        lambda n: n - 20.0,
        lambda n: n + 0.5 * (n % 7 == 0),
        lambda n: np.where(n == 0, -(2.0**-60), n - 1),
        lambda n: 1e9 * n,
        lambda n: n * 2.0**1000,
        lambda n: np.where(n == 0, 3, 2.0**24 + 2 * n).astype(np.float32),
        lambda n: (n / 7).astype(np.float32),
    ],
    ids=["seconds", "nanoseconds", "negative", "halves", "tiny", "wide", "huge", "float32", "decimals"],
)
def test_times_are_in_their_stable_order(make: Callable[[np.ndarray], np.ndarray]):
    """Whether they are few whole units, which are sorted as integers, or anything else."""
    rng = np.random.default_rng(0)
    for size in SIZES[2:]:
        times = make(rng.integers(0, 50, size))
        order = order_by_time(times)
        expected = times.argsort(kind="stable")
        assert order is None or order.dtype == np.int32
        assert (np.arange(size) if order is None else order).tolist() == expected.tolist()
        assert order_by_time(times[expected]) is None
    assert order_by_time(times[:0]) is None


@pytest.mark.usefixtures("_small_blocks")
def test_quartiles_of_gaps_are_those_of_pandas():
    rng = np.random.default_rng(0)
    for size in SIZES:
        users, times = rng.integers(0, 1 + size // 4, size), rng.random(size) * 10.0 ** rng.integers(0, 15)
        gaps = pd.DataFrame({"user": users, "time": times}).sort_values("time").groupby("user").time.diff()
        found = measure_gap_quartiles(users, times)
        expected = gaps.dropna().quantile([0.25, 0.5, 0.75]).tolist()
        assert found == (tuple(expected) if gaps.notna().any() else None)


def test_ordering_takes_little_memory(monkeypatch: pytest.MonkeyPatch):
    """Less than 22 bytes an interaction: three times 4 for orders and 8 for what is sorted."""
    monkeypatch.setattr(id_arrays, "BLOCK", 1 << 12)
    rng = np.random.default_rng(0)
    users = rng.integers(0, 9999, 500_000).astype(np.int32)
    times = rng.integers(0, 2**30, 500_000).astype(np.float64)
    tracemalloc.start()
    try:
        order_by_user(users, order_by_time(times))
        assert tracemalloc.get_traced_memory()[1] < 22 * len(users)
    finally:
        tracemalloc.stop()
