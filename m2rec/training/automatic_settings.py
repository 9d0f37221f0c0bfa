"""The rule of `auto: true`: what the data is like -> the settings of a run, each with a reason.

`choose_settings` depends on the statistics of the data alone, never on the machine or on time. The rule takes
one of PROFILES, then adjusts it to the size of the data. docs/training.md says where its numbers come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from m2rec.errors import format_count

_RARE_ITEMS = {
    "hidden_size": 128, "inner_size": 256, "dropout_prob": 0.4, "init": "standard",
    "learning_rate": 0.002, "decay_per_epoch": 0.16, "targets_per_step": 1_500,
    "average_targets": 200_000, "patience_targets": 400_000, "epochs": 60,
}  # fmt: skip
PROFILES: dict[str, dict[str, Any]] = {
    # most items are rare: wide, and pulled to zero all the time (amazon-beauty)
    "rare items": _RARE_ITEMS,
    # the same where they have text; Mamba4Rec's initial values start its branch small
    "rare items with text": {**_RARE_ITEMS, "init": "mamba4rec"},
    # common items, and many targets for each parameter (ml-1m)
    "much data": {
        "hidden_size": 128, "inner_size": 256, "dropout_prob": 0.3, "init": "mamba4rec",
        "learning_rate": 0.002, "decay_per_epoch": 0.0, "targets_per_step": 8_000,
        "average_targets": 1_000_000, "patience_targets": 4_000_000, "epochs": 30,
    },
    # common items, but too few targets for a wider model (ml-100k)
    "small data": {
        "hidden_size": 64, "inner_size": 256, "dropout_prob": 0.4, "init": "standard",
        "learning_rate": 0.001, "decay_per_epoch": 0.0, "targets_per_step": 2_500,
        "average_targets": 0, "patience_targets": 1_000_000, "epochs": 200,
    },
}  # fmt: skip
"""Named settings of M2Rec for data of a kind and of any size, for `auto` and for searches."""

# Which profile: items are rare if training has the median item less often than this.
RARE_ITEM_COUNT = 20
MIN_USERS_FOR_DECAY = 2_000  # below, the recipe of rare items lost 15% against the defaults
MAX_RETURNING_FOR_DECAY = 0.1  # and so it did where items return
MUCH_DATA_TARGETS = 500_000

# Steps. What was best on three data sets of 97,000 to 981,000 targets took 38 to 130 steps an epoch.
STEPS_PER_EPOCH = 90
TARGETS_PER_STEP = (500, 8_000)
AVERAGED_STEPS = 130
MIN_PATIENCE_STEPS = 260

# Epochs where no validation can end a run: after so many the runs of results/*.csv had their best weights.
EPOCHS_WITHOUT_VALIDATION = {"rare items": 15, "rare items with text": 15, "much data": 20, "small data": 25}

# Weight decay takes at most the profile's share of the weights in an epoch. Each target of an item pulls the
# item's weights up once, so where items have few targets decay takes as much for each, and less in all.
DECAY_PER_ITEM_TARGET = 0.015

# Dropout by targets per parameter: the first limit that is not reached counts.
DROPOUT_BY_TARGETS_PER_PARAMETER = ((0.5, 0.4), (1.5, 0.3), (float("inf"), 0.2))

# The whole softmax computes a score for each target and item. At 40,000 items a step of it takes about 60
# times as long as one of the sampled loss, which on ml-1m costs 1.5% of NDCG@10 (docs/performance.md).
MAX_SOFTMAX_SCORES = 10_000_000_000  # in an epoch
N_NEGATIVES = 1_024
MIN_ITEMS_TO_SAMPLE = 4 * N_NEGATIVES  # with fewer, sampling saves little

MIN_RETURNING_TO_RECOMMEND = 0.1

_LAYER_SQUARES = 24  # parameters of a layer, in D^2
_N_LAYERS = 2


@dataclass(frozen=True)
class DataStatistics:
    """What the rule knows of a data set."""

    targets: int
    """Training targets."""
    items: int
    users: int
    median_item_count: float
    """How often training has its median item."""
    returning_share: float
    """Of the targets of training and validation, those that their user had before."""
    has_text: bool
    """Whether items have text vectors, or a text to make them from."""
    has_validation: bool = True
    """Whether there is a validation target."""


class Choice(NamedTuple):
    """The value of a key, and why."""

    value: Any
    reason: str


RULE_KEYS = frozenset(
    {key for profile in PROFILES.values() for key in profile}
    | {"exclude_seen", "gate", "loss_type", "n_negatives", "neighbors"}
)
"""The keys that `choose_settings` may choose."""


def choose_settings(data: DataStatistics, decided: Mapping[str, Any] | None = None) -> dict[str, Choice]:
    """The settings of M2Rec for such data, by key; keys that are not in it keep their defaults.

    Args:
        data: what it is like.
        decided: keys of the rule that the user has set; what is chosen for the others goes with them.
    """
    name, why = choose_profile(data)
    choices = scale_profile(name, data, decided or {}, why)
    choices |= _choose_loss(data)
    choices["exclude_seen"] = _choose_exclude_seen(data)
    choices["gate"] = Choice("mean", "softmax was no better on the data of the tables")
    choices["neighbors"] = Choice(True, "validation chooses their weights, 0 among them")
    if not data.has_validation:
        reason = "no validation targets, which stop a run and choose the weights of neighbours"
        choices["epochs"] = Choice(EPOCHS_WITHOUT_VALIDATION[name], reason)
        choices["neighbors"] = Choice(False, reason)
        del choices["patience_targets"]
    return choices


def choose_profile(data: DataStatistics) -> tuple[str, str]:
    """The name of one of PROFILES, and why."""
    median = f"training has the median item {data.median_item_count:.0f} times"
    is_rare = data.median_item_count < RARE_ITEM_COUNT
    if is_rare and data.users < MIN_USERS_FOR_DECAY:
        return "small data", f"{median}, but there are only {data.users:,} users"
    if is_rare and data.returning_share >= MAX_RETURNING_FOR_DECAY:
        return "small data", f"{median}, but {data.returning_share:.0%} of the targets return"
    if is_rare:
        return "rare items with text" if data.has_text else "rare items", median
    targets = f"{data.targets:,} targets"
    if data.targets >= MUCH_DATA_TARGETS:
        return "much data", f"{targets}, {median}"
    return "small data", f"{targets}, {median}"


def scale_profile(
    name: str, data: DataStatistics, decided: Mapping[str, Any], why: str = "a profile"
) -> dict[str, Choice]:
    """The settings of one of PROFILES for data of this size.

    Args:
        name: of the profile.
        data: what it is like.
        decided: as for `choose_settings`.
        why: the reason for this profile.
    """
    profile = PROFILES[name]
    choices = {key: Choice(value, f"{name}: {why}") for key, value in profile.items()}
    width = decided.get("hidden_size", profile["hidden_size"])
    if width != profile["hidden_size"]:
        factor = profile["inner_size"] // profile["hidden_size"]
        choices["inner_size"] = Choice(factor * width, f"{factor} times hidden_size {width}")
    choices |= _scale_steps(data, {**profile, **decided}, decided.get("targets_per_step"))
    choices["dropout_prob"] = _choose_dropout(data, width)
    if profile["decay_per_epoch"]:
        choices["decay_per_epoch"] = _choose_decay(data, profile["decay_per_epoch"])
    return choices


def _scale_steps(data: DataStatistics, values: Mapping[str, Any], per_step: int | None) -> dict[str, Choice]:
    """The keys that count targets, for steps of `per_step`; None: for about STEPS_PER_EPOCH of them."""
    if per_step is None:
        low, high = TARGETS_PER_STEP
        per_step = min(max(round(data.targets / STEPS_PER_EPOCH), low), high)
    epochs = 3 if values["average_targets"] else 10  # the average is smooth, and needs less patience
    patience = max(epochs * data.targets, MIN_PATIENCE_STEPS * per_step)
    n_steps = max(1, round(data.targets / per_step))
    n_epochs = patience / max(data.targets, 1)
    shown = f"{n_epochs:.3g}" if n_epochs < 1_000 else f"{n_epochs:,.0f}"
    choices = {
        "targets_per_step": Choice(per_step, f"{format_count(n_steps, 'step')} an epoch"),
        "patience_targets": Choice(patience, f"{shown} epochs"),
    }
    if values["average_targets"]:
        choices["average_targets"] = Choice(AVERAGED_STEPS * per_step, f"{AVERAGED_STEPS} steps")
    return choices


def _choose_dropout(data: DataStatistics, hidden_size: int) -> Choice:
    parameters = data.items * hidden_size + _N_LAYERS * _LAYER_SQUARES * hidden_size**2
    ratio = data.targets / parameters
    dropout = next(value for limit, value in DROPOUT_BY_TARGETS_PER_PARAMETER if ratio < limit)
    return Choice(dropout, f"{ratio:.2g} targets per parameter")


def _choose_decay(data: DataStatistics, most: float) -> Choice:
    per_item = data.targets / max(data.items, 1)
    decay = min(most, round(DECAY_PER_ITEM_TARGET * per_item, 3))
    return Choice(decay, f"{per_item:.2g} targets per item")


def is_loss_open(data: DataStatistics) -> bool:
    """Whether either loss may be the better one: sampling saves time, and the whole softmax is affordable."""
    return data.items >= MIN_ITEMS_TO_SAMPLE and data.targets * data.items <= MAX_SOFTMAX_SCORES


def _choose_loss(data: DataStatistics) -> dict[str, Choice]:
    scores = data.targets * data.items
    reason = f"{data.targets:,} targets * {data.items:,} items = {scores:.1e} scores an epoch"
    if scores <= MAX_SOFTMAX_SCORES or data.items < MIN_ITEMS_TO_SAMPLE:
        return {"loss_type": Choice("CE", reason)}
    return {"loss_type": Choice("sampled", reason), "n_negatives": Choice(N_NEGATIVES, reason)}


def _choose_exclude_seen(data: DataStatistics) -> Choice:
    """Leave out what the user had where next to no target returns."""
    reason = f"{data.returning_share:.1%} of the targets return"
    return Choice(data.returning_share < MIN_RETURNING_TO_RECOMMEND, reason)


def format_choices(choices: dict[str, Choice]) -> str:
    """All choices in one line; keys that share a reason share its brackets."""
    by_reason: dict[str, list[str]] = {}
    for key, choice in choices.items():
        value = str(choice.value).lower() if isinstance(choice.value, bool) else choice.value
        by_reason.setdefault(choice.reason, []).append(f"{key} {value}")
    return "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in by_reason.items())
