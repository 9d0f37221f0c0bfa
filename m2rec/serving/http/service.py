"""The server's state: the model of the moment, its users, and how it is replaced while requests go on."""

import asyncio
import copy
import ctypes
import gc
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from m2rec.errors import UserError
from m2rec.serving.http.batching import Batcher
from m2rec.serving.http.errors import RequestError
from m2rec.serving.http.jobs import NO_EVENTS, Call, Job, RankHistory, RankUser, Worker
from m2rec.serving.http.metrics import Metrics
from m2rec.serving.http.new_items import (
    MAX_ADDED,
    add_items,
    add_stored_items,
    check_text_encoder,
    make_stored_items,
    open_text_encoder,
)
from m2rec.serving.http.schemas import NewItem
from m2rec.serving.http.store import Store, StoredItem
from m2rec.serving.http.users import LiveUsers
from m2rec.serving.hub_name import is_hub_name
from m2rec.serving.ranker import Ranking
from m2rec.serving.reasons import ExplainedItem
from m2rec.serving.recommender import Recommender

logger = logging.getLogger(__name__)

MAX_LOOKUPS = 64
MAX_CHANGES = 8
"""Requests of new items that wait; each may hold a large body."""
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ServiceOptions:
    """What is served, and how."""

    run: Path | str
    """The run folder, or a name on the hub; a reload reads it again, so it may be a link that has changed."""
    state: Path | None = None
    """The file of users and added items; None for memory."""
    text_encoder: str = ""
    """The run's language model, for new items by text; empty for none."""
    device: str = "cpu"
    precision: str = "float32"
    max_users: int = 10_000


class Service:
    """All that routes need.

    Three threads beside the event loop's: one ranks and owns the store, one looks things up, and one changes
    the model.

    Args:
        options: what is served.

    Raises:
        ValueError: the run, the state file or the language model can't be used.
    """

    def __init__(self, options: ServiceOptions) -> None:
        self.options = options
        self.metrics = Metrics()
        self.recommender = self._load_run()
        encoder = open_text_encoder(options.text_encoder, self.recommender) if options.text_encoder else None
        self.text_encoder = encoder
        self._store = Store(options.state)
        self.n_added = prepare_recommender(self.recommender, self._store.read_items())
        self.loaded_at = datetime.now(UTC)
        self._users = LiveUsers(self._store, options.max_users)
        worker = Worker(lambda: self.recommender, self._users)
        self._batcher: Batcher[Job, Any] = Batcher(worker.answer, self.metrics.batch_sizes.observe)
        self._lookups = ThreadPoolExecutor(1, "lookups")
        self._n_lookups = 0
        self._changes = ThreadPoolExecutor(1, "changes")
        self._change_lock = asyncio.Lock()
        self._n_changes = 0
        self.metrics.gauges |= {
            "m2rec_items": ("Items that can be ranked.", lambda: len(self.recommender.tokens) - 1),
            "m2rec_added_items": ("Items that were added since training.", lambda: self.n_added),
            "m2rec_users_in_memory": ("Users whose state is in memory.", lambda: len(self._users)),
            "m2rec_loaded_timestamp_seconds": (
                "When the run was loaded.",
                lambda: self.loaded_at.timestamp(),
            ),
        }

    async def submit(self, job: Job) -> Any:
        """The answer of the ranking thread; see `Batcher.submit`."""
        return await self._batcher.submit(job)

    async def look_up(self, function: Callable[[Recommender], _Result]) -> _Result:
        """What a function that changes nothing returns, beside the rankings.

        Raises:
            ValueError: too many wait already; or what the function raises.
        """
        if self._n_lookups >= MAX_LOOKUPS:
            raise RequestError(503, f"{MAX_LOOKUPS} requests wait already; send this one again later")
        self._n_lookups += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._lookups, function, self.recommender)
        finally:
            self._n_lookups -= 1

    async def explain_ranking(self, job: RankHistory | RankUser) -> list[ExplainedItem]:
        """As `submit`, with the reasons beside each item; they are found beside the rankings.

        Raises:
            ValueError: see `look_up` and `submit`.
        """
        if isinstance(job, RankHistory):
            return await self.look_up(
                lambda model: model.recommend(job.history, job.k, *job.options, explain=True)
            )

        def rank(model: Recommender) -> tuple[Recommender, list[str], Ranking | None]:
            history = self._users.read_history(job.user)
            return model, history, self._users.rank(model, [job.user], job.k, *job.options)[0]

        model, history, ranking = await self.submit(Call(rank))
        if ranking is None:
            raise RequestError(404, NO_EVENTS)
        return await self.look_up(lambda _: model.explain_ranking(history, ranking))

    async def read_history(self, user: str) -> list[str]:
        """The items of a user, oldest first; the model of the moment may lack some.

        Raises:
            ValueError: there is no such user.
        """
        history: list[str] = await self.submit(Call(lambda _: self._users.read_history(user)))
        if not history:
            raise RequestError(404, NO_EVENTS)
        return history

    async def delete_user(self, user: str) -> int:
        """Forget a user; returns how many events there were."""
        deleted: int = await self.submit(Call(lambda _: self._users.delete(user)))
        return deleted

    async def add_items(self, new: Sequence[NewItem]) -> None:
        """Take in new items, all or none; they are stored when this returns.

        Raises:
            ValueError: an item is known, a duplicate or without a usable vector; or there are too many,
                or too many requests wait.
        """
        if self._n_changes >= MAX_CHANGES:
            message = f"items: {MAX_CHANGES} requests wait already; send this one again later"
            raise RequestError(503, message)
        self._n_changes += 1
        try:
            async with self._change_lock:
                await self._add_items(new)
        finally:
            self._n_changes -= 1

    async def _add_items(self, new: Sequence[NewItem]) -> None:
        if self.n_added + len(new) > MAX_ADDED:
            message = f"items: the server takes {MAX_ADDED:,} new ones at most; train with them"
            raise RequestError(409, message)
        stored, longer = await self._change(self._extend_copy, new)
        await self.submit(Call(lambda _: self._store.add_items(stored)))
        self.recommender.take_over(longer)  # once they are stored
        self.n_added += len(stored)

    def _extend_copy(self, new: Sequence[NewItem]) -> tuple[list[StoredItem], Recommender]:
        """The items, and a copy of the recommender that has them and ranks."""
        stored = make_stored_items(new, self.recommender, self.text_encoder)
        longer = copy.copy(self.recommender)
        add_items(longer, stored)
        check_ranks(longer)
        return stored, longer

    async def reload(self) -> None:
        """Read the run folder again; requests go on, and the old model stays if the folder is broken.

        Raises:
            ValueError: the folder can't be used.
        """
        async with self._change_lock:
            try:
                stored = await self.submit(Call(lambda _: self._store.read_items()))
                recommender, n_added = await self._change(self._load_again, stored)
            except Exception as error:
                self.metrics.reloads["failed"] += 1
                logger.warning(
                    "reload failed, the old model stays: %s", error, exc_info=not _is_mistake(error)
                )
                if _is_mistake(error):
                    raise RequestError(409, f"{error}; the old model stays") from error
                raise
            self.recommender, self.n_added, self.loaded_at = recommender, n_added, datetime.now(UTC)
            self.metrics.reloads["done"] += 1
            with suppress(RequestError):  # those who wait do the same
                await self.submit(Call(lambda model: None))  # the users leave the old model
            await self._change(_return_free_memory)
            logger.warning("reloaded %s: %s items", self.options.run, f"{len(recommender.tokens) - 1:,}")

    def _load_run(self) -> Recommender:
        """The model of the run folder; a link is followed once, as it may change while files are read."""
        options, run = self.options, self.options.run
        folder = run if is_hub_name(run) else Path(os.path.realpath(run))
        return Recommender.load(folder, options.device, precision=options.precision)

    def _load_again(self, stored: Sequence[StoredItem]) -> tuple[Recommender, int]:
        recommender = self._load_run()
        if self.text_encoder is not None:
            check_text_encoder(self.text_encoder, recommender)
        return recommender, prepare_recommender(recommender, stored)

    async def _change(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._changes, function, *arguments)

    async def close(self) -> None:
        """Finish what is under way and close the store."""
        await self._batcher.close()
        self._lookups.shutdown()
        self._changes.shutdown()
        self._store.close()


def prepare_recommender(recommender: Recommender, stored: Sequence[StoredItem]) -> int:
    """Take in the stored items and rank once, which prepares the network; returns how many were added.

    Raises:
        ValueError: the model gives no finite scores.
    """
    n_added = add_stored_items(recommender, stored)
    check_ranks(recommender)
    return n_added


def check_ranks(recommender: Recommender) -> None:
    """Rank once.

    Raises:
        ValueError: the model gives no finite scores.
    """
    first = recommender.tokens[1]
    if not recommender.scores([[first]])[0, 1:].isfinite().all():
        raise UserError("model.safetensors: the scores are not finite; train again")
    recommender.recommend([first], 1)


def _return_free_memory() -> None:
    """Give an old model's memory back to the system; glibc would keep it for the next, and it adds up."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # another C library, or Windows
        ctypes.CDLL(None).malloc_trim(0)


def _is_mistake(error: Exception) -> bool:
    return isinstance(error, ValueError | OSError)
