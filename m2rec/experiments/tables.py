"""Markdown of a sweep's results: the tables of README and docs."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from m2rec.errors import UserError
from m2rec.experiments.ledger import (
    DATASET_COUNTS,
    HEADLINE_METRIC,
    FinishedRuns,
    ResultRow,
    SeedStatistics,
    find_main_device,
    list_unique_values,
    parse_column_value,
    read_headline_tests,
    select_rows_on_device,
    summarize_seeds,
)
from m2rec.experiments.sweep_plan import MAIN_TABLE, Sweep
from m2rec.experiments.table_parts import (
    HEADLINE_TITLE,
    NOT_RUN,
    P_VALUE_TITLE,
    format_markdown_table,
    format_mean,
    format_mean_std,
    format_measured_metrics,
    format_p_value,
    format_relative_change,
    format_seed_count,
    make_versus_title,
    strip_model_details,
)

BUCKET_KINDS = ("popularity", "history")


class MetricColumn(NamedTuple):
    """A column of numbers over variants."""

    title: str
    source: str
    """Column of NAME.csv."""
    show: Callable[[SeedStatistics], str]
    best: bool = True
    """Whether the highest is in bold."""


def _format_epoch_seconds(rows: Sequence[ResultRow], device: str) -> str:
    """Seconds of an epoch on this device; if no run was there, on the one that most had, which is named."""
    own = device if select_rows_on_device(rows, device) else find_main_device(rows)
    found = summarize_seeds(select_rows_on_device(rows, own), "seconds_per_epoch")
    if found is None:
        return ""
    text = f"{found.mean:,.0f}" if found.mean >= 99.5 else f"{found.mean:.2g}"
    return text if own == device else f"{text} on {own or 'an unknown device'}"


def _format_best_epoch(found: SeedStatistics) -> str:
    return f"{found.mean + 1:.0f}"  # they count from 0


METRIC_COLUMNS = (
    MetricColumn("test_unseen HR@10", "test_unseen.hit@10", format_mean_std),
    MetricColumn(HEADLINE_TITLE, HEADLINE_METRIC, format_mean_std),
    MetricColumn("test HR@10", "test.hit@10", format_mean_std),
    MetricColumn("test NDCG@10", "test.ndcg@10", format_mean_std),
    MetricColumn("valid NDCG@10", "valid.ndcg@10", format_mean),
    MetricColumn("item coverage@10", "test_unseen.itemcoverage@10", format_mean),
    MetricColumn("epochs to best", "best_epoch", _format_best_epoch, best=False),
)


def make_result_table(sweep: Sweep, answers: FinishedRuns, table: str) -> str:
    """One of the sweep's tables: a row per variant, and a line on how they were made.

    Args:
        sweep: names tables, seeds and reference.
        answers: its finished runs.
        table: which of the sweep's tables.

    Raises:
        ValueError: NAME-paired.csv can't be read, or is of other runs.
    """
    paired = read_headline_tests(sweep, answers)
    blocks = []
    for dataset in sweep.datasets:
        variants = sweep.tables[table]
        lines = _make_result_lines(sweep, dataset, answers, variants, paired)
        rows = _collect_variant_rows(answers, dataset, variants)
        words = [_describe_protocol(rows)] if rows else []
        blocks.append(
            _format_dataset_block(
                sweep, dataset, [lines], words, _list_missing_variants(answers, dataset, variants)
            )
        )
    return "\n\n".join(blocks)


def make_bucket_tables(sweep: Sweep, answers: FinishedRuns) -> str:
    """test_unseen NDCG@10 of the main variants by popularity of the target and length of history.

    Raises:
        ValueError: the finished runs were not measured by bucket.
    """
    blocks = []
    for dataset in sweep.datasets:
        variants = get_main_variants(sweep)
        rows = _collect_variant_rows(answers, dataset, variants)
        runs = _select_variants_with_runs(answers, dataset, variants)
        tables = [_make_bucket_lines(sweep, dataset, runs, kind) for kind in BUCKET_KINDS] if rows else []
        words = [HEADLINE_TITLE] if rows else []
        blocks.append(
            _format_dataset_block(
                sweep, dataset, tables, words, _list_missing_variants(answers, dataset, variants)
            )
        )
    return "\n\n".join(blocks)


def make_published_table(sweep: Sweep, answers: FinishedRuns, reported: Sequence[ResultRow]) -> str:
    """Published numbers beside ours.

    A published model stands beside the variant of the same name (what follows a comma or a
    bracket is detail); the reference has a row of its own where nothing was published of it.

    Args:
        sweep: names data sets and variants.
        answers: its finished runs.
        reported: rows of reported.csv.

    Raises:
        ValueError: nothing was published on one of the data sets.
    """
    blocks = []
    for dataset in sweep.datasets:
        published = [row for row in reported if row["dataset"] == dataset]
        if not published:
            raise UserError(f"reported.csv has no row of {dataset}; add one or take the marker away")
        lines = _make_published_lines(sweep, dataset, answers, published)
        words = ["Published numbers are of their authors' data, tuning and often one seed"]
        blocks.append(_format_dataset_block(sweep, dataset, [lines], words))
    return "\n\n".join(blocks)


def get_main_variants(sweep: Sweep) -> tuple[str, ...]:
    """The variants of the table `main`, or of the first."""
    return sweep.tables.get(MAIN_TABLE, next(iter(sweep.tables.values())))


def list_buckets(rows: Iterable[ResultRow], kind: str) -> list[str]:
    """The buckets of a kind in which runs were measured, from the lowest."""
    start = f"{HEADLINE_METRIC}|{kind}="
    found = {column.removeprefix(start) for row in rows for column in row if column.startswith(start)}
    return sorted(found, key=lambda bucket: int("0" + re.sub(r"\D.*", "", bucket)))


def format_bucket_users(rows: Iterable[ResultRow], kind: str, bucket: str) -> str:
    """Test users in a bucket; nothing where they were not counted."""
    counts = {
        count for row in rows if (count := parse_column_value(row, f"test_users|{kind}={bucket}")) is not None
    }
    return f"{max(counts):,.0f}" if counts else ""


def _make_result_lines(
    sweep: Sweep,
    dataset: str,
    answers: FinishedRuns,
    variants: Sequence[str],
    paired: Mapping[tuple[str, str], ResultRow],
) -> list[list[str]]:
    runs = _select_variants_with_runs(answers, dataset, variants)
    device = find_main_device(_collect_variant_rows(answers, dataset, variants))
    columns = {column.title: _format_metric_column(column, runs) for column in METRIC_COLUMNS}
    columns["s / epoch"] = [_format_epoch_seconds(rows, device) for rows in runs.values()]
    columns[make_versus_title(sweep)] = [
        format_relative_change(sweep, dataset, answers, variant) for variant in runs
    ]
    columns[P_VALUE_TITLE] = [
        format_p_value(sweep, dataset, answers, paired.get((dataset, variant))) for variant in runs
    ]
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    seeds = [format_seed_count(len(rows), len(sweep.seeds)) for rows in runs.values()]
    lines = zip(runs, seeds, *columns.values(), strict=True)
    return [["variant", "n", *columns], *map(list, lines)]


def _format_metric_column(column: MetricColumn, runs: Mapping[str, Sequence[ResultRow]]) -> list[str]:
    """A column's texts, in the order of the variants; the best in bold, unless all are equal."""
    found = [summarize_seeds(rows, column.source) for rows in runs.values()]
    best = max((format_mean(one) for one in found if one), default="")
    bold = column.best and len({format_mean(one) for one in found if one}) > 1
    texts = [column.show(one) if one else "" for one in found]
    return [
        f"**{text}**" if bold and one and format_mean(one) == best else text
        for text, one in zip(texts, found, strict=True)
    ]


def _select_variants_with_runs(
    answers: FinishedRuns, dataset: str, variants: Sequence[str]
) -> dict[str, Sequence[ResultRow]]:
    """The runs of each variant that has any."""
    return {variant: rows for variant in variants if (rows := answers[dataset, variant])}


def _collect_variant_rows(answers: FinishedRuns, dataset: str, variants: Sequence[str]) -> list[ResultRow]:
    return [row for variant in variants for row in answers[dataset, variant]]


def _make_bucket_lines(
    sweep: Sweep, dataset: str, runs: Mapping[str, Sequence[ResultRow]], kind: str
) -> list[list[str]]:
    rows = [row for found in runs.values() for row in found]
    names = list_buckets(rows, kind)
    if not names:
        path = sweep.path.with_suffix(".csv")
        raise UserError(f"{path}: no column {HEADLINE_METRIC}|{kind}=... on {dataset}; run the sweep again")
    columns = [MetricColumn(name, f"{HEADLINE_METRIC}|{kind}={name}", format_mean_std) for name in names]
    cells = [_format_metric_column(column, runs) for column in columns]
    lines = [[kind, *names], ["users", *(format_bucket_users(rows, kind, name) for name in names)]]
    lines += [[variant, *(column[k] for column in cells)] for k, variant in enumerate(runs)]
    return lines


def _make_published_lines(
    sweep: Sweep, dataset: str, answers: FinishedRuns, published: Sequence[ResultRow]
) -> list[list[str]]:
    heads = ["protocol", "model", "reported HR@10", "reported NDCG@10", "our HR@10", "our NDCG@10", "source"]
    lines = [heads]
    for protocol in sorted({row["protocol"] for row in published}):
        rows = [row for row in published if row["protocol"] == protocol]
        for row in rows:
            ours = format_measured_metrics(answers, dataset, _match_variant(row, sweep), protocol)
            lines.append([protocol, row["model"], row["hit@10"], row["ndcg@10"], *ours, row["source"]])
        if sweep.reference and sweep.reference not in (_match_variant(row, sweep) for row in rows):
            ours = format_measured_metrics(answers, dataset, sweep.reference, protocol)
            lines.append([protocol, sweep.reference, "", "", *ours, "this project"])
    return lines


def _match_variant(row: ResultRow, sweep: Sweep) -> str | None:
    """The variant that is the published model."""
    names = (row["model"], strip_model_details(row["model"]))
    return next((name for name in names if name in sweep.variants), None)


def _format_dataset_block(
    sweep: Sweep,
    dataset: str,
    tables: Sequence[list[list[str]]],
    words: Sequence[str],
    not_run: str = "",
) -> str:
    """Tables with the name of their data set above, if there are several, and a line below.

    Args:
        sweep, dataset: what they are of.
        tables: their lines of cells.
        words: sentences for the line below.
        not_run: names of variants that have none.
    """
    parts = [f"**{dataset}**"] if len(sweep.datasets) > 1 else []
    parts += [format_markdown_table(lines) for lines in tables if len(lines) > 1]
    missing = f"{NOT_RUN.capitalize()}: {not_run}" if not_run else ""
    sentences = [*words, missing, f"Made by `{sweep.command}`"]
    parts.append(" ".join(f"{sentence}." for sentence in sentences if sentence))
    return "\n\n".join(parts)


def _list_missing_variants(answers: FinishedRuns, dataset: str, variants: Sequence[str]) -> str:
    return "; ".join(variant for variant in variants if not answers[dataset, variant])


def _describe_protocol(rows: Sequence[ResultRow]) -> str:
    """Split, ranking, time order, counts, device."""
    splits = " and ".join(split.replace("_", "-") for split in list_unique_values(rows, "split"))
    orders = " and ".join(list_unique_values(rows, "time_order"))
    text = f"{splits}, full ranking" if splits else "full ranking"
    text += f", time order {orders}" if orders else ""
    counts = [f"{int(float(n)):,} {name}" for name in DATASET_COUNTS for n in list_unique_values(rows, name)]
    text += f"; {', '.join(counts)}" if counts else ""
    returning = [int(n) for n in list_unique_values(rows, "test_returning") if n != "0"]
    text += "".join(f"; {n:,} test targets return, misses in test_unseen" for n in returning)
    texts = " and ".join(_describe_text_files(rows, made_by) for made_by in list_unique_values(rows, "text"))
    text += f"; text by {texts}" if texts else ""
    main = find_main_device(rows)
    others = [device for device in list_unique_values(rows, "device") if device != main]
    text += f"; timed on {_describe_device(rows, main)}" if main else ""
    if others:
        text += f", and where a row says so on {' and '.join(_describe_device(rows, one) for one in others)}"
    return text[0].upper() + text[1:]


def _describe_device(rows: Sequence[ResultRow], device: str) -> str:
    """A device, and of a CPU how many threads runs had there."""
    threads = sorted(list_unique_values(select_rows_on_device(rows, device), "threads"), key=int)
    if not (threads and device.startswith("cpu")):
        return device
    return f"{device}, {' and '.join(threads)} thread{'s' if threads != ['1'] else ''}"


def _describe_text_files(rows: Sequence[ResultRow], made_by: str) -> str:
    """What made text vectors; how many files of them there are, if not one."""
    files = len({row["text_sha256"] for row in rows if row["text"] == made_by and row.get("text_sha256")})
    return f"{made_by} ({files} files)" if files > 1 else made_by
