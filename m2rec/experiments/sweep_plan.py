"""Sweeps: results/NAME.yaml asks, by data set, variant and seed; every finished run is an answer."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

from m2rec.errors import UserError
from m2rec.run_folder import RunFolder, list_run_folders
from m2rec.yaml_values import read_yaml, suggest_spelling

MAIN_TABLE = "main"
OVERVIEW_TABLE = "overview"
# the second words of README's markers that stand for no table of the sweep
RESERVED_TABLES = ("reported", "buckets", OVERVIEW_TABLE)

_REQUIRED_SWEEP_KEYS = ("title", "datasets", "seeds", "variants")
_LISTED_KEYS = ("dataset", "seed")


class PlannedRun(NamedTuple):
    """One run that a sweep asks for."""

    dataset: str
    variant: str
    seed: int
    keys: dict[str, Any]
    """Keys of run_mm.py, without dataset and seed."""


@dataclass(frozen=True)
class Sweep:
    """What results/NAME.yaml asks: every variant on every data set with every seed."""

    name: str
    """NAME."""
    path: Path
    title: str
    command: str
    """What fills results/NAME.csv."""
    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    common: Mapping[str, Any]
    """Keys of every run."""
    dataset_keys: Mapping[str, Mapping[str, Any]]
    """Keys by data set, stronger than `common`."""
    variants: Mapping[str, Mapping[str, Any]]
    """Keys by variant, the strongest, in the order of the tables' rows."""
    tables: Mapping[str, tuple[str, ...]]
    """Variants by table; one table `main` of all unless the file names others."""
    reference: str | None
    """The variant that the others are compared with; None: nothing is compared."""
    baselines: tuple[str, ...]
    without_text: str | None
    """The reference without text, to stand beside models that see none."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """The checked sweep in a YAML file.

        Raises:
            ValueError: the file can't be read, or a key is unknown, missing or has no meaning.
        """
        content = read_yaml(path)
        try:
            return cls(name=path.stem, path=path, **_parse_sweep(content, path.stem))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None

    def planned_runs(self) -> Iterator[PlannedRun]:
        """All runs, seed by seed, so that an early stop leaves every variant with as many seeds."""
        for dataset in self.datasets:
            for seed in self.seeds:
                for variant in self.variants:
                    yield PlannedRun(dataset, variant, seed, self.keys(dataset, variant))

    def keys(self, dataset: str, variant: str) -> dict[str, Any]:
        """Keys of run_mm.py for a variant, without dataset and seed."""
        return {**self.common, **self.dataset_keys.get(dataset, {}), **self.variants[variant]}


def slugify_variant(variant: str) -> str:
    """A variant's name as the name of a folder."""
    return re.sub(r"[^a-z0-9.+-]+", "-", variant.lower()).strip("-")


def get_planned_run_folder(root: Path, dataset: str, variant: str, seed: int) -> Path:
    """The folder that holds the run folders of one cell; `root` is that of the sweep."""
    return root / dataset / slugify_variant(variant) / str(seed)


def find_finished_run(cell: Path) -> Path | None:
    """The newest run folder in a cell's folder that has metrics.json, which is written last."""
    finished = [run for run in list_run_folders(cell) if run.is_finished]
    newest = max(finished, key=_finish_time, default=None)
    return newest.path if newest else None


def _finish_time(run: RunFolder) -> tuple[int, str]:
    return run.metrics_file.stat().st_mtime_ns, run.path.name


def _parse_sweep(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of a Sweep but its name and path."""
    _check_sweep_keys(content)
    datasets = _parse_names("datasets", content["datasets"])
    variants = _parse_settings_by_name("variants", content["variants"])
    if not variants:
        raise UserError("variants: there are none; give at least one, such as M2Rec: {}")
    _check_variant_slugs(variants)
    dataset_keys = _parse_settings_by_name("dataset_keys", content.get("dataset_keys"))
    _check_known_names("dataset_keys", dataset_keys, datasets)
    reference, without_text = (_parse_name(key, content.get(key)) for key in ("reference", "without_text"))
    baselines = _parse_names("baselines", content.get("baselines") or [], empty=True)
    named = {"reference": (reference,), "without_text": (without_text,), "baselines": baselines}
    for key, names in named.items():
        _check_known_names(key, [name for name in names if name is not None], variants)
    if baselines and reference is None:
        raise UserError("baselines: there is nothing to compare them with; name a reference")
    return {
        "title": str(content["title"]),
        "command": str(content.get("command", f"python scripts/sweep.py results/{name}.yaml")),
        "datasets": datasets,
        "seeds": _parse_seeds(content["seeds"]),
        "common": _parse_run_settings("common", content.get("common")),
        "dataset_keys": dataset_keys,
        "variants": variants,
        "tables": _parse_tables(content.get("tables"), variants),
        "reference": reference,
        "baselines": baselines,
        "without_text": without_text,
    }


def _check_sweep_keys(content: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(Sweep) if field.name not in ("name", "path")]
    for key in content:
        if key not in known:
            raise UserError(
                f"unknown key {key!r}{suggest_spelling(str(key), known)}; known: {', '.join(known)}"
            )
    for key in _REQUIRED_SWEEP_KEYS:
        if content.get(key) is None:
            raise UserError(f"{key} is missing")


def _parse_name(key: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{key}: expected a name, got {value!r}")
    return value


def _parse_names(key: str, value: Any, empty: bool = False) -> tuple[str, ...]:
    """Distinct names."""
    names = [str(name) if type(name) is int else name for name in value] if isinstance(value, list) else []
    if not (names or (empty and value == [])) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{key}: expected a list of names, got {value!r}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{key}: {name!r} comes twice")
    return tuple(names)


def _parse_seeds(value: Any) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
    if not whole or not value or len(set(value)) < len(value):
        raise UserError(f"seeds: expected distinct whole numbers from 0, got {value!r}")
    return tuple(value)


def _parse_run_settings(key: str, value: Any) -> dict[str, Any]:
    """Keys of a run; the data set and the seed have lists of their own."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{key}: expected {{key: value}}, got {value!r}")
    for own in _LISTED_KEYS:
        if own in value:
            raise UserError(f"{key}: {own} belongs to the list {own}s")
    for name, given in value.items():
        if not isinstance(name, str):
            raise UserError(f"{key}: {name!r} is no key of a run")
        try:
            json.dumps(given)
        except TypeError:
            raise UserError(f"{key}: {name}: {given!r} is no value of a key; put it into quotes") from None
    return value


def _parse_settings_by_name(key: str, value: Any) -> dict[str, dict[str, Any]]:
    """Keys of a run by name."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{key}: expected {{name: {{key: value}}}}, got {value!r}")
    for name in value:
        if not isinstance(name, str):
            raise UserError(f"{key}: {name!r} is no text; put the name into quotes")
    return {name: _parse_run_settings(f"{key}, {name}", own) for name, own in value.items()}


def _check_variant_slugs(variants: Mapping[str, Any]) -> None:
    seen: dict[str, str] = {}
    for variant in variants:
        if not re.search("[a-z0-9]", slugify_variant(variant)):
            raise UserError(f"variants: {variant!r} has no letter or digit that can name a folder")
        other = seen.setdefault(slugify_variant(variant), variant)
        if other != variant:
            raise UserError(
                f"variants: {other!r} and {variant!r} share the folder {slugify_variant(variant)!r}"
            )


def _check_known_names(
    key: str, names: Sequence[Any] | Mapping[str, Any], known: Sequence[str] | Mapping[str, Any]
) -> None:
    for name in names:
        if name not in known:
            what = "data set" if key == "dataset_keys" else "variant"
            raise UserError(f"{key}: unknown {what} {name!r}{suggest_spelling(str(name), known)}")


def _parse_tables(value: Any, variants: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    if value is None:
        return {MAIN_TABLE: tuple(variants)}
    if not isinstance(value, dict) or not value:
        raise UserError(f"tables: expected {{table: [variant, ...]}}, got {value!r}")
    tables = {}
    for table, names in value.items():
        if not isinstance(table, str) or not re.fullmatch(r"[\w.-]+", table) or table in RESERVED_TABLES:
            reserved = ", ".join(RESERVED_TABLES)
            raise UserError(f"tables: {table!r} can't name a table; one word, {reserved} are taken")
        tables[table] = _parse_names(f"tables, {table}", names)
        _check_known_names(f"tables, {table}", tables[table], variants)
    return tables
