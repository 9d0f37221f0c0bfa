"""Typed, validated settings: the only place that knows this project's keys, their defaults, ranges and roles.

`ModelSettings` are the keys of M2Rec itself, `RunSettings` those of any run, whatever the model. Both are
read from a mapping, a RecBole `Config` among them. A wrong value is a `UserError` of one line that names the
key, the value and the cure. Sweep files, search files and RecBole's keys are checked in the same way.
"""

from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from m2rec.errors import UserError
from m2rec.yaml_values import describe_unknown

PROPERTIES_FOLDER = Path(__file__).parent / "properties"


class Role(Enum):
    """What a key decides, and the keys that do, RecBole's among them; all lists of keys are made of roles."""

    DATASET = ("dataset",)
    SEED = ("seed",)
    # which targets are ranked, and which metric compares models
    PROTOCOL = (
        "ITEM_ID_FIELD", "TIME_FIELD", "USER_ID_FIELD", "filter_inter_by_user_or_item",
        "item_inter_num_interval", "rm_dup_inter", "split", "test_from", "ties", "time_order",
        "user_inter_num_interval", "val_interval", "valid_from", "valid_metric",
    )  # fmt: skip
    # the network and its loss
    MODEL = (
        "d_conv", "d_state", "dropout_prob", "expand", "filter", "filter_cutoff", "filter_modes", "gate",
        "gbce_t", "head_dim", "hidden_size", "id_dropout", "init", "inner_size", "loss_memory", "loss_type",
        "mixer", "model", "n_heads", "n_layers", "n_negatives", "negative_sampling", "negatives_shared",
        "neighbors",
        "repeat_bias", "text_in_sequence", "text_in_table", "text_whitening", "text_width",
    )  # fmt: skip
    # how the network is trained, and on which rows
    TRAINING = (
        "MAX_ITEM_LIST_LENGTH", "auto", "average_epochs", "average_targets", "clip_grad_norm", "compile",
        "continue_from", "decay_per_epoch", "enable_amp", "eval_step", "learner", "learning_rate",
        "replay_share", "reproducibility", "rows", "shard_items", "shuffle", "sparse_updates",
        "targets_per_step", "train_batch_size", "valid_users", "weight_decay",
    )  # fmt: skip
    LENGTH = ("epochs", "patience_targets", "stopping_step")
    # where the text vectors come from; a run stores a hash of the vectors themselves
    TEXT_SOURCE = ("text_encoder", "text_fingerprint", "text_vectors")
    # how a trained model recommends unless it is told otherwise
    SERVING = ("exclude_seen",)
    METRICS = ("metric_decimal_place", "metrics", "topk")
    DEFINITION = ("metric_definitions",)
    # where files are
    FOLDER = ("data_path", "runs_dir")
    # the GPU and the terminal at hand; a run folder does not store these keys
    LOCAL = ("gpu_id", "show_progress")
    # chosen at each start of a run
    START = ("eval_batch_size", "state", "use_gpu")
    # other keys that affect where and how a run executes, not its result
    MACHINE = (
        "baselines", "checkpoint_minutes", "data_cache", "log_wandb", "report", "scan_backend",
        "tensorboard", "worker",
    )  # fmt: skip
    # how the files of a data set are written
    FILE_FORMAT = ("LIST_SUFFIX", "field_separator", "load_col", "seq_separator")
    # RecBole's keys without effect here: nothing is pickled, and a run has its own folder
    IGNORED = (
        "checkpoint_dir", "config_file", "dataloaders_save_path", "dataset_save_path", "enable_scaler",
        "save_dataloaders", "save_dataset",
    )  # fmt: skip
    # RecBole's keys that are refused unless they have one value
    REFUSED = ("eval_args", "pre_model_path")


def collect_keys(*roles: Role) -> frozenset[str]:
    """The keys of these roles."""
    return frozenset().union(*(role.value for role in roles))


# keys that affect where and how a run executes, not its result
MACHINE_KEYS = collect_keys(Role.FOLDER, Role.LOCAL, Role.START, Role.MACHINE)

# keys that hold for data of any size, and the key that each is turned into once the training rows are counted
SCALE_FREE_KEYS = {
    "decay_per_epoch": "weight_decay",
    "targets_per_step": "train_batch_size",
    "average_targets": "average_epochs",
    "patience_targets": "stopping_step",
}


def override_settings(settings: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with stronger ones; of a scale-free key and its plain key only the stronger is left."""
    replaced = {SCALE_FREE_KEYS.get(key) for key in stronger}
    replaced |= {scale_free for scale_free, plain in SCALE_FREE_KEYS.items() if plain in stronger}
    return {**{key: value for key, value in settings.items() if key not in replaced}, **stronger}


class KeyValues(Protocol):
    """What settings are read from: a dict or a RecBole Config."""

    def __contains__(self, key: str, /) -> bool: ...
    def __getitem__(self, key: str, /) -> Any: ...


class CheckedModel(BaseModel):
    """A pydantic model whose errors are one line: key, expected, got.

    A validator raises `UserError` for a message in its own words, `ValueError` for the common message.
    """

    model_config = ConfigDict(frozen=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(self._describe_error(error, values)) from None

    @classmethod
    def _describe_error(cls, error: ValidationError, values: Mapping[str, Any]) -> str:
        """The first error; an unknown key comes before all others, as it is why another one is missing."""
        details = error.errors(include_url=False)
        first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
        location = [str(part) for part in first["loc"]]
        path = ": ".join(location)
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            return f"{path}: {cause}" if path else str(cause)
        if first["type"] == "extra_forbidden":
            return describe_unknown(path, cls.model_fields)
        if first["type"] == "missing":
            return f"{path} is missing"
        if expected := describe_allowed_values(cls.model_fields[location[0]]):
            return f"{location[0]}: expected {expected}, got {values[location[0]]!r}"
        cure = "; put it into quotes" if first["type"] == "string_type" else ""
        return f"{path}: {first['msg'].lower()}, got {first['input']!r}{cure}"


def describe_allowed_values(field: FieldInfo) -> str:
    """What a field's value may be, in words; empty if the type does not say it."""
    if field.description:
        return field.description
    if field.annotation is bool:
        return "True or False"
    if field.annotation is str:
        return "some text"
    if field.annotation in (int, float):
        return _describe_range(field)
    if get_origin(field.annotation) is Literal:
        return "one of " + ", ".join(get_args(field.annotation))
    return ""


def _describe_range(field: FieldInfo) -> str:
    limits: dict[str, float] = {}
    for limit in field.metadata:
        limits |= asdict(limit)
    if field.annotation is int:
        end = f" to {limits['le']}" if "le" in limits else ""
        return f"a whole number from {limits['ge']}{end}"
    low = f"[{limits['ge']}" if "ge" in limits else f"({limits['gt']}"
    high = f"{limits['le']}]" if "le" in limits else f"{limits['lt']})"
    return f"a number in {low}, {high}"


Text = Annotated[str, Field(min_length=1)]
Size = Annotated[int, Field(ge=1, le=262_144)]
Repeats = Annotated[int, Field(ge=1, le=1_000)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
OptionalCount = Annotated[int, Field(ge=0, le=2**53)]
"""0: not used."""
Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0, lt=float("inf"))]


class Settings(CheckedModel):
    """Keys of a run with their defaults."""

    model_config = ConfigDict(strict=True)

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """The names of all keys."""
        return tuple(cls.model_fields)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every key with its default."""
        return cls().model_dump()

    @classmethod
    def read(cls, values: KeyValues) -> Self:
        """Check and collect the keys that `values` has; all other keys take their defaults.

        Raises:
            UserError: a value has the wrong type or lies outside its range, or two don't fit together.
        """
        return cls(**{key: values[key] for key in cls.model_fields if key in values})

    def replace(self, values: Mapping[str, Any]) -> Self:
        """These settings with other values for the keys that they have; all other keys are ignored.

        Raises:
            UserError: as `read`.
        """
        own = {key: value for key, value in values.items() if key in type(self).model_fields}
        return type(self)(**{**self.model_dump(), **own}) if own else self


class ModelSettings(Settings):
    """The keys of M2Rec. config.yaml explains each in place."""

    hidden_size: Size = 64
    n_layers: Repeats = 2
    inner_size: Size = 256
    dropout_prob: Rate = 0.4
    mixer: Literal["mamba2", "mamba", "attention"] = "mamba2"
    d_state: Size = 32
    d_conv: Repeats = 4
    expand: Repeats = 2
    head_dim: Size = 64
    n_heads: Size = 2
    scan_backend: Literal["auto", "reference", "torch", "native", "triton", "mamba_ssm"] = "auto"
    filter: Literal["causal", "low_pass", "residual", "none"] = "causal"
    filter_modes: Size = 16
    filter_cutoff: Annotated[float, Field(gt=0, le=1)] = 0.5
    gate: Literal["softmax", "mean"] = "softmax"
    repeat_bias: bool = True
    neighbors: bool = False
    text_in_sequence: bool = True
    text_in_table: bool = True
    id_dropout: Rate = 0.0
    text_vectors: Text = "auto"
    text_encoder: Text = "auto"
    text_fingerprint: Text = "any"
    text_whitening: Literal["pca", "zca", "none"] = "pca"
    text_width: Annotated[int, Field(ge=0, le=65_536)] = 0
    init: Literal["standard", "mamba4rec"] = "standard"
    loss_type: Literal["CE", "sampled", "gBCE", "BPR"] = "CE"
    loss_memory: Annotated[int, Field(ge=0, le=2**20)] = 0
    n_negatives: Count = 512
    negatives_shared: Count = 128
    negative_sampling: Literal["uniform", "popularity"] = "uniform"
    gbce_t: Annotated[float, Field(ge=0, le=1)] = 0.75
    shard_items: bool = False
    sparse_updates: bool | Literal["auto"] = Field("auto", description="auto, True or False")
    compile: bool | Literal["auto"] = Field("auto", description="auto, True or False")
    exclude_seen: bool | Literal["auto"] = Field(True, description="auto, True or False")

    @model_validator(mode="after")
    def _check_text_and_loss(self) -> Self:
        if self.text_width and self.text_whitening == "none":
            raise UserError(
                f"text_width: {self.text_width} needs principal components; set text_whitening: pca, or 0"
            )
        if self.id_dropout and not self.text_in_table:
            raise UserError(
                f"id_dropout: {self.id_dropout} would leave items without text nothing in the item table; "
                f"set 0, or text_in_table: true"
            )
        if self.loss_type == "gBCE" and self.negative_sampling != "uniform":
            raise UserError(
                f"negative_sampling: {self.negative_sampling!r} does not fit loss_type: gBCE, which is "
                f"calibrated for uniform negatives; set negative_sampling: uniform, or loss_type: sampled"
            )
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
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
        return self

    @property
    def uses_text(self) -> bool:
        """Whether any part of the model uses text vectors."""
        return self.text_vectors != "none" and (self.text_in_sequence or self.text_in_table)


MAX_LENGTH = 1_000_000
NO_RUN = "none"
"""The value of `continue_from` without a run."""


class RunSettings(Settings):
    """The keys of a run that both RecBole and this project read, whatever the model."""

    model: Text = "M2Rec"
    dataset: Text = "ml-100k"
    data_path: Text = "dataset"
    runs_dir: Text = "runs"
    auto: bool = True
    continue_from: Text = NO_RUN
    replay_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 2020
    rows: Literal["dense", "prefix"] = "dense"
    time_order: Literal["exact", "recbole"] = "exact"
    ties: Literal["file", "shuffled"] = "file"
    split: Literal["leave_one_out", "global_time"] = "leave_one_out"
    valid_from: Share = 0.8
    test_from: Share = 0.9
    MAX_ITEM_LIST_LENGTH: Annotated[int, Field(ge=1, le=MAX_LENGTH)] | Literal["auto"] = Field(
        50, description=f"auto or a whole number from 1 to {MAX_LENGTH}"
    )
    epochs: Count = 200
    stopping_step: Annotated[int, Field(ge=0, le=2**31 - 1)] = 10
    eval_step: Count = 1
    valid_users: OptionalCount = 0
    checkpoint_minutes: Annotated[float, Field(gt=0, le=1_000_000)] = 5.0
    train_batch_size: Count = 2048
    eval_batch_size: Count = 256
    learning_rate: Annotated[float, Field(gt=0, lt=float("inf"))] = 0.001
    weight_decay: Weight = 0.0
    decay_per_epoch: Rate = 0.0
    targets_per_step: OptionalCount = 0
    average_epochs: Weight = 0.0
    average_targets: OptionalCount = 0
    patience_targets: OptionalCount = 0
    learner: Literal["adam", "adamw", "sgd", "adagrad", "rmsprop"] = "adam"
    shuffle: bool = True
    worker: Annotated[int, Field(ge=0, le=1_000)] = 0
    use_gpu: bool = True
    reproducibility: bool = True
    enable_amp: bool = False
    show_progress: bool = True
    data_cache: bool = True
    baselines: bool | Literal["auto"] = Field("auto", description="auto, True or False")
    report: bool = True
    tensorboard: bool = False
    state: Literal["INFO", "DEBUG", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    log_wandb: bool = False
    metric_decimal_place: Annotated[int, Field(ge=1, le=15)] = 6
    metric_definitions: Literal["textbook", "recbole"] = "textbook"

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.valid_from >= self.test_from:
            raise UserError(
                f"valid_from: {self.valid_from} must be less than test_from: {self.test_from}; both are "
                f"shares of the interactions, by time"
            )
        return self

    @property
    def max_length(self) -> int:
        """MAX_ITEM_LIST_LENGTH as a number, which it is once the data has been loaded.

        Raises:
            UserError: it is still `auto`.
        """
        length = self.MAX_ITEM_LIST_LENGTH
        if isinstance(length, str):
            raise UserError(f"MAX_ITEM_LIST_LENGTH: {length!r} is only for new runs; set a number")
        return length


_MAX_LOW_PASS_LENGTH = 10_000


def check_key_combination(model: ModelSettings, run: RunSettings) -> None:
    """Refuse combinations of keys that leak the future into training, or that need too much memory."""
    if model.filter != "low_pass":
        return
    if run.rows == "dense":
        raise UserError(
            "filter: 'low_pass' sees the future and can't be trained with rows: 'dense'; "
            "set rows: prefix, or filter: causal"
        )
    length = run.MAX_ITEM_LIST_LENGTH
    if isinstance(length, int) and length > _MAX_LOW_PASS_LENGTH:
        raise UserError(
            f"MAX_ITEM_LIST_LENGTH: {length} is too long for filter: 'low_pass', whose "
            f"memory grows with its square; set at most {_MAX_LOW_PASS_LENGTH}, or filter: causal"
        )


def get_defaults(*roles: Role) -> dict[str, Any]:
    """The keys of these roles with their defaults."""
    defaults = {**ModelSettings.defaults(), **RunSettings.defaults()}
    return {key: defaults[key] for key in collect_keys(*roles)}


def get_run_settings(config: Any) -> RunSettings:
    """The settings that `build_config` has stored with a config; read now from RecBole's plain Config."""
    return getattr(config, "run_settings", None) or RunSettings.read(config)


def get_model_settings(config: Any) -> ModelSettings:
    """As `get_run_settings`, for the keys of M2Rec."""
    return getattr(config, "model_settings", None) or ModelSettings.read(config)
