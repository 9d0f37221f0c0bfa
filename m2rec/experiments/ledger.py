"""What is kept of finished runs: results/NAME.csv, NAME-paired.csv and reported.csv."""

import csv
import io
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from m2rec.errors import UserError
from m2rec.experiments.sweep_plan import PlannedRun, Sweep
from m2rec.run_folder import RunFolder
from m2rec.storage import write_text

logger = logging.getLogger(__name__)

ResultRow = dict[str, str]
# finished runs by data set and variant, one per seed, in the order of the sweep's seeds
FinishedRuns = Mapping[tuple[str, str], Sequence[ResultRow]]

PAIRED_COLUMNS = ("dataset", "protocol", "metric", "variant", "baseline", "seeds", "users", "variant_mean",
          "baseline_mean", "difference", "low", "high", "p")  # fmt: skip
PUBLISHED_COLUMNS = ("dataset", "protocol", "model", "hit@10", "ndcg@10", "source")
TEST_PROTOCOLS = ("test", "test_unseen")
TABLE_METRICS = ("hit@10", "ndcg@10")
"""What tables, tests over users and buckets are of."""
HEADLINE_METRIC = "test_unseen.ndcg@10"
"""The column of NAME.csv that comparisons are made by."""
DATASET_COUNTS = ("users", "items", "interactions")

_MACHINE_COLUMNS = ("peak_memory_mib", "device", "processes", "threads", "parameters")
_ALL_PROTOCOLS = ("valid", "valid_unseen", "valid_new", *TEST_PROTOCOLS, "test_new")
_RUN_KEY_COLUMNS = ("dataset", "variant", "seed")
_NUMERIC_COLUMNS = ("best_epoch", "seconds_per_epoch", "seconds_training", "threads", *DATASET_COUNTS)
# a mean that was rounded to six places, by seed, is within this of the same mean from ranks
_MEAN_TOLERANCE = 1e-5


def format_settings(keys: Mapping[str, Any]) -> str:
    """A run's keys as the text that stands in the column `settings`."""
    return json.dumps(keys, sort_keys=True, ensure_ascii=False)


def make_run_key(cell: PlannedRun) -> tuple[str, ...]:
    """Data set, variant, seed and settings of the rows that answer a cell."""
    return cell.dataset, cell.variant, str(cell.seed), format_settings(cell.keys)


def read_run_key(row: ResultRow) -> tuple[str, ...]:
    """What `make_run_key` says of the cell that a row answers."""
    return tuple(row[column] for column in (*_RUN_KEY_COLUMNS, "settings"))


def build_result_row(cell: PlannedRun, folder: Path) -> ResultRow:
    """The row of NAME.csv for a finished run.

    Args:
        cell: what was asked for.
        folder: the run folder, with metrics.json and history.csv.

    Raises:
        ValueError: metrics.json can't be read.
    """
    try:
        metrics = RunFolder(folder).read_metrics()
        seconds = [float(row["seconds"]) for row in RunFolder(folder).read_history()]
        if missing := [metric for metric in TABLE_METRICS if metric not in metrics["test"]]:
            raise UserError(f"{missing[0]} was not measured, which tables and tests are made of; set topk")
        row = {
            "dataset": cell.dataset,
            "model": metrics["model"],
            "variant": cell.variant,
            "seed": cell.seed,
            "commit": metrics["commit"],
            "settings": format_settings(cell.keys),
            **{key: metrics["protocol"][key] for key in ("split", "time_order", "rows")},
            "best_epoch": metrics["best_epoch"],
            "epochs": metrics["epochs"],
            "seconds_per_epoch": round(sum(seconds) / max(1, len(seconds)), 3),
            "seconds_training": metrics["seconds"]["training"],
            "seconds_total": metrics["seconds"]["total"],
            **{key: metrics[key] for key in _MACHINE_COLUMNS},
            **metrics["data"],
            "text": _describe_text_vectors(metrics["text"] or {}),
            "text_sha256": (metrics["text"] or {}).get("sha256", ""),
            **metrics["versions"],
            **{f"{part}.{k}": v for part in _ALL_PROTOCOLS for k, v in metrics.get(part, {}).items()},
            **_flatten_bucket_metrics(metrics["test_by"]),
        }
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: no finished run ({type(error).__name__}: {error}); run it again"
        ) from error
    return {key: "" if found is None else str(found) for key, found in row.items()}


def _describe_text_vectors(about: Mapping[str, Any]) -> str:
    """Which model made text vectors, and of what; nothing without text."""
    made_of = about.get("template") or about.get("columns")
    return f"{about.get('model', 'another source')}{f': {made_of}' if made_of else ''}" if about else ""


def _flatten_bucket_metrics(test_by: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`test_users|KIND=BUCKET`, and the metrics of each protocol in it."""
    columns = {}
    for kind, buckets in test_by.items():
        for bucket, found in buckets.items():
            where = f"{kind}={bucket}"
            columns[f"test_users|{where}"] = found["users"]
            for part in (*TEST_PROTOCOLS, "test_new"):
                measured = found.get(part, {})
                of_part = {m: measured[m] for m in TABLE_METRICS if m in measured}
                columns.update({f"{part}.{metric}|{where}": value for metric, value in of_part.items()})
    return columns


def read_result_rows(path: Path) -> list[ResultRow]:
    """The rows of NAME.csv, none if there is no file yet.

    Raises:
        ValueError: it can't be read, or a column that names the cell is missing.
    """
    return read_csv_table(path, (*_RUN_KEY_COLUMNS, "settings")) if path.exists() else []


def write_result_rows(path: Path, rows: Sequence[ResultRow]) -> None:
    """Write NAME.csv with every column that any row has."""
    columns = dict.fromkeys(column for row in rows for column in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


class SeedStatistics(NamedTuple):
    """A value over seeds."""

    mean: float
    std: float | None
    """Sample standard deviation; None for one seed."""


def read_finished_runs(sweep: Sweep) -> FinishedRuns:
    """The finished runs that a sweep asks for; no file is no runs.

    Of two rows of one cell the last counts; rows of cells or settings that the sweep does not ask for don't.

    Raises:
        ValueError: the file can't be read, a number is none, or rows that belong together differ.
    """
    path = sweep.path.with_suffix(".csv")
    rows = read_result_rows(path)
    _check_numeric_columns(path, rows)
    cells = {make_run_key(cell) for cell in sweep.planned_runs()}
    found: dict[tuple[str, ...], ResultRow] = {}
    others = 0
    for row in rows:
        if read_run_key(row) in cells:
            found[read_run_key(row)[:3]] = row
        else:
            others += 1
    if others:
        logger.warning(
            "%s: %s rows are of no cell of %s, or of other settings", path, others, sweep.path.name
        )
    answers = {
        (dataset, variant): [
            found[dataset, variant, str(seed)]
            for seed in sweep.seeds
            if (dataset, variant, str(seed)) in found
        ]
        for dataset in sweep.datasets
        for variant in sweep.variants
    }
    _check_same_data(path, answers)
    return answers


def read_headline_tests(sweep: Sweep, answers: FinishedRuns) -> dict[tuple[str, str], ResultRow]:
    """By data set and variant, the test of its test_unseen ndcg@10 against the reference.

    Raises:
        ValueError: the file can't be read, or was made from other runs than `answers`.
    """
    path, found = get_paired_tests_path(sweep), {}
    for row in read_paired_tests(path):
        if not _is_headline_test(row) or row["variant"] != sweep.reference:
            continue
        if side := _find_outdated_side(row, answers):
            raise UserError(
                f"{path}: {row[side]!r} on {row['dataset']} is not of the runs in the sweep's CSV; "
                "make it again with scripts/report.py --paired"
            )
        found[row["dataset"], row["baseline"]] = row
    return found


def get_paired_tests_path(sweep: Sweep) -> Path:
    """The file of a sweep's paired tests."""
    return sweep.path.with_name(f"{sweep.name}-paired.csv")


def read_paired_tests(path: Path) -> list[ResultRow]:
    """The rows of NAME-paired.csv; no file is no rows.

    Raises:
        ValueError: it can't be read, a column is missing, or a number is none.
    """
    rows = read_csv_table(path, PAIRED_COLUMNS) if path.exists() else []
    for row in rows:
        _check_finite_values(path, row, ("variant_mean", "baseline_mean", "p"), empty="nan")
    return rows


def select_current_tests(pairs: Sequence[ResultRow], sweep: Sweep, answers: FinishedRuns) -> list[ResultRow]:
    """Of paired tests those that compare the sweep's reference, over runs in `answers`."""
    outdated = {
        get_compared_pair(row)
        for row in pairs
        if _is_headline_test(row) and _find_outdated_side(row, answers)
    }
    return [
        row for row in pairs if row["variant"] == sweep.reference and get_compared_pair(row) not in outdated
    ]


def get_compared_pair(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a paired test compares: data set, variant and baseline."""
    return row["dataset"], row["variant"], row["baseline"]


def read_published_results(path: Path) -> list[ResultRow]:
    """Published numbers.

    Raises:
        ValueError: the file can't be read, a protocol is unknown, or a number is none.
    """
    rows = read_csv_table(path, PUBLISHED_COLUMNS)
    for number, row in enumerate(rows, start=1):
        if row["protocol"] not in TEST_PROTOCOLS:
            expected = " or ".join(TEST_PROTOCOLS)
            raise UserError(f"{path}: row {number}: protocol is {row['protocol']!r}, expected {expected}")
        _check_finite_values(path, row, TABLE_METRICS)
    return rows


def read_csv_table(path: Path, columns: Sequence[str]) -> list[ResultRow]:
    """A CSV file with at least these columns.

    Raises:
        ValueError: it can't be read, or a column or a value is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header, rows = reader.fieldnames or [], list(reader)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV in UTF-8: {error}") from None
    missing = [column for column in columns if column not in header]
    if missing:
        raise UserError(f"{path}: column {missing[0]!r} is missing; expected {', '.join(columns)}")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UserError(f"{path}: row {number} has more or fewer values than the header")
    return rows


def parse_column_value(row: ResultRow, column: str) -> float | None:
    """A number, None where there is none."""
    text = row.get(column, "")
    return float(text) if text else None


def summarize_seeds(rows: Sequence[ResultRow], column: str) -> SeedStatistics | None:
    """Mean and deviation over rows; None unless every row has the value."""
    values = [found for row in rows if (found := parse_column_value(row, column)) is not None]
    return _compute_seed_statistics(values) if values and len(values) == len(rows) else None


def compare_with_reference(
    rows: Sequence[ResultRow], reference: Sequence[ResultRow], column: str
) -> tuple[SeedStatistics, SeedStatistics] | None:
    """The reference's values, and what the rows have more, over the seeds of both; None if there is none."""
    at = {row["seed"]: found for row in reference if (found := parse_column_value(row, column)) is not None}
    both = [
        (at[row["seed"]], found)
        for row in rows
        if (found := parse_column_value(row, column)) is not None and row["seed"] in at
    ]
    if not both:
        return None
    return _compute_seed_statistics([base for base, _ in both]), _compute_seed_statistics(
        [found - base for base, found in both]
    )


def list_unique_values(rows: Sequence[ResultRow], column: str) -> list[str]:
    """The values of a column, each once, in order; empty ones left out."""
    return list(dict.fromkeys(row[column] for row in rows if row.get(column)))


def find_main_device(rows: Sequence[ResultRow]) -> str:
    """The device that most rows were measured on, the first of equals; times of several don't compare."""
    devices = Counter(row["device"] for row in rows if row.get("device"))
    return devices.most_common(1)[0][0] if devices else ""


def select_rows_on_device(rows: Sequence[ResultRow], device: str) -> list[ResultRow]:
    """The rows that were measured there."""
    return [row for row in rows if row.get("device", "") == device]


def collect_dataset_rows(answers: FinishedRuns, dataset: str) -> list[ResultRow]:
    """All finished runs on a data set."""
    return [row for (of, _), rows in answers.items() if of == dataset for row in rows]


def _compute_seed_statistics(values: Sequence[float]) -> SeedStatistics:
    return SeedStatistics(mean(values), stdev(values) if len(values) > 1 else None)


def _check_numeric_columns(path: Path, rows: Sequence[ResultRow]) -> None:
    if rows:
        columns = [
            column for column in rows[0] if "@" in column or "|" in column or column in _NUMERIC_COLUMNS
        ]
        for row in rows:
            _check_finite_values(path, row, columns)


def _check_finite_values(path: Path, row: ResultRow, columns: Sequence[str], empty: str = "0") -> None:
    for column in columns:
        try:
            finite = math.isfinite(float(row[column] or empty))
        except ValueError:
            finite = False
        if not finite:
            where = ", ".join(
                f"{key} {row[key]!r}" for key in (*_RUN_KEY_COLUMNS, "baseline", "model") if key in row
            )
            raise UserError(f"{path}: {where}: {column} is {row[column]!r}, expected a number")


def _check_same_data(path: Path, answers: FinishedRuns) -> None:
    """One data set has one size, and where targets return all rows have them as misses."""
    for dataset in dict.fromkeys(dataset for dataset, _ in answers):
        rows = collect_dataset_rows(answers, dataset)
        if any(row.get("test_returning", "") not in ("", "0") for row in rows):
            if old := next((row for row in rows if not row.get("test_returning")), None):
                raise UserError(
                    f"{path}: {old['variant']!r} on {dataset}, seed {old['seed']}, was measured when targets "
                    f"that return were no misses in test_unseen; take the row out and run the sweep again"
                )
        for column in DATASET_COUNTS:
            counts = list_unique_values(collect_dataset_rows(answers, dataset), column)
            if len(counts) > 1:
                raise UserError(f"{path}: rows on {dataset} differ in {column}: {' and '.join(counts)}")


def _is_headline_test(row: ResultRow) -> bool:
    """Whether a paired test is the one of the tables."""
    return f"{row['protocol']}.{row['metric']}" == HEADLINE_METRIC


def matches_result_row(row: ResultRow, mean_of_ranks: float) -> bool:
    """Whether a mean over users of the headline's metric is that of a row of NAME.csv."""
    return abs(mean_of_ranks - float(row[HEADLINE_METRIC])) <= _MEAN_TOLERANCE


def _find_outdated_side(row: ResultRow, answers: FinishedRuns) -> str | None:
    """Of a test that is shown, the column of a variant whose runs are not those in `answers`."""
    seeds = row["seeds"].split()
    for side in ("variant", "baseline"):
        rows = [run for run in answers.get((row["dataset"], row[side]), []) if run["seed"] in seeds]
        found = summarize_seeds(rows, HEADLINE_METRIC)
        if (
            len(rows) < len(seeds)
            or not found
            or abs(found.mean - float(row[f"{side}_mean"])) > _MEAN_TOLERANCE
        ):
            return side
    return None
