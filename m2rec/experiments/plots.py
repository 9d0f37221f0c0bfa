"""Plots of a sweep's results, as SVG; the same results give the same file."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from m2rec.experiments.ledger import (
    HEADLINE_METRIC,
    DatasetResults,
    SeedStatistics,
    find_main_device,
    summarize_seeds,
)
from m2rec.experiments.tables import HEADLINE_TITLE, format_bucket_users, get_main_variants, list_buckets
from m2rec.reports.charts import GREY, MARKERS, set_log_ticks, use_chart_style
from m2rec.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ABLATION_TABLE = "ablations"


class Panel(NamedTuple):
    """What one data set adds to a plot."""

    height: float
    """Inches."""
    draw: Callable[["Axes"], None]


def write_sweep_plots(all_results: Sequence[DatasetResults]) -> list[Path]:
    """Write NAME-time.svg, NAME-ablations.svg and NAME-popularity.svg beside the CSV.

    A plot for which nothing was measured is left out.

    Args:
        all_results: of one sweep, by data set.

    Returns:
        The files written.
    """
    plots = {
        "time": _make_time_panel,
        "ablations": _make_ablation_panel,
        "popularity": _make_popularity_panel,
    }
    sweep = all_results[0].sweep
    written = []
    for name, make_panel in plots.items():
        panels = {}
        for results in all_results:
            if panel := make_panel(results):
                title = results.dataset if len(all_results) > 1 else sweep.title
                panels[title] = panel
        if panels:
            path = sweep.path.with_name(f"{sweep.name}-{name}.svg")
            _write_plot(path, panels)
            written.append(path)
    return written


def _write_plot(path: Path, panels: dict[str, Panel]) -> None:
    with use_chart_style():
        from matplotlib.figure import Figure

        heights = [panel.height for panel in panels.values()]
        figure = Figure(figsize=(8, sum(heights)), layout="constrained")
        grid = figure.subplots(len(panels), height_ratios=heights, squeeze=False)
        for (title, panel), axes in zip(panels.items(), grid[:, 0], strict=True):
            panel.draw(axes)
            axes.set_title(title)
        save = partial(figure.savefig, format="svg", metadata={"Date": None})
        write_atomically(path, save)


def _make_time_panel(results: DatasetResults) -> Panel | None:
    """Quality against the seconds of a training, a point per variant that was run on the main device."""
    device = find_main_device(results.runs)
    points = {}
    for variant in results.sweep.variants:
        runs = results.select_runs(variant)
        runs = runs[runs["device"] == device]
        seconds = summarize_seeds(runs, "seconds_training")
        quality = summarize_seeds(runs, HEADLINE_METRIC)
        if seconds and quality:
            points[variant] = {seconds.mean: quality}

    def draw(axes: "Axes") -> None:
        _draw_variants(axes, points, linestyle="")
        unit = f"seconds, of runs on {device}" if device else "seconds"
        axes.set(xscale="log", xlabel=f"training, {unit}", ylabel=HEADLINE_TITLE)
        set_log_ticks(axes.xaxis, "{x:,.0f}")
        axes.grid()

    height = max(3.5, 0.25 * len(points))
    return Panel(height, draw) if points else None


def _make_ablation_panel(results: DatasetResults) -> Panel | None:
    """What each ablation adds to the reference or takes from it, seed by seed."""
    reference = results.sweep.reference
    base = results.summarize_quality(reference)
    differences = {}
    for variant in results.sweep.tables.get(ABLATION_TABLE, ()):
        if compared := results.compare_with_reference(variant):
            differences[variant] = compared[1]
    if base is None or not differences:
        return None

    def draw(axes: "Axes") -> None:
        means = [difference.mean for difference in differences.values()]
        errors = _list_errors(differences)
        axes.barh(list(differences), means, xerr=errors, color="C0", alpha=0.7, ecolor=GREY)
        beside = axes.get_yaxis_transform()
        for y, (variant, difference) in enumerate(differences.items()):
            text = "reference" if variant == reference else f"{difference.mean:+.4f}"
            axes.text(1.02, y, text, transform=beside, va="center")
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.invert_yaxis()
        seeds = f"on the same seeds (its mean: {base.mean:.4f})"
        axes.set_xlabel(f"{HEADLINE_TITLE}, difference to {reference} {seeds}")
        axes.grid(axis="x")

    return Panel(1.2 + 0.3 * len(differences), draw)


def _make_popularity_panel(results: DatasetResults) -> Panel | None:
    """Quality by how often the target is in the training data, a line per main variant."""
    buckets = list_buckets(results.runs, "popularity")
    lines = {}
    for variant in get_main_variants(results.sweep):
        runs = results.select_runs(variant)
        line = {}
        for x, bucket in enumerate(buckets):
            if quality := summarize_seeds(runs, f"{HEADLINE_METRIC}|popularity={bucket}"):
                line[x] = quality
        if line:
            lines[variant] = line

    def draw(axes: "Axes") -> None:
        _draw_variants(axes, lines)
        labels = []
        for bucket in buckets:
            users = format_bucket_users(results.runs, "popularity", bucket)
            labels.append(f"{bucket}\n{users} users")
        axes.set_xticks(range(len(buckets)), labels)
        axes.set(xlabel="times that the target is in the training data", ylabel=HEADLINE_TITLE)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")

    return Panel(3.5, draw) if lines else None


def _draw_variants(axes: "Axes", lines: dict[str, dict[Any, SeedStatistics]], linestyle: str = "-") -> None:
    """Values by x with their deviation over seeds, a colour and a marker per variant, and the legend."""
    for number, (variant, line) in enumerate(lines.items()):
        axes.errorbar(
            list(line),
            [value.mean for value in line.values()],
            _list_errors(line),
            marker=MARKERS[number % len(MARKERS)],
            linestyle=linestyle,
            color=f"C{number % 10}",
            label=variant,
        )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _list_errors(values: dict[Any, SeedStatistics]) -> list[float]:
    return [value.std or 0.0 for value in values.values()]
