"""Typed, validated settings: the only place that knows the keys, their defaults and their ranges.

`ModelSettings` are the keys of M2Rec itself, `RunSettings` those of any run, whatever the
model. Both are read from a mapping, a RecBole `Config` among them; every wrong value is a
`ValueError` of one line that names the key, the value and the cure.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, Self

from m2rec.errors import UserError

PROPERTIES_FOLDER = Path(__file__).parent / "properties"

# keys that change how and where a run is made, not what comes out
MACHINE_KEYS = {
    "checkpoint_minutes", "data_path", "eval_batch_size", "gpu_id", "log_wandb", "report", "runs_dir",
    "scan_backend", "show_progress", "state", "tensorboard", "use_gpu", "worker",
}  # fmt: skip


class _KeyValues(Protocol):
    """What settings are read from: a dict or a RecBole Config."""

    def __contains__(self, key: str, /) -> bool: ...
    def __getitem__(self, key: str, /) -> Any: ...


def integer_field(default: int, low: int, high: int = 2**31 - 1) -> Any:
    """A whole number from `low` to `high`."""
    return field(default=default, metadata={"kind": int, "low": low, "high": high})


def number_field(
    default: float, low: float, high: float, open_low: bool = False, open_high: bool = False
) -> Any:
    """A number in [low, high], or in an interval without one of its ends."""
    spec = {"kind": float, "low": low, "high": high, "open_low": open_low, "open_high": open_high}
    return field(default=default, metadata=spec)


def choice_field(default: str, *others: str) -> Any:
    """One of a few words."""
    return field(default=default, metadata={"kind": str, "choices": (default, *others)})


def bool_field(default: bool) -> Any:
    """True or False."""
    return field(default=default, metadata={"kind": bool})


def text_field(default: str) -> Any:
    """Any text but the empty one."""
    return field(default=default, metadata={"kind": str})


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Reads each field from the key of the same name and checks it."""

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """The names of all keys."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every key with its default."""
        return {f.name: f.default for f in fields(cls) if f.default is not MISSING}

    @classmethod
    def read(cls, values: _KeyValues) -> Self:
        """Check and collect the keys that `values` has; the others take their defaults.

        Raises:
            ValueError: a value has the wrong type or lies outside its range.
        """
        return cls(**{f.name: _check_value(f, values[f.name]) for f in fields(cls) if f.name in values})


@dataclass(frozen=True, kw_only=True)
class ModelSettings(_Settings):
    """The keys of M2Rec. config.yaml explains each in place."""

    hidden_size: int = integer_field(64, 1, 65_536)
    n_layers: int = integer_field(2, 1, 1_000)
    inner_size: int = integer_field(256, 1, 262_144)
    dropout_prob: float = number_field(0.4, 0, 1, open_high=True)
    mixer: str = choice_field("mamba2", "mamba", "attention")
    d_state: int = integer_field(32, 1, 65_536)
    d_conv: int = integer_field(4, 1, 1_000)
    expand: int = integer_field(2, 1, 1_000)
    head_dim: int = integer_field(64, 1, 65_536)
    n_heads: int = integer_field(2, 1, 65_536)
    scan_backend: str = text_field("auto")
    filter: str = choice_field("causal", "low_pass", "residual", "none")
    filter_modes: int = integer_field(16, 1, 65_536)
    filter_cutoff: float = number_field(0.5, 0, 1, open_low=True)
    gate: str = choice_field("softmax", "mean")
    repeat_bias: bool = bool_field(True)
    text_in_sequence: bool = bool_field(True)
    text_in_table: bool = bool_field(True)
    id_dropout: float = number_field(0.0, 0, 1, open_high=True)
    text_vectors: str = text_field("auto")
    text_encoder: str = text_field("auto")
    text_whitening: str = choice_field("pca", "zca", "none")
    text_width: int = integer_field(0, 0, 65_536)
    init: str = choice_field("standard", "mamba4rec")
    loss_type: str = choice_field("CE", "sampled", "gBCE", "BPR")
    loss_memory: int = integer_field(0, 0, 1_048_576)
    n_negatives: int = integer_field(512, 1)
    negatives_shared: int = integer_field(128, 1)
    negative_sampling: str = choice_field("uniform", "popularity")
    gbce_t: float = number_field(0.75, 0, 1)

    def __post_init__(self) -> None:
        if self.text_width and self.text_whitening == "none":
            raise UserError(
                f"text_width: {self.text_width} needs principal components; set text_whitening: pca, or 0"
            )
        if self.id_dropout and not self.text_in_table:
            raise UserError(
                f"id_dropout: {self.id_dropout} would leave items nothing without text in the item table; "
                f"set 0, or text_in_table: true"
            )
        if self.loss_type == "gBCE" and self.negative_sampling != "uniform":
            raise UserError(
                f"negative_sampling: {self.negative_sampling!r} does not fit loss_type: gBCE, which is "
                f"calibrated for uniform negatives; set negative_sampling: uniform, or loss_type: sampled"
            )
        if self.mixer == "attention" and self.hidden_size % self.n_heads:
            raise UserError(
                f"n_heads: {self.n_heads} does not divide hidden_size: {self.hidden_size}; choose a divisor"
            )
        inner = self.expand * self.hidden_size
        if self.mixer == "mamba2" and inner % self.head_dim:
            raise UserError(
                f"head_dim: {self.head_dim} does not divide expand * hidden_size = {inner}; "
                f"choose a divisor, or mixer: mamba"
            )

    @property
    def uses_text(self) -> bool:
        """Whether any part of the model uses text vectors."""
        return self.text_vectors != "none" and (self.text_in_sequence or self.text_in_table)


@dataclass(frozen=True, kw_only=True)
class RunSettings(_Settings):
    """The keys of a run that both RecBole and this project read, whatever the model.

    The defaults here are RecBole's; the project's own are in properties/overall.yaml.
    """

    model: str = text_field("M2Rec")
    dataset: str = text_field("ml-100k")
    data_path: str = text_field("dataset")
    runs_dir: str = text_field("runs")
    seed: int = integer_field(2020, 0, 2**32 - 1)
    rows: str = choice_field("dense", "prefix")
    time_order: str = choice_field("exact", "recbole")
    split: str = choice_field("leave_one_out", "global_time")
    valid_from: float = number_field(0.8, 0, 1, open_low=True, open_high=True)
    test_from: float = number_field(0.9, 0, 1, open_low=True, open_high=True)
    MAX_ITEM_LIST_LENGTH: int = integer_field(50, 1, 1_000_000)
    epochs: int = integer_field(300, 1)
    stopping_step: int = integer_field(10, 0)
    eval_step: int = integer_field(1, 1)
    checkpoint_minutes: float = number_field(5.0, 0, 1e6, open_low=True)
    train_batch_size: int = integer_field(2048, 1)
    eval_batch_size: int = integer_field(4096, 1)
    learning_rate: float = number_field(0.001, 0, float("inf"), open_low=True, open_high=True)
    weight_decay: float = number_field(0.0, 0, float("inf"), open_high=True)
    average_epochs: float = number_field(0.0, 0, float("inf"), open_high=True)
    learner: str = choice_field("adam", "adamw", "sgd", "adagrad", "rmsprop")
    shuffle: bool = bool_field(True)
    worker: int = integer_field(0, 0, 1_000)
    use_gpu: bool = bool_field(True)
    reproducibility: bool = bool_field(True)
    enable_amp: bool = bool_field(False)
    show_progress: bool = bool_field(True)
    report: bool = bool_field(True)
    tensorboard: bool = bool_field(False)
    state: str = choice_field("INFO", "DEBUG", "WARNING", "ERROR", "CRITICAL")
    log_wandb: bool = bool_field(False)
    metric_decimal_place: int = integer_field(4, 1, 15)
    metric_definitions: str = choice_field("textbook", "recbole")

    def __post_init__(self) -> None:
        if self.valid_from >= self.test_from:
            raise UserError(
                f"valid_from: {self.valid_from} must be less than test_from: {self.test_from}; both are "
                f"shares of the interactions, by time"
            )


_MAX_LOW_PASS_LENGTH = 10_000


def check_key_combination(model: ModelSettings, run: RunSettings) -> None:
    """Refuse combinations of keys that would train on what they must not see."""
    if model.filter == "low_pass" and run.rows == "dense":
        raise UserError(
            "filter: 'low_pass' sees the future and can't be trained with rows: 'dense'; "
            "set rows: prefix, or filter: causal"
        )
    if model.filter == "low_pass" and run.MAX_ITEM_LIST_LENGTH > _MAX_LOW_PASS_LENGTH:
        raise UserError(
            f"MAX_ITEM_LIST_LENGTH: {run.MAX_ITEM_LIST_LENGTH} is too long for filter: 'low_pass', whose "
            f"memory grows with its square; set at most {_MAX_LOW_PASS_LENGTH}, or filter: causal"
        )


def _check_value(f: Field[Any], value: Any) -> Any:
    """The value in the field's type, or a ValueError."""
    spec: Mapping[str, Any] = f.metadata
    kind = spec["kind"]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right_type = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right_type or not _is_in_range(spec, value):
        raise UserError(f"{f.name}: expected {_describe_range(spec)}, got {value!r}")
    return value


def _is_in_range(spec: Mapping[str, Any], value: Any) -> bool:
    if "choices" in spec:
        return value in spec["choices"]
    if spec["kind"] is str:
        return bool(value)
    if "low" not in spec:
        return True
    above = value > spec["low"] if spec.get("open_low") else value >= spec["low"]
    high = spec.get("high", float("inf"))
    below = value < high if spec.get("open_high") else value <= high
    return bool(above and below)


def describe_allowed_values(f: Field[Any]) -> str:
    """What a field's values may be, in words."""
    return _describe_range(f.metadata)


def _describe_range(spec: Mapping[str, Any]) -> str:
    """The range in words."""
    kind = spec["kind"]
    if "choices" in spec:
        return "one of " + ", ".join(spec["choices"])
    if kind is bool:
        return "True or False"
    if kind is str:
        return "some text"
    if kind is int:
        return f"a whole number from {spec['low']} to {spec['high']}"
    left = "(" if spec.get("open_low") else "["
    right = ")" if spec.get("open_high") else "]"
    return f"a number in {left}{spec['low']}, {spec['high']}{right}"
