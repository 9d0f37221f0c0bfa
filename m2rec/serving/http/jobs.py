"""What the ranking thread does: rankings of histories, events and rankings of users, in batches."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from m2rec.errors import UserError
from m2rec.serving.http.errors import RequestError
from m2rec.serving.http.users import LiveUsers
from m2rec.serving.ranker import Ranking
from m2rec.serving.recommender import Recommender

logger = logging.getLogger(__name__)

Tokens = tuple[str, ...]
NO_EVENTS = "user: has no events; send one by POST /events, or give a history"
_NOT_RANKED = "the event is stored, don't send it again; ranking failed, the server's log says why"


class Options(NamedTuple):
    """Which items may be ranked; requests that agree in them are ranked together."""

    exclude_seen: bool | None = None
    candidates: Tokens | None = None
    exclude: Tokens | None = None
    skip_unknown: bool = False


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

    function: Callable[[Recommender], Any]
    """Of the model of the moment."""


class StoredEvent(NamedTuple):
    """The answer to an event, which is in the store."""

    ranking: Ranking
    warning: str = ""
    """Why there is no ranking; empty if there is one, or none was asked for."""


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
        """An answer, or an error, for each job: a `Ranking`, of an event a `StoredEvent`."""
        recommender = self._get_recommender()
        self._users.switch_model(recommender)
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
        answers |= self._rank_users(recommender, users)
        for group in _group_by_options(histories):
            answers |= _rank_together(group, lambda jobs, k: _rank_histories(recommender, jobs, k))
        for place, job in enumerate(jobs):
            if isinstance(job, Call):
                answers[place] = _catch(partial(job.function, recommender))
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
            answers |= self._add_events(recommender, list(turn.values()))
            rest = later

    def _add_events(self, recommender: Recommender, group: _Group) -> dict[int, Any]:
        """Store an event of each of different users, then rank; an error only where nothing is stored."""
        error = _catch(
            partial(self._users.add_events, recommender, [(job.user, job.item) for _, job in group])
        )
        if error is not None and not isinstance(error, UserError) and len(group) > 1:
            alone: dict[int, Any] = {}
            for one in group:
                alone |= self._add_events(recommender, [one])
            return alone
        if error is not None:
            return {place: error for place, _ in group}
        answers = {}
        for place, ranking in self._rank_users(recommender, group).items():
            failed = isinstance(ranking, Exception)
            if failed:
                logger.error("an event is stored, but not ranked", exc_info=ranking)
            answers[place] = StoredEvent([], _NOT_RANKED) if failed else StoredEvent(ranking)
        return answers

    def _rank_users(self, recommender: Recommender, group: _Group) -> dict[int, Any]:
        """A ranking, or an error, by place."""
        answers: dict[int, Any] = {place: [] for place, job in group if not job.k}
        for part in _group_by_options([(place, job) for place, job in group if job.k]):
            answers |= _rank_together(part, lambda jobs, k: self._rank_live(recommender, jobs, k))
        return answers

    def _rank_live(self, recommender: Recommender, jobs: Sequence[Any], k: int) -> list[Any]:
        names = list(dict.fromkeys(job.user for job in jobs))
        found = dict(zip(names, self._users.rank(recommender, names, k, *jobs[0].options), strict=True))
        missing = RequestError(404, NO_EVENTS)
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
    except Exception as error:
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
    """What a function returns, or the error that it raises."""
    try:
        return function()
    except Exception as error:
        return error
