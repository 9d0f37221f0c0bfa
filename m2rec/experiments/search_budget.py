"""How long a search may take: a number of trials, or a time that includes the final run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from time import time
from typing import Any

from m2rec.errors import UserError

_UNITS = {"s": 1, "m": 60, "h": 3600}
_MAX_SECONDS = 366 * 24 * 3600
_MAX_TRIALS = 100_000


@dataclass(frozen=True)
class Budget:
    """One of the two is None."""

    trials: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        if self.seconds is not None:
            return format_duration(self.seconds)
        return f"{self.trials} trial{'s' if self.trials != 1 else ''}"


def parse_budget(value: Any) -> Budget:
    """`30m`, `2h`, `1h30m` or `90s` is a time, a whole number is a number of trials.

    Raises:
        UserError: it is neither, or not above zero.
    """
    if type(value) is int and 0 < value <= _MAX_TRIALS:
        return Budget(trials=value)
    match = re.fullmatch(r"((?:\d+(?:\.\d+)?[hms])+)", value) if isinstance(value, str) else None
    if match:
        seconds = sum(float(n) * _UNITS[unit] for n, unit in re.findall(r"([\d.]+)([hms])", value))
        if 0 < seconds <= _MAX_SECONDS:
            return Budget(seconds=seconds)
    shown = "" if value is None else value
    raise UserError(
        f"search: expected a time such as 30m, 2h or 1h30m, or a number of trials such as 40, got '{shown}'"
    )


def format_duration(seconds: float) -> str:
    """Such as `1h 30m`, `14m 5s` or `8s`."""
    whole = round(seconds)
    parts = [(whole // 3600, "h"), (whole // 60 % 60, "m"), (whole % 60, "s")]
    shown = [f"{number}{unit}" for number, unit in parts if number][:2]
    return " ".join(shown) or "0s"


@dataclass(frozen=True)
class RunLength:
    """What decides how long a run of these settings is trained."""

    epochs: int
    patience: int
    """Epochs without improvement after which training stops."""


def estimate_run_seconds(notes: Mapping[str, Any], is_complete: bool, length: RunLength) -> float:
    """How long a run with a trial's settings will train at least.

    A trial that was trained to its end took as long as the run will. Another one is extrapolated, at its
    seconds per epoch, to the epoch where its patience would end it if it did not improve any more.

    Args:
        notes: of the trial: its seconds, and how many epochs it was trained for.
        is_complete: whether it was trained to its end.
        length: of the run.
    """
    seconds, epochs = float(notes.get("seconds", 0.0)), int(notes.get("trained_epochs", 0))
    if is_complete or not epochs:
        return seconds
    best = notes.get("best_epoch")
    end = (epochs if best is None else int(best) + 1) + length.patience + 1
    return seconds / epochs * max(epochs, min(length.epochs, end))


def measure_epoch_seconds(notes: Mapping[str, Any]) -> float:
    """How long an epoch of a trial takes, by the notes of the trial; 0 before the first has ended."""
    epochs = int(notes.get("trained_epochs", 0))
    return float(notes["seconds"]) / epochs if epochs else 0.0


@dataclass(frozen=True)
class Deadline:
    """The moment when a search must have its result."""

    ends_at: float = inf
    """As `time.time` counts."""

    @property
    def is_set(self) -> bool:
        """Whether there is such a moment."""
        return self.ends_at < inf

    def measure_seconds_left(self) -> float:
        """Until then; 0 afterwards."""
        return max(0.0, self.ends_at - time())

    def is_over(self, reserved_seconds: float) -> bool:
        """Whether no more than the reserved seconds are left."""
        return time() + reserved_seconds >= self.ends_at
