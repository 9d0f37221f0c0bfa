"""The commit of this code, and whether two commits train alike."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parent.parent
_COMMIT_SEPARATOR = " and "
# excluded from comparisons of code: results, docs and tests
_NON_CODE_PATHS = (":(exclude)results", ":(exclude)*.md", ":(exclude)tests")


def read_commit() -> str | None:
    """The commit of this code, `+dirty` with uncommitted changes; None outside a repository."""
    try:
        if Path(_run_git("rev-parse", "--show-toplevel")).resolve() != _REPOSITORY:
            return None  # installed inside another project's repository
        changes = _run_git("status", "--porcelain", "-uno", "--", ".", *_NON_CODE_PATHS)
        return _run_git("rev-parse", "HEAD") + ("+dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def join_commits(commits: Sequence[str | None]) -> str | None:
    """The commits that trained a run as one text; None for a single unknown one."""
    return commits[0] if len(commits) == 1 else _COMMIT_SEPARATOR.join(map(str, commits))


def split_commits(commits: str | None) -> list[str | None]:
    """What `join_commits` joined."""
    return [None] if commits is None else list(commits.split(_COMMIT_SEPARATOR))


def is_same_code(commits: str | None, commit: str | None) -> bool:
    """Whether commits, as `join_commits` names them, differ from another one in nothing that a run uses."""
    if commits == commit:
        return True
    if commits is None or commit is None or "+" in commits + commit:
        return False
    try:
        for other in commits.split(_COMMIT_SEPARATOR):
            _run_git("diff", "--quiet", other, commit, "--", ".", *_NON_CODE_PATHS)
        return True
    except (OSError, subprocess.CalledProcessError):  # the commits differ, or one is unknown here
        return False


def _run_git(*arguments: str) -> str:
    command = ["git", "-C", str(_REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
