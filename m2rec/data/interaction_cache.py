"""Interactions that are read, filtered and sorted, kept beside the data for the next run.

A file DIR/NAME/NAME.cache-CONTENT-KEYS.arrow holds them: CONTENT is a hash of the data file, KEYS one of the
settings that decide what is read and how it is filtered and sorted. So changed data or keys are noticed. The
columns are memory mapped, so that several processes share them. The last 64 bytes are a hash of all others.
A file's time of change is that of its last use: the `KEPT_FILES` last used ones of the present data are kept.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from m2rec.compat import Config, argument_list
from m2rec.data import inter_file
from m2rec.errors import format_one_line
from m2rec.storage import hash_content, hash_file, write_atomically

logger = logging.getLogger(__name__)

MIN_BYTES = 1 << 24
"""Smaller data files are read anew: that takes a second at most."""
KEPT_FILES = 3
"""So many are kept of one data file, each for other keys."""
COLUMN_TYPES = (np.int32, np.int64, np.float64)
"""Of the columns that are kept."""
_VERSION = 2  # of what the file holds and of how interactions are prepared
_KEYS = (
    *argument_list.dataset_arguments,
    "discretization", "encoding", "numerical_features", "ties", "time_order",
)  # fmt: skip
_OTHER_KEYS = {"MAX_ITEM_LIST_LENGTH"}  # which decide about rows only
# keys with which users or items have features, or columns other types than numbers
_FEATURE_KEYS = ("additional_feat_suffix", "benchmark_filename", "preload_weight")
_HASH_BYTES = 64

Message = tuple[str, int, str]
"""Logger, level and text."""


@dataclass(frozen=True)
class PreparedInteractions:
    """Interactions as a run takes them, sorted by user and time.

    Attributes:
        columns: by name (n,) ids (int32 where they fit, else int64) or numbers (float64).
        tokens: by column of ids its tokens by id, padding's first.
        types: `token` or `float` by column.
        counts: users, items and interactions.
        gap_quartiles: of the time between neighbouring interactions of a user.
        messages: what was said while they were prepared.
    """

    columns: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    types: dict[str, str]
    counts: dict[str, int]
    gap_quartiles: tuple[float, float, float] | None
    messages: list[Message]


def find_cache_file(config: Config) -> Path | None:
    """Where the interactions of a data set are kept with these keys; None for data that are not kept."""
    load_col = config["load_col"]
    if not config["data_cache"] or not isinstance(load_col, Mapping) or set(load_col) != {"inter"}:
        return None
    if any(config[key] for key in _FEATURE_KEYS):
        return None
    name, folder = str(config["dataset"]), Path(config["data_path"])
    path = inter_file.find_inter_file(folder, name)
    if not path.is_file() or path.stat().st_size < MIN_BYTES:
        return None
    keys = {key: config[key] for key in _KEYS if key not in _OTHER_KEYS}
    described = json.dumps([_VERSION, path.name, keys], sort_keys=True, default=str)
    content = hash_file(path)
    return folder / f"{name}.cache-{content[:16]}-{hashlib.sha256(described.encode()).hexdigest()[:16]}.arrow"


def read_cache(path: Path) -> PreparedInteractions | None:
    """What `write_cache` wrote; None if there is nothing, or if damaged or outdated, which is logged."""
    try:
        with pa.memory_map(str(path)) as file:
            content = file.read_buffer()
        body = content.slice(0, max(0, content.size - _HASH_BYTES))
        if hash_content(memoryview(body)).encode() != content.slice(body.size).to_pybytes():
            raise ValueError("its checksum is another one")
        table = ipc.open_file(pa.BufferReader(body)).read_all()
    except FileNotFoundError:
        return None
    except PermissionError as error:
        logger.warning(
            "data_cache: %s can't be read (%s); the data file is read again; change the permissions of the "
            "cache, or set data_cache: false",
            path, format_one_line(error),
        )  # fmt: skip
        return None
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        logger.warning("data_cache: %s is damaged (%s); it is made again", path, format_one_line(error))
        return None
    stored = json.loads(table.schema.metadata[b"m2rec"])
    if stored.get("version") != _VERSION:
        logger.info("data_cache: %s is of another version of this program; it is made again", path)
        return None
    with suppress(OSError):  # in a folder of somebody else's
        os.utime(path)
    arrays = {name: table.column(name).chunk(0).values for name in table.column_names}
    quartiles = stored["gap_quartiles"]
    return PreparedInteractions(
        columns={name: arrays[f"column:{name}"].to_numpy() for name in stored["types"]},
        tokens={name: np.array(arrays[f"tokens:{name}"].to_pylist()) for name in stored["tokens"]},
        types=stored["types"],
        counts=stored["counts"],
        gap_quartiles=None if quartiles is None else tuple(quartiles),
        messages=[tuple(message) for message in stored["messages"]],
    )


def write_cache(path: Path, prepared: PreparedInteractions) -> None:
    """Keep interactions in place of those of other content; a failure is logged and costs nothing else."""
    try:
        write_atomically(path, lambda file: _write_table(file, _build_table(prepared)))
        logger.info("data_cache: the interactions are kept in %s", path)
    except OSError as error:
        logger.warning(
            "data_cache: %s can't be written (%s); the next run reads the data again; to keep still about "
            "it set data_cache: false",
            path, format_one_line(error),
        )  # fmt: skip
        return
    content = path.name.rpartition("-")[0]
    same_data = []
    for other in path.parent.glob(f"{escape(content.rpartition('-')[0])}-*.arrow"):
        if not other.name.startswith(content):
            _remove(other, "the data file is another one now")
        elif other != path:
            same_data.append(other)
    for other in sorted(same_data, key=_find_last_use)[: 1 - KEPT_FILES]:
        _remove(other, f"the {KEPT_FILES} last used ones are kept")


def _find_last_use(path: Path) -> int:
    """Its time of change in nanoseconds; 0 if another process has removed it."""
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _remove(path: Path, reason: str) -> None:
    """Unlink a file; a process that has it mapped keeps its content."""
    with suppress(OSError):  # removed meanwhile; or on Windows, where another process has it mapped
        path.unlink()
        logger.info("data_cache: %s is removed: %s", path, reason)


def _build_table(prepared: PreparedInteractions) -> pa.Table:
    """One row whose cells are lists, so that columns of different lengths share a file."""
    arrays = {f"column:{name}": pa.array(values) for name, values in prepared.columns.items()}
    for name, tokens in prepared.tokens.items():
        arrays[f"tokens:{name}"] = pa.array(tokens.tolist(), pa.large_string())
    stored = {
        "version": _VERSION,
        "types": prepared.types,
        "tokens": list(prepared.tokens),
        "counts": prepared.counts,
        "gap_quartiles": prepared.gap_quartiles,
        "messages": prepared.messages,
    }
    cells = {
        name: pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)
        for name, values in arrays.items()
    }
    return pa.table(cells).replace_schema_metadata({"m2rec": json.dumps(stored)})


def _write_table(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    digest = hash_file(path)
    with path.open("ab") as file:
        file.write(digest.encode())


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[Message] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append((record.name, record.levelno, record.getMessage()))


@contextmanager
def record_messages() -> Iterator[list[Message]]:
    """Warnings, so that they can be said again."""
    recorder = _Recorder()
    logging.getLogger().addHandler(recorder)
    try:
        yield recorder.messages
    finally:
        logging.getLogger().removeHandler(recorder)


def repeat_messages(messages: list[Message]) -> None:
    """Say again what was said while cached interactions were prepared."""
    for name, level, text in messages:
        logging.getLogger(name).log(level, "%s", text)
