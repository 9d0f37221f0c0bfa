"""A run's folder: made with what the run was made from, and held while a process trains in it."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from m2rec import distributed
from m2rec.compat import Config
from m2rec.data.dataset import HistoryDataset
from m2rec.data.item_file import read_item_titles
from m2rec.errors import UserError
from m2rec.run_folder import CONFIG_FILE, COUNTS_FILE, ITEMS_FILE, TEXT_FILE, TITLES_FILE
from m2rec.storage import lock_path, write_text
from m2rec.training.configuration import resolve_settings
from m2rec.yaml_values import read_yaml

logger = logging.getLogger(__name__)

_LOCK_TIMEOUT = 10.0  # seconds: data-loader workers of a run that was killed hold its folder for five


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Keep other processes than this run's from going on with it at the same time.

    Raises:
        ValueError: one does.
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


def create_run_folder(config: Config, dataset: HistoryDataset, text: dict[str, Any] | None) -> Path:
    """A folder that no other run has, named after model, data set and time, with the run's inputs."""
    time = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^\w.+-]+", "_", f"{config['variant']}-{config['dataset']}-{time}")
    base = Path(config["runs_dir"]) / name
    for attempt in range(1, 1000):
        folder = base if attempt == 1 else base.with_name(f"{base.name}-{attempt}")
        try:
            folder.mkdir(parents=True)
            _write_run_inputs(folder, config, dataset, text)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            reason = error.strerror
            raise UserError(f"runs_dir: can't create {folder} ({reason}); set another") from error
    raise UserError(f"runs_dir: no free name like {base}; clean up {base.parent}")


def _write_run_config(folder: Path, settings: dict[str, Any]) -> None:
    header = f"# python run_mm.py --config_files={quote(str(folder / CONFIG_FILE))} repeats this run\n"
    write_text(folder / CONFIG_FILE, header + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def update_eval_batch_size(folder: Path, config: Config) -> None:
    """A run that goes on with another size of the test's batches is repeated with that."""
    settings = read_yaml(folder / CONFIG_FILE)
    if settings.get("eval_batch_size") != config["eval_batch_size"]:
        _write_run_config(folder, {**settings, "eval_batch_size": config["eval_batch_size"]})


def _write_run_inputs(
    folder: Path, config: Config, dataset: HistoryDataset, text: dict[str, Any] | None
) -> None:
    """What the run was made from: the resolved config, item tokens by internal id, their titles and text."""
    _write_run_config(folder, resolve_settings(config))
    if text is not None:
        write_text(folder / TEXT_FILE, json.dumps(text, indent=2, ensure_ascii=False) + "\n")
    tokens = dataset.item_tokens
    write_text(folder / ITEMS_FILE, json.dumps(tokens, ensure_ascii=False) + "\n")
    if dataset.histories is not None:
        counts = dataset.histories.training_counts(dataset.item_num).tolist()
        write_text(folder / COUNTS_FILE, json.dumps(counts) + "\n")
    try:
        path = Path(config["data_path"]) / f"{config['dataset']}.item"
        titles = read_item_titles(path, config["ITEM_ID_FIELD"], config["field_separator"])
    except (ValueError, OSError) as error:
        logger.warning("no titles: %s", error)
        return
    if known := {token: titles[token] for token in tokens[1:] if token in titles}:
        write_text(folder / TITLES_FILE, json.dumps(known, ensure_ascii=False) + "\n")
