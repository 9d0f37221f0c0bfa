"""What a search shows while it runs: a live table on a terminal, a line per event elsewhere."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from m2rec.experiments.search import SearchTask, judge_profiles
from m2rec.experiments.search_budget import Budget, format_duration
from m2rec.experiments.study import (
    TRIAL_STATES,
    count_states,
    find_best_trial,
    get_best_score,
    get_progress,
    is_maximized,
    log_trial,
    rank_trials,
)
from m2rec.experiments.trial_tables import describe_state, format_setting

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

MAX_LINES = 12  # of trials in the live table
_CLEAR_BELOW = "\x1b[J"
_ALERT_STATES = ("failed",)


class SearchView:
    """Shows a search.

    Args:
        stream: where the table goes.
        is_live: whether the stream is a terminal, whose lines can be drawn again.
        task: of the search.
        budget: what it was given.
        metric: the name of the score.
    """

    def __init__(self, stream: TextIO, is_live: bool, task: SearchTask, budget: Budget, metric: str) -> None:
        self.stream = stream
        self.is_live = is_live
        self.task = task
        self.budget = budget
        self.metric = metric
        self._n_drawn = 0
        self._told: set[int] | None = None
        self._n_rounds = 0

    def update(self, study: "optuna.Study", seconds: float) -> None:
        """Say what has happened since the last call, and draw the table."""
        trials = study.get_trials(deepcopy=False)
        ended = [trial for trial in trials if trial.state.name in TRIAL_STATES]
        if self._told is None:  # what an earlier start has told
            self._told = {trial.number for trial in ended}
            self._n_rounds = judge_profiles(study, self.task).rounds
        news = [trial for trial in ended if trial.number not in self._told]
        self._told.update(trial.number for trial in news)
        if not self.is_live:
            self._tell_race(study)
        for trial in news:
            if not self.is_live or TRIAL_STATES[trial.state.name] in _ALERT_STATES:
                self._erase()
                log_trial(trial)
        if self.is_live:
            height = shutil.get_terminal_size().lines - 1  # the cursor has a line, too
            status = self._describe(study, seconds)
            self._draw(format_live_table(study, self.task, self.metric, status, height))

    def say(self, line: str) -> None:
        """Log a line that must be seen."""
        self._erase()
        logger.warning("%s", line)

    def close(self) -> None:
        """Leave the table as it is."""
        self._n_drawn = 0

    def _tell_race(self, study: "optuna.Study") -> None:
        standing = judge_profiles(study, self.task)
        if standing.rounds == self._n_rounds:
            return
        self._n_rounds = standing.rounds
        trials = study.get_trials(deepcopy=False)
        left = [trials[number].user_attrs["origin"] for number in standing.alive]
        verb = "wins" if len(left) == 1 else "go on to their ends" if standing.is_decided else "go on"
        logger.info("race, round %s: %s %s", standing.rounds, ", ".join(left), verb)

    def _describe(self, study: "optuna.Study", seconds: float) -> str:
        """Such as `search, 14m 2s of 30m: best 0.1293; 3 complete, 4 pruned, 0 failed, 2 running`."""
        trials = study.get_trials(deepcopy=False)
        n_running = sum(trial.state.name == "RUNNING" for trial in trials)
        best = find_best_trial(study)
        score = None if best is None else get_best_score(best, is_maximized(study))
        shown = "" if score is None else f"best {score:.4f}; "
        counts = f"{count_states(study)}, {n_running} running"
        return f"search, {format_duration(seconds)} of {self.budget}: {shown}{counts}"

    def _draw(self, lines: Sequence[str]) -> None:
        self._erase()
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("".join(f"{line[:width]}\n" for line in lines))
        self.stream.flush()
        self._n_drawn = len(lines)

    def _erase(self) -> None:
        if self._n_drawn:
            self.stream.write(f"\x1b[{self._n_drawn}A{_CLEAR_BELOW}")
            self.stream.flush()
            self._n_drawn = 0


def format_live_table(
    study: "optuna.Study", task: SearchTask, metric: str, status: str, height: int
) -> list[str]:
    """The lines of the table, `height` at most: the trials that run, then the best ones, and the status."""
    maximize = is_maximized(study)
    running = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "RUNNING"]
    best = [trial for trial in rank_trials(study) if trial.state.name != "RUNNING"]
    rows = [("trial", "state", "epochs", metric, "seconds", "from", "settings")]
    shown = [*running, *best][: max(MAX_LINES, len(running))]
    footer = [status]
    if len(shown) > height - 2:  # without the head and the status
        n_left = max(0, height - 3)
        footer = [f"{len(shown) - n_left} more trials, not shown: the terminal has {height} lines", status]
        shown = shown[:n_left]
    for trial in shown:
        score = get_best_score(trial, maximize)
        notes = {**trial.user_attrs, **get_progress(trial)}
        rows.append(
            (
                str(trial.number),
                describe_state(trial),
                str(notes.get("trained_epochs", 0)),
                "" if score is None else f"{score:.4f}",
                f"{notes.get('seconds', 0.0):.0f}",
                str(notes.get("origin", "")),
                format_changes(notes.get("settings", {}), task.plain),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return [*lines, *footer][-max(1, height) :]


def format_changes(settings: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """The settings that differ from those of the plain run."""
    changes = []
    for key, value in settings.items():
        if plain.get(key) != value:
            changes.append(f"{key} {format_setting(value)}")
    return ", ".join(changes)
