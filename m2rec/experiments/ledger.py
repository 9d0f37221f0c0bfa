"""The ledger of finished runs as data frames: NAME.csv, NAME-paired.csv and reported.csv.

Files are read as text. A frame of finished runs has its metrics, counts and times as floats, NaN where a
cell is empty; its other columns stay text.
"""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, mode, stdev
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from m2rec.errors import UserError
from m2rec.experiments.sweep_plan import PlannedRun, Sweep
from m2rec.run_folder import RunFolder
from m2rec.storage import write_text

logger = logging.getLogger(__name__)

PAIRED_COLUMNS = ("dataset", "protocol", "metric", "variant", "baseline", "seeds", "users", "variant_mean",
          "baseline_mean", "difference", "low", "high", "p")  # fmt: skip
PUBLISHED_COLUMNS = ("dataset", "protocol", "model", "hit@10", "ndcg@10", "status", "confidence", "source")
PUBLISHED, UNPUBLISHED = "published", "unpublished"
CONFIDENCES = ("A", "B", "C", "")
"""How a published number was read: by the authors, another's run, second-hand, not noted."""
TEST_PROTOCOLS = ("test", "test_unseen")
TABLE_METRICS = ("hit@10", "ndcg@10")
"""The metrics of tables, paired tests and buckets."""
HEADLINE_METRIC = "test_unseen.ndcg@10"
"""The column of NAME.csv that variants are compared by."""
DATASET_COUNTS = ("users", "items", "interactions")

_MACHINE_COLUMNS = ("peak_memory_mib", "device", "processes", "threads", "parameters")
_ALL_PROTOCOLS = ("valid", "valid_unseen", "valid_new", *TEST_PROTOCOLS, "test_new")
_RUN_COLUMNS = ["dataset", "variant", "seed"]
_RUN_KEY_COLUMNS = [*_RUN_COLUMNS, "settings"]
_PAIR_COLUMNS = ["dataset", "variant", "baseline"]
_PAIRED_NUMBERS = ["variant_mean", "baseline_mean", "difference", "low", "high", "p"]
_PROTOCOL_COLUMNS = ("split", "time_order", "ties")
_TEXT_COLUMNS = (*_PROTOCOL_COLUMNS, "device", "text", "text_sha256")
_NUMERIC_COLUMNS = ("best_epoch", "seconds_per_epoch", "seconds_training", "threads", "test_returning",
                    HEADLINE_METRIC, *DATASET_COUNTS)  # fmt: skip
# tolerance between a mean stored with six decimals and the same mean recomputed from ranks
_MEAN_TOLERANCE = 1e-5


class SeedStatistics(NamedTuple):
    """A value over seeds."""

    mean: float
    std: float | None
    """Sample standard deviation; None for one seed."""


class DatasetResults(NamedTuple):
    """The results of a sweep on one of its data sets."""

    sweep: Sweep
    dataset: str
    runs: pd.DataFrame
    """Finished runs, as `read_finished_runs` returns them."""
    tests: pd.DataFrame
    """Paired tests of the headline metric against the reference."""
    shuffled: "DatasetResults | None" = None
    """Those of the sweep `ties_shuffled`."""

    def select_runs(self, variant: str | None) -> pd.DataFrame:
        """The runs of a variant, seed by seed."""
        return self.runs[self.runs["variant"] == variant]

    def summarize_quality(self, variant: str | None) -> SeedStatistics | None:
        """The headline metric of a variant."""
        return summarize_seeds(self.select_runs(variant), HEADLINE_METRIC)

    @property
    def headline(self) -> str | None:
        """The variant that stands for the sweep: its headline if it has runs, else its reference."""
        sweep = self.sweep
        return sweep.headline if len(self.select_runs(sweep.headline)) else sweep.reference

    @property
    def headline_without_text(self) -> str | None:
        """The same without text."""
        is_reference = self.headline == self.sweep.reference
        return self.sweep.without_text if is_reference else self.sweep.headline_without_text

    def compare_with_reference(
        self, variant: str, reference: str | None = None
    ) -> tuple[SeedStatistics, SeedStatistics] | None:
        """The reference's headline metric, and how much more a variant has, over the seeds of both.

        None if they have no seed in common.

        Args:
            variant: the variant.
            reference: another one in place of the sweep's reference.
        """
        base = self.select_runs(reference or self.sweep.reference).set_index("seed")[HEADLINE_METRIC]
        values = self.select_runs(variant).set_index("seed")[HEADLINE_METRIC]
        difference = (values - base).dropna()
        if difference.empty:
            return None
        shared = base[difference.index]
        return _compute_seed_statistics(shared), _compute_seed_statistics(difference)


def format_settings(settings: Mapping[str, Any]) -> str:
    """A run's settings as the text of the column `settings`."""
    return json.dumps(settings, sort_keys=True, ensure_ascii=False)


def make_run_key(planned: PlannedRun) -> tuple[str, ...]:
    """Data set, variant, seed and settings, as `list_run_keys` gives them for a row of NAME.csv."""
    settings = format_settings(planned.keys)
    return planned.dataset, planned.variant, str(planned.seed), settings


def list_run_keys(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """The key of each row of NAME.csv."""
    keys = rows[_RUN_KEY_COLUMNS]
    return list(keys.itertuples(index=False, name=None))


def build_result_row(planned: PlannedRun, folder: Path) -> dict[str, str]:
    """The row of NAME.csv for a finished run.

    Args:
        planned: the run in the sweep.
        folder: the run folder, with metrics.json and history.csv.

    Raises:
        ValueError: metrics.json or history.csv can't be read.
    """
    files = RunFolder(folder)
    try:
        metrics = files.read_metrics()
        history = read_csv_table(files.history_file, ["seconds"])
        seconds = history["seconds"].astype(float)
        epochs = max(1, len(seconds))  # 0: Popularity has no epochs
        for metric in TABLE_METRICS:
            if metric not in metrics["test"]:
                raise UserError(f"{metric} was not measured, but tables and paired tests need it; set topk")
        measured = metrics["seconds"]
        row = {
            "dataset": planned.dataset,
            "model": metrics["model"],
            "variant": planned.variant,
            "seed": planned.seed,
            "commit": metrics["commit"],
            "settings": format_settings(planned.keys),
            **{key: metrics["protocol"][key] for key in ("split", "time_order", "rows")},
            "ties": metrics["protocol"].get("tie_order", "file"),
            "best_epoch": metrics["best_epoch"],
            "epochs": metrics["epochs"],
            "seconds_per_epoch": round(seconds.sum() / epochs, 3),
            "seconds_training": measured["training"],
            "seconds_total": measured["total"],
            **{key: metrics[key] for key in _MACHINE_COLUMNS},
            **metrics["data"],
            **_describe_text_vectors(metrics["text"] or {}),
            **metrics["versions"],
            **_flatten_metrics(metrics),
        }
    except (OSError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}: not a finished run ({reason}); run it again") from error
    return {column: "" if value is None else str(value) for column, value in row.items()}


def _describe_text_vectors(about: Mapping[str, Any]) -> dict[str, str]:
    """The model and the template of text vectors, and their hash; empty without text."""
    if not about:
        return {"text": "", "text_sha256": ""}
    text = about.get("model", "another source")
    template = about.get("template") or about.get("columns")
    if template:
        text = f"{text}: {template}"
    return {"text": text, "text_sha256": about.get("sha256", "")}


def _flatten_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`PROTOCOL.METRIC`, then by bucket `test_users|KIND=BUCKET` and `PROTOCOL.METRIC|KIND=BUCKET`."""
    columns = {}
    for protocol in _ALL_PROTOCOLS:
        values = metrics.get(protocol, {})
        for metric, value in values.items():
            columns[f"{protocol}.{metric}"] = value
    for kind, buckets in metrics["test_by"].items():
        for bucket, measured in buckets.items():
            suffix = f"|{kind}={bucket}"
            columns[f"test_users{suffix}"] = measured["users"]
            for protocol in (*TEST_PROTOCOLS, "test_new"):
                values = measured.get(protocol, {})
                for metric in TABLE_METRICS:
                    if metric in values:
                        columns[f"{protocol}.{metric}{suffix}"] = values[metric]
    return columns


def read_csv_table(path: Path, columns: Sequence[str], optional: bool = False) -> pd.DataFrame:
    """A CSV file as text.

    Args:
        path: the file.
        columns: columns that it must have.
        optional: whether a missing file is an empty table.

    Raises:
        ValueError: the file can't be read, or a column or a value is missing.
    """
    if optional and not path.exists():
        return pd.DataFrame(columns=list(columns), dtype=object)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = [line for line in csv.reader(file) if line]
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from None
    header, *rows = lines or [[]]
    for column in columns:
        if column not in header:
            expected = ", ".join(columns)
            raise UserError(f"{path}: column {column!r} is missing; expected {expected}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise UserError(f"{path}: row {number} has more or fewer values than the header")
    return pd.DataFrame(rows, columns=header, dtype=object)


def read_result_rows(path: Path) -> pd.DataFrame:
    """The rows of NAME.csv as text, none if there is no such file.

    Raises:
        ValueError: the file can't be read, or a column of the run's key is missing.
    """
    return read_csv_table(path, _RUN_KEY_COLUMNS, optional=True)


def write_result_row(path: Path, sweep: Sweep, row: Mapping[str, str]) -> None:
    """Put a row into NAME.csv in the sweep's order; it replaces an earlier row of its run."""
    earlier = read_result_rows(path)
    rows = pd.concat([earlier, pd.DataFrame([row])])
    rows = rows.drop_duplicates(_RUN_COLUMNS, keep="last")
    numbers = {}
    for number, planned in enumerate(sweep.planned_runs()):
        numbers[make_run_key(planned)[:3]] = number
    positions = []
    for *run, _ in list_run_keys(rows):
        position = numbers.get(tuple(run), len(numbers))
        positions.append(position)
    order = np.argsort(positions, kind="stable")
    write_text(path, format_csv(rows.iloc[order]))


def format_csv(rows: pd.DataFrame) -> str:
    """The rows as CSV, floats with six decimals."""
    return str(rows.to_csv(index=False, lineterminator="\n", float_format="%.6f"))


def read_sweep_results(sweep: Sweep) -> list[DatasetResults]:
    """A sweep's finished runs and paired tests, by data set.

    Raises:
        ValueError: a file can't be read, or the tests were computed from other runs.
    """
    runs = read_finished_runs(sweep)
    tests = read_headline_tests(sweep, runs)
    shuffled = {}
    if other := sweep.read_ties_shuffled():
        shuffled = {results.dataset: results for results in read_sweep_results(other)}
    results = []
    for dataset in sweep.datasets:
        own_runs = runs[runs["dataset"] == dataset]
        own_tests = tests[tests["dataset"] == dataset].set_index("baseline")
        results.append(DatasetResults(sweep, dataset, own_runs, own_tests, shuffled.get(dataset)))
    return results


def read_finished_runs(sweep: Sweep) -> pd.DataFrame:
    """The finished runs that a sweep plans, in its order; none without a file.

    Of two rows of one run the last counts. Rows that the sweep does not plan are ignored.

    Raises:
        ValueError: the file can't be read, a number is invalid, or rows that belong together differ in
            their data or their protocol.
    """
    path = sweep.path.with_suffix(".csv")
    rows = read_result_rows(path)
    for column in (*_TEXT_COLUMNS, *_NUMERIC_COLUMNS):
        if column not in rows:
            rows[column] = ""
    is_measured = rows.columns.str.contains(r"[@|]")
    is_numeric = is_measured | rows.columns.isin(_NUMERIC_COLUMNS)
    rows = _parse_numbers(path, rows, rows.columns[is_numeric])
    rows.loc[rows["ties"] == "", "ties"] = "file"  # rows from before there was a choice
    keys = map(make_run_key, sweep.planned_runs())
    planned = pd.DataFrame(keys, columns=_RUN_KEY_COLUMNS)
    runs = planned.merge(rows, on=_RUN_KEY_COLUMNS)
    if ignored := len(rows) - len(runs):
        logger.warning(
            "%s: ignored %s rows that %s does not plan (other run or other settings)",
            path, ignored, sweep.path.name,
        )  # fmt: skip
    runs = runs.drop_duplicates(_RUN_COLUMNS, keep="last")
    for dataset in sweep.datasets:
        own_runs = runs[runs["dataset"] == dataset]
        _check_same_data(path, dataset, own_runs)
        _check_same_protocol(path, dataset, own_runs)
    return runs


def get_paired_tests_path(sweep: Sweep) -> Path:
    """The file of a sweep's paired tests."""
    return sweep.path.with_name(f"{sweep.name}-paired.csv")


def read_paired_tests(path: Path) -> pd.DataFrame:
    """The rows of NAME-paired.csv, with their numbers as floats; none without a file.

    Raises:
        ValueError: the file can't be read, a column is missing, or a number is invalid.
    """
    rows = read_csv_table(path, PAIRED_COLUMNS, optional=True)
    tests = _parse_numbers(path, rows, _PAIRED_NUMBERS, required=True)
    return tests[list(PAIRED_COLUMNS)]


def read_headline_tests(sweep: Sweep, runs: pd.DataFrame) -> pd.DataFrame:
    """The paired tests of the headline metric against the sweep's reference.

    Raises:
        ValueError: the file can't be read, or was computed from other runs than `runs`.
    """
    path = get_paired_tests_path(sweep)
    tests = _select_headline_tests(read_paired_tests(path), sweep)
    for test in tests.to_dict("records"):
        if side := _find_outdated_side(test, runs):
            raise UserError(
                f"{path}: {test[side]!r} on {test['dataset']} was computed from runs that are no longer in "
                "the sweep's CSV; make it again with scripts/report.py --paired"
            )
    return tests


def select_current_tests(tests: pd.DataFrame, sweep: Sweep, runs: pd.DataFrame) -> pd.DataFrame:
    """The paired tests of the sweep's reference that were computed from these runs."""
    current = tests[tests["variant"] == sweep.reference]
    headline = _select_headline_tests(tests, sweep)
    for test in headline.to_dict("records"):
        if _find_outdated_side(test, runs):
            is_dataset = current["dataset"] == test["dataset"]
            is_baseline = current["baseline"] == test["baseline"]
            current = current[~(is_dataset & is_baseline)]
    return current


def merge_paired_tests(tests: pd.DataFrame, earlier: pd.DataFrame) -> pd.DataFrame:
    """Of the new and the earlier tests of a pair those over more seeds, the new ones if equal.

    The runs of a sweep need not all be on one machine.
    """
    both = pd.concat([tests, earlier], ignore_index=True)
    both["n"] = both["seeds"].str.split().str.len()
    most = both.groupby(_PAIR_COLUMNS)["n"].transform("max")
    longest = both[both["n"] == most].drop(columns="n")
    return longest.drop_duplicates([*_PAIR_COLUMNS, "protocol", "metric"])


def _select_headline_tests(tests: pd.DataFrame, sweep: Sweep) -> pd.DataFrame:
    protocol, metric = HEADLINE_METRIC.split(".")
    is_protocol = tests["protocol"] == protocol
    is_metric = tests["metric"] == metric
    is_reference = tests["variant"] == sweep.reference
    return tests[is_protocol & is_metric & is_reference]


def _find_outdated_side(test: Mapping[str, Any], runs: pd.DataFrame) -> str | None:
    """The column of a test that names a variant with other runs or none, if there is one."""
    seeds = test["seeds"].split()
    is_dataset = runs["dataset"] == test["dataset"]
    is_tested = is_dataset & runs["seed"].isin(seeds)
    for side in ("variant", "baseline"):
        is_side = runs["variant"] == test[side]
        values = runs[HEADLINE_METRIC][is_tested & is_side]
        if len(values) < len(seeds):
            return side
        tested_mean = test[f"{side}_mean"]
        if not is_same_mean(values.mean(), tested_mean):
            return side
    return None


def is_same_mean(first: float, second: float) -> bool:
    """Whether two means differ by no more than their rounding."""
    return abs(first - second) <= _MEAN_TOLERANCE


def read_published_results(path: Path) -> pd.DataFrame:
    """Published numbers, as text; none without a file.

    Raises:
        ValueError: the file can't be read, a protocol, status or confidence is unknown, or a number is
            invalid.
    """
    rows = read_csv_table(path, PUBLISHED_COLUMNS, optional=True)
    allowed = {"protocol": TEST_PROTOCOLS, "status": (PUBLISHED, UNPUBLISHED), "confidence": CONFIDENCES}
    for column, values in allowed.items():
        for number, value in enumerate(rows[column], start=1):
            if value not in values:
                expected = " or ".join(filter(None, values))
                raise UserError(f"{path}: row {number}: {column} is {value!r}, expected {expected}")
    _parse_numbers(path, rows, TABLE_METRICS)
    return rows


def summarize_seeds(runs: pd.DataFrame, column: str) -> SeedStatistics | None:
    """Mean and deviation over runs; None unless every run has the value."""
    if runs.empty or column not in runs:
        return None
    values = runs[column]
    return None if values.isna().any() else _compute_seed_statistics(values)


def find_main_device(runs: pd.DataFrame) -> str:
    """The device of most runs, the first of equals; times on different devices can't be compared."""
    devices = runs["device"]
    named = devices[devices != ""]
    return "" if named.empty else mode(named)


def _compute_seed_statistics(values: pd.Series) -> SeedStatistics:
    std = stdev(values) if len(values) > 1 else None
    return SeedStatistics(mean(values), std)


def _parse_numbers(
    path: Path, rows: pd.DataFrame, columns: Sequence[str], required: bool = False
) -> pd.DataFrame:
    """The rows with these columns as floats, NaN for an empty text unless it is required."""
    texts = rows[[*columns]]
    numbers = texts.apply(pd.to_numeric, errors="coerce").astype(float)
    is_checked = texts != ""
    invalid = ~np.isfinite(numbers) & (required | is_checked)
    for column in invalid.columns[invalid.any()]:
        row = invalid[column].argmax()
        value = texts[column].iloc[row]
        raise UserError(f"{path}: row {row + 1}: {column} is {value!r}, expected a number")
    others = rows.drop(columns=texts.columns)
    return pd.concat([others, numbers], axis=1)


def _check_same_protocol(path: Path, dataset: str, runs: pd.DataFrame) -> None:
    """All rows on a data set rank the same targets, so that they may share a column."""
    for column in _PROTOCOL_COLUMNS:
        values = [value for value in runs[column].unique() if value]
        if len(values) > 1:
            listed = " and ".join(values)
            raise UserError(f"{path}: rows on {dataset} differ in {column}: {listed}; make a sweep for each")


def _check_same_data(path: Path, dataset: str, runs: pd.DataFrame) -> None:
    """All rows on a data set have the same counts and the same rule for returning targets."""
    returning = runs["test_returning"]
    old = runs[returning.isna()]
    if len(old) and returning.max() > 0:
        variant, seed = old[["variant", "seed"]].iloc[0]
        raise UserError(
            f"{path}: {variant!r} on {dataset}, seed {seed}, was measured when targets that return were no "
            "misses in test_unseen; take the row out and run the sweep again"
        )
    for column in DATASET_COUNTS:
        counts = runs[column].dropna().unique()
        if len(counts) > 1:
            listed = " and ".join(map("{:.0f}".format, counts))
            raise UserError(f"{path}: rows on {dataset} differ in {column}: {listed}")
