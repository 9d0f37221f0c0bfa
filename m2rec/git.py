"""Which commit of this repository runs, and whether two commits train alike."""

import subprocess
from pathlib import Path

COMMIT_SEPARATOR = " and "  # between the commits that trained a run


# what a sweep and its report write themselves, and what no run is made by
_REPOSITORY = Path(__file__).resolve().parent.parent


_NON_CODE_PATHS = (":(exclude)results", ":(exclude)*.md", ":(exclude)tests")


def read_commit() -> str | None:
    """The commit of this code, `+dirty` with uncommitted changes of it; None outside a repository."""
    try:
        if Path(_run_git("rev-parse", "--show-toplevel")).resolve() != _REPOSITORY:
            return None  # installed somewhere in another project's
        changes = _run_git("status", "--porcelain", "-uno", "--", ".", *_NON_CODE_PATHS)
        return _run_git("rev-parse", "HEAD") + ("+dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def is_same_code(first: str | None, second: str | None) -> bool:
    """Whether two commits are one or differ in nothing that a run is made by.

    Args:
        first, second: as `read_commit` gives them, or as a run that several trained names them, `A and B`.
    """
    if first == second:
        return True
    if first is None or second is None or "+" in first + second:
        return False
    if COMMIT_SEPARATOR in first:
        return all(is_same_code(one, second) for one in first.split(COMMIT_SEPARATOR))
    try:
        _run_git("diff", "--quiet", first, second, "--", ".", *_NON_CODE_PATHS)
        return True
    except (OSError, subprocess.CalledProcessError):  # they differ, or one of them is not known here
        return False


def _run_git(*arguments: str) -> str:
    """What git says about this repository."""
    call = ["git", "-C", str(_REPOSITORY), *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
