"""Rankings for many users as a DataFrame; pandas is imported where it is needed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from m2rec.errors import UserError
from m2rec.serving.ranker import Recommendation
from m2rec.serving.reasons import ExplainedItem

if TYPE_CHECKING:
    from m2rec.data.frames import InteractionColumns

Histories = Mapping[Any, Sequence[str]]
"""Item tokens, oldest first, by user."""


def collect_histories(given: Any, known: Histories, columns: "InteractionColumns") -> Histories:
    """The histories that were given, or those of the users that were named.

    Args:
        given: a frame of interactions; histories by user; a list of histories, whose users are 0, 1, ...;
            or a list of users.
        known: the histories of users that may be named.
        columns: of a frame.

    Raises:
        ValueError: it is none of these, or a user is unknown.
    """
    from m2rec.data.frames import UserHistories, is_frame

    if is_frame(given):
        return UserHistories(given, columns)
    if isinstance(given, Mapping):
        return given
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UserError(f"users_or_histories: expected a list, a dict or a DataFrame, got {given!r}")
    listed = list(given)
    n_users = sum(isinstance(one, str | int) for one in listed)
    if n_users == 0:
        return dict(enumerate(listed))
    if n_users < len(listed):
        raise UserError("users_or_histories: users and histories are mixed; give one kind")
    return {user: _find_history(str(user), known) for user in listed}


def _find_history(user: str, known: Histories) -> Sequence[str]:
    if not known:
        raise UserError(
            f"users_or_histories: no history of user {user!r} is known here; give histories, or a DataFrame "
            f"of interactions, or set the attribute histories"
        )
    if user not in known:
        raise UserError(f"users_or_histories: unknown user {user!r}; give the history instead")
    return known[user]


def build_frame(
    given: Any,
    users: Iterable[Any],
    rankings: Iterable[Sequence[Recommendation | ExplainedItem]],
    with_titles: bool,
    with_reasons: bool = False,
) -> Any:
    """A row for each recommended item, as a frame of polars if `given` is one, else of pandas.

    Args:
        given: what the user gave.
        users: of the rankings.
        rankings: one for each user.
        with_titles: whether there is a column `title`.
        with_reasons: whether there are columns of reasons, which the rankings have.

    Returns:
        The columns `user`, `rank` (from 1), `item`, `score` and `title`; `raised_by` and
        `nearest_by_text`, lists of item tokens.
    """
    import pandas as pd

    names = ("user", "rank", "item", "score", "title", "raised_by", "nearest_by_text")
    columns: dict[str, list[Any]] = {name: [] for name in (names if with_reasons else names[:5])}
    for user, ranking in zip(users, rankings, strict=True):
        for rank, entry in enumerate(ranking, 1):
            values = [user, rank, entry.item, entry.score, entry.title]
            if isinstance(entry, ExplainedItem):
                values += [[one.item for one in kind] for kind in (entry.influences, entry.nearest_by_text)]
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    if not with_titles:
        del columns["title"]
    if isinstance(given, pd.DataFrame) or not hasattr(given, "lazy"):
        return pd.DataFrame(columns)
    return type(given)(columns)
