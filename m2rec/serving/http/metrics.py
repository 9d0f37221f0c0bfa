"""Counters of the server, and the text in which Prometheus reads them."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    """Counts of values up to some bounds.

    Args:
        bounds: ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def format_lines(self, name: str) -> Iterable[str]:
        """Lines of Prometheus, whose counts are cumulative."""
        cumulative = list(accumulate(self.counts))
        for bound, count in zip([*map(str, self.bounds), "+Inf"], cumulative, strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {cumulative[-1]}"


@dataclass
class Metrics:
    """All that the server counts; changed by the event loop's thread and the ranking thread alone."""

    requests: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    """By method, route and status."""
    request_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    batch_sizes: Histogram = field(default_factory=lambda: Histogram(BATCH_SIZES))
    reloads: Counter[str] = field(default_factory=Counter)
    """By result: `done` or `failed`."""
    gauges: dict[str, tuple[str, Callable[[], float]]] = field(default_factory=dict)
    """By name: what it is, and what reads it."""

    def format_text(self) -> str:
        """The text format of Prometheus, version 0.0.4."""
        lines = ["# HELP m2rec_requests_total Requests answered.", "# TYPE m2rec_requests_total counter"]
        for (method, route, status), count in sorted(self.requests.items()):
            labels = f'method="{method}",route="{route}",status="{status}"'
            lines.append(f"m2rec_requests_total{{{labels}}} {count}")
        lines += ["# HELP m2rec_reloads_total Reloads of the run.", "# TYPE m2rec_reloads_total counter"]
        lines += [
            f'm2rec_reloads_total{{result="{name}"}} {self.reloads[name]}' for name in ("done", "failed")
        ]
        for name, about, histogram in (
            ("m2rec_request_seconds", "Seconds from a request to its answer.", self.request_seconds),
            ("m2rec_batch_size", "Requests that were ranked together.", self.batch_sizes),
        ):
            lines += [f"# HELP {name} {about}", f"# TYPE {name} histogram", *histogram.format_lines(name)]
        for name, (about, read) in self.gauges.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} gauge", f"{name} {read():g}"]
        return "\n".join(lines) + "\n"
