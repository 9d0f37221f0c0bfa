"""Run folders -> one HTML page that needs no network: metrics, curves, gate, filter, examples."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from shlex import quote
from typing import Any, Self

from m2rec.errors import UserError
from m2rec.reports import charts, page
from m2rec.reports.page import PageFigure
from m2rec.run_folder import RunFolder
from m2rec.storage import write_text

_PAGE_PROTOCOLS = ("valid", "test", "test_unseen", "test_new")
_TIME_UNITS = (("days", 86_400), ("hours", 3_600), ("minutes", 60))


@dataclass(frozen=True)
class RunRecord:
    """What a finished run left in its folder."""

    folder: Path
    metrics: Mapping[str, Any]
    config: Mapping[str, Any]
    history: list[dict[str, str]]
    """A row per epoch."""
    titles: Mapping[str, str]
    insights: Mapping[str, Any]
    """As `insights.look` found them; empty for runs that were made before there were any."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a folder.

        Raises:
            ValueError: a file is missing or damaged.
        """
        files = RunFolder(folder)
        return cls(
            folder,
            metrics=files.read_metrics(),
            config=files.read_config(),
            history=files.read_history(),
            titles=files.read_titles(),
            insights=files.read_insights(),
        )

    @property
    def metric(self) -> str:
        """The metric that the weights were chosen by."""
        return str(self.metrics.get("valid_metric", self.config["valid_metric"])).lower()

    def title(self, token: str) -> str:
        """An item as a person knows it."""
        return self.titles.get(token, token)


def write_run_page(folder: Path) -> Path:
    """Write report.html into the folder of a finished run.

    Raises:
        ValueError: it is none, or one of its files is not as a run leaves it.
    """
    path = RunFolder(folder).report_file
    with _report_damaged_files(folder):
        write_text(path, _render_run_page(RunRecord.read(folder)))
    return path


def write_comparison_page(folders: Sequence[Path], path: Path) -> Path:
    """Write one page that sets several finished runs side by side.

    Raises:
        ValueError: one is none, or is given twice; or a file is not as a run leaves it.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is given twice; name each once")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = {name: RunRecord.read(folder) for name, folder in zip(names, folders, strict=True)}
    with _report_damaged_files(*folders):
        write_text(path, _render_comparison_page(runs))
    return path


def write_insight_charts(folder: Path, into: Path) -> list[Path]:
    """Write what gate and filter of a finished run do as SVG files.

    Args:
        folder: of the run.
        into: the folder for the pictures, made if need be.

    Returns:
        Their paths: gate_by_layer.svg, gate_by_position.svg, gate_by_popularity.svg,
        filter_gain.svg and filter_periods.svg, fewer where the model has no such part.

    Raises:
        ValueError: it is no finished run, its model has neither, or one of its files is not as a run
            leaves it.
    """
    run = RunRecord.read(folder)
    with _report_damaged_files(folder):
        figures = {**_make_gate_figures(run), **_make_filter_figures(run)}
    if not figures:
        raise UserError(
            f"{folder}: its model has neither a gate nor a filter that learns, or it has no insights"
        )
    into.mkdir(parents=True, exist_ok=True)
    for name, shown in figures.items():
        write_text(into / f"{name}.svg", shown.svg.decode())
    return [into / f"{name}.svg" for name in figures]


@contextmanager
def _report_damaged_files(*folders: Path) -> Iterator[None]:
    """Turn what unexpected content of these run folders raises into one line."""
    try:
        yield
    except UserError:  # it names the file
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        names = ", ".join(map(str, folders))
        raise UserError(f"{names}: a file has unexpected content ({type(error).__name__}: {error})") from None


def _render_run_page(run: RunRecord) -> str:
    """The page of a run."""
    name = f"{run.metrics['model']} on {run.metrics['dataset']}"
    sections = [
        _render_header(name, {run.folder.name: run}),
        page.render_section("Quality", _render_metrics_table(run), _render_protocol(run)),
        page.render_section("Training", page.render_grid(_render_training_curves({"": run}))),
        page.render_section("Who is served", page.render_grid(_render_bucket_charts(run))),
        _render_gate(run),
        _render_filter(run),
        _render_examples(run),
        page.render_section("Settings", _render_settings(run.config), _render_commands(run)),
    ]
    return page.render_page(name, sections)


def _render_comparison_page(runs: Mapping[str, RunRecord]) -> str:
    """The page of several runs by name."""
    parts = [part for part in _select_protocols(runs.values()) if part != "valid"]
    sections = [
        _render_header("Runs compared", runs),
        page.render_section(
            "Quality",
            _render_comparability_warning(runs),
            *(_render_metric_comparison(runs, part) for part in parts),
        ),
        page.render_section("Training", page.render_grid(_render_training_curves(runs))),
        page.render_section("What differs", _render_setting_differences(runs)),
        *(
            page.render_section(name, _render_protocol(run), _render_commands(run))
            for name, run in runs.items()
        ),
    ]
    return page.render_page("Runs compared", sections)


def _render_header(title: str, runs: Mapping[str, RunRecord]) -> str:
    facts = []
    for name, run in runs.items():
        m = run.metrics
        facts.append(
            f"{name}: seed {m['seed']}, {m['parameters']:,} parameters, {m['epochs']} epochs "
            f"(best {m['best_epoch']}), {m['seconds']['total']:,.0f} s on {m['device']}, "
            f"commit {str(m['commit'])[:9]}"
        )
    return f"<h1>{escape(title)}</h1>" + "".join(f'<p class="facts">{escape(fact)}</p>' for fact in facts)


def _render_metrics_table(run: RunRecord) -> str:
    parts = _select_protocols([run])
    rows = [
        [name, *(_format_metric_value(run.metrics[part][name]) for part in parts)]
        for name in run.metrics["test"]
    ]
    return page.render_table(["metric", *parts], rows)


def _select_protocols(runs: Collection[RunRecord]) -> list[str]:
    """The protocols that were measured; test_new only where it differs from test_unseen."""
    returns = any(run.metrics["data"].get("test_returning") for run in runs)
    parts = [part for part in _PAGE_PROTOCOLS if returns or part != "test_new"]
    return [part for part in parts if any(run.metrics.get(part) for run in runs)]


def _render_comparability_warning(runs: Mapping[str, RunRecord]) -> str:
    """What keeps these runs from being compared on test_unseen; empty where nothing does."""
    counts = {name: run.metrics["data"].get("test_returning") for name, run in runs.items()}
    old = [name for name, count in counts.items() if count is None]
    if not old or not any(counts.values()):
        return ""
    return (
        f"<p>{escape(', '.join(old))}: measured when targets that return were no misses in test_unseen. "
        "Compare only test with the others.</p>"
    )


def _render_metric_comparison(runs: Mapping[str, RunRecord], part: str) -> str:
    measured = [run.metrics.get(part, {}) for run in runs.values()]
    names = list(dict.fromkeys(name for metrics in measured for name in metrics))
    rows = [[name, *(_format_metric_value(metrics.get(name)) for metrics in measured)] for name in names]
    return f"<h3>{part}</h3>" + page.render_table(["metric", *runs], rows)


def _render_protocol(run: RunRecord) -> str:
    p = run.metrics["protocol"]
    data = ", ".join(f"{name} {count:,}" for name, count in run.metrics["data"].items())
    cautions = "".join(f" {escape(p[key])}." for key in ("ties", "returning") if key in p)
    return (
        f'<p class="note">Split {escape(p["split"])}: {escape(p["targets"])}. '
        f"Ranking {escape(p['ranking'])}, time order {escape(p['time_order'])}, "
        f"{escape(p['chosen_by'])}. test: {escape(p['test'])}. test_unseen: {escape(p['test_unseen'])}. "
        f"Data: {escape(data)}.{cautions}</p>"
    )


def _render_training_curves(runs: Mapping[str, RunRecord]) -> Iterable[str]:
    metric = next(iter(runs.values())).metric
    for column, label in (("loss", "training loss"), (f"valid.{metric}", f"{metric} on valid")):
        series: dict[str, tuple[list[int], list[float]]] = {}
        for name, run in runs.items():
            points = [(int(row["epoch"]), float(row[column])) for row in run.history if row.get(column)]
            if points:
                xs, ys = [x for x, _ in points], [y for _, y in points]
                series[name or label] = (xs, ys)
        if series:
            said = "; ".join(f"{name} from {ys[0]:.4g} to {ys[-1]:.4g}" for name, (_, ys) in series.items())
            svg = charts.draw_lines(series, "epoch", label)
            yield page.render_figure(PageFigure(svg, f"{label} by epoch: {said}", label))


def _render_bucket_charts(run: RunRecord) -> Iterable[str]:
    words = {
        "popularity": "how often the target is in the training data",
        "history": "items before the target",
    }
    for name, x in words.items():
        table = run.metrics.get("test_by", {}).get(name, {})
        measured: Mapping[str, float] = next((row["test"] for row in table.values()), {})
        metric = run.metric if run.metric in measured else next(iter(measured), None)
        if metric is None:
            continue
        groups = [f"{bucket}\n{row['users']:,}" for bucket, row in table.items()]
        series = {part: [row[part][metric] for row in table.values()] for part in ("test", "test_unseen")}
        said = ", ".join(f"{b}: {row['test_unseen'][metric]:.4f}" for b, row in table.items())
        svg = charts.draw_grouped_bars(groups, series, f"{x}; users below", metric)
        yield page.render_figure(PageFigure(svg, f"{metric} by {x}, test_unseen: {said}", f"{metric} by {x}"))


def _render_gate(run: RunRecord) -> str:
    figures = _make_gate_figures(run)
    if not figures:
        return ""
    note = (
        "What the gate gives each branch, mean over channels: temporal is the Mamba block, frequency the "
        "Fourier filter, semantic the text of the items. Taken from test histories."
    )
    shown = page.render_grid(map(page.render_figure, figures.values()))
    return page.render_section("Which branch is trusted", f"<p>{note}</p>", shown)


def _make_gate_figures(run: RunRecord) -> dict[str, PageFigure]:
    """By name, none without a gate."""
    gate = run.insights.get("gate")
    if not gate:
        return {}
    words = {
        "by_layer": ("layer", "by layer"),
        "by_position": ("position in the history", "by position, 1 is the oldest item"),
        "by_popularity": ("how often training meets the item", "by how popular the item is"),
    }
    figures = {}
    for key, (x, caption) in words.items():
        table = gate[key]
        series = {name: [row[k] for row in table.values()] for k, name in enumerate(gate["branches"])}
        said = "; ".join(
            f"{bucket}: {_format_gate_weights(gate['branches'], weights)}"
            for bucket, weights in table.items()
        )
        svg = charts.draw_stacked_bars(list(table), series, x)
        figures[f"gate_{key}"] = PageFigure(svg, f"gate weights {caption}: {said}", caption)
    return figures


def _format_gate_weights(branches: Sequence[str], weights: Sequence[float]) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in zip(branches, weights, strict=True))


def _render_filter(run: RunRecord) -> str:
    figures = _make_filter_figures(run)
    if not figures:
        return ""
    shown = page.render_grid(map(page.render_figure, figures.values()))
    return page.render_section("What the filter hears", _render_time_gaps(run), shown)


def _make_filter_figures(run: RunRecord) -> dict[str, PageFigure]:
    """By name, none without a filter that learns."""
    layers = run.insights.get("filter")
    if not layers:
        return {}
    names = [f"layer {n}" for n in range(1, len(layers) + 1)]
    response = {
        name: (own["period"], own["lower"], own["median"], own["upper"])
        for name, own in zip(names, layers, strict=True)
    }
    peaks = [own["period"][max(range(len(own["median"])), key=own["median"].__getitem__)] for own in layers]
    said = "; ".join(
        f"{name} is loudest at {peak:.3g} events" for name, peak in zip(names, peaks, strict=True)
    )
    found = {name: own["strength"] for name, own in zip(names, layers, strict=True)}
    strongest = [max(range(len(values)), key=values.__getitem__) for values in found.values()]
    edges = layers[0]["edges"]
    heard = "; ".join(
        f"{name} mostly {edges[k]:.3g} to {edges[k + 1]:.3g} events"
        for name, k in zip(names, strongest, strict=True)
    )
    return {
        "filter_gain": PageFigure(
            charts.draw_bands(response, "period, events", "gain"),
            f"gain of the filter by period, median and quartiles over channels: {said}",
            "frequency response: line the median channel, band the middle half",
        ),
        "filter_periods": PageFigure(
            charts.draw_histograms(edges, found, "period, events", "share"),
            f"periods of the filter's modes, weighted by their gain: {heard}",
            "the periods found, weighted by how much of them passes",
        ),
    }


def _render_time_gaps(run: RunRecord) -> str:
    gaps = run.insights.get("gaps")
    if not gaps:
        return ""
    middle, late = gaps["median"], f"a quarter after more than {_format_duration(gaps['upper_quartile'])}"
    text = (
        f"Half of all interactions follow the one before within {_format_duration(middle)}, a quarter within "
        f"{_format_duration(gaps['lower_quartile'])}, {late}; at that rate 10 events "
        f"take about {_format_duration(10 * middle)}."
        if middle
        else f"At least half of all interactions are of the same time as the one before, {late}."
    )
    return f"<p>A period is counted in events. {escape(text)} Times are read as seconds.</p>"


def _format_duration(seconds: float) -> str:
    for unit, length in _TIME_UNITS:
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def _render_examples(run: RunRecord) -> str:
    examples = run.insights.get("examples")
    if not examples:
        return ""
    articles = []
    for example in examples:
        past = "".join(f"<li>{escape(run.title(token))}</li>" for token in example["history"])
        start = example["length"] - len(example["history"]) + 1
        best = "".join(
            f"<li{' class=hit' if token == example['next'] else ''}>{escape(run.title(token))}</li>"
            for token in example["recommended"]
        )
        articles.append(
            f"<article><p><b>User {escape(example['user'])}</b>, {example['length']:,} items, the last:</p>"
            f'<ol start="{start}">{past}</ol><p>Recommended:</p><ol>{best}</ol>'
            f'<p>Next was <span class="hit">{escape(run.title(example["next"]))}</span>, '
            f"{_format_target_rank(example['place'])}.</p></article>"
        )
    note = "Test users, evenly spread, not chosen. What they had before is left out of the ranking."
    return page.render_section("Examples", f"<p>{note}</p>", f'<div class="grid">{"".join(articles)}</div>')


def _format_target_rank(place: int) -> str:
    return f"in place {place:,}" if place else "which the user had before"


def _render_settings(config: Mapping[str, Any]) -> str:
    rows = [[key, _format_setting_value(value)] for key, value in sorted(config.items())]
    table = page.render_table(["key", "value"], rows, "words")
    return f"<details><summary>All {len(rows)} keys</summary>{table}</details>"


def _render_setting_differences(runs: Mapping[str, RunRecord]) -> str:
    keys = sorted({key for run in runs.values() for key in run.config})
    rows = [[key, *(_format_setting_value(run.config.get(key)) for run in runs.values())] for key in keys]
    other = [row for row in rows if len(set(row[1:])) > 1]
    return page.render_table(["key", *runs], other, "words") if other else "<p>Nothing.</p>"


def _render_commands(run: RunRecord) -> str:
    lines = [f"python run_mm.py --config_files={quote(str(RunFolder(run.folder).config_file))}"]
    if run.metrics.get("recommends"):
        lines.append(f"python scripts/recommend.py {quote(str(run.folder))} --interactive")
    return f"<p>To repeat the run and to use it:</p><pre>{escape(chr(10).join(lines))}</pre>"


def _format_setting_value(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _format_metric_value(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
