"""Studies: results/tune/NAME.yaml lists the settings to search, and how each is drawn."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, StrictStr, model_validator

from m2rec.errors import UserError
from m2rec.settings import MACHINE_KEYS, CheckedModel, Count, Role, collect_keys
from m2rec.yaml_values import describe_unknown, read_yaml

# keys that change which rows are scored, or how, or only luck: values of such trials can't be compared
_NOT_SEARCHABLE = collect_keys(Role.DATASET, Role.SEED, Role.PROTOCOL)

NonNegative = Annotated[int, Field(ge=0, lt=2**31)]


def _check_number(value: Any) -> Any:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return value


Number = Annotated[Any, AfterValidator(_check_number), Field(description="a number")]


class SearchRange(CheckedModel):
    """A range of numbers to draw from; whole numbers if all of its numbers are."""

    model_config = ConfigDict(strict=True, extra="forbid")

    low: Number
    high: Number
    step: float | None = Field(None, gt=0, allow_inf_nan=False, description="a number above 0")
    log: bool = False

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low > self.high:
            raise UserError(f"low {self.low} is above high {self.high}; swap them")
        if self.log and self.step is not None:
            raise UserError("log: true and step exclude each other; leave one out")
        if self.log and self.low <= 0:
            raise UserError(f"log needs low above 0, got {self.low}; raise low, or leave log out")
        return self


class Pruner(CheckedModel):
    """When a trial may be stopped."""

    model_config = ConfigDict(strict=True, extra="forbid")

    warmup_epochs: NonNegative = 0
    startup_trials: NonNegative = 5


class SearchPlan(CheckedModel):
    """What a study's file and the command line ask for."""

    model_config = ConfigDict(extra="forbid")

    study: str = Field(pattern=r"^\w[\w.+-]*$", description="a name of letters, digits and any of ._+-")
    trials: Count = Field(strict=True)
    """In all, over all workers."""
    seed: NonNegative = Field(2020, strict=True)
    """Of the search; the runs have theirs in `fixed`."""
    fixed: dict[StrictStr, Any] = Field({}, description="lines of 'key: value'")
    """Keys of every run."""
    search: dict[StrictStr, Any] = Field(min_length=1, description="lines of 'key: value'")
    """A range or a list of choices per key."""
    pruner: Pruner | None = None
    """None: no trial is stopped."""

    @classmethod
    def read(cls, path: Path, given: Mapping[str, Any], known_keys: Collection[str]) -> Self:
        """The checked plan in a YAML file, with the values of the command line in it.

        Args:
            path: the file; `python scripts/tune.py --help` shows its format.
            given: `trials`, and keys that are stronger than those in `fixed`.
            known_keys: the keys of a run.

        Raises:
            UserError: the file can't be read, or a key or value in it is wrong.
        """
        content = {"fixed": {}, **read_yaml(path)}
        stronger = dict(given)
        if "trials" in stronger:
            content["trials"] = stronger.pop("trials")
        if isinstance(content["fixed"], dict):
            # without auto, trials differ in the searched keys alone
            content["fixed"] = {"auto": False, **content["fixed"], **stronger}
        try:
            plan = cls(**{str(key): value for key, value in content.items()})
            for key, drawn in plan.search.items():
                if key not in known_keys:
                    raise UserError(f"search: {describe_unknown(key, known_keys)}")
                _check_search_space(key, drawn, plan.fixed)
        except UserError as error:
            raise UserError(f"{path}: {error}; --help shows the format") from None
        return plan


def _check_search_space(key: str, drawn: Any, fixed: Mapping[str, Any]) -> None:
    if key in fixed:
        raise UserError(f"search: {key} is fixed too, to {fixed[key]!r}; remove one of them")
    if key in _NOT_SEARCHABLE:
        raise UserError(f"search: {key} changes what is measured; fix it, and make a study for each value")
    if key in MACHINE_KEYS or key in collect_keys(Role.SERVING):
        raise UserError(f"search: {key} changes no result; fix it, or leave it out")
    if isinstance(drawn, dict):
        try:
            SearchRange(**{str(name): value for name, value in drawn.items()})
        except UserError as error:
            raise UserError(f"search: {key}: {error}") from None
    elif not isinstance(drawn, list) or not drawn:
        raise UserError(f"search: {key}: expected {{low: ..., high: ...}} or a list, got {drawn!r}")
    elif not all(value is None or type(value) in (bool, int, float, str) for value in drawn):
        raise UserError(f"search: {key}: expected a list of numbers, words, true, false or ~, got {drawn!r}")
