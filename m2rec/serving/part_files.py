"""Recommendations as a folder of Parquet parts: processes share them out, and a job that was stopped goes on.

Part n has the rows n * PART_ROWS and following of the input. A part is written whole or not at all.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from m2rec import distributed
from m2rec.errors import UserError
from m2rec.nn.encoder import Encoder
from m2rec.serving.batch_files import list_history_files, write_recommendations
from m2rec.serving.ranker import Ranking
from m2rec.storage import hash_file, lock_path, write_text

PART_ROWS = 100_000
JOB_FILE = "_job.json"  # readers of Parquet folders leave out names that begin with _

_LONG_KEYS = ("model", "histories")  # of a job, whose values no message has

Rows = Iterable[tuple[str, Iterable[str]]]
"""Users and their item tokens."""


def names_folder(output: str | Path) -> bool:
    """Whether an output is a folder of parts: one that exists, or a name that ends with a slash."""
    return str(output).endswith("/") or Path(output).is_dir()


def write_parts(
    folder: Path,
    rows: Rows,
    rank: Callable[[Rows], Iterable[tuple[str, Ranking]]],
    job: dict[str, Any],
) -> int:
    """Rank the rows of the parts that are missing; under torchrun each process ranks its share of them.

    Args:
        folder: made if it does not exist.
        rows: of the whole input.
        rank: gives the rankings of some rows, in their order.
        job: what decides the rankings, as JSON.

    Returns:
        The number of rows in the parts that this process has written.

    Raises:
        ValueError: the folder has parts of another job.
    """
    _begin_job(folder, job)
    process, n_processes = distributed.read_launch()
    rest, number, n_written = iter(rows), 0, 0
    while (first := next(rest, None)) is not None:
        part = chain([first], islice(rest, PART_ROWS - 1))
        file = folder / _name_part(number)
        if number % n_processes == process and not file.exists():
            n_written += write_recommendations(file, rank(part))
        else:
            deque(part, maxlen=0)
        number += 1
    if number == 0 and process == 0:  # a folder without a part has no columns
        write_recommendations(folder / _name_part(0), rank(()))
    return n_written


def describe_job(encoder: Encoder, source: Path, **options: Any) -> dict[str, Any]:
    """What decides the rankings: the weights, the contents of the files of histories, and the options.

    Machines may have copies of the files, so neither paths nor times are compared.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    files = []
    for file in list_history_files(source):
        files.append([file.stat().st_size, hash_file(file)])
    return {"model": digest.hexdigest(), "histories": files, "part_rows": PART_ROWS, **options}


def _begin_job(folder: Path, job: dict[str, Any]) -> None:
    """Write the job's description, or compare it with that of the parts that are there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file; name a folder, or leave the slash at the end out")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / JOB_FILE
    with lock_path(folder):
        if not any(folder.glob("part-*.parquet")):  # an earlier job may have failed before its first part
            write_text(file, json.dumps(job, indent=1))
            return
        if not file.exists():
            raise UserError(f"output: {folder} has parts, but no {JOB_FILE}; name another folder")
    before = json.loads(file.read_text(encoding="utf-8"))
    for key, value in job.items():
        if before.get(key) != value:
            was = "is another one" if key in _LONG_KEYS else f"was {before.get(key)!r} and is now {value!r}"
            raise UserError(
                f"output: {folder} has parts of another job, whose {key} {was}; remove the folder, or name "
                f"another one"
            )


def _name_part(number: int) -> str:
    return f"part-{number:05d}.parquet"
