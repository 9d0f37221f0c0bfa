"""Paired tests over users: a sweep's reference against its other variants."""

import logging
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from m2rec.errors import UserError
from m2rec.evaluation.metrics import FloatArray, compute_rank_metric
from m2rec.experiments.bootstrap import paired_bootstrap
from m2rec.experiments.ledger import (
    HEADLINE_METRIC,
    PAIRED_COLUMNS,
    TABLE_METRICS,
    TEST_PROTOCOLS,
    is_same_mean,
    read_csv_table,
)
from m2rec.experiments.sweep_plan import Sweep, find_finished_run, get_planned_run_folder
from m2rec.run_folder import RunFolder

logger = logging.getLogger(__name__)

PAIRED_MEASURES = list(product(TEST_PROTOCOLS, TABLE_METRICS))
_HEADLINE_INDEX = list(map(".".join, PAIRED_MEASURES)).index(HEADLINE_METRIC)


class TargetRanks(NamedTuple):
    """The ranks of the test targets in one run, by user."""

    folder: Path
    targets: pd.Series
    """Token of the target by token of the user, sorted by user."""
    values: NDArray[np.int32]
    """(users, protocols), 0: not in the measured top of the ranking."""


class _Comparison(NamedTuple):
    """A baseline beside the reference on the seeds of both."""

    seeds: list[str]
    reference_metrics: FloatArray
    """(users, measures), means over the seeds."""
    baseline_metrics: FloatArray


def compare_with_baselines(sweep: Sweep, runs: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The rows of NAME-paired.csv: one per data set, other variant, protocol and metric.

    Each user's metric is averaged over the seeds that both variants have. Variants without a finished run
    are left out, and so is a run that is not the one in NAME.csv. The bootstrap resamples users, not
    seeds: p says whether these runs differ on other users of the same kind.

    Args:
        sweep: names the reference.
        runs: the rows of NAME.csv.
        folder: holds the run folders of the sweep.

    Raises:
        ValueError: there is no reference or no run of it, or runs saw different data.
    """
    if sweep.reference is None:
        raise UserError(f"{sweep.path}: reference: name the variant that others are compared with")
    tests = []
    for dataset in sweep.datasets:
        own_runs = runs[runs["dataset"] == dataset]
        rows = _compare_on_dataset(sweep, own_runs, folder)
        if len(rows):
            tests.append(rows)
    if not tests:
        raise UserError(
            f"{folder}: no seed of {sweep.reference!r} and another variant has a finished run of the CSV; "
            f"run {sweep.command}, or name the folder with --runs"
        )
    return pd.concat(tests)[[*PAIRED_COLUMNS]]


def read_target_ranks(folder: Path) -> TargetRanks:
    """The test_ranks.csv of a run folder.

    Raises:
        ValueError: the file can't be read, a column is missing, a rank is not a whole number from 0, or a
            user is duplicated.
    """
    path = RunFolder(folder).ranks_file
    rows = read_csv_table(path, ["user", "item", *TEST_PROTOCOLS])
    for column in TEST_PROTOCOLS:
        texts = rows[column]
        is_rank = texts.str.fullmatch(r"\d{1,9}").astype(bool)
        for row, value in texts[~is_rank].items():
            raise UserError(f"{path}: {column} is {value!r} in row {row + 1}, expected a whole number from 0")
    rows = rows.set_index("user").sort_index()
    for user in rows.index[rows.index.duplicated()]:
        raise UserError(f"{path}: user {user!r} is duplicated")
    ranks = rows[[*TEST_PROTOCOLS]].to_numpy()
    return TargetRanks(folder, rows["item"], ranks.astype(np.int32))


def _compare_on_dataset(sweep: Sweep, runs: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The tests on one data set, from its runs; empty if no baseline has a seed of the reference."""
    rows = []
    differences = []
    for baseline, pair in _pair_runs(sweep, runs, folder).items():
        differences.append(pair.reference_metrics - pair.baseline_metrics)
        for column, (protocol, metric) in enumerate(PAIRED_MEASURES):
            rows.append(
                {
                    "dataset": runs["dataset"].iloc[0],
                    "protocol": protocol,
                    "metric": metric,
                    "variant": sweep.reference,
                    "baseline": baseline,
                    "seeds": " ".join(pair.seeds),
                    "users": len(pair.reference_metrics),
                    "variant_mean": pair.reference_metrics[:, column].mean(),
                    "baseline_mean": pair.baseline_metrics[:, column].mean(),
                }
            )
    if not rows:
        return pd.DataFrame()
    try:
        results = paired_bootstrap(np.concatenate(differences, axis=1))
    except ValueError as error:
        raise UserError(f"{rows[0]['dataset']}: {error}") from None
    columns = results._asdict()
    return pd.DataFrame(rows).assign(**columns)


def _pair_runs(sweep: Sweep, runs: pd.DataFrame, folder: Path) -> dict[str, _Comparison]:
    """By baseline, its metrics and the reference's on the seeds of both."""
    reference = _read_ranks_by_seed(runs, sweep.reference, folder)
    for ranks in reference.values():
        _check_same_users(next(iter(reference.values())), ranks)
    pairs = {}
    missing = []
    for baseline in dict.fromkeys([*sweep.baselines, *sweep.variants]):
        if baseline == sweep.reference:
            continue
        by_seed = _read_ranks_by_seed(runs, baseline, folder)
        seeds = [seed for seed in reference if seed in by_seed]
        for seed in seeds:
            _check_same_users(reference[seed], by_seed[seed])
        if seeds:
            reference_metrics = _average_user_metrics(reference, seeds)
            baseline_metrics = _average_user_metrics(by_seed, seeds)
            pairs[baseline] = _Comparison(seeds, reference_metrics, baseline_metrics)
        else:
            missing.append(baseline)
    if missing:
        listed = "; ".join(missing)
        logger.info("%s: no run with a seed of %s: %s", folder, sweep.reference, listed)
    return pairs


def _read_ranks_by_seed(runs: pd.DataFrame, variant: str | None, folder: Path) -> dict[str, TargetRanks]:
    """By seed, the ranks of a variant's finished runs."""
    by_seed = {}
    own_runs = runs[runs["variant"] == variant]
    for run in own_runs.to_dict("records"):
        planned = get_planned_run_folder(folder, run["dataset"], run["variant"], run["seed"])
        if finished := find_finished_run(planned):
            ranks = read_target_ranks(finished)
            mean = _compute_user_metrics(ranks)[:, _HEADLINE_INDEX].mean()
            if is_same_mean(mean, run[HEADLINE_METRIC]):
                by_seed[run["seed"]] = ranks
            else:
                logger.warning("%s is not the run of the CSV's row: left out", finished)
    return by_seed


def _compute_user_metrics(ranks: TargetRanks) -> FloatArray:
    """(users, measures) of one run."""
    columns = []
    for protocol, metric in PAIRED_MEASURES:
        values = ranks.values[:, TEST_PROTOCOLS.index(protocol)]
        columns.append(compute_rank_metric(metric, values))
    return np.stack(columns, axis=1)


def _average_user_metrics(by_seed: Mapping[str, TargetRanks], seeds: Sequence[str]) -> FloatArray:
    """(users, measures), means over the seeds."""
    metrics = [_compute_user_metrics(by_seed[seed]) for seed in seeds]
    return np.asarray(np.mean(metrics, axis=0))


def _check_same_users(one: TargetRanks, other: TargetRanks) -> None:
    users = one.targets.index
    odd = users.symmetric_difference(other.targets.index)
    if len(odd):
        raise UserError(
            f"user {odd[0]!r} is in only one of {one.folder} and {other.folder}: "
            "they saw different data; run one again"
        )
    differs = users[one.targets != other.targets]
    if len(differs):
        raise UserError(
            f"user {differs[0]!r} has another test item in {one.folder} than in {other.folder}: "
            "they saw different data or another time order; run one again"
        )
