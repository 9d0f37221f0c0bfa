"""What a search varies: a range for each key, around the settings that are best so far.

`RULES` is the place to change what `run_mm.py --search` tries. A range is as in a search file: a list of
choices, or `low` and `high` with `log` or `step`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Settings = dict[str, Any]
Range = dict[str, Any] | list[Any]


class Space(Protocol):
    """The ranges to draw from, given the settings that are best so far."""

    @property
    def is_moving(self) -> bool:
        """Whether the ranges depend on the best settings."""
        ...

    def make_ranges(self, best: Mapping[str, Any]) -> dict[str, Range]:
        """A range for each key that is searched around these settings."""
        ...


class Rule(Protocol):
    """How the range of one key follows from its value."""

    def make_range(self, value: Any) -> Range | None:
        """The range around this value, None if the key is not searched there."""
        ...


@dataclass(frozen=True)
class Factor:
    """From value / factor to value * factor on a log scale; a value of 0 switches the key off and stays."""

    factor: float
    high: float
    """The largest number ever drawn."""
    is_whole: bool = False

    def make_range(self, value: Any) -> Range | None:
        if type(value) not in (int, float) or value <= 0:
            return None
        low, high = value / self.factor, min(value * self.factor, max(self.high, value))
        if self.is_whole:
            return {"low": max(1, round(low)), "high": max(1, round(high)), "log": True}
        return {"low": float(low), "high": float(high), "log": True}


@dataclass(frozen=True)
class Steps:
    """Up to `count` steps up or down, within [low, high]."""

    step: float
    count: int
    low: float
    high: float

    def make_range(self, value: Any) -> Range | None:
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            return None
        down = min(self.count, int((value - self.low) / self.step + 1e-9))
        up = min(self.count, int((self.high - value) / self.step + 1e-9))
        low, high = value - down * self.step, value + up * self.step
        if type(self.step) is int and type(value) is int:
            return {"low": low, "high": high, "step": self.step}
        return {"low": round(float(low), 6), "high": round(float(high), 6), "step": float(self.step)}


@dataclass(frozen=True)
class Width:
    """From half of the value to twice the value, in multiples that heads divide."""

    multiple: int = 32

    def make_range(self, value: Any) -> Range | None:
        if type(value) is not int or value < 2:
            return None
        step = self.multiple if value >= 2 * self.multiple else value // 2
        low = max(step, value // 2 // step * step)
        return {"low": low, "high": 2 * value // step * step, "step": step}


@dataclass(frozen=True)
class Choices:
    """One of these, whatever the value."""

    choices: tuple[Any, ...]

    def make_range(self, value: Any) -> Range | None:
        return list(self.choices) if len(self.choices) > 1 else None


RULES: dict[str, Rule] = {
    "learning_rate": Factor(4, high=0.05),
    # a share of the weights and a number of targets: a drawn learning rate or length does not change them
    "decay_per_epoch": Factor(4, high=0.5),
    "average_targets": Factor(2, high=2**53, is_whole=True),
    "dropout_prob": Steps(0.1, 2, low=0.0, high=0.8),
    "targets_per_step": Factor(4, high=32_768, is_whole=True),
    "hidden_size": Width(),
    "n_layers": Steps(1, 1, low=1, high=4),
    "loss_type": Choices(("CE", "sampled")),  # where the catalogue is large, but not too large for CE
    "mixer": Choices(("mamba2", "mamba", "attention")),
    "filter": Choices(("causal", "none")),
    "gate": Choices(("softmax", "mean")),
    "MAX_ITEM_LIST_LENGTH": Choices(()),  # those of the profiles: a new length loads the data anew
}
"""What is searched for M2Rec."""

_DROPOUT = RULES["dropout_prob"]
GENERAL_RULES: dict[str, Rule] = {
    "learning_rate": RULES["learning_rate"],
    "train_batch_size": Factor(4, high=8192, is_whole=True),
    "dropout_prob": _DROPOUT,
    "hidden_dropout_prob": _DROPOUT,
    "attn_dropout_prob": _DROPOUT,
    "hidden_size": RULES["hidden_size"],
    "embedding_size": Width(),
    "n_layers": RULES["n_layers"],
}
"""What is searched for any other model, as far as it has the key."""


@dataclass(frozen=True)
class SpaceAround:
    """Rules that make ranges around the best settings."""

    rules: Mapping[str, Rule]
    is_moving: bool = True

    def make_ranges(self, best: Mapping[str, Any]) -> dict[str, Range]:
        ranges = {}
        for key, rule in self.rules.items():
            found = rule.make_range(best.get(key))
            if found is not None:
                ranges[key] = found
        return ranges


@dataclass(frozen=True)
class FixedSpace:
    """The ranges of a search file."""

    ranges: Mapping[str, Range]
    is_moving: bool = False

    def make_ranges(self, best: Mapping[str, Any]) -> dict[str, Range]:
        return dict(self.ranges)


def build_space(
    is_m2rec: bool, plain: Mapping[str, Any], profiles: Iterable[Settings], fixed: Iterable[str]
) -> SpaceAround:
    """What is searched around a run.

    Args:
        is_m2rec: whether the model is M2Rec itself; another one keeps its parts.
        plain: all settings of the run as the user asked for it, scale-free keys in place of plain ones.
        profiles: the settings of each profile; their values are among the choices.
        fixed: keys that stay as they are.
    """
    rules = {}
    profiles = list(profiles)
    for key, rule in (RULES if is_m2rec else GENERAL_RULES).items():
        if key in fixed or key not in plain:
            continue
        if isinstance(rule, Choices):
            values = [plain[key], *(profile[key] for profile in profiles if key in profile), *rule.choices]
            rule = Choices(tuple(dict.fromkeys(values)))
        rules[key] = rule
    return SpaceAround(rules)
