"""What `auto` chooses for which data, that it overrides nobody, and what the scale-free keys turn into."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import run_mm
from m2rec.data.max_length import choose_max_length
from m2rec.experiments.sweep_plan import Sweep
from m2rec.settings import SCALE_FREE_KEYS, ModelSettings, Role, RunSettings, collect_keys
from m2rec.training.automatic_settings import (
    PROFILES,
    RULE_KEYS,
    DataStatistics,
    choose_profile,
    choose_settings,
    format_choices,
)
from m2rec.training.configuration import build_config, resolve_settings
from m2rec.training.run import load_data, prepare_run
from m2rec.training.settling import collect_statistics, resolve_scale_free_keys
from tests.conftest import as_arguments, random_rows, small, write_inter

ROOT = Path(__file__).parent.parent
RECIPES = {"amazon-beauty": "amazon", "amazon-sports-outdoors": "amazon", "amazon-toys-games": "amazon",
           "ml-1m": "ml-1m"}  # fmt: skip
N_ROWS = {"amazon-beauty": 22_512, "amazon-sports-outdoors": 35_678, "amazon-toys-games": 19_539}
"""Of training, at the length of the recipe."""


def describe(**others: Any) -> DataStatistics:
    """Amazon Beauty, but for `others`."""
    beauty = {
        "targets": 131_413,
        "items": 12_101,
        "users": 22_363,
        "median_item_count": 7.0,
        "returning_share": 0.0,
        "has_text": False,
    }
    return DataStatistics(**{**beauty, **others})


ML_1M = {"targets": 981_491, "items": 3_416, "users": 6_040, "median_item_count": 144.0}
ML_100K = {"targets": 97_171, "items": 1_682, "users": 943, "median_item_count": 26.0}


@pytest.mark.parametrize(
    ("data", "profile", "expected"),
    [
        ({}, "rare items", {"hidden_size": 128, "decay_per_epoch": 0.16, "dropout_prob": 0.4}),
        ({}, "rare items", {"targets_per_step": 1_460, "average_targets": 130 * 1_460, "init": "standard"}),
        ({"targets": 30_000}, "rare items", {"decay_per_epoch": 0.037}),
        ({"has_text": True}, "rare items with text", {"hidden_size": 128, "init": "mamba4rec"}),
        ({"users": 1_500}, "small data", {"hidden_size": 64, "decay_per_epoch": 0.0}),
        ({"returning_share": 0.3}, "small data", {"average_targets": 0, "exclude_seen": False}),
        ({"returning_share": 0.05}, "rare items", {"exclude_seen": True}),
        (ML_1M, "much data", {"dropout_prob": 0.3, "targets_per_step": 8_000, "loss_type": "CE"}),
        (ML_100K, "small data", {"hidden_size": 64, "dropout_prob": 0.4, "learning_rate": 0.001}),
        ({**ML_100K, "targets": 300_000}, "small data", {"dropout_prob": 0.3}),
        ({"targets": 10_000_000}, "rare items", {"loss_type": "sampled", "n_negatives": 1_024}),
        ({**ML_1M, "targets": 20_000_000, "items": 600}, "much data", {"loss_type": "CE"}),
        ({"targets": 90}, "rare items", {"targets_per_step": 500, "patience_targets": 260 * 500}),
    ],
)
def test_the_rule(data: dict[str, Any], profile: str, expected: dict[str, Any]):
    statistics = describe(**data)
    assert choose_profile(statistics)[0] == profile
    choices = choose_settings(statistics)
    assert {key: choices[key].value for key in expected} == expected
    assert set(choices) <= RULE_KEYS and all(choice.reason for choice in choices.values())
    line = format_choices(choices)
    assert "\n" not in line and all(f"{key} " in line for key in choices)


def test_few_targets_and_many_epochs_are_written_out():
    line = format_choices(choose_settings(describe(targets=100)))
    assert "targets_per_step 500 (1 step an epoch)" in line
    assert "patience_targets 130000 (1,300 epochs)" in line


@pytest.mark.parametrize(
    ("data", "decided", "expected"),
    [
        # 12,101 * 8 + 48 * 8^2 parameters have 1.3 targets each
        ({}, {"hidden_size": 8}, {"dropout_prob": 0.3, "inner_size": 16}),
        ({}, {"hidden_size": 256}, {"dropout_prob": 0.4, "inner_size": 512}),
        (ML_1M, {"hidden_size": 512}, {"dropout_prob": 0.4, "inner_size": 1_024}),
        (ML_100K, {"hidden_size": 32}, {"dropout_prob": 0.3, "inner_size": 128}),
        ({}, {"average_targets": 0}, {"patience_targets": 10 * 131_413}),
        (ML_100K, {"average_targets": 9}, {"patience_targets": 3 * 97_171}),
        ({}, {"targets_per_step": 20_000}, {"patience_targets": 260 * 20_000, "average_targets": 2_600_000}),
    ],
)
def test_what_is_chosen_goes_with_what_is_set(
    data: dict[str, Any], decided: dict[str, Any], expected: dict[str, Any]
):
    choices = choose_settings(describe(**data), decided)
    assert {key: choices[key].value for key in expected} == expected


def test_the_width_of_the_user_counts(toy: Path):
    """Of the profile's width 64 there are 0.001 targets per parameter."""
    write_inter(toy, "toy", random_rows(n_users=60, n_items=9, longest=25))
    keys = {"dataset": "toy", "data_path": str(toy), "gpu_id": ""}
    chosen = {}
    for width in (1, 64):
        config = build_config({**keys, "hidden_size": width, "head_dim": 1, "average_epochs": 1})
        _, loaders = load_data(config)
        chosen[width] = (config["inner_size"], config["dropout_prob"])
    assert chosen == {1: (4, 0.2), 64: (256, 0.4)}
    targets, rows = loaders.train.dataset.n_targets, len(loaders.train.dataset)
    config = build_config({**keys, "train_batch_size": rows, "average_epochs": 0})
    load_data(config)
    assert config["stopping_step"] == 260, "the least patience is 260 steps, here of all rows"
    config = build_config({**keys, "train_batch_size": 1, "average_epochs": 1})
    load_data(config)
    assert config["stopping_step"] == max(3, round(260 * round(targets / rows) / targets))


def test_the_rule_depends_on_the_data_alone():
    """Its module loads nothing that knows a clock or a machine, and gives the same twice."""
    code = (
        "import sys; import m2rec.training.automatic_settings\n"
        "print(*{'torch', 'numpy', 'time', 'platform', 'm2rec.threads'} & {*sys.modules} - before)"
    )
    code = f"import sys; before = {{*sys.modules}}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert choose_settings(describe()) == choose_settings(describe())


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_made_of_keys(name: str):
    config = build_config({"auto": False, **PROFILES[name]})
    for key, value in PROFILES[name].items():
        assert config[key] == value
    assert not set(PROFILES[name]) & set(SCALE_FREE_KEYS.values()), "a profile holds for data of any size"


def write_rows(folder: Path, histories: dict[str, str]) -> dict[str, Any]:
    """Write histories such as {"u": "a b c"} as the data set `shop`; returns the keys of a run."""
    rows = []
    for user, items in histories.items():
        rows += [(user, item, time) for time, item in enumerate(items.split())]
    write_inter(folder, "shop", rows)
    keys = small(folder, "shop", runs_dir=str(folder / "runs"), auto=True)
    return {key: value for key, value in keys.items() if key not in {*RULE_KEYS, "MAX_ITEM_LIST_LENGTH"}}


def test_the_statistics_are_counted(tmp_path: Path):
    # trained: a b | a a b c | d e; validated: c | a; of these 7 targets the two a return
    keys = write_rows(tmp_path, {"u": "a b c d", "v": "a a b c a b", "w": "d e f"})
    for rows in ("dense", "prefix"):
        dataset, loaders = load_data(build_config({**keys, "auto": False, "rows": rows}))
        statistics = collect_statistics(dataset, has_text=True)
        assert statistics == DataStatistics(
            targets=5,
            items=6,
            users=3,
            median_item_count=1.0,  # a 3, b 2, c 1, d 1, e 1
            returning_share=2 / 7,
            has_text=True,
        )
        assert statistics.targets == loaders.train.dataset.n_targets


@pytest.mark.parametrize(("data", "epochs"), [({}, 15), (ML_1M, 20), (ML_100K, 25)])
def test_without_validation_the_epochs_are_few_and_fixed(data: dict[str, Any], epochs: int):
    """Nothing would stop a run, and nothing choose the weights of neighbours."""
    choices = choose_settings(describe(**data, has_validation=False))
    assert choices["epochs"].value == epochs and choices["neighbors"].value is False
    assert "patience_targets" not in choices
    stops = "(no validation targets, which stop a run and choose the weights of neighbours)"
    assert f"epochs {epochs}, neighbors false {stops}" in format_choices(choices)


def test_missing_validation_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    config = build_config(write_rows(tmp_path, {"u": "a b c", "v": "b c a", "w": "c a"}))
    dataset, _ = load_data(config)
    assert not collect_statistics(dataset, has_text=False).has_validation
    assert (config["epochs"], config["neighbors"]) == (25, False)
    assert "epochs 25, neighbors false (no validation targets" in caplog.text
    assert "patience" not in caplog.text


def test_returns_are_counted_in_some_of_many_histories(tmp_path: Path):
    keys = write_rows(tmp_path, {f"u{n}": "a a a a a" if n % 2 else "a b c d e" for n in range(10)})
    dataset, _ = load_data(build_config({**keys, "auto": False}))
    assert dataset.histories is not None
    assert dataset.histories.measure_returning_share(100) == 0.5
    assert dataset.histories.measure_returning_share(5) in (0.0, 1.0)


SET = {
    "hidden_size": 32, "inner_size": 48, "dropout_prob": 0.1, "init": "standard", "learning_rate": 0.01,
    "weight_decay": 0.5, "learner": "sgd", "train_batch_size": 3, "average_epochs": 0.7, "epochs": 3,
    "stopping_step": 7, "loss_type": "gBCE", "n_negatives": 5, "exclude_seen": False,
    "MAX_ITEM_LIST_LENGTH": 9, "decay_per_epoch": 0.3, "targets_per_step": 20, "average_targets": 50,
    "patience_targets": 500, "neighbors": False, "repeat_bias": False, "gate": "softmax",
}  # fmt: skip


def test_every_key_of_the_rule_is_tried_below():
    assert set(SET) >= RULE_KEYS | set(SCALE_FREE_KEYS.values())


@pytest.mark.parametrize("key", SET)
def test_a_key_that_is_set_stays(toy: Path, key: str):
    keys = {name: value for name, value in small(toy).items() if name not in {*RULE_KEYS, key}}
    keys = {**keys, "auto": True, key: SET[key]}
    config = build_config(keys)
    closed = {scale_free for scale_free, plain in SCALE_FREE_KEYS.items() if key == plain}
    closed |= {
        "learner": {"decay_per_epoch"},
        "loss_type": {"n_negatives"},
    }.get(key, set())
    assert config.open_keys and not config.open_keys & {key, *closed}
    dataset, loaders = load_data(config)
    if key in SCALE_FREE_KEYS:
        targets, rows = loaders.train.dataset.n_targets, len(loaders.train.dataset)
        plain = SCALE_FREE_KEYS[key]
        settings = RunSettings.read({**config.run_settings.model_dump(), key: SET[key]})
        assert config[plain] == resolve_scale_free_keys(settings, rows, targets)[plain]
    else:
        assert config[key] == SET[key]
    assert config.run_settings.auto is False
    if key == "MAX_ITEM_LIST_LENGTH":
        assert dataset.max_item_list_len == 9


def test_what_is_not_set_is_chosen(toy: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    write_inter(toy, "toy", random_rows(n_users=2_100, n_items=700, longest=6))
    config = build_config({"dataset": "toy", "data_path": str(toy), "gpu_id": ""})
    dataset, loaders = load_data(config)
    assert config.model_settings.hidden_size == config["hidden_size"] == 128
    assert (config["learner"], config["MAX_ITEM_LIST_LENGTH"], config["exclude_seen"]) == ("adamw", 50, True)
    statistics = collect_statistics(dataset, has_text=False)
    per_step = choose_settings(statistics)["targets_per_step"].value
    rows = len(loaders.train.dataset)
    assert config["train_batch_size"] == round(per_step * rows / statistics.targets)
    assert loaders.train.batch_size == config["train_batch_size"]
    said = [record.message for record in caplog.records if record.message.startswith("auto: ")]
    assert len(said) == 1 and "hidden_size 128" in said[0] and "median item" in said[0]
    assert f"train_batch_size {config['train_batch_size']}" in caplog.text


def test_auto_false_leaves_the_defaults(toy: Path):
    config = build_config({"dataset": "toy", "data_path": str(toy), "auto": False, "gpu_id": ""})
    before = resolve_settings(config)
    load_data(config)
    assert resolve_settings(config) == before
    defaults = {**RunSettings.defaults(), **ModelSettings.defaults(), "train_batch_size": 64}
    for key in RULE_KEYS | {*SCALE_FREE_KEYS, *SCALE_FREE_KEYS.values(), "learner", "MAX_ITEM_LIST_LENGTH"}:
        assert config[key] == defaults[key], key


@pytest.mark.parametrize("model", ["Mamba4Rec", "SASRec", "Popularity"])
def test_other_models_keep_their_settings(toy: Path, model: str):
    """But for the length of the histories."""
    values = {"dataset": "toy", "data_path": str(toy), "model": model, "gpu_id": ""}
    chosen, fixed = build_config(values), build_config({**values, "auto": False})
    load_data(chosen)
    differing = {"auto", "exclude_seen"}
    assert {key: value for key, value in resolve_settings(chosen).items() if key not in differing} == {
        key: value for key, value in resolve_settings(fixed).items() if key not in differing
    }


@pytest.mark.parametrize(
    ("lengths", "n_rows", "expected"),
    [
        ([3, 5, 8], 0, 50),
        ([50, 50, 50, 50, 200], 0, 50),
        ([40, 60, 70, 90], 0, 100),
        ([63, 146, 300], 0, 200),
        ([1_000, 2_000], 0, 200),
        ([1_000, 2_000], 2_000_000, 100),  # prefix rows that would hold 4e8 items
        ([1_000, 2_000], 20_000_000, 50),
    ],
)
def test_the_length_covers_most_histories(lengths: list[int], n_rows: int, expected: int):
    assert choose_max_length(np.array(lengths), n_rows) == expected


def test_a_chosen_length_is_as_a_given_one(tmp_path: Path):
    histories = {f"u{n}": " ".join(f"i{(n + 7 * k) % 90}" for k in range(80 + n)) for n in range(8)}
    keys = write_rows(tmp_path, histories)
    for rows in ("dense", "prefix"):
        chosen, given = (
            build_config({**keys, "auto": False, "rows": rows, "MAX_ITEM_LIST_LENGTH": length})
            for length in ("auto", 100)
        )
        (_, of_chosen), (_, of_given) = load_data(chosen), load_data(given)
        assert chosen["MAX_ITEM_LIST_LENGTH"] == 100 == chosen.run_settings.max_length
        for a, b in zip(of_chosen, of_given, strict=True):
            for column in b.dataset.inter_feat.columns:
                assert torch.equal(a.dataset.inter_feat[column], b.dataset.inter_feat[column])


def test_scale_free_keys_turn_into_plain_ones():
    settings = RunSettings(
        targets_per_step=1_000,
        decay_per_epoch=0.5,
        learning_rate=0.01,
        average_targets=3_000,
        patience_targets=9_000,
        eval_step=2,
    )
    values = resolve_scale_free_keys(settings, n_rows=150, n_targets=1_500)
    assert values["train_batch_size"] == 100 and values["learner"] == "adamw"
    assert (1 - 0.01 * values["weight_decay"]) ** 2 == pytest.approx(0.5)  # two steps
    assert (values["average_epochs"], values["stopping_step"]) == (2.0, 3)
    assert resolve_scale_free_keys(RunSettings(), 150, 1_500) == {}
    assert resolve_scale_free_keys(RunSettings(targets_per_step=1), 150, 1_500) == {"train_batch_size": 1}


def test_an_epoch_takes_the_share(toy: Path):
    """An epoch of steps with gradients of zero takes this share of every weight that is decayed."""
    keys = small(toy, decay_per_epoch=0.25, train_batch_size=7, runs_dir=str(toy.parent / "runs"))
    prepared = prepare_run(build_config(keys))
    trainer, model = prepared.trainer, prepared.trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(len(prepared.loaders.train)):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        trainer.optimizer.step()
    decayed = {name for name, p in model.named_parameters() if not getattr(p, "_no_weight_decay", False)}
    assert len(decayed) > 10
    for name, p in model.named_parameters():
        kept = 0.75 if name in decayed else 1.0
        torch.testing.assert_close(p.detach(), kept * before[name], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"decay_per_epoch": 0.1, "weight_decay": 1.0},
            "decay_per_epoch: 0.1 and weight_decay: 1.0 exclude each other; leave one out",
        ),
        (
            {"targets_per_step": 9, "train_batch_size": 2},
            "targets_per_step: 9 and train_batch_size: 2 exclude",
        ),
        ({"average_targets": 9, "average_epochs": 2}, "average_targets: 9 and average_epochs: 2 exclude"),
        ({"patience_targets": 9, "stopping_step": 2}, "patience_targets: 9 and stopping_step: 2 exclude"),
        ({"decay_per_epoch": 0.1, "learner": "sgd"}, "decay_per_epoch: 0.1 needs learner: adamw, not sgd"),
        ({"auto": "yes"}, "auto: expected True or False, got 'yes'"),
    ],
)
def test_a_mistake_is_one_line(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        build_config(given)
    assert "\n" not in str(caught.value)


def test_of_a_pair_the_stronger_holds(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("train_batch_size: 5\naverage_targets: 70\n")
    config = build_config({"targets_per_step": 40, "average_epochs": 2, "auto": False}, file)
    assert (config["targets_per_step"], config["average_epochs"], config["average_targets"]) == (40, 2, 0)
    config = build_config({"dataset": "amazon-beauty", "targets_per_step": 40})
    assert config["targets_per_step"] == 40 and config["decay_per_epoch"] == 0.16153
    config = build_config({"dataset": "amazon-beauty", "weight_decay": 0.5})
    assert (config["weight_decay"], config["decay_per_epoch"], config["learner"]) == (0.5, 0.0, "adamw")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_row_of_the_tables(name: str):
    """But for the text, the plain command has the keys of the sweep's variant with neighbours."""
    sweep = Sweep.read(ROOT / "results" / f"{RECIPES[name]}.yaml")
    row = build_config({**sweep.keys(name, "M2Rec with neighbours"), "dataset": name, "auto": False})
    plain = build_config({"dataset": name}, ROOT / "config.yaml")
    keys = collect_keys(Role.MODEL, Role.TRAINING, Role.LENGTH, Role.PROTOCOL) - {"auto", "decay_per_epoch"}
    found = {key: plain[key] for key in keys}
    if name in N_ROWS:
        found |= resolve_scale_free_keys(plain.run_settings, N_ROWS[name], 1)
    expected = {key: row[key] for key in keys}
    assert found.pop("weight_decay") == pytest.approx(expected.pop("weight_decay"), rel=1e-4)
    assert found == expected


@pytest.mark.parametrize("name", N_ROWS)
@pytest.mark.parametrize("given", [{}, {"train_batch_size": 64}, {"learning_rate": 0.0005}])
def test_a_recipe_keeps_its_decay_in_an_epoch(name: str, given: dict[str, Any]):
    """Whatever batch or learning rate the user sets."""
    config = build_config({"dataset": name, **given})
    settings = config.run_settings.replace(resolve_scale_free_keys(config.run_settings, N_ROWS[name], 1))
    n_steps = -(-N_ROWS[name] // settings.train_batch_size)
    of_row = 1 - (1 - 0.002 * 1.0) ** -(-N_ROWS[name] // 256)
    taken = 1 - (1 - settings.learning_rate * settings.weight_decay) ** n_steps
    assert taken == pytest.approx(of_row, rel=1e-4) and settings.learner == "adamw"


@pytest.mark.parametrize(
    "others", [{"auto": False}, {"model": "SASRec"}, {"model": "Mamba4Rec"}, {"model": "Popularity"}]
)
def test_a_recipe_is_for_the_plain_command(others: dict[str, Any]):
    config = build_config({"dataset": "amazon-beauty", **others})
    assert config["MAX_ITEM_LIST_LENGTH"] == 50 and config["user_inter_num_interval"] == "[5,inf)"
    assert config["weight_decay"] == 0.0 and config["train_batch_size"] != 256
    assert config["hidden_size"] != 128


def test_a_recipe_takes_no_decay_for_another_learner():
    """For adam, weight_decay is an L2 term, and 1.0 would be ruinous."""
    config = build_config({"dataset": "amazon-beauty", "learner": "adam"})
    assert (config["learner"], config["weight_decay"], config["hidden_size"]) == ("adam", 0.0, 128)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "the recipe of amazon-beauty"),
        ({"dropout_prob": 0.1}, "the recipe of amazon-beauty"),  # the recipe does not say it
        ({"epochs": 3, "hidden_size": 64}, "the recipe of amazon-beauty without hidden_size, epochs"),
        ({"targets_per_step": 40}, "the recipe of amazon-beauty without train_batch_size"),
        ({"learner": "adam"}, "the recipe of amazon-beauty without learner, decay_per_epoch"),
        ({"auto": False}, ""),
        (
            {
                **{"hidden_size": 64, "inner_size": 64, "learner": "adam", "train_batch_size": 9},
                **{"learning_rate": 0.1, "average_epochs": 0, "epochs": 1, "patience_targets": 50},
                **{"gate": "softmax", "neighbors": False},
            },
            "",
        ),
    ],
)
def test_a_recipe_says_what_of_it_was_taken(given: dict[str, Any], expected: str):
    recipe = build_config({"dataset": "amazon-beauty", **given}).recipe
    assert {choice.reason for choice in recipe.values()} == ({expected} if expected else set())
    assert not set(recipe) & set(given)


def test_the_log_lists_the_values_of_a_recipe(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    load_data(build_config({"dataset": "ml-100k", "epochs": 3, "gpu_id": ""}))
    (line,) = (message for message in caplog.messages if message.startswith("auto: "))
    values = "neighbors true, MAX_ITEM_LIST_LENGTH 200, targets_per_step 1080"
    assert line.startswith(f"auto: {values} (the recipe of ml-100k); exclude_seen true (0.0% of")


def test_a_run_repeats_from_its_config(toy: Path):
    """Whatever the rule says by then."""
    runs = toy.parent / "runs"
    keys = small(toy, runs_dir=str(runs), auto=True, exclude_seen="auto")
    keys = {key: value for key, value in keys.items() if key not in RULE_KEYS - {"exclude_seen"}}
    assert run_mm.main(as_arguments({**keys, "MAX_ITEM_LIST_LENGTH": "auto", "epochs": 1})) == 0
    (first,) = runs.iterdir()
    stored = yaml.safe_load((first / "config.yaml").read_text())
    assert stored["auto"] is False and stored["exclude_seen"] in (True, False)
    assert stored["hidden_size"] == 64 and stored["MAX_ITEM_LIST_LENGTH"] == 50
    assert not any(stored[key] for key in SCALE_FREE_KEYS)
    assert run_mm.main([f"--config_files={first / 'config.yaml'}"]) == 0
    (second,) = set(runs.iterdir()) - {first}
    assert yaml.safe_load((second / "config.yaml").read_text()) == stored
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    assert metrics[0]["test_unseen"] == metrics[1]["test_unseen"]
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_old_runs_have_every_key_of_the_rule():
    """So that a repeat of one is never touched by the rule."""
    for name in ("finished", "stopped"):
        config = yaml.safe_load((ROOT / "tests" / "old_runs" / "runs" / name / "config.yaml").read_text())
        assert not RULE_KEYS - {*SCALE_FREE_KEYS, "exclude_seen", "neighbors"} - set(config)
        for dataset in ("ml-100k", "toy"):  # with a recipe, and by the rule
            repeated = build_config({**config, "dataset": dataset, "data_path": ".", "gpu_id": ""})
            assert repeated["neighbors"] is False and "neighbors" not in repeated.open_keys
        assert set(SCALE_FREE_KEYS.values()) <= set(config)


def test_a_sweep_knows_the_rows_of_before():
    """The keys of a sweep say nothing of auto, so that every row of a planned run keeps its settings."""
    for path in (ROOT / "results").glob("*.yaml"):
        planned = {run[:3]: run.keys for run in Sweep.read(path).planned_runs()}
        with path.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                keys = planned.get((row["dataset"], row["variant"], int(row["seed"])))
                assert keys is None or keys == json.loads(row["settings"]), (path.name, row["variant"])
