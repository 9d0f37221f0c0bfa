"""A new run folder with the run's inputs, and the lock of a run folder."""

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from m2rec import distributed
from m2rec.compat import Config
from m2rec.data.dataset import HistoryDataset
from m2rec.data.extent import TrainingExtent
from m2rec.data.item_file import read_item_titles
from m2rec.errors import UserError
from m2rec.run_folder import RunFolder
from m2rec.storage import lock_path, write_text
from m2rec.training.configuration import resolve_settings

logger = logging.getLogger(__name__)

_LOCK_TIMEOUT = 10.0  # seconds: the data-loader workers of a killed run keep its lock for five


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Lock a run folder so that no other process can resume it.

    Raises:
        ValueError: another process has locked it.
    """
    with ExitStack() as stack:
        try:
            if distributed.is_main_process():
                stack.enter_context(lock_path(folder, _LOCK_TIMEOUT))
        except BlockingIOError:
            raise UserError(
                f"resume: another process is training in {folder}; wait for it or stop it"
            ) from None
        yield


def create_run_folder(
    config: Config, dataset: HistoryDataset, text: dict[str, Any] | None, comment: str = ""
) -> Path:
    """Create a folder named after model, data set and time, and write the run's inputs into it.

    Args:
        text: the source of the text vectors, None without text.
        comment: for the head of config.yaml.
    """
    time = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^\w.+-]+", "_", f"{config['variant']}-{config['dataset']}-{time}")
    for attempt in count(1):
        folder = Path(config["runs_dir"]) / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"runs_dir: can't create {folder} ({error.strerror}); set another") from error
    files = RunFolder(folder)
    _write_run_inputs(files, config, dataset, text or {}, comment)
    launch = distributed.name_launch()
    if launch is not None:
        write_text(files.launch_file, launch)
    return folder


def find_interrupted_run(runs: Path) -> Path | None:
    """The run that this torchrun command has begun and can resume, where it starts its processes again.

    Args:
        runs: the folder of the runs, which all machines share.
    """
    start, name = distributed.find_launch_start(), distributed.name_launch()
    if start is None:
        return None
    begun: list[tuple[float, Path]] = []
    for file in runs.glob("*/launch.txt"):
        with suppress(FileNotFoundError):  # the end of a run removes it
            written = file.stat().st_mtime
            # an earlier command may have had the same rendezvous id
            if written >= start and file.read_text(encoding="utf-8") == name:
                begun.append((written, file.parent))
    for _, folder in sorted(begun, reverse=True):
        files = RunFolder(folder)
        if files.checkpoint_file.is_file() and not files.is_finished:
            return folder
    return None


def update_eval_batch_size(files: RunFolder, eval_batch_size: int) -> None:
    """Store the new eval_batch_size of a resumed run in its config.yaml."""
    settings = files.read_config()
    if settings.get("eval_batch_size") != eval_batch_size:
        files.write_config({**settings, "eval_batch_size": eval_batch_size}, files.read_comment())


def _write_run_inputs(
    files: RunFolder, config: Config, dataset: HistoryDataset, text: dict[str, Any], comment: str
) -> None:
    tokens = dataset.item_tokens
    counts: list[int] = []
    if dataset.histories is not None:
        counts = dataset.histories.training_counts(dataset.item_num).tolist()
    titles = _read_titles(config)
    titles = {token: titles[token] for token in tokens[1:] if token in titles}
    files.write_inputs(resolve_settings(config), tokens, counts, titles, text, comment)
    if dataset.row_targets is not None:
        files.write_extent(TrainingExtent.measure(dataset).to_tensors())


def _read_titles(config: Config) -> dict[str, str]:
    """All titles of the item file by token; empty if it can't be read."""
    path = Path(config["data_path"]) / f"{config['dataset']}.item"
    try:
        return read_item_titles(path, config["ITEM_ID_FIELD"], config["field_separator"])
    except (ValueError, OSError) as error:
        logger.warning("no titles: %s", error)
        return {}
