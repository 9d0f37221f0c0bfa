"""The parts of the result tables: numbers as text, comparisons with the reference, Markdown."""

import re

from m2rec.experiments.ledger import (
    HEADLINE_METRIC,
    TABLE_METRICS,
    FinishedRuns,
    ResultRow,
    SeedStatistics,
    compare_with_reference,
    summarize_seeds,
)
from m2rec.experiments.sweep_plan import Sweep

NOT_RUN = "not run"
HEADLINE_TITLE = "test_unseen NDCG@10"
P_VALUE_TITLE = "p"


def format_mean(found: SeedStatistics) -> str:
    """The mean with four places."""
    return f"{found.mean:.4f}"


def format_mean_std(found: SeedStatistics) -> str:
    """The mean and its deviation over seeds, if there are several."""
    return format_mean(found) if found.std is None else f"{found.mean:.4f} ± {found.std:.4f}"


def format_seed_count(done: int, asked: int) -> str:
    """How many seeds were run, and of how many if not all."""
    return str(done) if done == asked else f"{done} of {asked}"


def format_p_value(sweep: Sweep, dataset: str, answers: FinishedRuns, test: ResultRow | None) -> str:
    """A test's p, with its seeds if both have more."""
    if test is None:
        return ""
    p = float(test["p"])
    text = "< 0.001" if p < 0.001 else f"{p:.3f}"
    ours, theirs = (
        {row["seed"] for row in answers[dataset, variant]}
        for variant in (sweep.reference or "", test["baseline"])
    )
    seeds = test["seeds"].split()
    word = "seed" if len(seeds) == 1 else "seeds"
    return text if ours & theirs == {*seeds} else f"{text} ({word} {', '.join(seeds)})"


def make_versus_title(sweep: Sweep) -> str:
    """The head of the column that compares with the reference."""
    return f"vs {sweep.reference}"


def format_relative_change(sweep: Sweep, dataset: str, answers: FinishedRuns, variant: str) -> str:
    """A variant's quality relative to the reference's on the same seeds."""
    if sweep.reference in (None, variant):
        return ""
    found = compare_with_reference(
        answers[dataset, variant], answers[dataset, sweep.reference], HEADLINE_METRIC
    )
    if found is None or not found[0].mean:
        return ""
    base, more = found
    return f"{100 * more.mean / base.mean:+.1f}%"


def strip_model_details(model: str) -> str:
    """A published model's name without the detail behind a comma or in brackets."""
    return re.split(r",| \(", model)[0]


def format_measured_metrics(
    answers: FinishedRuns, dataset: str, variant: str | None, protocol: str
) -> list[str]:
    """Our HR@10 and NDCG@10."""
    rows = answers[dataset, variant] if variant else []
    if variant and not rows:
        return [NOT_RUN, ""]
    found = [summarize_seeds(rows, f"{protocol}.{metric}") for metric in TABLE_METRICS]
    return [format_mean_std(one) if one else "" for one in found]


def format_markdown_table(lines: list[list[str]]) -> str:
    """Lines of cells as a table; the first is the head, short ones are filled up."""
    width = len(lines[0])
    filled = [[*line, *[""] * (width - len(line))] for line in lines]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in filled]
    return "\n".join(f"| {' | '.join(line)} |" for line in (escaped[0], ["---"] * width, *escaped[1:]))
