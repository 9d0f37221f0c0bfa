"""Start functions of a test in several processes at once, as torchrun starts a command."""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

# a server that has loaded once what takes seconds; its forks begin at once, and may use autograd
_SERVER = get_context("forkserver")
_SERVER.set_forkserver_preload(["run_mm", "m2rec.training.run", "tests.conftest", "torch._dynamo"])


def run_together(n: int, folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(*arguments)` in n processes, which find each other as under torchrun.

    Args:
        n: how many.
        folder: for their errors, of which the first is raised here.
        work: a function of a module.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    errors = [folder / f"error-{port}-{rank}.txt" for rank in range(n)]
    processes = []
    for rank, error in enumerate(errors):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1"}
        environment = {name: str(value) for name, value in {**places, "MASTER_PORT": port}.items()}
        processes.append(_SERVER.Process(target=_call, args=(environment, error, work, arguments)))
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    written = [error.read_text() for error in errors if error.exists()]
    assert not written, "\n".join(written)
    assert [process.exitcode for process in processes] == [0] * n


def _call(
    environment: dict[str, str], error: Path, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except BaseException:
        error.write_text(traceback.format_exc())
        raise
