"""One user who is followed live, as Python's users see it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from m2rec.serving import session
from m2rec.serving.ranker import Ranking
from m2rec.serving.session import SessionState

if TYPE_CHECKING:
    from m2rec.serving.recommender import Recommender


class Session:
    """One user, followed live; made by `Recommender.session`.

    Holds a state of constant size, and the distinct items in the order of their first event.
    """

    def __init__(self, recommender: "Recommender", state: SessionState) -> None:
        self.recommender, self._state = recommender, state

    @property
    def seen(self) -> list[str]:
        """The distinct items of the history, in the order of their first event."""
        return [self.recommender.tokens[item] for item in self._state.seen]

    def add(self, token: str) -> None:
        """Add the user's next event.

        Raises:
            ValueError: an unknown item token.
        """
        self.recommender.add_events([self], [token])

    def recommend(
        self,
        k: int = 10,
        exclude_seen: bool | None = None,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
    ) -> Ranking:
        """As `Recommender.recommend` after all events so far."""
        (ranked,) = self.recommender.recommend_sessions([self], k, exclude_seen, candidates, exclude)
        return ranked

    def to_bytes(self) -> bytes:
        """Bytes to keep anywhere, for `Recommender.restore_session`; nothing is pickled."""
        return session.serialize_state(self._state, self.recommender.model)
