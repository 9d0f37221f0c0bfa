"""Prepare the public data sets of the results tables from their raw files, downloaded if need be."""

import logging
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from m2rec.data.fetch import fetch_file
from m2rec.data.raw.comparison import Comparison, compare_dataset
from m2rec.data.raw.formats import TABLE_KINDS
from m2rec.data.raw.options import PreparationOptions
from m2rec.data.raw.prepare import DatasetStatistics, prepare_dataset
from m2rec.data.raw.public_data import Preset, PresetSource, RawFile, read_presets
from m2rec.errors import UserError
from m2rec.storage import write_atomically
from m2rec.yaml_values import describe_unknown

logger = logging.getLogger(__name__)

_ITEM_OPTIONS = ("item_id", "text", "item_columns", "item_separator")


class PreparedPreset(NamedTuple):
    """The statistics of a prepared data set, and its comparison with the data of the tables."""

    statistics: DatasetStatistics
    comparisons: list[Comparison]
    note: str

    @property
    def is_same(self) -> bool:
        """Whether nothing that can be compared differs."""
        return all(comparison.is_same for comparison in self.comparisons)


class RawFolder(NamedTuple):
    """Where raw files are, and whether missing ones are downloaded."""

    path: Path
    download: bool = False


def prepare_preset(
    name: str,
    options: Mapping[str, Any],
    folder: RawFolder,
    source: str | None = None,
    log: Callable[[str], object] = logger.warning,
) -> PreparedPreset:
    """Prepare a public data set and compare it with the data of the tables.

    Args:
        name: the preset's.
        options: `dataset`, `data_path`, `interactions` and `items` of `PreparationOptions`, where they are
            not the preset's. With `interactions`, nothing is looked for in `folder`.
        folder: of the raw files.
        source: one of the preset's sources; by default the first.
        log: see `prepare_dataset`.

    Raises:
        UserError: a raw file is missing or can't be downloaded, or `prepare_dataset` fails.
    """
    presets = read_presets()
    if name not in presets:
        raise UserError(
            f"preset: {describe_unknown(name, presets, 'preset')}; it is one of {', '.join(presets)}"
        )
    preset = presets[name]
    chosen = _choose_source(preset, source)
    if "interactions" in options:
        files = {}
    else:
        files = _obtain_files(preset, chosen, folder, log)
    settings = chosen.options | {"dataset": name} | files | dict(options)
    if "items" not in settings and settings.get("format") in TABLE_KINDS:
        settings = {key: settings[key] for key in settings if key not in _ITEM_OPTIONS or key in options}
    prepared = PreparationOptions(**settings)
    statistics = prepare_dataset(prepared, log)
    inter = prepared.data_path / prepared.dataset / f"{prepared.dataset}.inter"
    return PreparedPreset(statistics, compare_dataset(inter, statistics, preset, chosen), chosen.note)


def _choose_source(preset: Preset, name: str | None) -> PresetSource:
    if name is None:
        return next(iter(preset.sources.values()))
    if name not in preset.sources:
        raise UserError(f"source: expected one of {', '.join(preset.sources)}, got {name!r}")
    return preset.sources[name]


def _obtain_files(
    preset: Preset, source: PresetSource, folder: RawFolder, log: Callable[[str], object]
) -> dict[str, Path]:
    """The paths of the interactions and the items; missing files are downloaded or are an error.

    Items are optional without a download.
    """
    for file_name, file in source.files.items():
        needed = file.unpack or (file_name,)
        if all((folder.path / member).is_file() for member in needed):
            continue
        path = folder.path / file_name
        if not path.is_file():
            if file_name == source.items and not folder.download:
                log(f"{path}: no such file, so the items get no texts; {_describe_ways(preset, file, path)}")
                continue
            _download(file, path, preset, folder)
        if file.unpack:
            _unpack(path, file.unpack)
    paths = {"interactions": folder.path / source.interactions}
    if source.items and (folder.path / source.items).is_file():
        paths["items"] = folder.path / source.items
    return paths


def _download(file: RawFile, path: Path, preset: Preset, folder: RawFolder) -> None:
    if not folder.download or file.url is None:
        raise UserError(f"raw: there is no {path}; {_describe_ways(preset, file, path)}")
    logger.warning("downloading %s (%s: %s; %s)", file.url, preset.about, preset.terms, preset.page)
    try:
        fetch_file(file.to_remote(), path)
    except UserError as error:
        raise UserError(
            f"{error} (or get the file from {preset.page} and put it into {path.parent})"
        ) from error


def _describe_ways(preset: Preset, file: RawFile, path: Path) -> str:
    """How to get a file that is missing."""
    by_hand = f"get the file from {preset.page} and put it into {path.parent}"
    return f"download fetches {file.url}, or {by_hand}" if file.url else by_hand


def _unpack(archive: Path, members: tuple[str, ...]) -> None:
    """Write members of a zip file beside it, each atomically."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in members:
                content = opened.read(member)
                path = archive.parent / member
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, partial(_write_bytes, content))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{archive}: it is damaged or another archive ({error}); delete it") from error


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)
