"""The race of the profiles: all are trained for a few epochs, the better half twice as long, and so on."""

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
    """

    limits: dict[int, int | None] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)
    rounds: int = 0

    @property
    def is_decided(self) -> bool:
        """Whether at most one is left."""
        return len(self.alive) <= 1


def judge_race(runners: Sequence[Runner], first_epochs: int) -> Standing:
    """Who may go on, and how far.

    A round ends when all have reached its epoch, or have ended before; scores are compared at that epoch, so
    that the verdict on a round is the same whenever it is asked for.

    Args:
        runners: all that did not fail, whether started or not.
        first_epochs: length of the first round; each further one is twice as long.
    """
    alive, limit, rounds = list(runners), first_epochs, 0
    while len(alive) > 1:
        late = [runner for runner in alive if runner.epochs < limit and not runner.is_ended]
        if late:
            limits: dict[int, int | None] = {runner.number: limit for runner in late}
            return _build_standing(limits, runners, alive, rounds)
        alive.sort(key=lambda runner: (-runner.score_at(limit), runner.number))
        alive = alive[: (len(alive) + 1) // 2]
        limit *= 2
        rounds += 1
    limits = {runner.number: None for runner in alive if not runner.is_ended}
    return _build_standing(limits, runners, alive, rounds)


def _build_standing(
    limits: dict[int, int | None], runners: Sequence[Runner], alive: Sequence[Runner], rounds: int
) -> Standing:
    kept = [runner.number for runner in alive]
    dropped = [runner.number for runner in runners if runner.number not in kept and not runner.is_ended]
    return Standing(limits, dropped, kept, rounds)
