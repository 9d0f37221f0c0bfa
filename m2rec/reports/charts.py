"""Charts as SVG, legible on white and on black; the same numbers are the same file."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

GREY = "#808080"
MARKERS = "osD^vPX<>"  # nine, so that with ten colours all pairs up to 90 differ
_STYLE = {
    "svg.hashsalt": "m2rec",
    "svg.fonttype": "none",  # text stays text
    "savefig.transparent": True,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "errorbar.capsize": 3,
    "legend.frameon": False,
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
}
_FIGURE_SIZE = (4.6, 2.7)  # inches: text keeps its size on a phone
_LEGEND_LINE_HEIGHT = 0.18  # inches, of a legend
_LONG_LABEL_LENGTH = 16  # characters, from which three names don't fit side by side
_MAX_HORIZONTAL_LABELS = 6  # groups, from which their names stand aslant


@contextmanager
def use_chart_style() -> Iterator[None]:
    """Draw in the project's style."""
    with matplotlib.rc_context(_STYLE):
        yield


def draw_lines(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> bytes:
    """Lines over whole numbers, such as epochs."""
    from matplotlib.ticker import MaxNLocator

    with _draw_svg(x, y) as (axes, file):
        for label, (xs, ys) in series.items():
            axes.plot(xs, ys, marker="." if len(xs) < 40 else "", label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
    return file.getvalue()


def draw_grouped_bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], x: str, y: str) -> bytes:
    """A bar per group and series, side by side."""
    width = 0.8 / max(len(series), 1)
    with _draw_svg(x, y) as (axes, file):
        for k, (label, values) in enumerate(series.items()):
            centers = [group - 0.4 + (k + 0.5) * width for group in range(len(groups))]
            axes.bar(centers, values, width, label=label, alpha=0.8)
        _label_groups(axes, groups)
        axes.grid(axis="y")
    return file.getvalue()


def draw_stacked_bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], x: str) -> bytes:
    """Per group a bar of shares that add up to one."""
    base = [0.0] * len(groups)
    with _draw_svg(x, "weight") as (axes, file):
        for label, values in series.items():
            axes.bar(range(len(groups)), values, 0.8, base, label=label, alpha=0.8)
            base = [low + value for low, value in zip(base, values, strict=True)]
        _label_groups(axes, groups)
        axes.set_ylim(0, 1)
    return file.getvalue()


def draw_bands(series: Mapping[str, Sequence[Sequence[float]]], x: str, y: str) -> bytes:
    """Per label x, lower, middle and upper values: lines with a band around, over two logarithmic axes."""
    with _draw_svg(x, y) as (axes, file):
        for label, (xs, lower, middle, upper) in series.items():
            (line,) = axes.plot(xs, middle, label=label)
            axes.fill_between(xs, lower, upper, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xscale="log", yscale="log")
        set_log_ticks(axes.xaxis)
        set_log_ticks(axes.yaxis)
        axes.grid()
    return file.getvalue()


def draw_histograms(edges: Sequence[float], series: Mapping[str, Sequence[float]], x: str, y: str) -> bytes:
    """Histograms over a logarithmic axis; edges (n + 1,), values (n,) by label."""
    with _draw_svg(x, y) as (axes, file):
        for label, values in series.items():
            axes.stairs(values, edges, label=label, linewidth=1.5)
        axes.set(xscale="log", ylim=(0, None))
        set_log_ticks(axes.xaxis)
        axes.grid()
    return file.getvalue()


def set_log_ticks(axis: "Axis", number_format: str = "{x:g}") -> None:
    """1, 2, 5, 10 instead of powers of ten, and none between."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(number_format)
    axis.set_minor_locator(LogLocator(subs=()))


def _label_groups(axes: "Axes", groups: Sequence[str]) -> None:
    axes.set_xticks(range(len(groups)), groups)
    if len(groups) > _MAX_HORIZONTAL_LABELS:
        axes.tick_params("x", rotation=45)


def _add_legend(axes: "Axes") -> None:
    """Above the axes; each long name has its own line, for which the picture grows."""
    _, names = axes.get_legend_handles_labels()
    if len(names) < 2:
        return
    columns = 3 if max(map(len, names)) < _LONG_LABEL_LENGTH else 1
    lines = -(-len(names) // columns)
    if lines > 1 and (figure := axes.get_figure(root=True)):
        figure.set_figheight(_FIGURE_SIZE[1] + _LEGEND_LINE_HEIGHT * (lines - 1))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, fontsize=8)


@contextmanager
def _draw_svg(x: str, y: str) -> Iterator[tuple["Axes", io.BytesIO]]:
    """Axes to draw on, and the file that then has the SVG."""
    with use_chart_style():
        from matplotlib.figure import Figure

        file = io.BytesIO()
        figure = Figure(figsize=_FIGURE_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=x, ylabel=y)
        yield axes, file
        _add_legend(axes)
        figure.savefig(file, format="svg", metadata={"Date": None})
