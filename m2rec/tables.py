"""Markdown of a sweep's results: the tables of README and docs."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from m2rec.results import (
    COUNTS,
    HEADLINE,
    Answers,
    Row,
    Spread,
    distinct,
    main_device,
    on_device,
    read_paired,
    spread,
    value,
)
from m2rec.sweeps import MAIN, Sweep
from m2rec.table_parts import (
    NOT_RUN,
    QUALITY,
    P,
    four,
    four_pm,
    markdown,
    measured,
    p_value,
    plain_name,
    relative,
    seeds_done,
    versus,
)

KINDS = ("popularity", "history")


class Column(NamedTuple):
    """A column of numbers over variants."""

    title: str
    source: str
    """Column of NAME.csv."""
    show: Callable[[Spread], str]
    best: bool = True
    """Whether the highest is in bold."""


def _seconds(rows: Sequence[Row], device: str) -> str:
    """Seconds of an epoch on this device; if no run was there, on the one that most had, which is named."""
    own = device if on_device(rows, device) else main_device(rows)
    found = spread(on_device(rows, own), "seconds_per_epoch")
    if found is None:
        return ""
    text = f"{found.mean:,.0f}" if found.mean >= 99.5 else f"{found.mean:.2g}"
    return text if own == device else f"{text} on {own or 'an unknown device'}"


def _epochs(found: Spread) -> str:
    return f"{found.mean + 1:.0f}"  # they count from 0


COLUMNS = (
    Column("test_unseen HR@10", "test_unseen.hit@10", four_pm),
    Column(QUALITY, HEADLINE, four_pm),
    Column("test HR@10", "test.hit@10", four_pm),
    Column("test NDCG@10", "test.ndcg@10", four_pm),
    Column("valid NDCG@10", "valid.ndcg@10", four),
    Column("item coverage@10", "test_unseen.itemcoverage@10", four),
    Column("epochs to best", "best_epoch", _epochs, best=False),
)


def result_table(sweep: Sweep, answers: Answers, table: str) -> str:
    """One of the sweep's tables: a row per variant, and a line on how they were made.

    Args:
        sweep: names tables, seeds and reference.
        answers: its finished runs.
        table: which of the sweep's tables.

    Raises:
        ValueError: NAME-paired.csv can't be read, or is of other runs.
    """
    paired = read_paired(sweep, answers)
    blocks = []
    for dataset in sweep.datasets:
        variants = sweep.tables[table]
        lines = _result_lines(sweep, dataset, answers, variants, paired)
        rows = _rows_of(answers, dataset, variants)
        words = [_protocol(rows)] if rows else []
        blocks.append(_block(sweep, dataset, [lines], words, _not_run(answers, dataset, variants)))
    return "\n\n".join(blocks)


def bucket_tables(sweep: Sweep, answers: Answers) -> str:
    """test_unseen NDCG@10 of the main variants by popularity of the target and length of history.

    Raises:
        ValueError: the finished runs were not measured by bucket.
    """
    blocks = []
    for dataset in sweep.datasets:
        variants = main_variants(sweep)
        rows = _rows_of(answers, dataset, variants)
        runs = _finished(answers, dataset, variants)
        tables = [_bucket_lines(sweep, dataset, runs, kind) for kind in KINDS] if rows else []
        words = [QUALITY] if rows else []
        blocks.append(_block(sweep, dataset, tables, words, _not_run(answers, dataset, variants)))
    return "\n\n".join(blocks)


def reported_table(sweep: Sweep, answers: Answers, reported: Sequence[Row]) -> str:
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
            raise ValueError(f"reported.csv has no row of {dataset}; add one or take the marker away")
        lines = _reported_lines(sweep, dataset, answers, published)
        words = ["Published numbers are of their authors' data, tuning and often one seed"]
        blocks.append(_block(sweep, dataset, [lines], words))
    return "\n\n".join(blocks)


def main_variants(sweep: Sweep) -> tuple[str, ...]:
    """The variants of the table `main`, or of the first."""
    return sweep.tables.get(MAIN, next(iter(sweep.tables.values())))


def buckets(rows: Iterable[Row], kind: str) -> list[str]:
    """The buckets of a kind in which runs were measured, from the lowest."""
    start = f"{HEADLINE}|{kind}="
    found = {column.removeprefix(start) for row in rows for column in row if column.startswith(start)}
    return sorted(found, key=lambda bucket: int("0" + re.sub(r"\D.*", "", bucket)))


def users_in(rows: Iterable[Row], kind: str, bucket: str) -> str:
    """Test users in a bucket; nothing where they were not counted."""
    counts = {count for row in rows if (count := value(row, f"test_users|{kind}={bucket}")) is not None}
    return f"{max(counts):,.0f}" if counts else ""


def _result_lines(
    sweep: Sweep,
    dataset: str,
    answers: Answers,
    variants: Sequence[str],
    paired: Mapping[tuple[str, str], Row],
) -> list[list[str]]:
    runs = _finished(answers, dataset, variants)
    device = main_device(_rows_of(answers, dataset, variants))
    columns = {column.title: _cells(column, runs) for column in COLUMNS}
    columns["s / epoch"] = [_seconds(rows, device) for rows in runs.values()]
    columns[versus(sweep)] = [relative(sweep, dataset, answers, variant) for variant in runs]
    columns[P] = [p_value(sweep, dataset, answers, paired.get((dataset, variant))) for variant in runs]
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    seeds = [seeds_done(len(rows), len(sweep.seeds)) for rows in runs.values()]
    lines = zip(runs, seeds, *columns.values(), strict=True)
    return [["variant", "n", *columns], *map(list, lines)]


def _cells(column: Column, runs: Mapping[str, Sequence[Row]]) -> list[str]:
    """A column's texts, in the order of the variants; the best in bold, unless all are equal."""
    found = [spread(rows, column.source) for rows in runs.values()]
    best = max((four(one) for one in found if one), default="")
    bold = column.best and len({four(one) for one in found if one}) > 1
    texts = [column.show(one) if one else "" for one in found]
    return [
        f"**{text}**" if bold and one and four(one) == best else text
        for text, one in zip(texts, found, strict=True)
    ]


def _finished(answers: Answers, dataset: str, variants: Sequence[str]) -> dict[str, Sequence[Row]]:
    """The runs of each variant that has any."""
    return {variant: rows for variant in variants if (rows := answers[dataset, variant])}


def _rows_of(answers: Answers, dataset: str, variants: Sequence[str]) -> list[Row]:
    return [row for variant in variants for row in answers[dataset, variant]]


def _bucket_lines(
    sweep: Sweep, dataset: str, runs: Mapping[str, Sequence[Row]], kind: str
) -> list[list[str]]:
    rows = [row for found in runs.values() for row in found]
    names = buckets(rows, kind)
    if not names:
        path = sweep.path.with_suffix(".csv")
        raise ValueError(f"{path}: no column {HEADLINE}|{kind}=... on {dataset}; run the sweep again")
    columns = [Column(name, f"{HEADLINE}|{kind}={name}", four_pm) for name in names]
    cells = [_cells(column, runs) for column in columns]
    lines = [[kind, *names], ["users", *(users_in(rows, kind, name) for name in names)]]
    lines += [[variant, *(column[k] for column in cells)] for k, variant in enumerate(runs)]
    return lines


def _reported_lines(
    sweep: Sweep, dataset: str, answers: Answers, published: Sequence[Row]
) -> list[list[str]]:
    heads = ["protocol", "model", "reported HR@10", "reported NDCG@10", "our HR@10", "our NDCG@10", "source"]
    lines = [heads]
    for protocol in sorted({row["protocol"] for row in published}):
        rows = [row for row in published if row["protocol"] == protocol]
        for row in rows:
            ours = measured(answers, dataset, _same_model(row, sweep), protocol)
            lines.append([protocol, row["model"], row["hit@10"], row["ndcg@10"], *ours, row["source"]])
        if sweep.reference and sweep.reference not in (_same_model(row, sweep) for row in rows):
            ours = measured(answers, dataset, sweep.reference, protocol)
            lines.append([protocol, sweep.reference, "", "", *ours, "this project"])
    return lines


def _same_model(row: Row, sweep: Sweep) -> str | None:
    """The variant that is the published model."""
    names = (row["model"], plain_name(row["model"]))
    return next((name for name in names if name in sweep.variants), None)


def _block(
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
    parts += [markdown(lines) for lines in tables if len(lines) > 1]
    missing = f"{NOT_RUN.capitalize()}: {not_run}" if not_run else ""
    sentences = [*words, missing, f"Made by `{sweep.command}`"]
    parts.append(" ".join(f"{sentence}." for sentence in sentences if sentence))
    return "\n\n".join(parts)


def _not_run(answers: Answers, dataset: str, variants: Sequence[str]) -> str:
    return "; ".join(variant for variant in variants if not answers[dataset, variant])


def _protocol(rows: Sequence[Row]) -> str:
    """Split, ranking, time order, counts, device."""
    splits = " and ".join(split.replace("_", "-") for split in distinct(rows, "split"))
    orders = " and ".join(distinct(rows, "time_order"))
    text = f"{splits}, full ranking" if splits else "full ranking"
    text += f", time order {orders}" if orders else ""
    counts = [f"{int(float(n)):,} {name}" for name in COUNTS for n in distinct(rows, name)]
    text += f"; {', '.join(counts)}" if counts else ""
    returning = [int(n) for n in distinct(rows, "test_returning") if n != "0"]
    text += "".join(f"; {n:,} test targets return, misses in test_unseen" for n in returning)
    texts = " and ".join(_text_files(rows, made_by) for made_by in distinct(rows, "text"))
    text += f"; text by {texts}" if texts else ""
    main = main_device(rows)
    others = [device for device in distinct(rows, "device") if device != main]
    text += f"; timed on {_with_threads(rows, main)}" if main else ""
    if others:
        text += f", and where a row says so on {' and '.join(_with_threads(rows, one) for one in others)}"
    return text[0].upper() + text[1:]


def _with_threads(rows: Sequence[Row], device: str) -> str:
    """A device, and of a CPU how many threads runs had there."""
    threads = sorted(distinct(on_device(rows, device), "threads"), key=int)
    if not (threads and device.startswith("cpu")):
        return device
    return f"{device}, {' and '.join(threads)} thread{'s' if threads != ['1'] else ''}"


def _text_files(rows: Sequence[Row], made_by: str) -> str:
    """What made text vectors; how many files of them there are, if not one."""
    files = len({row["text_sha256"] for row in rows if row["text"] == made_by and row.get("text_sha256")})
    return f"{made_by} ({files} files)" if files > 1 else made_by
