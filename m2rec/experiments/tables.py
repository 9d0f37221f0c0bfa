"""The result tables of README and docs, as Markdown."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from m2rec.errors import UserError
from m2rec.experiments.ledger import (
    DATASET_COUNTS,
    HEADLINE_METRIC,
    PUBLISHED,
    TABLE_METRICS,
    DatasetResults,
    SeedStatistics,
    find_main_device,
    summarize_seeds,
)
from m2rec.experiments.sweep_plan import MAIN_TABLE, OVERVIEW_TABLE, Sweep
from m2rec.reports.markdown import format_markdown_table

HEADLINE_TITLE = "test_unseen NDCG@10"

_BUCKET_KINDS = ("popularity", "history")
_PUBLISHED_TITLES = ["protocol", "model", "reported HR@10", "reported NDCG@10", "our HR@10", "our NDCG@10",
                     "confidence", "source"]  # fmt: skip
_OVERVIEW_TITLES = ("data set", "variant", "n", "HR@10", "NDCG@10", "NDCG@10 without text", "published HR@10",
                    "published NDCG@10", "NDCG@10 of the strongest baseline here")  # fmt: skip
_OVERVIEW_NOTE = (
    "test_unseen, full ranking. n: seeds; ±: their standard deviation. Published: the highest in "
    "`results/reported.csv` with the status `published`, of whichever model. Strongest baseline: the highest "
    "here of those that were run; {versus}: it relative to the row's variant, over the seeds that both have. "
    "p: paired bootstrap over users, these runs held fixed; blank: not tested."
)

# the runs of each variant that has any, in the order of a table
RunsByVariant = Mapping[str, pd.DataFrame]


def format_mean(value: SeedStatistics | None) -> str:
    """The mean with four decimals; empty without a value."""
    return f"{value.mean:.4f}" if value else ""


def format_mean_std(value: SeedStatistics | None) -> str:
    """The mean, and its deviation over several seeds; empty without a value."""
    text = format_mean(value)
    if value is None or value.std is None:
        return text
    return f"{text} ± {value.std:.4f}"


def _format_epoch_count(best_epoch: SeedStatistics | None) -> str:
    return f"{best_epoch.mean + 1:.0f}" if best_epoch else ""  # epochs count from 0


class MetricColumn(NamedTuple):
    """A column of numbers over variants."""

    title: str
    source: str
    """Column of NAME.csv."""
    format: Callable[[SeedStatistics | None], str]
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
_SHUFFLED_COLUMNS = (
    MetricColumn("ties shuffled: test_unseen HR@10", "test_unseen.hit@10", format_mean_std),
    MetricColumn(f"ties shuffled: {HEADLINE_TITLE}", HEADLINE_METRIC, format_mean_std),
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
            block = _make_published_block(results, published)
        elif table == "buckets":
            block = _make_bucket_block(results)
        else:
            block = _make_variant_block(results, table)
        blocks.append(block)
    return "\n\n".join(blocks)


def _make_variant_block(results: DatasetResults, table: str) -> str:
    """A row per variant."""
    variants = results.sweep.tables[table]
    found = _select_variants_with_runs(results, variants)
    if not found:
        return _format_block(results, [], [], variants)
    all_runs = pd.concat(found.values())
    device = find_main_device(all_runs)
    counts = []
    seconds = []
    comparisons = []
    for variant, runs in found.items():
        counts.append(_format_seed_count(results, variant))
        seconds.append(_format_epoch_seconds(runs, device))
        comparisons.append(_format_comparison(results, variant))
    cells = pd.DataFrame({"variant": list(found), "n": counts})
    for column in METRIC_COLUMNS:
        cells[column.title] = _format_metric_column(column, found)
    cells["s / epoch"] = seconds
    cells[_list_comparison_titles(results)] = comparisons
    notes = [_describe_protocol(all_runs)]
    if shuffled := _make_shuffled_cells(results, list(found)):
        cells = cells.assign(**shuffled)
        assert results.shuffled is not None
        notes.append(f"Ties shuffled: another protocol, made by `{results.shuffled.sweep.command}`")
    is_filled = (cells != "").any()
    return _format_block(results, [cells.loc[:, is_filled]], notes, variants)


def _make_shuffled_cells(results: DatasetResults, variants: Sequence[str]) -> dict[str, list[str]]:
    """By title, the same variants' quality where ties are shuffled; empty if none was run."""
    if results.shuffled is None:
        return {}
    found = _select_variants_with_runs(results.shuffled, variants)
    if not found:
        return {}
    columns = {column.title: _format_metric_column(column, found) for column in _SHUFFLED_COLUMNS}
    columns["ties shuffled: n"] = [_format_seed_count(results.shuffled, variant) for variant in found]
    cells = {}
    for title, texts in columns.items():
        by_variant = dict(zip(found, texts, strict=True))
        cells[title] = [by_variant.get(variant, "") for variant in variants]
    return cells


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
            source = f"{HEADLINE_METRIC}|{kind}={bucket}"
            column = MetricColumn(bucket, source, format_mean_std)
            users = format_bucket_users(results.runs, kind, bucket)
            texts = _format_metric_column(column, found)
            cells[bucket] = [users, *texts]
        tables.append(cells)
    return _format_block(results, tables, [HEADLINE_TITLE], variants)


def _make_published_block(results: DatasetResults, published: pd.DataFrame) -> str:
    """Published numbers beside ours.

    A published model stands beside the variant of the same name; what follows a comma or a bracket is
    detail. The reference has its own row where nothing was published of it.
    """
    if deviation := _describe_deviation(results):
        raise UserError(
            f"{results.sweep.name}: published numbers are of another protocol than {results.dataset}"
            f"{deviation}; remove the marker of the table reported"
        )
    published = published[published["dataset"] == results.dataset]
    if published.empty:
        raise UserError(f"reported.csv has no row of {results.dataset}; add one or remove the marker")
    headline = results.headline
    rows = []
    for protocol, group in published.groupby("protocol"):
        matched = []
        for row in group.to_dict("records"):
            model = row["model"]
            variant = _match_variant(model, results.sweep)
            matched.append(variant)
            ours = _format_our_metrics(results, variant, protocol)
            theirs = [row[metric] for metric in TABLE_METRICS]
            if row["status"] != PUBLISHED:
                model = f"{model}, {row['status']}"
            rows.append([protocol, model, *theirs, *ours, row["confidence"], row["source"]])
        if headline and headline not in matched:
            ours = _format_our_metrics(results, headline, protocol)
            rows.append([protocol, headline, "", "", *ours, "", "this project"])
    table = pd.DataFrame(rows, columns=_PUBLISHED_TITLES)
    note = "Published numbers are of their authors' data, tuning and often one seed"
    return _format_block(results, [table], [note])


def _make_overview(all_results: Sequence[DatasetResults], published: pd.DataFrame) -> str:
    """Each data set's headline beside the best published numbers and the best of the sweep's baselines."""
    references = {}
    for results in all_results:
        references[results.sweep.name] = results.sweep.reference
    distinct = set(references.values())
    if None in distinct or len(distinct) > 1:
        listed = ", ".join(f"{name}: {reference}" for name, reference in references.items())
        raise UserError(f"an overview needs sweeps with the same reference, got {listed}")
    titles = _list_comparison_titles(all_results[0])
    rows = [_make_overview_row(results, published) for results in all_results]
    table = format_markdown_table([*_OVERVIEW_TITLES, *titles], rows)
    note = _OVERVIEW_NOTE.format(versus=titles[0])
    return f"{table}\n\n{note}"


def _make_overview_row(results: DatasetResults, published: pd.DataFrame) -> list[str]:
    headline = results.headline
    assert headline is not None
    comparable = published[:0]
    deviation = _describe_deviation(results)
    if not deviation:
        is_own = (published["dataset"] == results.dataset) & (published["protocol"] == "test_unseen")
        comparable = published[is_own & (published["status"] == PUBLISHED)]
    return [
        f"{results.dataset}{deviation}",
        headline,
        _format_seed_count(results, headline),
        *_format_our_metrics(results, headline, "test_unseen"),
        _format_quality(results, results.headline_without_text),
        *(_format_best_published(comparable, metric) for metric in TABLE_METRICS),
        *_format_best_baseline(results),
    ]


def _describe_deviation(results: DatasetResults) -> str:
    """How a sweep's protocol on a data set differs from that of published numbers; empty if it does not."""
    keys = results.sweep.keys(results.dataset, next(iter(results.sweep.variants)))
    deviations = {"split": ("global_time", ", split by time"), "ties": ("shuffled", ", ties shuffled")}
    words = [word for key, (value, word) in deviations.items() if keys.get(key) == value]
    return "".join(words)


def _format_best_published(published: pd.DataFrame, metric: str) -> str:
    """The highest published number and its model."""
    values = pd.to_numeric(published[metric]).dropna()
    if values.empty:
        return ""
    best = published.loc[values.idxmax()]
    model = _strip_model_details(best["model"])
    return f"{best[metric]} ({model})"


def _format_best_baseline(results: DatasetResults) -> list[str]:
    """Quality and name of the strongest baseline, its relative change and its p."""
    means = {}
    for baseline in results.sweep.baselines:
        if quality := results.summarize_quality(baseline):
            means[baseline] = quality.mean
    if not means:
        return ["", "", ""]
    best = max(means, key=means.__getitem__)
    quality_text = _format_quality(results, best)
    change = _format_relative_change(results, best, results.headline)
    p = _format_p_value(results, best) if results.headline == results.sweep.reference else ""
    return [f"{quality_text}: {best}", change, p]


def _format_quality(results: DatasetResults, variant: str | None) -> str:
    """test_unseen NDCG@10 with the number of seeds."""
    quality = results.summarize_quality(variant)
    if quality is None:
        return ""
    n = len(results.select_runs(variant))
    return f"{format_mean_std(quality)} (n {n})"


def get_main_variants(sweep: Sweep) -> tuple[str, ...]:
    """The variants of the table `main`, or of the first table."""
    first = next(iter(sweep.tables.values()))
    return sweep.tables.get(MAIN_TABLE, first)


def list_buckets(runs: pd.DataFrame, kind: str) -> list[str]:
    """The buckets of a kind in which runs were measured, from the lowest."""
    start = f"{HEADLINE_METRIC}|{kind}="
    buckets = []
    for column in runs:
        if column.startswith(start):
            buckets.append(column.removeprefix(start))
    return sorted(buckets, key=_get_lower_end)


def _get_lower_end(bucket: str) -> int:
    """The first number of a bucket such as `6-20` or `101+`."""
    return int(re.split(r"\D", bucket)[0])


def format_bucket_users(runs: pd.DataFrame, kind: str, bucket: str) -> str:
    """How many test users are in a bucket; empty where they were not counted."""
    column = f"test_users|{kind}={bucket}"
    if column not in runs or runs[column].isna().all():
        return ""
    return f"{runs[column].max():,.0f}"


def _select_variants_with_runs(results: DatasetResults, variants: Sequence[str]) -> RunsByVariant:
    found = {}
    for variant in variants:
        runs = results.select_runs(variant)
        if len(runs):
            found[variant] = runs
    return found


def _format_metric_column(column: MetricColumn, found: RunsByVariant) -> list[str]:
    """A text per variant; the best in bold, unless all are equal."""
    texts = []
    means = []
    for runs in found.values():
        value = summarize_seeds(runs, column.source)
        texts.append(column.format(value))
        means.append(format_mean(value))
    distinct = set(means) - {""}
    if not column.mark_best or len(distinct) < 2:
        return texts
    best = max(distinct)
    for row, mean in enumerate(means):
        if mean == best:
            texts[row] = f"**{texts[row]}**"
    return texts


def _format_epoch_seconds(runs: pd.DataFrame, device: str) -> str:
    """Seconds of an epoch on this device; falls back to the most common device, which is then named."""
    used = device
    if not (runs["device"] == device).any():
        used = find_main_device(runs)
    timed = runs[runs["device"] == used]
    seconds = summarize_seeds(timed, "seconds_per_epoch")
    if seconds is None:
        return ""
    number_format = ",.0f" if seconds.mean >= 99.5 else ".2g"
    text = format(seconds.mean, number_format)
    if used != device:
        text += f" on {used or 'an unknown device'}"
    return text


def _format_seed_count(results: DatasetResults, variant: str) -> str:
    done = len(results.select_runs(variant))
    planned = len(results.sweep.seeds)
    if done == planned:
        return str(done)
    return f"{done} of {planned}"


def _list_comparison_titles(results: DatasetResults) -> list[str]:
    return [f"vs {results.sweep.reference}", "p"]


def _format_comparison(results: DatasetResults, variant: str) -> list[str]:
    """A variant beside the reference: its relative change and its p."""
    return [_format_relative_change(results, variant), _format_p_value(results, variant)]


def _format_relative_change(results: DatasetResults, variant: str, reference: str | None = None) -> str:
    """A variant's quality relative to the reference's, or another one's, on the same seeds."""
    if variant == (reference or results.sweep.reference):
        return ""
    compared = results.compare_with_reference(variant, reference)
    if compared is None:
        return ""
    base, difference = compared
    if base.mean == 0:
        return ""
    return f"{100 * difference.mean / base.mean:+.1f}%"


def _format_p_value(results: DatasetResults, baseline: str) -> str:
    """A test's p; lists the seeds used when both variants have others, too."""
    if baseline not in results.tests.index:
        return ""
    test = results.tests.loc[baseline]
    p = test["p"]
    text = "< 0.001" if p < 0.001 else f"{p:.3f}"
    reference_runs = results.select_runs(results.sweep.reference)
    baseline_runs = results.select_runs(baseline)
    shared = set(reference_runs["seed"]).intersection(baseline_runs["seed"])
    tested = test["seeds"].split()
    if shared != set(tested):
        word = "seed" if len(tested) == 1 else "seeds"
        text += f" ({word} {', '.join(tested)})"
    return text


def _match_variant(model: str, sweep: Sweep) -> str | None:
    """The variant that is the published model."""
    if model in sweep.variants:
        return model
    name = _strip_model_details(model)
    return name if name in sweep.variants else None


def _strip_model_details(model: str) -> str:
    """A published model's name without the detail behind a comma or in brackets."""
    return re.split(r",| \(", model)[0]


def _format_our_metrics(results: DatasetResults, variant: str | None, protocol: str) -> list[str]:
    """HR@10 and NDCG@10 of a variant."""
    runs = results.select_runs(variant)
    if variant and runs.empty:
        return ["not run", ""]
    texts = []
    for metric in TABLE_METRICS:
        value = summarize_seeds(runs, f"{protocol}.{metric}")
        texts.append(format_mean_std(value))
    return texts


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
    parts = []
    if len(sweep.datasets) > 1:
        parts.append(f"**{results.dataset}**")
    for table in tables:
        rows = table.to_numpy().tolist()
        parts.append(format_markdown_table(list(table), rows))
    sentences = [*notes]
    done = set(results.runs["variant"])
    missing = "; ".join(variant for variant in variants if variant not in done)
    if missing:
        sentences.append(f"Not run: {missing}")
    sentences.append(f"Made by `{sweep.command}`.")
    parts.append(". ".join(sentences))
    return "\n\n".join(parts)


def _describe_protocol(runs: pd.DataFrame) -> str:
    """Split, ranking, time order, counts, text and device."""
    ranking = [_join_unique(runs, "split").replace("_", "-"), "full ranking"]
    if order := _join_unique(runs, "time_order"):
        ranking.append(f"time order {order}")
    ranking.append({"file": "ties in file order", "shuffled": "ties shuffled"}[_join_unique(runs, "ties")])
    counts = []
    for name in DATASET_COUNTS:
        for count in _list_unique(runs, name):
            counts.append(f"{count:,.0f} {name}")
    clauses = [", ".join(filter(None, ranking)), ", ".join(counts)]
    for count in _list_unique(runs, "test_returning"):
        clauses.append(f"{count:,.0f} test targets return, misses in test_unseen")
    clauses.append(_describe_text_files(runs))
    clauses.append(_describe_devices(runs))
    text = "; ".join(filter(None, clauses))
    return text[0].upper() + text[1:]


def _list_unique(runs: pd.DataFrame, column: str) -> pd.Series:
    """The values of a column, each once, without empty ones and zero."""
    values = runs[column].dropna().drop_duplicates()
    return values[values.astype(bool)]


def _join_unique(runs: pd.DataFrame, column: str) -> str:
    return " and ".join(_list_unique(runs, column))


def _describe_text_files(runs: pd.DataFrame) -> str:
    """What made text vectors; how many files of them there are, if not one."""
    texts = []
    for made_by in _list_unique(runs, "text"):
        own_runs = runs[runs["text"] == made_by]
        files = len(_list_unique(own_runs, "text_sha256"))
        texts.append(f"{made_by} ({files} files)" if files > 1 else made_by)
    listed = " and ".join(texts)
    return f"text by {listed}" if listed else ""


def _describe_devices(runs: pd.DataFrame) -> str:
    """The main device, and those that a row of the table names."""
    main = find_main_device(runs)
    if not main:
        return ""
    text = f"timed on {_describe_device(runs, main)}"
    others = []
    for device in _list_unique(runs, "device"):
        if device != main:
            others.append(_describe_device(runs, device))
    if others:
        listed = " and ".join(others)
        text += f", and where a row says so on {listed}"
    return text


def _describe_device(runs: pd.DataFrame, device: str) -> str:
    """A device, and of a CPU how many threads runs had there."""
    own_runs = runs[runs["device"] == device]
    threads = _list_unique(own_runs, "threads").sort_values()
    if threads.empty or not device.startswith("cpu"):
        return device
    listed = " and ".join(f"{count:.0f}" for count in threads)
    word = "thread" if listed == "1" else "threads"
    return f"{device}, {listed} {word}"
