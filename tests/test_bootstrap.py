"""The paired bootstrap against SciPy and cases that need no computer."""

import numpy as np
import pytest
from scipy import stats

from m2rec.experiments import bootstrap
from m2rec.experiments.bootstrap import paired_bootstrap


def test_identical_runs():
    found = paired_bootstrap(np.zeros((50, 2)))
    assert (found.difference == 0).all() and (found.low == 0).all() and (found.high == 0).all()
    assert (found.p == 1).all()


def test_a_mean_of_zero_has_p_1():
    values = np.array([1.0, -1.0] * 10)[:, None] / 3
    assert paired_bootstrap(values).p == pytest.approx(1)


def test_two_users_by_hand():
    # of two users with 0 and 1: means 0, 1/2, 1/2, 1; 0 and 1 lie as far from 1/2 as 1/2 from 0
    found = paired_bootstrap(np.array([[0.0], [1.0]]))
    assert found.difference == 0.5 and (found.low, found.high) == (0, 1)
    assert found.p == pytest.approx(0.5, abs=0.02)


def test_a_clear_shift_has_the_smallest_p_which_is_not_0():
    values = np.random.default_rng(0).normal(1, 1, size=(100, 1))
    assert paired_bootstrap(values, resamples=999).p == pytest.approx(1 / 1000)


def test_columns_are_tested_apart_and_signs_do_not_matter():
    column = np.random.default_rng(1).normal(0.2, 1, size=80)
    found = paired_bootstrap(np.stack([column, -column, np.zeros(80)], axis=1))
    alone = paired_bootstrap(column[:, None])
    assert found.p[0] == alone.p[0] == found.p[1] and found.p[2] == 1
    assert 0.001 < found.p[0] < 0.5
    assert found.low[0] == pytest.approx(-found.high[1])


def test_agrees_with_scipy():
    values = np.random.default_rng(2).normal(0.1, 1, size=200)
    found = paired_bootstrap(values[:, None])
    rival = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=3)
    assert found.low[0] == pytest.approx(rival.confidence_interval.low, abs=0.01)
    assert found.high[0] == pytest.approx(rival.confidence_interval.high, abs=0.01)
    assert found.p[0] == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)


def test_p_is_about_uniform_where_nothing_differs():
    generator = np.random.default_rng(4)
    # columns share their draws, which leaves each p as it is
    p = paired_bootstrap(generator.normal(size=(100, 500)), resamples=999).p
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.02 < (p < 0.05).mean() < 0.09


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(5).normal(size=(20, 2))
    whole = paired_bootstrap(values, resamples=100)
    monkeypatch.setattr(bootstrap, "_MAX_COUNTS_IN_MEMORY", 60)
    for left, right in zip(whole, paired_bootstrap(values, resamples=100), strict=True):
        assert left == pytest.approx(right)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((0, 1)), "at least two users, got 0"),
        (np.ones((1, 1)), "at least two users, got 1"),
        (np.array([[1.0], [np.nan]]), "a finite number for each user"),
    ],
)
def test_nothing_to_test(values: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(values)
