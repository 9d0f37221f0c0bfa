"""Run folders -> one HTML page that needs no network: metrics, curves, gate, filter, examples."""

import json
from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple, Self

import jinja2

from m2rec.errors import UserError
from m2rec.reports import charts
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


class _Figure(NamedTuple):
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
        return str(self.metrics.get("valid_metric", self.config["valid_metric"])).lower()

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
        raise UserError(f"{folder}: no gate, no learned filter, or no {RunFolder(folder).insights_file.name}")
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
    except (LookupError, TypeError, AttributeError, ValueError, jinja2.TemplateError) as error:
        names = ", ".join(map(str, folders))
        raise UserError(f"{names}: a file has unexpected content ({type(error).__name__}: {error})") from None


def _render_run_page(run: RunRecord) -> str:
    """The page of a run."""
    return _render_page(
        f"{run.metrics['model']} on {run.metrics['dataset']}",
        {run.folder.name: run},
        single=run,
        curves=_draw_training_curves({"": run}),
        groups=_draw_bucket_charts(run),
        gate=list(_draw_gate_charts(run).values()),
        filter=list(_draw_filter_charts(run).values()),
    )


def _render_comparison_page(runs: Mapping[str, RunRecord]) -> str:
    """The page of several runs by name."""
    metrics = {}
    for protocol in _PAGE_PROTOCOLS:
        metrics[protocol] = _merge_keys(run.metrics.get(protocol, {}) for run in runs.values())
    differences = {}
    for key in sorted(_merge_keys(run.config for run in runs.values())):
        values = [_format_setting_value(run.config.get(key)) for run in runs.values()]
        if len({*values}) > 1:
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
    environment.filters["duration"] = _format_duration
    environment.filters["setting"] = _format_setting_value
    environment.filters["quote"] = lambda path: quote(str(path))
    template = environment.get_template("run_page.html.j2")
    return template.render(title=title, runs=runs, protocols=_select_protocols(runs.values()), **context)


def _merge_keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(chain(*mappings)))


def _select_protocols(runs: Collection[RunRecord]) -> list[str]:
    """The protocols that were measured; test_new only where it differs from test_unseen."""
    returns = any(run.metrics["data"].get("test_returning") for run in runs)
    selected = []
    for protocol in _PAGE_PROTOCOLS:
        is_measured = any(run.metrics.get(protocol) for run in runs)
        if is_measured and (returns or protocol != "test_new"):
            selected.append(protocol)
    return selected


def _list_incomparable_runs(runs: Mapping[str, RunRecord]) -> list[str]:
    """The runs that can't be compared with the others on test_unseen."""
    counts = {name: run.metrics["data"].get("test_returning") for name, run in runs.items()}
    if not any(counts.values()):
        return []
    return [name for name, count in counts.items() if count is None]


def _draw_training_curves(runs: Mapping[str, RunRecord]) -> list[_Figure]:
    """Loss and validation metric by epoch, a line per run."""
    metric = next(iter(runs.values())).metric
    figures = []
    for column, label in (("loss", "training loss"), (f"valid.{metric}", f"{metric} on valid")):
        series: dict[str, tuple[list[int], list[float]]] = {}
        for name, run in runs.items():
            rows = [row for row in run.history if row.get(column)]
            if rows:
                epochs = [int(row["epoch"]) for row in rows]
                series[name or label] = epochs, [float(row[column]) for row in rows]
        if series:
            trends = []
            for name, (_, values) in series.items():
                trends.append(f"{name} from {values[0]:.4g} to {values[-1]:.4g}")
            svg = charts.draw_lines(series, "epoch", label)
            figures.append(_Figure(svg, f"{label} by epoch: {'; '.join(trends)}", label))
    return figures


def _draw_bucket_charts(run: RunRecord) -> list[_Figure]:
    """Quality by popularity of the target and by length of the history."""
    figures = []
    for kind, x in _BUCKET_TITLES.items():
        buckets = run.metrics.get("test_by", {}).get(kind, {})
        measured: Mapping[str, float] = next((bucket["test"] for bucket in buckets.values()), {})
        metric = run.metric if run.metric in measured else next(iter(measured), None)
        if metric is None:
            continue
        groups = [f"{name}\n{bucket['users']:,}" for name, bucket in buckets.items()]
        series = {}
        for protocol in ("test", "test_unseen"):
            series[protocol] = [bucket[protocol][metric] for bucket in buckets.values()]
        values = zip(buckets, series["test_unseen"], strict=True)
        listed = ", ".join(f"{name}: {value:.4f}" for name, value in values)
        svg = charts.draw_grouped_bars(groups, series, f"{x}; users below", metric)
        figures.append(_Figure(svg, f"{metric} by {x}, test_unseen: {listed}", f"{metric} by {x}"))
    return figures


def _draw_gate_charts(run: RunRecord) -> dict[str, _Figure]:
    """By name, none without a gate."""
    gate = run.insights.get("gate")
    if not gate:
        return {}
    figures = {}
    for key, (x, caption) in _GATE_TITLES.items():
        table = gate[key]
        series = dict(zip(gate["branches"], zip(*table.values(), strict=True), strict=True))
        listed = []
        for bucket, weights in table.items():
            pairs = zip(gate["branches"], weights, strict=True)
            texts = [f"{name} {weight:.2f}" for name, weight in pairs]
            listed.append(f"{bucket}: {', '.join(texts)}")
        svg = charts.draw_stacked_bars(list(table), series, x)
        figures[f"gate_{key}"] = _Figure(svg, f"gate weights {caption}: {'; '.join(listed)}", caption)
    return figures


def _draw_filter_charts(run: RunRecord) -> dict[str, _Figure]:
    """By name, none without a learned filter."""
    responses, strengths, peaks, strongest = {}, {}, [], []
    for number, layer in enumerate(run.insights.get("filter") or [], start=1):
        name = f"layer {number}"
        responses[name] = layer["period"], layer["lower"], layer["median"], layer["upper"]
        strengths[name] = layer["strength"]
        peak = layer["period"][_find_highest(layer["median"])]
        peaks.append(f"{name} has its highest gain at {peak:.3g} events")
        start = _find_highest(layer["strength"])
        low, high = layer["edges"][start : start + 2]
        strongest.append(f"{name} mostly {low:.3g} to {high:.3g} events")
    if not responses:
        return {}
    edges = run.insights["filter"][0]["edges"]
    return {
        "filter_gain": _Figure(
            charts.draw_bands(responses, "period, events", "gain"),
            f"gain of the filter by period, median and quartiles over channels: {'; '.join(peaks)}",
            "frequency response: line the median channel, band the middle half",
        ),
        "filter_periods": _Figure(
            charts.draw_histograms(edges, strengths, "period, events", "share"),
            f"periods of the filter's modes, weighted by their gain: {'; '.join(strongest)}",
            "the periods found, weighted by how much of them passes",
        ),
    }


def _find_highest(values: Sequence[float]) -> int:
    return values.index(max(values))


def _format_duration(seconds: float) -> str:
    for unit, length in _TIME_UNITS:
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def _format_setting_value(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)
