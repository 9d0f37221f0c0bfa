"""From command line and files to a Config: precedence, every shipped YAML, unknown keys."""

import re
import sys
from pathlib import Path

import pytest
import torch

from m2rec import models
from m2rec.compat import RECBOLE_FOLDER
from m2rec.data.shipped import ORIGIN_KEY, RECIPE_KEY
from m2rec.models.m2rec import M2Rec
from m2rec.models.registry import find_model_class
from m2rec.settings import (
    SCALE_FREE_KEYS,
    ModelSettings,
    RunSettings,
    get_model_settings,
    get_run_settings,
)
from m2rec.training.automatic_settings import RULE_KEYS
from m2rec.training.configuration import PROPERTIES_FOLDER, build_config
from m2rec.training.recbole_keys import DataSettings, LoopSettings
from m2rec.yaml_values import parse_arguments, read_yaml

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(PROPERTIES_FOLDER.glob("*/*.yaml"))


def documented() -> tuple[dict[str, object], dict[str, object]]:
    """The active and the commented keys of config.yaml with their values."""
    import yaml

    active = read_yaml(ROOT / "config.yaml")
    commented = {}
    for line in (ROOT / "config.yaml").read_text().splitlines():
        if match := re.match(r"# (\w+): (.+?)\s+# ", line):
            commented[match[1]] = yaml.safe_load(match[2])
    return active, commented


def test_order_of_strength(tmp_path: Path):
    """Command line, config file, properties, RecBole."""
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\nlearning_rate: 5e-4\n")
    config = build_config({"epochs": 3}, file)
    assert config["epochs"] == 3
    assert config["learning_rate"] == 0.0005
    assert config["train_batch_size"] == 64  # properties/model/M2Rec.yaml, RecBole has 2048
    assert build_config({"dataset": "ml-1m"}, file)["MAX_ITEM_LIST_LENGTH"] == 200
    file.write_text("MAX_ITEM_LIST_LENGTH: 77\nmodel: Mamba4Rec\nmixer: mamba2\n")
    config = build_config({"dataset": "ml-1m"}, file)
    assert (config["MAX_ITEM_LIST_LENGTH"], config["mixer"], config["init"]) == (77, "mamba2", "mamba4rec")
    assert build_config({"dataset": "ml-1m", "MAX_ITEM_LIST_LENGTH": 9}, file)["MAX_ITEM_LIST_LENGTH"] == 9
    assert config["neg_sampling"] is None and config["LIST_SUFFIX"] == "_list"  # RecBole's own


def test_config_files_replace_the_default_file(tmp_path: Path):
    default, a, b = (tmp_path / name for name in ("default.yaml", "a.yaml", "b.yaml"))
    for path, text in ((default, "seed: 1\nepochs: 9"), (a, "seed: 2\nepochs: 8"), (b, "seed: 3")):
        path.write_text(text)
    config = build_config(parse_arguments([f"--config_files={a} {b}"]), default)
    assert (config["seed"], config["epochs"]) == (3, 8)
    spaced = tmp_path / "my runs.yaml"
    spaced.write_text("seed: 4")
    assert build_config(parse_arguments([f"--config_files={spaced}"]), default)["seed"] == 4


@pytest.mark.parametrize("path", SHIPPED, ids=[str(p.relative_to(PROPERTIES_FOLDER)) for p in SHIPPED])
def test_every_shipped_yaml_builds_a_config(path: Path):
    kind = path.parent.name
    given = {"model": path.stem} if kind == "model" else {"dataset": path.stem} if kind == "dataset" else {}
    config = build_config(given)
    properties = read_yaml(path)
    for key, value in {**properties, **properties.get(RECIPE_KEY, {})}.items():
        if key not in ("data_path", ORIGIN_KEY, RECIPE_KEY):  # RecBole adds the data set's name
            assert config[key] == value, key


def test_config_yaml_holds_the_defaults_of_the_main_run():
    active, commented = documented()
    """The fixed ones, without a recipe; three keys as `auto: true` has them whatever the data."""
    config, plain = build_config({}), build_config({"auto": False})
    assert build_config({}, ROOT / "config.yaml").final_config_dict == config.final_config_dict
    derived = {"show_progress"}
    for key, value in {**active, **commented}.items():
        if key not in derived | {"gpu_id", "user_inter_num_interval", "item_inter_num_interval", "data_path"}:
            shown = config if key in ("auto", "exclude_seen", "neighbors") else plain
            assert shown[key] == value, key


def test_config_yaml_documents_every_key_of_ours():
    active, commented = documented()
    assert not set(active) & set(commented)
    assert set(ModelSettings.keys()) | set(RunSettings.keys()) <= set(active) | set(commented)


def test_config_yaml_does_not_silence_the_properties_nor_the_rule():
    """An active key would be stronger than any properties file and the rule, so none may be in one."""
    active, _ = documented()
    for path in SHIPPED:
        if path.parent.name in ("dataset", "model"):
            properties = read_yaml(path)
            keys = {*properties, *properties.get(RECIPE_KEY, {})}
            assert (keys & set(active)) - {"model"} == set(), path
    assert not {*RULE_KEYS, *SCALE_FREE_KEYS, *SCALE_FREE_KEYS.values(), "learner"} & set(active)


def test_mamba4rec_is_m2rec_with_settings():
    config = build_config({"model": "Mamba4Rec"})
    settings = ModelSettings.read(config)
    assert config["model"] == "M2Rec" and config["variant"] == "Mamba4Rec"
    assert (settings.filter, settings.gate, settings.mixer, settings.init) == (
        "none",
        "mean",
        "mamba",
        "mamba4rec",
    )
    assert not settings.uses_text
    assert config["rows"] == "prefix"


def test_baselines_take_prefix_rows_and_refuse_dense_ones():
    assert build_config({"model": "SASRec"})["rows"] == "prefix"
    with pytest.raises(ValueError, match="rows: 'dense' is for M2Rec; SASRec trains on its last position"):
        build_config({"model": "SASRec", "rows": "dense"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rat": 0.1}, "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (
            {"MAX_ITEM_LIST_LENTH": 9},
            "unknown key 'MAX_ITEM_LIST_LENTH'; did you mean 'MAX_ITEM_LIST_LENGTH'?",
        ),
        (
            {"neg_sampling": None},
            "'neg_sampling': RecBole has renamed or dropped it; set train_neg_sample_args",
        ),
        (
            {"min_user_inter_num": 5},
            "'min_user_inter_num': RecBole has renamed or dropped it; set user_inter_num",
        ),
        ({"real_time_process": True}, "RecBole has renamed or dropped it; leave it out, nothing replaces it"),
        (
            {"split_ratio": [8, 1, 1]},
            "'split_ratio': RecBole has renamed or dropped it; set split in its place",
        ),
        (
            {"val_interval": {"rating": "[4,inf)"}},
            "val_interval: column 'rating' is not loaded; add it to load_col, such as "
            '--load_col="{inter: [user_id, item_id, timestamp, rating]}"',
        ),
        ({"hiden_size": 9}, "unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        ({"model": "SASrec"}, "model: unknown model 'SASrec'; did you mean 'SASRec'?"),
        ({"model": "os"}, "model: unknown model 'os'"),
        ({"hidden_size": "64; import os"}, "hidden_size: expected a whole number"),
        ({"filter": "low_pass"}, "filter: 'low_pass' sees the future"),
        ({"gpu_id": 99}, f"gpu_id: there is no GPU '99', PyTorch sees {torch.cuda.device_count()}"),
        ({"scan_backend": "cuda"}, "scan_backend: expected one of auto, reference"),
        ({"valid_metric": "NDCG@7"}, "valid_metric: 'NDCG@7' is not measured; choose one of Hit@5"),
        ({"topk": [0]}, "topk: expected whole numbers from 1, got [0]"),
        ({"metrics": ["NDCG", "Nonsense"]}, "metrics: expected some of Hit, NDCG"),
        (
            {"user_inter_num_interval": "5"},
            "user_inter_num_interval: expected an interval from low to high, such as",
        ),
        (
            {"item_inter_num_interval": "[5,3]"},
            "item_inter_num_interval: expected an interval from low to high, such as '[5,inf)', got '[5,3]'",
        ),
        ({"val_interval": 5}, "val_interval: expected {column: '[low,high]'}, got 5"),
        (
            {"val_interval": {"timestamp": 5}},
            "val_interval: expected {column: '[low,high]'}, got {'timestamp': 5}",
        ),
        ({"load_col": ["user_id"]}, "load_col: expected {inter: [column, ...]}, got ['user_id']"),
        ({"clip_grad_norm": 5}, "clip_grad_norm: expected {max_norm: 5} or ~, got 5"),
        ({"clip_grad_norm": {"max_norm": "x"}}, "clip_grad_norm: expected {max_norm: 5} or ~"),
        ({"field_separator": 5}, "field_separator: expected some text, got 5"),
        ({"metrics": 5}, "metrics: expected some of Hit, NDCG"),
        ({"metrics": []}, "metrics: expected some of Hit, NDCG"),
        ({"metrics": ["NDCG", "GAUC"]}, "metrics: expected some of Hit, NDCG"),
        ({"topk": [5, True]}, "topk: expected whole numbers from 1, got [5, True]"),
        ({"topk": "abc"}, "topk: expected whole numbers from 1, got 'abc'"),
        ({"config_files": 5}, "config_files: expected the names of files, got 5"),
        ({"config_files": "."}, "config file '.' can't be read: Is a directory"),
        ({"encoding": "latin-1"}, "unknown key 'encoding'"),
        ({"dataset": None}, "dataset: expected some text, got None"),
        ({"state": "LOUD"}, "state: expected one of INFO"),
        ({"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}}}, "eval_args: {'split'"),
        ({"config_files": "nowhere.yaml"}, "config file 'nowhere.yaml' can't be read: No such file"),
    ],
)
def test_a_mistake_is_named(given: dict[str, object], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_config(given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "expected lines of 'key: value'"),
        ("a: [1\n", "is not valid YAML"),
        ("!!python/name:os.system x", "is not valid YAML"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str, message: str):
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        build_config({"config_files": str(file)})


def test_arguments_are_yaml_and_never_evaluated():
    values = parse_arguments(
        "--a=3 --b=1e-3 --c=[1,x] --d=~ --e=__import__('os').getcwd() --f=a=b --g=| --h=''".split()
    )
    assert values == {
        "a": 3,
        "b": 0.001,
        "c": [1, "x"],
        "d": None,
        "e": "__import__('os').getcwd()",
        "f": "a=b",
        "g": "|",
        "h": "",
    }
    config = build_config({"data_path": "__import__('os').getcwd()", "dataset": "x"})
    assert config["data_path"] == "__import__('os').getcwd()/x"
    for wrong in ("epochs=3", "--epochs", "--=3", "-e=3"):
        with pytest.raises(ValueError, match=f"argument '{wrong}': expected --key=value"):
            parse_arguments([wrong])


def test_a_separator_comes_as_it_was_meant():
    assert parse_arguments(["--field_separator= "]) == {"field_separator": " "}
    assert parse_arguments(["--clip_grad_norm="]) == {"clip_grad_norm": None}
    for given, meant in ((r"\t", "\t"), ("\t", "\t"), (" ", " "), ("||", "||")):
        assert build_config(parse_arguments([f"--field_separator={given}"]))["field_separator"] == meant


def test_the_programs_own_arguments_stay_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["prog", "--epochs=77"])
    assert build_config({})["epochs"] != 77


def test_defaults_are_those_of_recbole():
    """The settings repeat a few of RecBole's defaults; they must not drift apart."""
    folder = RECBOLE_FOLDER / "properties"
    stock = {**read_yaml(folder / "overall.yaml"), **read_yaml(folder / "dataset" / "sample.yaml")}
    own = {"data_path", "epochs", "eval_batch_size", "load_col", "metric_decimal_place", "metrics", "topk"}
    for kind in (RunSettings, LoopSettings, DataSettings):
        for key, value in kind.defaults().items():
            if key in stock and key not in own | {"eval_args", "valid_metric"}:
                assert stock[key] == value, key


def test_no_properties_of_recbole_are_overruled():
    """RunSettings' defaults are stronger than RecBole's properties, of which none may have those keys."""
    for path in (RECBOLE_FOLDER / "properties").rglob("*.yaml"):
        if path.name not in ("overall.yaml", "sample.yaml", "ml-100k.yaml"):
            assert not set(read_yaml(path)) & set(RunSettings.keys()), path


def test_a_data_set_may_have_a_number_for_a_name():
    assert build_config(parse_arguments(["--dataset=1234"]))["dataset"] == "1234"


def test_negatives_are_drawn_where_a_models_own_loss_needs_them():
    """FPMC is BPR by RecBole's properties, SASRec is cross-entropy."""
    assert build_config({"model": "FPMC"})["train_neg_sample_args"]["distribution"] == "uniform"
    assert build_config({"model": "SASRec"})["train_neg_sample_args"]["distribution"] == "none"
    bpr = build_config({"model": "SASRec", "loss_type": "BPR"})
    assert bpr["train_neg_sample_args"]["distribution"] == "uniform"


def test_own_files_come_before_the_ml_100k_inside_recbole(tmp_path: Path):
    assert "dataset_example" in build_config({"data_path": str(tmp_path)})["data_path"]
    own = tmp_path / "ml-100k" / "ml-100k.inter"
    own.parent.mkdir()
    own.write_text("user_id:token\titem_id:token\ttimestamp:float\n")
    assert build_config({"data_path": str(tmp_path)})["data_path"] == str(own.parent)


def test_models_are_found_by_their_exact_name():
    assert find_model_class("M2Rec") is M2Rec
    assert find_model_class("GRU4Rec").__name__ == "GRU4Rec"


def test_anomaly_detection_is_off_and_stays_off():
    assert not torch.is_anomaly_enabled()


def test_the_settings_are_read_once(monkeypatch: pytest.MonkeyPatch):
    config = build_config({"hidden_size": 128, "epochs": 3})
    assert config.run_settings.epochs == 3 and config.model_settings.hidden_size == 128
    assert get_model_settings(config) is config.model_settings
    assert get_run_settings(config) is config.run_settings
    assert build_config({"model": "SASRec"}).model_settings is None


def test_a_baseline_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "from m2rec.models.popularity import Popularity\nclass Newest(Popularity):\n    pass\n"
    (tmp_path / "newest.py").write_text(code)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    config = build_config({"model": "Newest", "epochs": 9})
    assert config.model_class.__name__ == "Newest"
    assert (config["rows"], config["epochs"]) == ("dense", 1)
