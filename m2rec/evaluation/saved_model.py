"""Rank all items of a saved model for the targets of any data set, user by user.

letter  meaning
n, V    users, items including padding
K       length of the ranking that is kept
"""

import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from m2rec.data.dataset import HistoryDataset
from m2rec.evaluation.metrics import BoolArray, IntArray
from m2rec.evaluation.ranking import NO_ITEM, Ranking, ScoredBatch, rank_batches

_BATCH_SIZE = 256
UNKNOWN_TARGET = -1  # instead of the id of a target that is unknown to the model


class Scorer(typing.Protocol):
    """A saved model that scores all its items, such as `Recommender`."""

    @property
    def tokens(self) -> Sequence[str]:
        """Item tokens by id, padding's first."""

    def scores(self, histories: Iterable[Iterable[str]]) -> Tensor:
        """Scores (b, V) after each history, padding's -inf."""


@dataclass(frozen=True)
class EvaluationCases:
    """Users to evaluate, in tokens.

    Attributes:
        users, targets: (n,).
        histories: (n,), each user's items before the target, oldest first.
    """

    users: list[str]
    histories: list[list[str]]
    targets: list[str]

    @property
    def lengths(self) -> IntArray:
        """Of the histories, (n,)."""
        return np.array(list(map(len, self.histories)), dtype=np.int64)

    @property
    def returning(self) -> BoolArray:
        """Whether each target is in the history, (n,)."""
        pairs = zip(self.targets, self.histories, strict=True)
        return np.array([target in history for target, history in pairs], dtype=bool)

    def select_cases(self, rows: Iterable[int]) -> "EvaluationCases":
        """Only these rows."""
        chosen = EvaluationCases([], [], [])
        for row in rows:
            chosen.users.append(self.users[row])
            chosen.histories.append(self.histories[row])
            chosen.targets.append(self.targets[row])
        return chosen

    def drop_unknown_items(self, tokens: Collection[str]) -> "EvaluationCases":
        """Without the items of histories that are not among these."""
        known = set(tokens)
        histories = []
        for history in self.histories:
            histories.append([item for item in history if item in known])
        return EvaluationCases(self.users, histories, self.targets)


def collect_cases(part: HistoryDataset, rows: IntArray | None = None) -> EvaluationCases:
    """The targets of a part with whole histories.

    Args:
        part: validation or test rows, such as `loaders.test.dataset` from `m2rec.training.run.load_run_data`.
        rows: numbers of the rows, in the wanted order; None for all.
    """
    assert part.histories is not None and part.part is not None
    feat = part.inter_feat if rows is None else part.inter_feat[rows]
    owners = feat[part.owner_field].numpy()
    _, seen = part.histories.items_before_target(owners, part.part)
    ends = part.histories.lengths_before_target(owners, part.part).cumsum()
    users = part.id2token(part.uid_field, feat[part.uid_field])
    targets = part.id2token(part.iid_field, feat[part.iid_field])
    seen_tokens = part.id2token(part.iid_field, seen)
    histories = [history.tolist() for history in np.split(seen_tokens, ends)[:-1]]
    return EvaluationCases(users.tolist(), histories, targets.tolist())


def sample_evenly(n: int, most: int | None = None) -> IntArray:
    """At most so many of n row numbers, evenly spread; None for all."""
    size = n if most is None else min(n, most)
    return np.unique(np.linspace(0, max(n - 1, 0), size).round().astype(np.int64))


def rank_cases(
    scorer: Scorer,
    cases: EvaluationCases,
    k: int,
    shown: int | None = None,
    candidates: Collection[str] | None = None,
) -> Ranking:
    """Rank all items of the model after each history.

    An unknown target is in no ranking, and an unknown item of a history is skipped. After a history without a
    known item nothing is ranked. Both are misses.

    Args:
        scorer: the saved model.
        cases: the users.
        k: K.
        shown: how many items of the history the model gets, the last ones; None for all.
        candidates: items to rank; None for all.
    """
    ids: dict[str, int] = {}
    excluded: list[int] = []
    for number, token in enumerate(scorer.tokens[1:], 1):
        ids[token] = number
        if candidates is not None and token not in candidates:
            excluded.append(number)
    known = cases.drop_unknown_items(ids)
    lengths = known.lengths
    by_length = np.argsort(lengths, kind="stable")  # little padding
    ranked = by_length[lengths[by_length] > 0]

    def score_batches() -> Iterator[ScoredBatch]:
        for start in range(0, len(ranked), _BATCH_SIZE):
            rows = ranked[start : start + _BATCH_SIZE]
            seen: list[int] = []
            inputs = []
            for row in rows:
                history = known.histories[row]
                seen.extend(map(ids.__getitem__, history))
                inputs.append(history[-(shown or 0) :])
            scores = scorer.scores(inputs).cpu()
            scores[:, excluded] = -np.inf
            row_of_seen = np.arange(len(rows)).repeat(lengths[rows])
            yield scores, (row_of_seen, np.array(seen))

    items = {}
    for protocol, top in rank_batches(score_batches(), k).items():
        items[protocol] = np.full((len(lengths), k), NO_ITEM)
        items[protocol][ranked] = top
    targets = np.array([ids.get(target, UNKNOWN_TARGET) for target in cases.targets], dtype=np.int64)
    return Ranking(targets, cases.returning, items)


def count_cases(cases: EvaluationCases, tokens: Collection[str]) -> dict[str, int]:
    """Users, targets that return, and what is unknown to a model with these item tokens."""
    n_items = int(cases.lengths.sum())
    known = set(tokens)
    n_known = int(cases.drop_unknown_items(known).lengths.sum())
    return {
        "users": len(cases.users),
        "returning": int(cases.returning.sum()),
        "unknown_targets": sum(target not in known for target in cases.targets),
        "items_in_histories": n_items,
        "unknown_in_histories": n_items - n_known,
    }
