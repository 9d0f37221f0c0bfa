"""What the ranking thread does: rankings of histories, events and rankings of users, in batches."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from m2rec.errors import UserError
from m2rec.serving.http.errors import RequestError
from m2rec.serving.http.users import LiveUsers
from m2rec.serving.ranker import Ranking
from m2rec.serving.recommender import Recommender

Tokens = tuple[str, ...]


class Options(NamedTuple):
    """Which items may be ranked; requests that agree in them are ranked together."""

    exclude_seen: bool | None = None
    candidates: Tokens | None = None
    exclude: Tokens | None = None


class RankHistory(NamedTuple):
    """Rank items after a history."""

    history: Tokens
    k: int
    options: Options


class RankUser(NamedTuple):
    """Rank items for a user who is followed."""

    user: str
    k: int
    options: Options


class AddEvent(NamedTuple):
    """Add a user's next event, then rank; k of 0 ranks nothing."""

    user: str
    item: str
    k: int
    options: Options


class Call(NamedTuple):
    """Anything else that must not run beside the others, such as deleting a user."""

    function: Callable[[], Any]


Job = RankHistory | RankUser | AddEvent | Call
_Group = list[tuple[int, Any]]
"""Jobs of one kind with their positions in the batch."""


class Worker:
    """Answers batches of jobs with the model of the moment.

    Args:
        get_recommender: the model; it is asked once for each batch, which therefore ends as it began.
        users: who is followed.
    """

    def __init__(self, get_recommender: Callable[[], Recommender], users: LiveUsers) -> None:
        self._get_recommender, self._users = get_recommender, users

    def answer(self, jobs: Sequence[Job]) -> list[Any]:
        """An answer, or a `ValueError`, for each job."""
        recommender = self._get_recommender()
        answers: dict[int, Any] = {}
        histories: _Group = []
        users: _Group = []
        events: _Group = []
        for place, job in enumerate(jobs):
            if isinstance(job, RankHistory):
                histories.append((place, job))
            elif isinstance(job, RankUser):
                users.append((place, job))
            elif isinstance(job, AddEvent):
                events.append((place, job))
        self._answer_events(recommender, events, answers)
        self._rank_users(recommender, users, answers)
        for group in _group_by_options(histories):
            answers |= _rank_together(group, lambda jobs, k: _rank_histories(recommender, jobs, k))
        for place, job in enumerate(jobs):
            if isinstance(job, Call):
                answers[place] = _catch(job.function)
        return [answers[place] for place in range(len(jobs))]

    def _answer_events(self, recommender: Recommender, events: _Group, answers: dict[int, Any]) -> None:
        """Rounds of one event for each user."""
        rest = []
        for place, job in events:
            if job.item in recommender.model.ids:
                rest.append((place, job))
            else:
                answers[place] = _catch(partial(recommender.to_ids, [job.item]))
        while rest:
            turn: dict[str, tuple[int, AddEvent]] = {}
            later: _Group = []
            for place, job in rest:
                if job.user in turn:
                    later.append((place, job))
                else:
                    turn[job.user] = (place, job)
            given = [(job.user, job.item) for _, job in turn.values()]
            error = _catch(partial(self._users.add_events, recommender, given))
            if error is None:
                self._rank_users(recommender, list(turn.values()), answers)
            else:
                answers |= {place: error for place, _ in turn.values()}
            rest = later

    def _rank_users(self, recommender: Recommender, group: _Group, answers: dict[int, Any]) -> None:
        for part in _group_by_options([(place, job) for place, job in group if job.k]):
            answers |= _rank_together(part, lambda jobs, k: self._rank_live(recommender, jobs, k))
        answers |= {place: [] for place, job in group if not job.k}

    def _rank_live(self, recommender: Recommender, jobs: Sequence[Any], k: int) -> list[Any]:
        names = list(dict.fromkeys(job.user for job in jobs))
        found = dict(zip(names, self._users.rank(recommender, names, k, *jobs[0].options), strict=True))
        missing = RequestError(404, "user: has no events; send one by POST /events, or give a history")
        return [missing if found[job.user] is None else found[job.user] for job in jobs]


def _rank_histories(recommender: Recommender, jobs: Sequence[RankHistory], k: int) -> list[Ranking]:
    return list(recommender.recommend_batch([job.history for job in jobs], k, *jobs[0].options))


def _group_by_options(jobs: Iterable[tuple[int, Any]]) -> list[_Group]:
    groups: dict[Options, _Group] = {}
    for place, job in jobs:
        groups.setdefault(job.options, []).append((place, job))
    return list(groups.values())


def _rank_together(group: _Group, rank: Callable[[list[Any], int], list[Any]]) -> dict[int, Any]:
    """Rankings by place; if one job fails, each is ranked alone, so that the mistake is that job's only."""
    jobs = [job for _, job in group]
    try:
        rankings = rank(jobs, max(job.k for job in jobs))
    except ValueError as error:
        if len(group) == 1:
            return {group[0][0]: error}
        alone: dict[int, Any] = {}
        for one in group:
            alone |= _rank_together([one], rank)
        return alone
    answers = {}
    for (place, job), ranking in zip(group, rankings, strict=True):
        answers[place] = ranking if isinstance(ranking, UserError) else ranking[: job.k]
    return answers


def _catch(function: Callable[[], Any]) -> Any:
    """What a function returns, or the `ValueError` that it raises."""
    try:
        return function()
    except ValueError as error:
        return error
