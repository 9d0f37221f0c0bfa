"""The race of the profiles: all are trained for a few epochs, the better half twice as long, and so on.

One of them may have a place in the better half whatever it scores: the plain run. The winner must beat it at
their ends, since settings that learn slowly are behind for many epochs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Runner:
    """A profile in the race."""

    number: int
    """Of its trial."""
    scores: Mapping[int, float]
    """By the number of epochs; a higher one is better."""
    is_ended: bool = False
    """Whether it is trained no more."""
    stays: bool = False
    """Whether it is in the better half of each round, whatever it scores."""

    @property
    def epochs(self) -> int:
        """How many it was trained for."""
        return max(self.scores, default=0)

    def score_at(self, epochs: int) -> float:
        """Its best score up to there."""
        return max((score for epoch, score in self.scores.items() if epoch <= epochs), default=float("-inf"))


@dataclass(frozen=True)
class Standing:
    """How a race stands.

    Attributes:
        limits: up to which epoch each trial may be trained now; None: to its end.
        dropped: trials that are out.
        alive: trials that are in.
        rounds: how many are over.
        is_decided: whether all that are in are trained to their ends.
    """

    limits: dict[int, int | None] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)
    rounds: int = 0
    is_decided: bool = False


def judge_race(runners: Sequence[Runner], first_epochs: int) -> Standing:
    """Who may go on, and how far.

    A round ends when all have reached its epoch, or have ended before; scores are compared at that epoch, so
    that the verdict on a round is the same whenever it is asked for.

    Args:
        runners: all that did not fail, whether started or not.
        first_epochs: length of the first round; each further one is twice as long.
    """
    alive, limit, rounds, is_decided = list(runners), first_epochs, 0, len(runners) <= 1
    while not is_decided:
        late = [runner for runner in alive if runner.epochs < limit and not runner.is_ended]
        if late:
            limits: dict[int, int | None] = {runner.number: limit for runner in late}
            return _build_standing(limits, runners, alive, rounds)
        alive.sort(key=lambda runner: (-runner.score_at(limit), runner.number))
        is_decided = len(alive) == 2
        alive = _keep_better_half(alive)
        limit *= 2
        rounds += 1
    limits = {runner.number: None for runner in alive if not runner.is_ended}
    return _build_standing(limits, runners, alive, rounds, is_decided)


def _keep_better_half(ranked: Sequence[Runner]) -> list[Runner]:
    """The first half, the last places of which are for those that stay; at least the first."""
    n_kept = (len(ranked) + 1) // 2
    staying = [runner for runner in ranked[n_kept:] if runner.stays]
    return [*ranked[: max(1, n_kept - len(staying))], *staying]


def _build_standing(
    limits: dict[int, int | None],
    runners: Sequence[Runner],
    alive: Sequence[Runner],
    rounds: int,
    is_decided: bool = False,
) -> Standing:
    kept = [runner.number for runner in alive]
    dropped = [runner.number for runner in runners if runner.number not in kept and not runner.is_ended]
    return Standing(limits, dropped, kept, rounds, is_decided)
