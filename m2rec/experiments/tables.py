"""The result tables of README and docs, as Markdown."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from m2rec.errors import UserError
from m2rec.experiments.ledger import (
    DATASET_COUNTS,
    HEADLINE_METRIC,
    TABLE_METRICS,
    DatasetResults,
    SeedStatistics,
    find_main_device,
    summarize_seeds,
)
from m2rec.experiments.sweep_plan import MAIN_TABLE, OVERVIEW_TABLE, Sweep
from m2rec.reports.markdown import format_markdown_table

HEADLINE_TITLE = "test_unseen NDCG@10"

_NOT_RUN = "not run"
_P_VALUE_TITLE = "p"
_BUCKET_KINDS = ("popularity", "history")
_PUBLISHED_TITLES = ["protocol", "model", "reported HR@10", "reported NDCG@10", "our HR@10", "our NDCG@10",
                     "source"]  # fmt: skip
_OVERVIEW_TITLES = ("data set", "n", "HR@10", "NDCG@10", "NDCG@10 without text", "published HR@10",
                    "published NDCG@10", "NDCG@10 of the strongest baseline here")  # fmt: skip
_OVERVIEW_NOTE = (
    "test_unseen, full ranking. n: seeds; ±: their standard deviation. Published: the highest in "
    "`results/reported.csv`, of whichever model. Strongest baseline: the highest here of those that were "
    "run; {versus}: over the seeds that both have. p: paired bootstrap over users, these runs held fixed; "
    "blank: not tested."
)

# the runs of each variant that has any, in the order of a table
RunsByVariant = Mapping[str, pd.DataFrame]


def format_mean(quality: SeedStatistics) -> str:
    """The mean with four decimals."""
    return f"{quality.mean:.4f}"


def format_mean_std(quality: SeedStatistics) -> str:
    """The mean, and its deviation over several seeds."""
    if quality.std is None:
        return format_mean(quality)
    return f"{format_mean(quality)} ± {quality.std:.4f}"


def _format_epoch_count(best_epoch: SeedStatistics) -> str:
    return f"{best_epoch.mean + 1:.0f}"  # epochs count from 0


class MetricColumn(NamedTuple):
    """A column of numbers over variants."""

    title: str
    source: str
    """Column of NAME.csv."""
    format: Callable[[SeedStatistics], str]
    mark_best: bool = True
    """Whether the highest value is in bold."""


METRIC_COLUMNS = (
    MetricColumn("test_unseen HR@10", "test_unseen.hit@10", format_mean_std),
    MetricColumn(HEADLINE_TITLE, HEADLINE_METRIC, format_mean_std),
    MetricColumn("test HR@10", "test.hit@10", format_mean_std),
    MetricColumn("test NDCG@10", "test.ndcg@10", format_mean_std),
    MetricColumn("valid NDCG@10", "valid.ndcg@10", format_mean),
    MetricColumn("item coverage@10", "test_unseen.itemcoverage@10", format_mean),
    MetricColumn("epochs to best", "best_epoch", _format_epoch_count, mark_best=False),
)


def make_table(all_results: Sequence[DatasetResults], table: str, published: pd.DataFrame) -> str:
    """The Markdown of one marker.

    Args:
        all_results: by data set.
        table: one of the sweep's tables, or one of `RESERVED_TABLES`.
        published: rows of reported.csv.

    Raises:
        ValueError: the results lack what the table shows.
    """
    if table == OVERVIEW_TABLE:
        return _make_overview(all_results, published)
    blocks = []
    for results in all_results:
        if table == "reported":
            blocks.append(_make_published_block(results, published))
        elif table == "buckets":
            blocks.append(_make_bucket_block(results))
        else:
            blocks.append(_make_variant_block(results, results.sweep.tables[table]))
    return "\n\n".join(blocks)


def _make_variant_block(results: DatasetResults, variants: Sequence[str]) -> str:
    """A row per variant."""
    found = _select_variants_with_runs(results, variants)
    if not found:
        return _format_block(results, [], [], variants)
    runs = pd.concat(found.values())
    device = find_main_device(runs)
    cells = pd.DataFrame(index=list(found))
    cells["n"] = [_format_seed_count(results, variant) for variant in found]
    for column in METRIC_COLUMNS:
        cells[column.title] = _format_metric_column(column, found)
    cells["s / epoch"] = [_format_epoch_seconds(own, device) for own in found.values()]
    cells[_make_versus_title(results)] = [_format_relative_change(results, variant) for variant in found]
    cells[_P_VALUE_TITLE] = [_format_p_value(results, variant) for variant in found]
    filled = cells.loc[:, (cells != "").any()]
    table = filled.reset_index(names="variant")
    return _format_block(results, [table], [_describe_protocol(runs)], variants)


def _make_bucket_block(results: DatasetResults) -> str:
    """test_unseen NDCG@10 of the main variants by popularity of the target and length of history."""
    variants = get_main_variants(results.sweep)
    found = _select_variants_with_runs(results, variants)
    if not found:
        return _format_block(results, [], [], variants)
    tables = []
    for kind in _BUCKET_KINDS:
        buckets = list_buckets(results.runs, kind)
        if not buckets:
            path = results.sweep.path.with_suffix(".csv")
            raise UserError(f"{path}: no column {HEADLINE_METRIC}|{kind}=...; run the sweep again")
        cells = pd.DataFrame({kind: ["users", *found]})
        for bucket in buckets:
            column = MetricColumn(bucket, f"{HEADLINE_METRIC}|{kind}={bucket}", format_mean_std)
            users = format_bucket_users(results.runs, kind, bucket)
            cells[bucket] = [users, *_format_metric_column(column, found)]
        tables.append(cells)
    return _format_block(results, tables, [HEADLINE_TITLE], variants)


def _make_published_block(results: DatasetResults, published: pd.DataFrame) -> str:
    """Published numbers beside ours.

    A published model stands beside the variant of the same name; what follows a comma or a bracket is
    detail. The reference has its own row where nothing was published of it.
    """
    published = published[published["dataset"] == results.dataset]
    if published.empty:
        raise UserError(f"reported.csv has no row of {results.dataset}; add one or remove the marker")
    reference, rows = results.sweep.reference, []
    for protocol, group in published.groupby("protocol"):
        variants = [_match_variant(model, results.sweep) for model in group["model"]]
        for row, variant in zip(group.to_dict("records"), variants, strict=True):
            ours = _format_our_metrics(results, variant, protocol)
            rows.append([protocol, row["model"], row["hit@10"], row["ndcg@10"], *ours, row["source"]])
        if reference and reference not in variants:
            ours = _format_our_metrics(results, reference, protocol)
            rows.append([protocol, reference, "", "", *ours, "this project"])
    table = pd.DataFrame(rows, columns=_PUBLISHED_TITLES)
    note = "Published numbers are of their authors' data, tuning and often one seed"
    return _format_block(results, [table], [note])


def _make_overview(all_results: Sequence[DatasetResults], published: pd.DataFrame) -> str:
    """Each data set's reference beside the best published numbers and the best of the sweep's baselines."""
    references = {results.sweep.name: results.sweep.reference for results in all_results}
    if None in references.values() or len({*references.values()}) > 1:
        listed = ", ".join(f"{name}: {reference}" for name, reference in references.items())
        raise UserError(f"an overview needs sweeps with the same reference, got {listed}")
    versus = _make_versus_title(all_results[0])
    rows = [_make_overview_row(results, published) for results in all_results]
    table = format_markdown_table([*_OVERVIEW_TITLES, versus, _P_VALUE_TITLE], rows)
    return f"{table}\n\n{_OVERVIEW_NOTE.format(versus=versus)}"


def _make_overview_row(results: DatasetResults, published: pd.DataFrame) -> list[str]:
    sweep = results.sweep
    assert sweep.reference is not None
    name = results.dataset
    published = published[published["dataset"] == name]
    published = published[published["protocol"] == "test_unseen"]
    if sweep.keys(name, sweep.reference).get("split") == "global_time":
        name, published = f"{name}, split by time", published.iloc[:0]
    return [
        name,
        _format_seed_count(results, sweep.reference),
        *_format_our_metrics(results, sweep.reference, "test_unseen"),
        _format_quality(results, sweep.without_text),
        *(_format_best_published(published, metric) for metric in TABLE_METRICS),
        *_format_best_baseline(results),
    ]


def _format_best_published(published: pd.DataFrame, metric: str) -> str:
    """The highest published number and its model."""
    values = pd.to_numeric(published[metric]).dropna()
    if values.empty:
        return ""
    best = published.loc[values.idxmax()]
    return f"{best[metric]} ({_strip_model_details(best['model'])})"


def _format_best_baseline(results: DatasetResults) -> list[str]:
    """Quality and name of the strongest baseline, its relative change and its p."""
    means = {}
    for baseline in results.sweep.baselines:
        if quality := results.summarize_quality(baseline):
            means[baseline] = quality.mean
    if not means:
        return ["", "", ""]
    best = max(means, key=means.__getitem__)
    quality_text = f"{_format_quality(results, best)}: {best}"
    return [quality_text, _format_relative_change(results, best), _format_p_value(results, best)]


def _format_quality(results: DatasetResults, variant: str | None) -> str:
    """test_unseen NDCG@10 with the number of seeds."""
    quality = results.summarize_quality(variant)
    return f"{format_mean_std(quality)} (n {len(results.select_runs(variant))})" if quality else ""


def get_main_variants(sweep: Sweep) -> tuple[str, ...]:
    """The variants of the table `main`, or of the first table."""
    return sweep.tables.get(MAIN_TABLE, next(iter(sweep.tables.values())))


def list_buckets(runs: pd.DataFrame, kind: str) -> list[str]:
    """The buckets of a kind in which runs were measured, from the lowest."""
    start = f"{HEADLINE_METRIC}|{kind}="
    buckets = [column.removeprefix(start) for column in runs if column.startswith(start)]
    return sorted(buckets, key=lambda bucket: int(re.split(r"\D", bucket)[0] or 0))


def format_bucket_users(runs: pd.DataFrame, kind: str, bucket: str) -> str:
    """How many test users are in a bucket; empty where they were not counted."""
    column = f"test_users|{kind}={bucket}"
    users = runs[column].max() if column in runs else math.nan
    return "" if math.isnan(users) else f"{users:,.0f}"


def _select_variants_with_runs(results: DatasetResults, variants: Sequence[str]) -> RunsByVariant:
    found = {variant: results.select_runs(variant) for variant in variants}
    return {variant: runs for variant, runs in found.items() if len(runs)}


def _format_metric_column(column: MetricColumn, found: RunsByVariant) -> list[str]:
    """A text per variant; the best in bold, unless all are equal."""
    values = [summarize_seeds(runs, column.source) for runs in found.values()]
    means = {format_mean(value) for value in values if value}
    best = max(means) if column.mark_best and len(means) > 1 else None
    texts = []
    for value in values:
        text = column.format(value) if value else ""
        is_best = value and format_mean(value) == best
        texts.append(f"**{text}**" if is_best else text)
    return texts


def _format_epoch_seconds(runs: pd.DataFrame, device: str) -> str:
    """Seconds of an epoch on this device; falls back to the most common device, which is then named."""
    used = device if device in {*runs["device"]} else find_main_device(runs)
    seconds = summarize_seeds(runs[runs["device"] == used], "seconds_per_epoch")
    if seconds is None:
        return ""
    text = f"{seconds.mean:,.0f}" if seconds.mean >= 99.5 else f"{seconds.mean:.2g}"
    return text if used == device else f"{text} on {used or 'an unknown device'}"


def _format_seed_count(results: DatasetResults, variant: str) -> str:
    done = len(results.select_runs(variant))
    planned = len(results.sweep.seeds)
    return str(done) if done == planned else f"{done} of {planned}"


def _make_versus_title(results: DatasetResults) -> str:
    return f"vs {results.sweep.reference}"


def _format_relative_change(results: DatasetResults, variant: str) -> str:
    """A variant's quality relative to the reference's on the same seeds."""
    compared = results.compare_with_reference(variant)
    if compared is None or not compared[0].mean or variant == results.sweep.reference:
        return ""
    base, difference = compared
    return f"{100 * difference.mean / base.mean:+.1f}%"


def _format_p_value(results: DatasetResults, baseline: str) -> str:
    """A test's p; lists the seeds used when both variants have others, too."""
    if baseline not in results.tests.index:
        return ""
    p, seeds = results.tests.loc[baseline, ["p", "seeds"]]
    text = "< 0.001" if p < 0.001 else f"{p:.3f}"
    tested = seeds.split()
    reference_seeds = {*results.select_runs(results.sweep.reference)["seed"]}
    baseline_seeds = {*results.select_runs(baseline)["seed"]}
    if reference_seeds & baseline_seeds == {*tested}:
        return text
    word = "seed" if len(tested) == 1 else "seeds"
    return f"{text} ({word} {', '.join(tested)})"


def _match_variant(model: str, sweep: Sweep) -> str | None:
    """The variant that is the published model."""
    for name in (model, _strip_model_details(model)):
        if name in sweep.variants:
            return name
    return None


def _strip_model_details(model: str) -> str:
    """A published model's name without the detail behind a comma or in brackets."""
    return re.split(r",| \(", model)[0]


def _format_our_metrics(results: DatasetResults, variant: str | None, protocol: str) -> list[str]:
    """HR@10 and NDCG@10 of a variant."""
    runs = results.select_runs(variant)
    if variant and runs.empty:
        return [_NOT_RUN, ""]
    values = [summarize_seeds(runs, f"{protocol}.{metric}") for metric in TABLE_METRICS]
    return [format_mean_std(value) if value else "" for value in values]


def _format_block(
    results: DatasetResults,
    tables: Sequence[pd.DataFrame],
    notes: Sequence[str],
    variants: Sequence[str] = (),
) -> str:
    """Tables between the name of their data set, if there are several, and a line of notes.

    Args:
        results: of the data set.
        tables: cells as text.
        notes: sentences of the line.
        variants: those that the tables are about; the line names those without runs.
    """
    sweep = results.sweep
    parts = [f"**{results.dataset}**"] if len(sweep.datasets) > 1 else []
    parts += [format_markdown_table(list(table), table.to_numpy().tolist()) for table in tables]
    sentences = [*notes]
    missing = [variant for variant in variants if results.select_runs(variant).empty]
    if missing:
        sentences.append(f"{_NOT_RUN.capitalize()}: {'; '.join(missing)}")
    sentences.append(f"Made by `{sweep.command}`.")
    parts.append(". ".join(sentences))
    return "\n\n".join(parts)


def _describe_protocol(runs: pd.DataFrame) -> str:
    """Split, ranking, time order, counts, text and device."""
    split = " and ".join(_list_unique(runs, "split")).replace("_", "-")
    order = " and ".join(_list_unique(runs, "time_order"))
    ranking = [split, "full ranking", order and f"time order {order}"]
    counts = []
    for name in DATASET_COUNTS:
        counts += [f"{count:,.0f} {name}" for count in _list_unique(runs, name)]
    clauses = [", ".join(filter(None, ranking)), ", ".join(counts)]
    for count in _list_unique(runs, "test_returning"):
        clauses.append(f"{count:,.0f} test targets return, misses in test_unseen")
    clauses += [_describe_text_files(runs), _describe_devices(runs)]
    text = "; ".join(filter(None, clauses))
    return text[0].upper() + text[1:]


def _list_unique(runs: pd.DataFrame, column: str) -> list[Any]:
    """The values of a column, each once, without empty ones and zero."""
    return [value for value in runs[column].dropna().unique() if value]


def _describe_text_files(runs: pd.DataFrame) -> str:
    """What made text vectors; how many files of them there are, if not one."""
    texts = []
    for made_by in _list_unique(runs, "text"):
        files = len(_list_unique(runs[runs["text"] == made_by], "text_sha256"))
        texts.append(f"{made_by} ({files} files)" if files > 1 else made_by)
    return f"text by {' and '.join(texts)}" if texts else ""


def _describe_devices(runs: pd.DataFrame) -> str:
    """The main device, and those that a row of the table names."""
    main = find_main_device(runs)
    if not main:
        return ""
    others = [_describe_device(runs, device) for device in _list_unique(runs, "device") if device != main]
    text = f"timed on {_describe_device(runs, main)}"
    return f"{text}, and where a row says so on {' and '.join(others)}" if others else text


def _describe_device(runs: pd.DataFrame, device: str) -> str:
    """A device, and of a CPU how many threads runs had there."""
    threads = sorted(_list_unique(runs[runs["device"] == device], "threads"))
    if not (threads and device.startswith("cpu")):
        return device
    listed = " and ".join(f"{count:.0f}" for count in threads)
    return f"{device}, {listed} thread{'' if threads == [1] else 's'}"
