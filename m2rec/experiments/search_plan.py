"""Studies: results/tune/NAME.yaml asks which settings to search, and how each is drawn."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from m2rec.errors import UserError
from m2rec.settings import MACHINE_KEYS
from m2rec.yaml_values import read_yaml, suggest_spelling

_PLAN_KEYS = ("study", "trials", "seed", "fixed", "search", "pruner")
_RANGE_KEYS = ("low", "high", "log", "step")
_PRUNER_DEFAULTS = {"warmup_epochs": 0, "startup_trials": 5}
# keys that change which rows are scored, or how, or only luck: values of such trials can't be compared
_NOT_SEARCHABLE = {
    "ITEM_ID_FIELD", "TIME_FIELD", "USER_ID_FIELD", "dataset", "filter_inter_by_user_or_item",
    "item_inter_num_interval", "rm_dup_inter", "seed", "split", "test_from", "time_order",
    "user_inter_num_interval", "val_interval", "valid_from", "valid_metric",
}  # fmt: skip


@dataclass(frozen=True)
class SearchPlan:
    """What a study's file and the command line ask for."""

    study: str
    trials: int
    """In all, over all workers."""
    seed: int
    """Of the search; the runs have theirs in `fixed`."""
    fixed: dict[str, Any]
    """Keys of every run."""
    search: dict[str, dict[str, Any] | list[Any]]
    """A range or a list of choices per key."""
    pruner: dict[str, int] | None
    """When a trial may be stopped; None: never."""

    @classmethod
    def read(cls, path: Path, given: Mapping[str, Any], known_keys: Collection[str]) -> Self:
        """The checked plan in a YAML file, with the values of the command line in it.

        Args:
            path: the file; `python scripts/tune.py --help` shows its format.
            given: `trials`, and keys that are stronger than those in `fixed`.
            known_keys: the keys of a run.

        Raises:
            ValueError: the file can't be read, or a key or value in it is wrong.
        """
        content = read_yaml(path)
        try:
            return cls(**_parse_plan(content, given, known_keys))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None


def _parse_plan(
    content: Mapping[str, Any], given: Mapping[str, Any], known_keys: Collection[str]
) -> dict[str, Any]:
    """The fields of a Plan."""
    values = {"seed": 2020, "fixed": {}, "pruner": None, **content}
    _check_plan_keys(values)
    name, trials = values["study"], given.get("trials", values["trials"])
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"study: expected a name of letters, digits and any of ._+-, got {name!r}")
    _check_integer("trials", trials, 1)
    _check_integer("seed", values["seed"], 0)
    fixed = {**values["fixed"], **{key: value for key, value in given.items() if key != "trials"}}
    if not values["search"]:
        raise UserError("search: no key to search; --help shows the format")
    for key, drawn in values["search"].items():
        if key not in known_keys:
            raise UserError(f"search: unknown key {key!r}{suggest_spelling(str(key), known_keys)}")
        _check_search_space(key, drawn, fixed)
    return {**values, "trials": trials, "fixed": fixed, "pruner": _parse_pruner(values["pruner"])}


def _check_plan_keys(values: Mapping[str, Any]) -> None:
    for key in values:
        if key not in _PLAN_KEYS:
            raise UserError(f"unknown key {key!r}{suggest_spelling(str(key), _PLAN_KEYS)}")
    for key in _PLAN_KEYS:
        if key not in values:
            raise UserError(f"{key} is missing; --help shows the format")
    for key in ("fixed", "search"):
        if not isinstance(values[key], dict):
            raise UserError(f"{key}: expected lines of 'key: value', got {values[key]!r}")


def _parse_pruner(value: Any) -> dict[str, int] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not set(value) <= set(_PRUNER_DEFAULTS):
        raise UserError(f"pruner: expected some of {', '.join(_PRUNER_DEFAULTS)}, got {value!r}")
    for key, number in value.items():
        _check_integer(f"pruner: {key}", number, 0)
    return {**_PRUNER_DEFAULTS, **value}


def _check_integer(key: str, value: Any, low: int) -> None:
    if type(value) is not int or not low <= value < 2**31:
        raise UserError(f"{key}: expected a whole number from {low}, got {value!r}")


def _check_search_space(key: Any, drawn: Any, fixed: Mapping[str, Any]) -> None:
    if key in fixed:
        raise UserError(f"search: {key} is fixed too, to {fixed[key]!r}; take it out of one")
    if key in _NOT_SEARCHABLE:
        raise UserError(f"search: {key} changes what is measured; fix it, and make a study for each value")
    if key in MACHINE_KEYS:
        raise UserError(f"search: {key} changes no result; fix it, or leave it out")
    if isinstance(drawn, dict):
        _check_search_range(key, drawn)
    elif not isinstance(drawn, list) or not drawn:
        raise UserError(f"search: {key}: expected {{low: ..., high: ...}} or a list, got {drawn!r}")
    elif not all(value is None or type(value) in (bool, int, float, str) for value in drawn):
        raise UserError(f"search: {key}: expected a list of numbers, words, true, false or ~, got {drawn!r}")


def _check_search_range(key: str, drawn: Mapping[str, Any]) -> None:
    for name in drawn:
        if name not in _RANGE_KEYS:
            raise UserError(f"search: {key}: unknown {name!r}; a range has {', '.join(_RANGE_KEYS)}")
    for name in ("low", "high", "step"):
        value: Any = drawn.get(name)
        wrong = type(value) not in (int, float) or not math.isfinite(value)
        if wrong and (name in drawn or name != "step"):
            raise UserError(f"search: {key}: {name}: expected a number, got {value!r}")
    low, high, log = drawn["low"], drawn["high"], drawn.get("log", False)
    if low > high:
        raise UserError(f"search: {key}: low {low} is above high {high}; swap them")
    if type(log) is not bool or (log and "step" in drawn):
        raise UserError(f"search: {key}: log: expected true or false, and no step beside true; got {log!r}")
    if log and low <= 0:
        raise UserError(f"search: {key}: log needs low above 0, got {low}; raise low, or leave log out")
    if drawn.get("step", 1) <= 0:
        raise UserError(f"search: {key}: step: expected a number above 0, got {drawn['step']}")
