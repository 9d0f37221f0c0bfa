"""A sweep's reference against its other variants, by paired tests over users."""

import csv
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    FinishedRuns,
    get_compared_pair,
    matches_result_row,
)
from m2rec.experiments.sweep_plan import Sweep, find_finished_run, get_planned_run_folder
from m2rec.run_folder import RunFolder

logger = logging.getLogger(__name__)

PAIRED_MEASURES = [(protocol, metric) for protocol in TEST_PROTOCOLS for metric in TABLE_METRICS]
_HEADLINE_INDEX = [f"{protocol}.{metric}" for protocol, metric in PAIRED_MEASURES].index(HEADLINE_METRIC)


class TargetRanks(NamedTuple):
    """The places of the test targets in one run, by user."""

    folder: Path
    targets: pd.Series
    """Token of the target by token of the user, sorted by user."""
    values: NDArray[np.int32]
    """(users, protocols), 0 is below the measured part of the ranking."""


def compare_with_baselines(sweep: Sweep, answers: FinishedRuns, runs: Path) -> list[dict[str, Any]]:
    """One row of NAME-paired.csv per data set, other variant, protocol and metric.

    Each user's metric is averaged over the seeds that both variants have; variants without a
    finished run are left out, and so is a run that is not the one in NAME.csv. Users are drawn,
    seeds are not: p says whether these runs differ on other users of the same kind.

    Args:
        sweep: names the reference.
        answers: the rows of NAME.csv.
        runs: folder of the sweep's cells.

    Raises:
        ValueError: there is no reference or no run of it, or runs saw different data.
    """
    if sweep.reference is None:
        raise UserError(f"{sweep.path}: reference: name the variant that others are compared with")
    rows = [row for dataset in sweep.datasets for row in _compare_on_dataset(dataset, sweep, answers, runs)]
    if not rows:
        raise UserError(
            f"{runs}: no seed of {sweep.reference!r} and another variant has a finished run of the CSV; "
            f"run {sweep.command}, or name the folder with --runs"
        )
    return rows


def merge_earlier_tests(
    rows: list[dict[str, Any]], earlier: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """New rows, and of earlier ones those of pairs that are not compared anew, or were over more seeds.

    The runs of a sweep need not all be on one machine.
    """
    seeds = {get_compared_pair(row): len(row["seeds"].split()) for row in rows}
    kept = [dict(row) for row in earlier if len(row["seeds"].split()) > seeds.get(get_compared_pair(row), 0)]
    outdated = {get_compared_pair(row) for row in kept}
    return [row for row in rows if get_compared_pair(row) not in outdated] + kept


def format_paired_tests(rows: list[dict[str, Any]]) -> str:
    """The rows as the text of NAME-paired.csv, numbers with six places."""
    text = io.StringIO()
    writer = csv.DictWriter(text, PAIRED_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def read_target_ranks(folder: Path) -> TargetRanks:
    """The test_ranks.csv of a run folder.

    Raises:
        ValueError: the file can't be read, a column is missing, a rank is not a whole number from 0, or
            a user is duplicated.
    """
    ranks = RunFolder(folder).read_ranks(TEST_PROTOCOLS).set_index("user").sort_index()
    values = ranks[list(TEST_PROTOCOLS)].to_numpy().astype(np.int32)
    return TargetRanks(folder, ranks["item"], values)


def _compare_on_dataset(
    dataset: str, sweep: Sweep, answers: FinishedRuns, runs: Path
) -> Iterator[dict[str, Any]]:
    reference = sweep.reference or ""
    ours = _read_ranks_by_seed(dataset, reference, answers, runs)
    for ranks in ours.values():
        _check_same_users(ours[min(ours)], ranks)
    others = dict.fromkeys([*sweep.baselines, *sweep.variants])
    others.pop(reference, None)
    pairs: dict[str, tuple[list[int], FloatArray, FloatArray]] = {}
    for other in others:
        theirs = _read_ranks_by_seed(dataset, other, answers, runs)
        if seeds := [seed for seed in ours if seed in theirs]:
            for seed in seeds:
                _check_same_users(ours[seed], theirs[seed])
            pairs[other] = (seeds, _average_user_metrics(ours, seeds), _average_user_metrics(theirs, seeds))
    if missing := [other for other in others if other not in pairs]:
        logger.info("%s: no run with a seed of %s: %s", dataset, reference, "; ".join(missing))
    if not pairs:
        return
    try:
        found = paired_bootstrap(np.concatenate([left - right for _, left, right in pairs.values()], axis=1))
    except ValueError as error:
        raise UserError(f"{dataset}: {error}") from None
    for k, (other, (seeds, left, right)) in enumerate(pairs.items()):
        for m, (protocol, metric) in enumerate(PAIRED_MEASURES):
            column = k * len(PAIRED_MEASURES) + m
            yield {
                "dataset": dataset,
                "protocol": protocol,
                "metric": metric,
                "variant": reference,
                "baseline": other,
                "seeds": " ".join(map(str, seeds)),
                "users": len(left),
                "variant_mean": float(left[:, m].mean()),
                "baseline_mean": float(right[:, m].mean()),
                **{name: float(values[column]) for name, values in found._asdict().items()},
            }


def _read_ranks_by_seed(
    dataset: str, variant: str, answers: FinishedRuns, runs: Path
) -> dict[int, TargetRanks]:
    """By seed, the ranks of a variant's finished runs that have a row in NAME.csv."""
    found = {}
    for row in answers[dataset, variant]:
        seed = int(row["seed"])
        if folder := find_finished_run(get_planned_run_folder(runs, dataset, variant, seed)):
            ranks = read_target_ranks(folder)
            if matches_result_row(row, float(_compute_user_metrics(ranks)[:, _HEADLINE_INDEX].mean())):
                found[seed] = ranks
            else:
                logger.warning("%s is not the run of the CSV's row: left out", folder)
    return found


def _compute_user_metrics(ranks: TargetRanks) -> FloatArray:
    """(users, measures) of one run."""
    columns = [
        compute_rank_metric(m, ranks.values[:, TEST_PROTOCOLS.index(protocol)])
        for protocol, m in PAIRED_MEASURES
    ]
    return np.stack(columns, axis=1)


def _average_user_metrics(runs: Mapping[int, TargetRanks], seeds: Sequence[int]) -> FloatArray:
    """(users, measures), means over the seeds."""
    return np.asarray(np.mean([_compute_user_metrics(runs[seed]) for seed in seeds], axis=0))


def _check_same_users(one: TargetRanks, other: TargetRanks) -> None:
    odd = one.targets.index.symmetric_difference(other.targets.index)
    if len(odd):
        raise UserError(
            f"user {odd[0]!r} is in only one of {one.folder} and {other.folder}: "
            "they saw different data; run one again"
        )
    differs = one.targets.index[one.targets.to_numpy() != other.targets.to_numpy()]
    if len(differs):
        raise UserError(
            f"user {differs[0]!r} has another test item in {one.folder} than in {other.folder}: "
            "they saw different data or another time order; run one again"
        )
