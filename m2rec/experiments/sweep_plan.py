"""Sweeps: results/NAME.yaml lists the runs to make, by data set, variant and seed."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StrictStr, model_validator

from m2rec.errors import UserError
from m2rec.run_folder import RunFolder, list_run_folders
from m2rec.settings import CheckedModel, Role, collect_keys
from m2rec.yaml_values import describe_unknown, read_yaml

MAIN_TABLE = "main"
OVERVIEW_TABLE = "overview"
# the second words of README's markers that stand for no table of the sweep
RESERVED_TABLES = ("reported", "buckets", OVERVIEW_TABLE)

_LISTED_KEYS = collect_keys(Role.DATASET, Role.SEED)
_PROTOCOL_KEYS = collect_keys(Role.PROTOCOL)


class PlannedRun(NamedTuple):
    """One run that a sweep asks for."""

    dataset: str
    variant: str
    seed: int
    keys: dict[str, Any]
    """Keys of run_mm.py, without dataset and seed."""


def slugify_variant(variant: str) -> str:
    """A variant's name as the name of a folder."""
    return re.sub(r"[^a-z0-9.+-]+", "-", variant.lower()).strip("-")


def _check_run_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Keys of a run; the sweep lists data sets and seeds in keys of its own."""
    for key, value in keys.items():
        if key in _LISTED_KEYS:
            raise UserError(f"{key} belongs to the list {key}s")
        try:
            json.dumps(value)
        except TypeError:
            raise UserError(f"{key}: {value!r} is not a valid value of a key; put it into quotes") from None
    return keys


def _check_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse duplicates, which would count a run twice."""
    if len(set(values)) < len(values):
        raise ValueError
    return values


def _check_variants(variants: dict[str, Any]) -> dict[str, Any]:
    """The name of each variant must name a folder that no other variant has."""
    if not variants:
        raise UserError("there are none; give at least one, such as M2Rec: {}")
    owners: dict[str, str] = {}
    for variant in variants:
        slug = slugify_variant(variant)
        if not re.search("[a-z0-9]", slug):
            raise UserError(f"{variant!r} has no letter or digit that can name a folder")
        owner = owners.setdefault(slug, variant)
        if owner != variant:
            raise UserError(f"{owner!r} and {variant!r} share the folder {slug!r}")
    return variants


def _check_table_names(tables: dict[str, Any]) -> dict[str, Any]:
    for table in tables:
        if not re.fullmatch(r"[\w.-]+", table) or table in RESERVED_TABLES:
            reserved = ", ".join(RESERVED_TABLES)
            raise UserError(f"{table!r} can't name a table; give one word other than {reserved}")
    return tables


def _replace_none(value: Any) -> Any:
    return {} if value is None else value


Names = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    AfterValidator(_check_distinct),
    Field(description="a list of distinct names"),
]
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, strict=True)], ...],
    AfterValidator(_check_distinct),
    Field(min_length=1, description="distinct whole numbers from 0"),
]
Tables = Annotated[dict[StrictStr, Names], AfterValidator(_check_table_names)]
RunKeys = Annotated[dict[StrictStr, Any], AfterValidator(_check_run_keys), BeforeValidator(_replace_none)]


class Sweep(CheckedModel):
    """The content of results/NAME.yaml: every variant on every data set with every seed."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    name: str
    """NAME."""
    path: Path
    title: str
    command: str
    """The command that fills results/NAME.csv."""
    datasets: Names = Field(min_length=1)
    seeds: Seeds
    common: RunKeys = Field({})
    """Keys of every run."""
    dataset_keys: dict[StrictStr, RunKeys] = Field({})
    """Keys by data set, stronger than `common`."""
    variants: Annotated[dict[StrictStr, RunKeys], AfterValidator(_check_variants)]
    """Keys by variant, the strongest, in the order of the tables' rows."""
    tables: Tables = Field(min_length=1)
    """Variants by table; one table `main` of all unless the file names others."""
    reference: str | None = None
    """The variant that all other variants are compared with; None: nothing is compared."""
    baselines: Names = ()
    without_text: str | None = None
    """The reference without text, for comparison with models that do not use text."""
    headline: str | None = None
    """The variant beside published numbers and in the overview once it has runs; else the reference."""
    headline_without_text: str | None = None
    """The same without text."""
    ties_shuffled: str | None = None
    """The sweep in the same folder with some of these variants under `ties: shuffled`, shown beside them."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """The checked sweep in a YAML file.

        Raises:
            UserError: the file can't be read, or a key is unknown, missing or invalid.
        """
        content = read_yaml(path)
        given = {str(key): value for key, value in content.items() if value is not None}
        given.setdefault("command", f"python scripts/sweep.py results/{path.stem}.yaml")
        given.setdefault("tables", {MAIN_TABLE: list(given.get("variants") or ())})
        try:
            return cls(**{**given, "name": path.stem, "path": path})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        """Every named data set and variant must be one of the sweep."""
        _require_known("dataset_keys", self.dataset_keys, self.datasets, "data set")
        for key in ("reference", "without_text", "headline", "headline_without_text"):
            variant = getattr(self, key)
            if variant is not None:
                _require_known(key, [variant], self.variants)
        _require_known("baselines", self.baselines, self.variants)
        for table, variants in self.tables.items():
            _require_known(f"tables: {table}", variants, self.variants)
        if self.baselines and self.reference is None:
            raise UserError("baselines: there is nothing to compare them with; name a reference")
        return self

    @model_validator(mode="after")
    def _check_one_protocol(self) -> Self:
        """All variants rank the same targets on a data set, or their numbers could not share a column."""
        first = next(iter(self.variants))
        for dataset in self.datasets:
            expected = _select_protocol_keys(self.keys(dataset, first))
            for variant in self.variants:
                found = _select_protocol_keys(self.keys(dataset, variant))
                if found != expected:
                    raise UserError(
                        f"variants: {variant!r} has {found or 'no keys'} of the protocol, {first!r} has "
                        f"{expected or 'none'}; put the keys into common, or make a sweep for each protocol"
                    )
        return self

    def read_ties_shuffled(self) -> "Sweep | None":
        """The sweep `ties_shuffled`, None without one.

        Raises:
            UserError: it can't be read, or a variant of both does not differ in `ties` alone.
        """
        if self.ties_shuffled is None:
            return None
        other = Sweep.read(self.path.with_name(f"{self.ties_shuffled}.yaml"))
        for dataset in other.datasets:
            _require_known("datasets", [dataset], self.datasets, "data set")
            for variant in other.variants:
                _require_known(f"{other.path}: variants", [variant], self.variants)
                own = self.keys(dataset, variant)
                if own.get("ties") == "shuffled":
                    raise UserError(f"{self.path}: ties_shuffled: the sweep is itself shuffled; leave it out")
                expected = {**own, "ties": "shuffled"}
                if other.keys(dataset, variant) != expected:
                    raise UserError(
                        f"{other.path}: {variant!r} on {dataset} differs from {self.path} in more than ties: "
                        f"shuffled; give it the same keys"
                    )
        return other

    def planned_runs(self) -> Iterator[PlannedRun]:
        """All runs, seed by seed, so that an early stop leaves every variant with as many seeds."""
        for dataset in self.datasets:
            for seed in self.seeds:
                for variant in self.variants:
                    yield PlannedRun(dataset, variant, seed, self.keys(dataset, variant))

    def keys(self, dataset: str, variant: str) -> dict[str, Any]:
        """Keys of run_mm.py for a variant, without dataset and seed."""
        return {**self.common, **self.dataset_keys.get(dataset, {}), **self.variants[variant]}


def _select_protocol_keys(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key in _PROTOCOL_KEYS}


def _require_known(key: str, names: Iterable[str], known: Iterable[str], what: str = "variant") -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{key}: {describe_unknown(name, known, what)}")


def get_planned_run_folder(root: Path, dataset: str, variant: str, seed: int) -> Path:
    """The folder that holds the run folders of one cell; `root` is that of the sweep."""
    return root / dataset / slugify_variant(variant) / str(seed)


def find_finished_run(cell: Path) -> Path | None:
    """The newest run folder in a cell's folder that has metrics.json, which is written last."""
    finished = [run for run in list_run_folders(cell) if run.is_finished]
    newest = max(finished, key=_get_finish_time, default=None)
    return newest.path if newest else None


def _get_finish_time(run: RunFolder) -> tuple[int, str]:
    return run.metrics_file.stat().st_mtime_ns, run.path.name
