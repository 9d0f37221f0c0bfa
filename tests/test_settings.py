"""Every model key: type, range and the text of its error."""

import re
import subprocess
import sys
from typing import Any

import pytest

from m2rec.commands.new_items_trial import NON_SETTING_KEYS
from m2rec.commands.run import RESUME_KEYS
from m2rec.settings import (
    MACHINE_KEYS,
    ModelSettings,
    Role,
    RunSettings,
    check_key_combination,
    collect_keys,
)
from m2rec.training import provenance
from m2rec.training.configuration import collect_known_keys
from m2rec.training.recbole_keys import DataSettings, LoopSettings

WRONG: list[tuple[str, Any, str]] = [
    ("hidden_size", 0, "a whole number from 1 to "),
    ("hidden_size", "abc", "a whole number from 1 to "),
    ("hidden_size", 2.5, "a whole number from 1 to "),
    ("hidden_size", True, "a whole number from 1 to "),
    ("n_layers", 10**11, "a whole number from 1 to "),
    ("n_layers", 0, "a whole number from 1 to "),
    ("inner_size", -1, "a whole number from 1 to "),
    ("dropout_prob", 1.0, "a number in [0, 1)"),
    ("dropout_prob", -0.1, "a number in [0, 1)"),
    ("dropout_prob", float("nan"), "a number in [0, 1)"),
    ("mixer", "lstm", "one of mamba2, mamba, attention"),
    ("d_state", 0, "a whole number from 1 to "),
    ("d_conv", 0, "a whole number from 1 to "),
    ("expand", 0, "a whole number from 1 to "),
    ("n_heads", 0, "a whole number from 1 to "),
    ("head_dim", None, "a whole number from 1 to "),
    ("scan_backend", "cuda", "one of auto, reference, torch, native, triton, mamba_ssm"),
    ("filter", "fft", "one of causal, low_pass, residual, none"),
    ("filter_modes", 0, "a whole number from 1 to "),
    ("filter_cutoff", 0, "a number in (0, 1]"),
    ("filter_cutoff", 1.1, "a number in (0, 1]"),
    ("gate", "sigmoid", "one of softmax, mean"),
    ("text_in_sequence", "yes", "True or False"),
    ("text_in_table", 1, "True or False"),
    ("id_dropout", 1.0, "a number in [0, 1)"),
    ("repeat_bias", "yes", "True or False"),
    ("neighbors", "auto", "True or False"),
    ("text_vectors", "", "some text"),
    ("text_encoder", "", "some text"),
    ("text_fingerprint", "", "some text"),
    ("text_whitening", True, "one of pca, zca, none"),
    ("text_width", -1, "a whole number from 0 to "),
    ("init", "xavier", "one of standard, mamba4rec"),
    ("loss_type", "MSE", "one of CE, sampled, gBCE, BPR"),
    ("loss_memory", -1, "a whole number from 0 to "),
    ("negative_sampling", "popular", "one of uniform, popularity"),
    ("gbce_t", 1.5, "a number in [0, 1]"),
    ("negatives_shared", 0, "a whole number from 1 to "),
    ("n_negatives", 0, "a whole number from 1 to "),
    ("compile", "yes", "auto, True or False"),
    ("shard_items", "yes", "True or False"),
    ("sparse_updates", "yes", "auto, True or False"),
    ("exclude_seen", "no", "auto, True or False"),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG)
def test_a_wrong_value_is_named(key: str, value: Any, expected: str):
    message = re.escape(f"{key}: expected {expected}") + r"[\d]*" + re.escape(f", got {value!r}")
    with pytest.raises(ValueError, match=message):
        ModelSettings.read({key: value})


def test_every_model_key_has_a_wrong_value_above():
    assert {key for key, _, _ in WRONG} == set(ModelSettings.keys())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("epochs", -1),
        ("stopping_step", -1),
        ("eval_step", 0),
        ("checkpoint_minutes", 0),
        ("train_batch_size", 0),
        ("learning_rate", 0),
        ("learning_rate", float("inf")),
        ("weight_decay", -1),
        ("MAX_ITEM_LIST_LENGTH", "abc"),
        ("MAX_ITEM_LIST_LENGTH", 0),
        ("MAX_ITEM_LIST_LENGTH", "automatic"),
        ("auto", "yes"),
        ("decay_per_epoch", 1),
        ("targets_per_step", -1),
        ("average_targets", 1.5),
        ("patience_targets", None),
        ("seed", -1),
        ("rows", "all"),
        ("time_order", "stable"),
        ("ties", "random"),
        ("learner", "lion"),
        ("dataset", 5),
        ("tensorboard", "no"),
        ("report", "no"),
        ("use_gpu", "abc"),
        ("reproducibility", "abc"),
        ("show_progress", "abc"),
        ("shuffle", 1),
        ("worker", -1),
        ("metric_decimal_place", 0),
        ("seed", 2**32),
        ("continue_from", 5),
        ("replay_share", 1.5),
    ],
)
def test_a_wrong_run_value_is_named(key: str, value: Any):
    with pytest.raises(ValueError, match=re.escape(f"{key}: expected ")):
        RunSettings.read({key: value})


def test_reading_takes_what_is_there():
    settings = ModelSettings.read({"hidden_size": 32, "dropout_prob": 0, "unrelated": "x"})
    assert (settings.hidden_size, settings.dropout_prob, settings.n_layers) == (32, 0.0, 2)


def test_width_needs_components():
    with pytest.raises(ValueError, match="text_width: 5 needs principal components; set text_whitening: pca"):
        ModelSettings(text_width=5, text_whitening="none")


def test_head_dim_must_divide_the_inner_width():
    with pytest.raises(ValueError, match=r"head_dim: 48 does not divide expand \* hidden_size = 128"):
        ModelSettings(head_dim=48)
    assert ModelSettings(head_dim=48, mixer="mamba").head_dim == 48


def test_low_pass_is_refused_with_dense_rows():
    with pytest.raises(ValueError, match=r"filter: 'low_pass' sees the future .* set rows: prefix"):
        check_key_combination(ModelSettings(filter="low_pass"), RunSettings(rows="dense"))
    check_key_combination(ModelSettings(filter="low_pass"), RunSettings(rows="prefix"))


def test_text_is_wanted_only_where_it_is_used():
    assert ModelSettings().uses_text
    assert not ModelSettings(text_vectors="none").uses_text
    assert not ModelSettings(text_in_sequence=False, text_in_table=False).uses_text


def test_every_key_has_one_role():
    """A new key gets a role, so that it is in the lists of keys that it belongs to."""
    named = [key for role in Role for key in role.value]
    checked = {*DataSettings.keys(), *LoopSettings.keys()}
    assert len(named) == len(set(named))
    assert {*ModelSettings.keys(), *RunSettings.keys(), *checked} <= set(named) <= collect_known_keys()


def test_the_lists_of_keys():
    """As they were written out before they were made of roles."""
    machine = {
        "baselines", "checkpoint_minutes", "data_cache", "data_path", "eval_batch_size", "gpu_id",
        "log_wandb", "report", "runs_dir", "scan_backend", "show_progress", "state", "tensorboard",
        "use_gpu", "worker",
    }  # fmt: skip
    assert machine == MACHINE_KEYS
    lasting = {
        "epochs", "exclude_seen", "metric_definitions", "patience_targets", "stopping_step", "text_encoder",
        "text_fingerprint", "text_vectors",
    }  # fmt: skip
    assert machine | lasting == provenance._RESUME_OVERRIDES
    assert set(RESUME_KEYS) == {"eval_batch_size", "gpu_id", "use_gpu", "show_progress", "state"}
    assert set(NON_SETTING_KEYS) == {"dataset", "seed", "data_path", "runs_dir"}
    assert collect_keys(Role.LOCAL) == {"gpu_id", "show_progress"}
    measured = {
        "ITEM_ID_FIELD", "TIME_FIELD", "USER_ID_FIELD", "dataset", "filter_inter_by_user_or_item",
        "item_inter_num_interval", "rm_dup_inter", "seed", "split", "test_from", "ties", "time_order",
        "user_inter_num_interval", "val_interval", "valid_from", "valid_metric",
    }  # fmt: skip
    assert measured == collect_keys(Role.DATASET, Role.SEED, Role.PROTOCOL)
    ignored = {
        "checkpoint_dir", "config_file", "dataloaders_save_path", "dataset_save_path", "enable_scaler",
        "save_dataloaders", "save_dataset",
    }  # fmt: skip
    assert ignored == collect_keys(Role.IGNORED)


def test_reading_settings_loads_no_torch():
    code = "import sys, m2rec.settings; sys.exit(bool({'torch', 'pandas', 'recbole'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
