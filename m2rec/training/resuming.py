"""Whether a run that was stopped can go on: nothing that it depends on has changed since."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2rec.errors import UserError
from m2rec.run_folder import RunFolder


class CannotResume(UserError):
    """A run that was stopped can't go on from what is left of it or beside it; only a new one helps."""

    exit_status = 3
    """Of run_mm.py, where other mistakes are 2."""


def check_unchanged_inputs(began: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """A run goes on with the data, text vectors and settings that it began with.

    Args:
        began: what the checkpoint has noted of `data`, `text` and `settings`.
        now: the same of today.
        folder: the run folder.

    Raises:
        ValueError: something is other than it was.
    """
    cure = "put it back, or start a new run"
    for key, what in (("data", "data"), ("text", "text vectors")):
        if began.get(key) != now.get(key):
            raise UserError(f"resume: the {what} of {folder} have changed since it stopped; {cure}")
    before, after = began.get("settings", {}), now.get("settings", {})
    if other := [key for key in {**before, **after} if before.get(key) != after.get(key)]:
        raise UserError(
            f"resume: {other[0]} was {before.get(other[0])} and is {after.get(other[0])} in "
            f"{RunFolder(folder).config_file}; {cure}"
        )


def check_best_weights(files: RunFolder, epoch: int, best_epoch: int | None) -> tuple[int, float] | None:
    """The best weights so far are whole, and those of the best epoch.

    Args:
        files: the run folder.
        epoch: the last that is whole.
        best_epoch: that of the best weights, None if there are none yet.

    Returns:
        Epoch and score of weights whose epoch's checkpoint was not written any more, which are the
        best then; None if there are none.

    Raises:
        ValueError: they are damaged or of another epoch.
    """
    path = files.weights_file
    if not path.exists() and best_epoch is None:
        return None
    _, about = files.read_weights()
    found = int(about.get("epoch", -1))
    if found > epoch:
        return found, float(about["score"])
    if found != best_epoch:
        raise UserError(f"resume: {path} is of epoch {found}, not of {best_epoch}; start a new run")
    return None
