"""The files of a run folder: their names, and how they are read, checked and written.

PyTorch and pandas are only imported by the methods that need them, so that a table or a page starts quickly.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from m2rec.cli import name_command
from m2rec.errors import UserError, format_one_line
from m2rec.storage import write_text
from m2rec.yaml_values import read_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from m2rec.tensor_files import RowBlocks

ITEMS_FILE = "items.json"

JsonObject = dict[str, Any]
_JsonValue = TypeVar("_JsonValue", JsonObject, list[Any])


class RunFolder:
    """One run's folder; none of its files is a pickle. Every `read_` method raises ValueError for a bad file.

    Args:
        path: the folder, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.json"  # written when the run is finished
        self.history_file = path / "history.csv"  # a line per epoch
        self.ranks_file = path / "test_ranks.csv"
        self.items_file = path / ITEMS_FILE  # item tokens by internal id
        self.counts_file = path / "counts.json"  # occurrences of each item in the training data
        self.extent_file = path / "trained.safetensors"  # how much of each user's history training had
        self.titles_file = path / "titles.json"  # only if the item file has titles
        self.text_file = path / "text.json"  # source of the text vectors; only if there are any
        self.insights_file = path / "insights.json"  # gate weights, filter gains and examples
        self.report_file = path / "report.html"
        self.weights_file = path / "model.safetensors"  # the best weights so far
        self.checkpoint_file = path / "checkpoint.safetensors"  # the training state of an unfinished run
        self.launch_file = path / "launch.txt"  # of an unfinished run: the torchrun command that began it

    def name_shard(self, moment: str, rank: int, n_processes: int) -> Path:
        """The file of what only one process has of a checkpoint, with `shard_items`.

        Args:
            moment: names the checkpoint; two must not mix.
            rank, n_processes: number of the process, from 0, and how many there are.
        """
        return self.path / f"checkpoint-{moment}.{rank + 1}-of-{n_processes}.safetensors"

    def list_shards(self) -> list[Path]:
        """The files that `name_shard` names, of all checkpoints and processes."""
        return sorted(self.path.glob("checkpoint-*-of-*.safetensors"))

    @property
    def is_finished(self) -> bool:
        """Whether the run was trained and tested."""
        return self.metrics_file.is_file()

    @property
    def has_training(self) -> bool:
        """Whether a training, finished or not, wrote this folder."""
        written = (self.metrics_file, self.checkpoint_file, self.history_file)
        return any(path.exists() for path in written)

    def read_config(self) -> JsonObject:
        """The keys of the run."""
        return read_yaml(self.config_file)

    def read_comment(self) -> str:
        """What `write_config` got as the comment; empty without one."""
        try:
            with self.config_file.open(encoding="utf-8") as file:
                file.readline()  # the command
                line = file.readline()
        except (OSError, ValueError):
            return ""
        return line[2:].rstrip("\n") if line.startswith("# ") else ""

    def write_config(self, config: Mapping[str, Any], comment: str = "", is_run: bool = True) -> None:
        """Write config.yaml; of a run with the command that repeats it, and one more line of comment."""
        header = ""
        if is_run:
            command = f"{name_command('train')} --config_files={quote(str(self.config_file))}"
            header = f"# {command} repeats this run\n"
        if comment:
            header += f"# {comment}\n"
        content = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        write_text(self.config_file, header + content)

    def write_inputs(
        self,
        config: Mapping[str, Any],
        tokens: Sequence[str],
        counts: Sequence[int],
        titles: Mapping[str, str],
        text_source: Mapping[str, Any],
        comment: str = "",
        is_run: bool = True,
    ) -> None:
        """Write what a model needs beside its weights; a file that would be empty is left out."""
        self.write_config(config, comment, is_run)
        _write_json(self.items_file, tokens)
        optional = {self.counts_file: counts, self.titles_file: titles, self.text_file: text_source}
        for path, content in optional.items():
            if content:
                _write_json(path, content)
            else:
                path.unlink(missing_ok=True)  # of an earlier model

    def read_tokens(self) -> list[str]:
        """Item tokens by internal id, that of padding first."""
        tokens = _read_json(self.items_file, list)
        items = tokens[1:]  # an item may have the token of padding
        are_strings = all(isinstance(token, str) for token in tokens)
        if not items or not are_strings or len(set(items)) < len(items):
            raise UserError(f"{self.items_file} must be a list of unique strings")
        return tokens

    def read_counts(self, n_items: int) -> list[int]:
        """Occurrences of each item in the training data by internal id; empty in older folders."""
        counts = _read_json(self.counts_file, list, [])
        are_counts = all(type(count) is int and count >= 0 for count in counts)
        if not are_counts or (counts and len(counts) != n_items):
            raise UserError(f"{self.counts_file} must be a list of {n_items} whole numbers from 0")
        return counts

    def read_titles(self) -> dict[str, str]:
        """Titles by item token; empty without the file."""
        titles = _read_json(self.titles_file, dict, {})
        if not all(isinstance(title, str) for title in titles.values()):
            raise UserError(f"{self.titles_file} holds a title that is not a string")
        return titles

    def read_text_source(self) -> JsonObject:
        """The source of the text vectors; empty without text."""
        return _read_json(self.text_file, dict, {})

    def read_extent(self) -> dict[str, Tensor]:
        """How much of each user's history training had, as `m2rec.data.extent` has it."""
        from m2rec.tensor_files import read_tensors

        return read_tensors(self.extent_file)[0]

    def write_extent(self, tensors: dict[str, Tensor]) -> None:
        """Write what `read_extent` reads."""
        from m2rec.tensor_files import write_tensors

        write_tensors(self.extent_file, tensors)

    def read_weights(self, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
        """The weights and their metadata, such as the epoch."""
        from m2rec.tensor_files import read_tensors

        return read_tensors(self.weights_file, device)

    def open_weights(self) -> AbstractContextManager[tuple[Any, dict[str, str]]]:
        """The weights and their metadata, as `tensor_files.open_tensors` has them; checked, but not read."""
        from m2rec.tensor_files import open_tensors

        return open_tensors(self.weights_file)

    def write_weights(
        self, weights: Mapping[str, Tensor | RowBlocks], metadata: dict[str, str] | None = None
    ) -> None:
        """Write the weights atomically."""
        from m2rec.tensor_files import write_tensors

        write_tensors(self.weights_file, weights, metadata)

    def read_history(self) -> list[dict[str, str]]:
        """A row per epoch."""
        try:
            lines = self.history_file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.history_file} can't be read ({format_one_line(error)})") from None
        return list(csv.DictReader(lines))

    def append_history(self, values: Sequence[Any]) -> None:
        """Append a line and sync it: a checkpoint must not reach the disk before the lines of its epochs."""
        with self.history_file.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(values)
            file.flush()
            os.fsync(file.fileno())

    def truncate_history(self, epoch: int) -> None:
        """Drop the lines after this epoch.

        Raises:
            ValueError: an earlier line is missing.
        """
        content = self.history_file.read_text(encoding="utf-8", errors="replace")
        lines = content.splitlines()[: epoch + 2]
        first_column = [line.partition(",")[0] for line in lines]
        if first_column != ["epoch", *map(str, range(epoch + 1))]:
            raise UserError(
                f"resume: {self.history_file} is incomplete before epoch {epoch}; start a new run"
            )
        write_text(self.history_file, "\n".join(lines) + "\n")

    def read_metrics(self) -> JsonObject:
        """The content of metrics.json."""
        if not self.is_finished:
            raise UserError(f"{self.path} is not a finished run: {self.metrics_file.name} is missing")
        return _read_json(self.metrics_file, dict)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json, with which the run is finished."""
        _write_json(self.metrics_file, metrics, indent=2)

    def write_ranks(self, content: str) -> None:
        """Write test_ranks.csv."""
        write_text(self.ranks_file, content)

    def read_insights(self) -> JsonObject:
        """The content of insights.json; empty in older folders."""
        return _read_json(self.insights_file, dict, {})

    def write_insights(self, insights: Mapping[str, Any]) -> None:
        """Write insights.json."""
        _write_json(self.insights_file, insights)

    def remove_temporary_files(self) -> None:
        """Remove what interrupted writes left."""
        for path in self.path.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def list_run_folders(parent: Path) -> list[RunFolder]:
    """The run folders in a folder, sorted by name."""
    return [RunFolder(path) for path in sorted(parent.glob("*/"))]


def _read_json(path: Path, kind: type[_JsonValue], missing: _JsonValue | None = None) -> _JsonValue:
    """The content of a JSON file, or `missing` where that is given and the file does not exist."""
    if missing is not None and not path.exists():
        return missing
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({format_one_line(error)})") from None
    if not isinstance(content, kind):
        raise UserError(f"{path} must hold a JSON {'object' if kind is dict else 'array'}")
    return content


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
