"""A saved model's metrics on any data set whose items it knows, user by user.

letter  meaning
n, V    users, items including padding
K       length of the ranking that is kept, the longest cut of the metrics
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m2rec.data.dataset import HistoryDataset
from m2rec.data.histories import NO_TARGET, Histories
from m2rec.errors import UserError
from m2rec.evaluation.diversity import TEXTBOOK_METRICS
from m2rec.evaluation.metrics import compute_rank_metric
from m2rec.evaluation.ranking import ALL, NEW, NO_ITEM, UNSEEN, Ranking
from m2rec.serving.recommender import Recommender
from m2rec.training.run import load_run_data

BATCH_SIZE = 256
UNKNOWN_TARGET = -1  # in place of the id of a target that the model does not know


@dataclass(frozen=True)
class EvaluationCases:
    """Whom to test: what each user did before the target, and the target, as item tokens.

    Attributes:
        users, targets: (n,) tokens.
        pasts: (n,), each user's item tokens, oldest first.
    """

    users: list[str]
    past_items: list[list[str]]
    targets: list[str]


def read_evaluation_cases(run: Path, part: str = "test", **keys: Any) -> EvaluationCases:
    """The targets of a data set, split as a run splits its own.

    Args:
        run: the run folder, whose keys hold.
        part: `test` or `valid`.
        keys: stronger ones, such as dataset and data_path.

    Raises:
        ValueError: the data can't be loaded.
    """
    _, dataset, _ = load_run_data(run, **keys)
    histories = _require_user_histories(dataset)
    tokens, users = dataset.item_tokens, dataset.field2id_token[dataset.uid_field]
    rows = np.flatnonzero(histories.split.targets[part] != NO_TARGET)
    ends = histories.split.targets[part][rows]
    pasts = [histories.items[start:end] for start, end in zip(histories.start[rows], ends, strict=True)]
    return EvaluationCases(
        [str(users[user]) for user in histories.users[rows]],
        [[tokens[item] for item in past] for past in pasts],
        [tokens[item] for item in histories.items[ends]],
    )


def read_user_histories(run: Path, **keys: Any) -> list[tuple[str, list[str]]]:
    """Every user of a data set with all that they did, oldest first; nobody is filtered out.

    Args:
        run: the run folder, whose keys hold, but for the intervals of numbers of interactions.
        keys: stronger ones, such as dataset and data_path.

    Raises:
        ValueError: the data can't be loaded.
    """
    everybody = {"user_inter_num_interval": "[0,inf)", "item_inter_num_interval": "[0,inf)"}
    _, dataset, _ = load_run_data(run, **{**everybody, **keys})
    return list_user_histories(dataset)


def list_user_histories(dataset: HistoryDataset) -> list[tuple[str, list[str]]]:
    """The users of a loaded data set with all that they did, as tokens.

    Raises:
        ValueError: its rows bring histories of their own.
    """
    histories = _require_user_histories(dataset)
    tokens, users = dataset.item_tokens, dataset.field2id_token[dataset.uid_field]
    return [
        (str(users[user]), [tokens[item] for item in histories.items[start:end]])
        for user, start, end in zip(histories.users, histories.start, histories.end, strict=True)
    ]


def _require_user_histories(dataset: HistoryDataset) -> Histories:
    if dataset.owner_field != dataset.uid_field:
        raise UserError(
            "dataset: its rows bring a history each (benchmark_filename), not whole users; give another one"
        )
    assert dataset.histories is not None
    return dataset.histories


def rank_evaluation_cases(recommender: Recommender, tests: EvaluationCases, cut: int) -> Ranking:
    """Rank all items of the model after each past.

    Items that the model does not know are left out of the pasts; a target that it does not know is in no
    ranking, and after a past without any item that it knows nothing is ranked. Both are misses.

    Args:
        recommender: the saved model.
        tests: the users.
        cut: K.
    """
    known = set(recommender.tokens[1:])
    pasts = [[item for item in past if item in known] for past in tests.past_items]
    found = {name: torch.full((len(pasts), cut), NO_ITEM) for name in (ALL, UNSEEN)}
    order = [row for row in np.argsort([len(past) for past in pasts], kind="stable").tolist() if pasts[row]]
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        scores = recommender.scores([pasts[row] for row in rows]).cpu()
        for name in (ALL, UNSEEN):
            if name == UNSEEN:
                for place, row in enumerate(rows):
                    scores[place, recommender.to_ids(set(pasts[row]))] = -torch.inf
            best = scores.topk(min(cut, scores.shape[1]))
            items = best.indices.masked_fill(best.values == -torch.inf, NO_ITEM)
            found[name][rows, : items.shape[1]] = items
    ids = [recommender.to_ids([item])[0] if item in known else UNKNOWN_TARGET for item in tests.targets]
    returning = [target in past for target, past in zip(tests.targets, tests.past_items, strict=True)]
    return Ranking(torch.tensor(ids), torch.tensor(returning), found)


def compute_ranking_metrics(
    ranking: Ranking, protocol: str, topk: Sequence[int], n_items: int
) -> dict[str, float]:
    """Hit, NDCG, MRR and item coverage of a ranking, such as `ndcg@10`; empty without users."""
    if not len(ranking.targets):
        return {}
    places, items = ranking.target_ranks(protocol), ranking.items[protocol].numpy()
    metrics = {
        f"{name}@{k}": float(compute_rank_metric(f"{name}@{k}", places).mean())
        for name in ("hit", "ndcg", "mrr")
        for k in topk
    }
    coverage = TEXTBOOK_METRICS["itemcoverage"]
    return {**metrics, **{f"itemcoverage@{k}": coverage(items[:, :k], n_items) for k in topk}}


def evaluate_run(run: Path, part: str = "test", device: str = "cpu", **keys: Any) -> dict[str, Any]:
    """A run's metrics on a data set, under every protocol.

    Args:
        run: the run folder.
        part: `test` or `valid`.
        device: where to compute.
        keys: of the data set, stronger than the run's; None leaves a key to the run.

    Returns:
        `run`, `dataset`, `part`; `counts` of users, of targets that return, of targets and of items in
        histories that the run does not know; `metrics` by protocol, such as `test_unseen`.

    Raises:
        ValueError: the run or the data can't be loaded, or nobody has a target.
    """
    recommender = Recommender.load(run, device)
    tests = read_evaluation_cases(run, part, **keys)
    if not tests.users:
        raise UserError(f"dataset: nobody has a {part} target; give other data, or --part")
    topk = [int(k) for k in recommender.config["topk"]]
    ranking = rank_evaluation_cases(recommender, tests, max(topk))
    known = set(recommender.tokens[1:])
    counts = {
        "users": len(tests.users),
        "returning": int(ranking.returning.sum()),
        "unknown_targets": int((ranking.targets == UNKNOWN_TARGET).sum()),
        "items_in_histories": sum(map(len, tests.past_items)),
        "unknown_in_histories": sum(item not in known for past in tests.past_items for item in past),
    }
    rankings = {part: (ranking, ALL), f"{part}_unseen": (ranking, UNSEEN)}
    rankings[f"{part}_new"] = (ranking.with_new_targets(), NEW)
    n_items = len(recommender.tokens) - 1
    return {
        "run": str(run),
        "dataset": keys.get("dataset") or recommender.config["dataset"],
        "part": part,
        "counts": counts,
        "metrics": {name: compute_ranking_metrics(*one, topk, n_items) for name, one in rankings.items()},
    }
