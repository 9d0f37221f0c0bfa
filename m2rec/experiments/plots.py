"""Pictures of a sweep's results, as SVG; the same results are the same file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from m2rec.experiments.ledger import (
    HEADLINE_METRIC,
    FinishedRuns,
    SeedStatistics,
    collect_dataset_rows,
    compare_with_reference,
    find_main_device,
    select_rows_on_device,
    summarize_seeds,
)
from m2rec.experiments.sweep_plan import Sweep
from m2rec.experiments.table_parts import HEADLINE_TITLE
from m2rec.experiments.tables import format_bucket_users, get_main_variants, list_buckets
from m2rec.reports.charts import GREY, MARKERS, use_chart_style
from m2rec.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ABLATION_TABLE = "ablations"


class Panel(NamedTuple):
    """What one data set adds to a picture."""

    height: float
    """Inches."""
    draw: Callable[["Axes"], None]


def write_sweep_plots(sweep: Sweep, answers: FinishedRuns) -> list[Path]:
    """Write NAME-time.svg, NAME-ablations.svg and NAME-popularity.svg beside the CSV.

    A picture for which nothing was measured is left out.

    Args:
        sweep: names variants, tables and reference.
        answers: its finished runs.

    Returns:
        The files written.
    """
    pictures = {
        "time": _make_time_panel,
        "ablations": _make_ablation_panel,
        "popularity": _make_popularity_panel,
    }
    written = []
    for name, make in pictures.items():
        panels = {dataset: make(sweep, answers, dataset) for dataset in sweep.datasets}
        if measured := {dataset: panel for dataset, panel in panels.items() if panel}:
            path = sweep.path.with_name(f"{sweep.name}-{name}.svg")
            _write_plot(path, sweep, measured)
            written.append(path)
    return written


def _write_plot(path: Path, sweep: Sweep, panels: Mapping[str, Panel]) -> None:
    with use_chart_style():
        from matplotlib.figure import Figure

        heights = [panel.height for panel in panels.values()]
        figure = Figure(figsize=(8, sum(heights)), layout="constrained")
        grid = figure.subplots(len(panels), height_ratios=heights, squeeze=False)
        for (dataset, panel), axes in zip(panels.items(), grid[:, 0], strict=True):
            panel.draw(axes)
            axes.set_title(dataset if len(sweep.datasets) > 1 else sweep.title)
        write_atomically(path, lambda p: figure.savefig(p, format="svg", metadata={"Date": None}))


def _make_time_panel(sweep: Sweep, answers: FinishedRuns, dataset: str) -> Panel | None:
    """Quality against the seconds of a training, a point per variant that was run on the main device."""
    device = find_main_device(collect_dataset_rows(answers, dataset))
    points: dict[str, tuple[SeedStatistics, SeedStatistics]] = {}
    for variant in sweep.variants:
        rows = select_rows_on_device(answers[dataset, variant], device)
        seconds, quality = summarize_seeds(rows, "seconds_training"), summarize_seeds(rows, HEADLINE_METRIC)
        if seconds and quality:
            points[variant] = seconds, quality

    def onto(axes: "Axes") -> None:
        from matplotlib.ticker import LogLocator

        for k, (variant, (seconds, quality)) in enumerate(points.items()):
            marker = MARKERS[k % len(MARKERS)]
            error = quality.std or 0.0
            axes.errorbar(seconds.mean, quality.mean, error, fmt=marker, color=f"C{k % 10}", label=variant)
        axes.set(
            xscale="log",
            xlabel="training, seconds" + (f", of runs on {device}" if device else ""),
            ylabel=HEADLINE_TITLE,
        )
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.grid()
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return Panel(max(3.5, 0.25 * len(points)), onto) if points else None


def _make_ablation_panel(sweep: Sweep, answers: FinishedRuns, dataset: str) -> Panel | None:
    """What each ablation adds to the reference or takes from it, seed by seed."""
    reference = answers[dataset, sweep.reference] if sweep.reference else []
    zero = summarize_seeds(reference, HEADLINE_METRIC)
    found = {
        v: compare_with_reference(answers[dataset, v], reference, HEADLINE_METRIC)
        for v in sweep.tables.get(ABLATION_TABLE, ())
    }
    bars = {variant: pair[1] for variant, pair in found.items() if pair}
    if zero is None or not bars:
        return None

    def onto(axes: "Axes") -> None:
        names = list(bars)
        differences = [more.mean for more in bars.values()]
        errors = [more.std or 0.0 for more in bars.values()]
        axes.barh(names, differences, xerr=errors, color="C0", alpha=0.7, ecolor=GREY)
        for y, (name, difference) in enumerate(zip(names, differences, strict=True)):
            text = "reference" if name == sweep.reference else f"{difference:+.4f}"
            axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center")
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel(
            f"{HEADLINE_TITLE}, difference to {sweep.reference} on the same seeds (its mean: {zero.mean:.4f})"
        )
        axes.grid(axis="x")

    return Panel(1.2 + 0.3 * len(bars), onto)


def _make_popularity_panel(sweep: Sweep, answers: FinishedRuns, dataset: str) -> Panel | None:
    """Quality by how often the target is in the training data, a line per main variant."""
    rows = collect_dataset_rows(answers, dataset)
    names = list_buckets(rows, "popularity")
    lines: dict[str, dict[int, SeedStatistics]] = {}
    for variant in get_main_variants(sweep):
        of_variant = answers[dataset, variant]
        found = [summarize_seeds(of_variant, f"{HEADLINE_METRIC}|popularity={name}") for name in names]
        if any(found):
            lines[variant] = {x: quality for x, quality in enumerate(found) if quality}

    def onto(axes: "Axes") -> None:
        for k, (variant, line) in enumerate(lines.items()):
            means = [quality.mean for quality in line.values()]
            errors = [quality.std or 0.0 for quality in line.values()]
            marker = MARKERS[k % len(MARKERS)]
            axes.errorbar(list(line), means, errors, marker=marker, color=f"C{k % 10}", label=variant)
        counts = [format_bucket_users(rows, "popularity", name) for name in names]
        labels = [f"{name}\n{count} users" for name, count in zip(names, counts, strict=True)]
        axes.set_xticks(range(len(names)), labels)
        axes.set(xlabel="times that the target is in the training data", ylabel=HEADLINE_TITLE)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return Panel(3.5, onto) if lines else None
