"""A worker of the benchmark of peers: one model of one library, which trains and ranks when it is told to.

A worker runs in the environment of its library, so this folder never imports m2rec, except for the worker
of the models that are installed beside it. A request is a line on stdin, the answer a line of JSON on
stdout; what a library prints goes to stderr.

    train N     N training steps      -> {"seconds": ..., "targets": ...}
    rank        the ten best items    -> {"seconds": ..., "histories": ...}
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from time import perf_counter
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

K = 10


@dataclass(frozen=True)
class Task:
    """What to build. `data` is a file of `write_interactions`; the other numbers are sizes."""

    model: str
    data: str
    length: int
    width: int
    layers: int
    heads: int
    dropout: float
    batch: int
    histories: int
    threads: int

    def read_interactions(self) -> dict[str, np.ndarray]:
        """Columns user, item and time (seconds), each user's rows together and in order; ids from 0."""
        with np.load(self.data) as columns:
            return dict(columns)

    def read_histories(self) -> list[np.ndarray]:
        """Each user's items in order."""
        columns = self.read_interactions()
        starts = np.flatnonzero(np.diff(columns["user"])) + 1
        return np.split(columns["item"], starts)


@dataclass(frozen=True)
class Ranked:
    """The best items of some histories: ids and scores, (histories, K)."""

    items: np.ndarray
    scores: np.ndarray


@dataclass
class Peer:
    """A model that can be timed."""

    rank: Callable[[], Ranked]
    """The best items of all items after `task.histories` histories: all but a user's last item."""
    model: torch.nn.Module | None = None
    """None where there is inference only."""
    batches: Callable[[], Iterable[Any]] = tuple
    """The training batches of an epoch, as the library's own loader makes them."""
    compute_loss: Callable[[Any], Tensor] = torch.as_tensor
    """The loss of a batch."""
    count_targets: Callable[[Any], int] = len
    """The positions of a batch that have a term in its loss."""
    epoch_targets: int = 0
    """Those of an epoch."""


def run_worker(build: Callable[[Task], Peer], packages: Iterable[str]) -> None:
    """Build what the command line says, then answer requests until stdin ends."""
    answers = _reserve_stdout()
    task = Task(**json.loads(sys.argv[1]))
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    peer = build(task)
    check_ranked(peer.rank(), task.histories)
    _send(answers, {"versions": _read_versions(packages), "epoch_targets": peer.epoch_targets})
    requests = _build_requests(peer, task)
    for line in sys.stdin:
        name, *numbers = line.split()
        _send(answers, requests[name](*map(int, numbers)))


def _read_versions(packages: Iterable[str]) -> dict[str, str]:
    """Of the packages that are installed."""
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _reserve_stdout() -> TextIO:
    """Stdout for the answers alone: all else that this process prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _send(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _build_requests(peer: Peer, task: Task) -> dict[str, Callable[..., dict[str, Any]]]:
    def rank() -> dict[str, Any]:
        start = perf_counter()
        ranked = peer.rank()
        seconds = perf_counter() - start
        check_ranked(ranked, task.histories)
        return {"seconds": seconds, "histories": task.histories}

    if peer.model is None:
        return {"rank": rank}
    batches = _repeat_epochs(peer.batches)
    optimizer = torch.optim.Adam(peer.model.parameters(), lr=1e-3)
    return {"rank": rank, "train": lambda steps: _time_steps(peer, optimizer, islice(batches, steps))}


def _repeat_epochs(make_batches: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    while True:
        yield from make_batches()


def _time_steps(peer: Peer, optimizer: torch.optim.Optimizer, batches: Iterable[Any]) -> dict[str, Any]:
    """Seconds of some training steps, with the making of their batches."""
    assert peer.model is not None
    peer.model.train()
    trained, start = [], perf_counter()
    for batch in batches:
        optimizer.zero_grad()
        loss = peer.compute_loss(batch)
        if not torch.isfinite(loss).all() or loss.shape != ():
            raise ValueError(f"the loss is {loss}, not one finite number")
        loss.backward()
        optimizer.step()
        trained.append(batch)
    seconds = perf_counter() - start
    return {"seconds": seconds, "targets": sum(map(peer.count_targets, trained))}


def check_ranked(ranked: Ranked, histories: int) -> None:
    """Stop unless each history has K different items with finite scores, the best first."""
    if ranked.items.shape != (histories, K) or ranked.scores.shape != (histories, K):
        raise ValueError(f"ranked {ranked.items.shape} items, not {(histories, K)}")
    if not np.isfinite(ranked.scores).all() or (np.diff(ranked.scores, axis=1) > 0).any():
        raise ValueError("scores are not finite, or not in order")
    if any(len(set(row)) < K for row in ranked.items.tolist()):
        raise ValueError("an item is ranked twice")


def pad_left(sequences: list[np.ndarray], length: int, padding: int) -> Tensor:
    """(n, length) ids: the last `length` of each sequence, after padding."""
    rows = np.full((len(sequences), length), padding)
    for row, sequence in zip(rows, sequences, strict=True):
        last = sequence[-length:]
        row[length - len(last) :] = last
    return torch.from_numpy(rows)


def rank_scores(scores: list[Tensor]) -> Ranked:
    """The best items of each row of (B, V) scores, batch by batch."""
    best = [batch.topk(K) for batch in scores]
    items, values = (torch.cat([getattr(b, name) for b in best]) for name in ("indices", "values"))
    return Ranked(items.numpy(), values.numpy())
