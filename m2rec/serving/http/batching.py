"""Requests that arrive together are ranked together, by one thread."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from m2rec.serving.http.errors import RequestError

logger = logging.getLogger(__name__)

MAX_BATCH = 64
MAX_WAITING = 1024

_Job = TypeVar("_Job")
_Answer = TypeVar("_Answer")


class Batcher(Generic[_Job, _Answer]):
    """Collects jobs while a batch is under way, and hands them to a function in that function's own thread.

    Nobody waits for others to come: an idle server answers at once, a busy one in larger batches.

    Args:
        work: an answer or an error for each job of a batch, in their order.
        observe: is told the size of each batch.
    """

    def __init__(
        self, work: Callable[[Sequence[_Job]], Sequence[_Answer | Exception]], observe: Callable[[int], None]
    ) -> None:
        self._work, self._observe = work, observe
        self._waiting: deque[tuple[_Job, asyncio.Future[_Answer]]] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "ranking")

    async def submit(self, job: _Job) -> _Answer:
        """The answer to a job.

        Raises:
            ValueError: too many jobs wait already; or the job's own error.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise RequestError(503, f"{MAX_WAITING:,} requests wait already; send this one again later")
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, answer))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        """Work until nothing waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
            self._observe(len(batch))
            try:
                answers = await loop.run_in_executor(self._thread, self._work, [job for job, _ in batch])
            except Exception as error:
                logger.exception("a batch failed")
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():  # whoever asked has gone
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        self._runner = None

    async def close(self) -> None:
        """Finish what is under way, and end the thread."""
        if self._runner is not None:
            await self._runner
        self._thread.shutdown()
