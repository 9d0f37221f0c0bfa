"""Run folders -> one HTML page that needs no network: metrics, curves, gate, filter, examples."""

import json
from base64 import b64encode
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple, Self

import jinja2

from m2rec.errors import UserError, format_count
from m2rec.reports import charts
from m2rec.reports.baselines import describe_comparison, list_compared_models
from m2rec.run_folder import RunFolder
from m2rec.storage import write_text

_PAGE_PROTOCOLS = ("valid", "test", "test_unseen", "test_new")
_BUCKET_TITLES = {
    "popularity": "how often the target is in the training data",
    "history": "items before the target",
}
_GATE_TITLES = {
    "by_layer": ("layer", "by layer"),
    "by_position": ("position in the history", "by position, 1 is the oldest item"),
    "by_popularity": ("how often the item is in the training data", "by how popular the item is"),
}
_TIME_UNITS = (("days", 86_400), ("hours", 3_600), ("minutes", 60))


class Chart(NamedTuple):
    """A chart, what it shows in words, and a caption."""

    svg: bytes
    alt_text: str
    caption: str

    @property
    def base64(self) -> str:
        """The SVG as it stands in the page."""
        return b64encode(self.svg).decode()


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
        configured = self.config["valid_metric"]
        return str(self.metrics.get("valid_metric", configured)).lower()

    @property
    def test_returning(self) -> int | None:
        """How many test targets are in their histories; None where they were not counted."""
        count: int | None = self.metrics["data"].get("test_returning")
        return count

    def title(self, token: str) -> str:
        """An item as a person knows it."""
        return self.titles.get(token, token)


def write_run_page(folder: Path) -> Path:
    """Write report.html into the folder of a finished run.

    Raises:
        ValueError: it is not a finished run, or one of its files is damaged.
    """
    path = RunFolder(folder).report_file
    with _report_damaged_files(folder):
        write_text(path, _render_run_page(RunRecord.read(folder)))
    return path


def write_comparison_page(folders: Sequence[Path], path: Path) -> Path:
    """Write one page that sets several finished runs side by side.

    Raises:
        ValueError: one is not a finished run or is given twice, or a file is damaged.
    """
    if len(set(map(Path.resolve, folders))) < len(folders):
        raise UserError("a run is given twice; name each once")
    are_names_distinct = len({folder.name for folder in folders}) == len(folders)
    runs = {}
    for folder in folders:
        name = folder.name if are_names_distinct else str(folder)
        runs[name] = RunRecord.read(folder)
    with _report_damaged_files(*folders):
        write_text(path, _render_comparison_page(runs))
    return path


def write_insight_charts(folder: Path, into: Path) -> list[Path]:
    """Write charts of a finished run's gate and filter as SVG files.

    Args:
        folder: of the run.
        into: the folder for the charts; it is created if missing.

    Returns:
        Their paths: gate_by_layer.svg, gate_by_position.svg, gate_by_popularity.svg,
        filter_gain.svg and filter_periods.svg, fewer where the model has no such part.

    Raises:
        ValueError: it is not a finished run, its model has neither, or one of its files is damaged.
    """
    run = RunRecord.read(folder)
    with _report_damaged_files(folder):
        figures = {**_draw_gate_charts(run), **_draw_filter_charts(run)}
    if not figures:
        insights = RunFolder(folder).insights_file
        raise UserError(f"{folder}: no gate, no learned filter, or no {insights.name}")
    into.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        path = into / f"{name}.svg"
        write_text(path, figure.svg.decode())
        written.append(path)
    return written


@contextmanager
def _report_damaged_files(*folders: Path) -> Iterator[None]:
    """Turn what unexpected content of these run folders raises into one line."""
    try:
        yield
    except UserError:  # it names the file
        raise
    except (LookupError, TypeError, AttributeError, ValueError, jinja2.TemplateError) as error:
        names = ", ".join(map(str, folders))
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{names}: a file has unexpected content ({reason})") from None


def draw_charts(run: RunRecord) -> list[Chart]:
    """All charts of a run's page.

    Raises:
        ValueError: a file of the run has unexpected content.
    """
    with _report_damaged_files(run.folder):
        return [
            *_draw_training_curves({"": run}),
            *_draw_bucket_charts(run),
            *_draw_gate_charts(run).values(),
            *_draw_filter_charts(run).values(),
        ]


def _render_run_page(run: RunRecord) -> str:
    """The page of a run."""
    return _render_page(
        f"{run.metrics['model']} on {run.metrics['dataset']}",
        {run.folder.name: run},
        single=run,
        compared=list_compared_models(run.metrics),
        sentence=describe_comparison(run.metrics),
        curves=_draw_training_curves({"": run}),
        groups=_draw_bucket_charts(run),
        gate=list(_draw_gate_charts(run).values()),
        filter=list(_draw_filter_charts(run).values()),
    )


def _render_comparison_page(runs: Mapping[str, RunRecord]) -> str:
    """The page of several runs by name."""
    configs = [run.config for run in runs.values()]
    metrics = {}
    for protocol in _PAGE_PROTOCOLS:
        names: dict[str, None] = {}  # a set in the order of the first run
        for run in runs.values():
            names.update(dict.fromkeys(run.metrics.get(protocol, ())))
        metrics[protocol] = list(names)
    differences = {}
    for key in sorted(set().union(*configs)):
        values = [_format_setting_value(config.get(key)) for config in configs]
        if len(set(values)) > 1:
            differences[key] = values
    return _render_page(
        "Runs compared",
        runs,
        single=None,
        curves=_draw_training_curves(runs),
        metrics=metrics,
        differences=differences,
        incomparable=_list_incomparable_runs(runs),
    )


def _render_page(title: str, runs: Mapping[str, RunRecord], **context: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["count"] = format_count
    environment.filters["duration"] = _format_duration
    environment.filters["setting"] = _format_setting_value
    environment.filters["quote"] = lambda path: quote(str(path))
    template = environment.get_template("run_page.html.j2")
    protocols = select_protocols(runs.values())
    return template.render(title=title, runs=runs, protocols=protocols, **context)


def select_protocols(runs: Collection[RunRecord]) -> list[str]:
    """The protocols that were measured; test_new only where it differs from test_unseen."""
    measured = set()
    for run in runs:
        for protocol in _PAGE_PROTOCOLS:
            if run.metrics.get(protocol):
                measured.add(protocol)
    if not any(run.test_returning for run in runs):
        measured.discard("test_new")
    return sorted(measured, key=_PAGE_PROTOCOLS.index)


def _list_incomparable_runs(runs: Mapping[str, RunRecord]) -> list[str]:
    """The runs that can't be compared with the others on test_unseen."""
    if not any(run.test_returning for run in runs.values()):
        return []
    return [name for name, run in runs.items() if run.test_returning is None]


def _draw_training_curves(runs: Mapping[str, RunRecord]) -> list[Chart]:
    """Loss and validation metric by epoch, a line per run."""
    metric = next(iter(runs.values())).metric
    titles = {"loss": "training loss", f"valid.{metric}": f"{metric} on valid"}
    figures = []
    for column, title in titles.items():
        series = {}
        trends = []
        for name, run in runs.items():
            epochs = []
            values = []
            for row in run.history:
                if row.get(column):
                    epochs.append(int(row["epoch"]))
                    values.append(float(row[column]))
            if values:
                label = name or title
                series[label] = epochs, values
                trends.append(f"{label} from {values[0]:.4g} to {values[-1]:.4g}")
        if series:
            svg = charts.draw_lines(series, "epoch", title)
            trend = "; ".join(trends)
            figures.append(Chart(svg, f"{title} by epoch: {trend}", title))
    return figures


def _draw_bucket_charts(run: RunRecord) -> list[Chart]:
    """Quality by popularity of the target and by length of the history."""
    figures = []
    for kind, x in _BUCKET_TITLES.items():
        buckets = run.metrics.get("test_by", {}).get(kind, {})
        if not buckets:
            continue
        measured = next(iter(buckets.values()))["test"]
        if not measured:
            continue
        metric = run.metric if run.metric in measured else next(iter(measured))
        groups = []
        listed = []
        series: dict[str, list[float]] = {"test": [], "test_unseen": []}
        for name, bucket in buckets.items():
            groups.append(f"{name}\n{bucket['users']:,}")
            for protocol, values in series.items():
                values.append(bucket[protocol][metric])
            listed.append(f"{name}: {series['test_unseen'][-1]:.4f}")
        svg = charts.draw_grouped_bars(groups, series, f"{x}; users below", metric)
        caption = f"{metric} by {x}"
        alt_text = f"{caption}, test_unseen: {', '.join(listed)}"
        figures.append(Chart(svg, alt_text, caption))
    return figures


def _draw_gate_charts(run: RunRecord) -> dict[str, Chart]:
    """By name, none without a gate."""
    gate = run.insights.get("gate")
    if not gate:
        return {}
    figures = {}
    for key, (x, caption) in _GATE_TITLES.items():
        table = gate[key]
        series: dict[str, list[float]] = {branch: [] for branch in gate["branches"]}
        listed = []
        for bucket, weights in table.items():
            texts = []
            for branch, weight in zip(series, weights, strict=True):
                series[branch].append(weight)
                texts.append(f"{branch} {weight:.2f}")
            listed.append(f"{bucket}: {', '.join(texts)}")
        svg = charts.draw_stacked_bars(list(table), series, x)
        alt_text = f"gate weights {caption}: {'; '.join(listed)}"
        figures[f"gate_{key}"] = Chart(svg, alt_text, caption)
    return figures


def _draw_filter_charts(run: RunRecord) -> dict[str, Chart]:
    """By name, none without a learned filter."""
    layers = run.insights.get("filter")
    if not layers:
        return {}
    edges = layers[0]["edges"]
    responses = {}
    strengths = {}
    peaks = []
    strongest = []
    for number, layer in enumerate(layers, start=1):
        name = f"layer {number}"
        periods = layer["period"]
        median = layer["median"]
        responses[name] = periods, layer["lower"], median, layer["upper"]
        strengths[name] = layer["strength"]
        peak = periods[_find_highest(median)]
        peaks.append(f"{name} has its highest gain at {peak:.3g} events")
        start = _find_highest(layer["strength"])
        low, high = layer["edges"][start : start + 2]
        strongest.append(f"{name} mostly {low:.3g} to {high:.3g} events")
    gain = Chart(
        charts.draw_bands(responses, "period, events", "gain"),
        f"gain of the filter by period, median and quartiles over channels: {'; '.join(peaks)}",
        "frequency response: line the median channel, band the middle half",
    )
    histogram = Chart(
        charts.draw_histograms(edges, strengths, "period, events", "share"),
        f"periods of the filter's modes, weighted by their gain: {'; '.join(strongest)}",
        "the periods found, weighted by how much of them passes",
    )
    return {"filter_gain": gain, "filter_periods": histogram}


def _find_highest(values: Sequence[float]) -> int:
    return values.index(max(values))


def _format_duration(seconds: float) -> str:
    for unit, length in _TIME_UNITS:
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def _format_setting_value(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)
