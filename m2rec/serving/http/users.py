"""Users who are followed: the states of those who came last in memory, the events of all in the store."""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from m2rec.errors import UserError
from m2rec.serving.http.store import MAX_EVENTS, Event, Store
from m2rec.serving.ranker import Ranking
from m2rec.serving.recommender import Recommender, Session

logger = logging.getLogger(__name__)


@dataclass
class LiveUser:
    """A user's state by the model of the moment."""

    n_events: int
    """The number of the last event."""
    session: Session | None
    """None for a model that needs the whole history at once."""
    history: list[str]
    """Item tokens, oldest first, for such a model; else empty."""


class LiveUsers:
    """Users by name; of one thread.

    Args:
        store: the events.
        max_users: states in memory at most. Who came longest ago is dropped first; a store in memory forgets
            that user, one on disk does not.
    """

    def __init__(self, store: Store, max_users: int) -> None:
        self._store, self._max_users = store, max_users
        self._recommender: Recommender | None = None
        """The model that the states are of."""
        self._is_recurrent = False
        self._users: OrderedDict[str, LiveUser | None] = OrderedDict()
        """None for a state that has to be computed again."""

    def __len__(self) -> int:
        return len(self._users)

    def switch_model(self, recommender: Recommender) -> None:
        """Follow the users by this model; states of another one are dropped, and with them that model."""
        if self._recommender is not recommender:
            self._recommender, self._is_recurrent = recommender, is_recurrent(recommender)
            self._users = OrderedDict.fromkeys(self._users)

    def add_events(self, recommender: Recommender, events: Sequence[tuple[str, str]]) -> None:
        """Write each user's next item to the store, then advance the states.

        A state that can't be advanced is dropped, and computed again when it is needed.

        Args:
            recommender: the model.
            events: users, each a different one, and known item tokens.

        Raises:
            ValueError: the store can't be written. After any error nothing has changed.
        """
        self.switch_model(recommender)
        users = [self._load(recommender, user) for user, _ in events]
        self._store.add_events(
            [Event(name, user.n_events + 1, item) for user, (name, item) in zip(users, events, strict=True)]
        )
        try:
            self._advance(recommender, users, [item for _, item in events])
        except Exception:  # the store is right
            logger.exception("states that can't be advanced are computed again")
            for name, _ in events:
                self._users[name] = None
        self._evict()

    def rank(
        self,
        recommender: Recommender,
        users: Sequence[str],
        k: int,
        exclude_seen: bool | None = None,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        skip_unknown: bool = False,
    ) -> list[Ranking | None]:
        """The best items for different users, None for one without events; see `Recommender.recommend`.

        Raises:
            ValueError: a candidate is unknown.
        """
        self.switch_model(recommender)
        loaded = [self._load(recommender, name) for name in users]
        known = [user for user in loaded if user.n_events]
        options = (k, exclude_seen, candidates, exclude, skip_unknown)
        sessions = [user.session for user in known if user.session is not None]
        try:
            if sessions:
                found = recommender.recommend_sessions(sessions, *options)
            else:
                found = list(recommender.recommend_batch([user.history for user in known], *options))
        finally:  # also after a mistake: who asks for nobody fills no memory
            for name, user in zip(users, loaded, strict=True):
                if not user.n_events:
                    self._users.pop(name, None)
            self._evict()
        ranked = iter(found)
        return [next(ranked) if user.n_events else None for user in loaded]

    def delete(self, name: str) -> int:
        """Forget a user; returns how many events there were.

        Raises:
            ValueError: the store can't be written; then nothing has changed.
        """
        n_events = self._store.delete_events([name])
        self._users.pop(name, None)
        return n_events

    def read_history(self, name: str) -> list[str]:
        """A user's items, oldest first."""
        return self._store.read_events(name)[0]

    def _load(self, recommender: Recommender, name: str) -> LiveUser:
        """A user's state, computed from the events if need be."""
        user = self._users.get(name)
        if user is None:
            history, n_events = self._store.read_events(name)
            known = recommender.model.ids
            user = LiveUser(n_events, None, [item for item in history if item in known])
            if self._is_recurrent:
                user.session, user.history = recommender.session(user.history), []
            self._users[name] = user
        self._users.move_to_end(name)
        return user

    def _advance(self, recommender: Recommender, users: Sequence[LiveUser], items: Sequence[str]) -> None:
        sessions = [user.session for user in users if user.session is not None]
        if sessions:
            recommender.add_events(sessions, items)
        for user, item in zip(users, items, strict=True):
            user.n_events += 1
            if user.session is None:
                user.history.append(item)
                del user.history[:-MAX_EVENTS]

    def _evict(self) -> None:
        dropped = []
        while len(self._users) > self._max_users:
            dropped.append(self._users.popitem(last=False)[0])
        if dropped and not self._store.is_kept:
            self._store.delete_events(dropped)


def is_recurrent(recommender: Recommender) -> bool:
    """Whether the model follows users event by event."""
    try:
        recommender.model.encoder.require_recurrence()
    except UserError:
        return False
    return True
