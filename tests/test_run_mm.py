"""The command: whole runs through run_mm.main, the run folder, and its errors."""

import csv
import errno
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from m2rec.data.dataset import HistoryDataset
from m2rec.tensor_files import read_tensors
from m2rec.training.configuration import build_config
from m2rec.training.new_run import create_run_folder
from m2rec.training.run import build_resumed_config
from tests.conftest import as_arguments, random_rows, small, write_inter
from tests.test_vector_import import Trap

ROOT = Path(__file__).parent.parent
Command = Callable[..., tuple[int, str, str]]
QUICK = {"auto": False, "MAX_ITEM_LIST_LENGTH": 10, "baselines": False, "report": False}  # of every model


def test_a_run_end_to_end(command: Command, toy: Path, write_vectors: Callable[..., Path]):
    write_vectors(toy, "toy", [f"i{k}" for k in range(15)])
    status, out, err = command(*as_arguments(small(toy, seed=5, report=True)))
    assert status == 0, err
    lines = out.splitlines()
    folder = Path(lines[-1])
    assert folder.parent.name == "runs" and folder.name.startswith("M2Rec-toy-")
    assert "device cpu (" in err and "scan backend torch (auto: " in err
    assert re.search(
        r"text for 15 of 20 items, \S+/toy\.text\.safetensors, 3 wide, mean cosine in the file -?0\.\d\d; "
        r"the first without: i\d+(, i\d+){4}$",
        err,
        re.M,
    )
    assert "does not read" not in err
    assert next(line for line in lines if line.startswith("metric")).split() == [
        "metric",
        "valid",
        "test",
        "test_unseen",
        "test_new",
    ]
    returning = re.compile(r"[\d,]+ of 26 test targets \(\d+%\) are in their user's history: misses in", re.M)
    assert returning.search(err) and returning.search(out)
    assert re.search(
        r"^\S+ [\d,]+ of [\d,]+ interactions \(\d+%\) share their time with another one", err, re.M
    )
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "metrics.json", "history.csv", "model.safetensors", "items.json",
        "trained.safetensors", "text.json", "test_ranks.csv", "counts.json", "insights.json", "report.html",
    }  # fmt: skip
    assert lines[-4:-1] == [
        f"look at it: {folder}/report.html",
        f"use it:     python scripts/recommend.py {folder} --interactive",
        f"repeat it:  python run_mm.py --config_files={folder}/config.yaml",
    ]

    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"protocol", "seed", "commit", "versions", "data", "seconds"} <= set(metrics)
    release = torch.__version__.partition("+")[0]  # the wheel on PyPI is called so, without its +cu130
    assert metrics["seed"] == 5 and metrics["versions"]["torch"] in (torch.__version__, release)
    names = {f"{metric}@{k}" for metric in ("hit", "ndcg", "mrr", "itemcoverage") for k in (5, 10)}
    with (folder / "history.csv").open() as file:
        best = max(float(line["valid.ndcg@10"]) for line in csv.DictReader(file))
    assert metrics["valid"]["ndcg@10"] == pytest.approx(best)
    for part in ("valid", "valid_unseen", "test", "test_unseen"):
        assert set(metrics[part]) == names
        assert all(0 <= value <= 1 for value in metrics[part].values())
    text = metrics["text"]
    assert (
        text["model"] == "random"
        and (text["matched"], text["items"]) == (15, 20)
        and len(text["sha256"]) == 64
    )
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert (
        written["learning_rate"] == 0.001
        and written["MAX_ITEM_LIST_LENGTH"] == 10
        and written["mixer"] == "mamba2"
    )
    counts = metrics["data"]
    assert counts["users"] == 30 and counts["items"] == 20 and counts["interactions"] == len(random_rows())
    tokens = json.loads((folder / "items.json").read_text())
    assert tokens[0] == "[PAD]" and len(set(tokens)) == 21
    assert load_file(folder / "model.safetensors")["encoder.id_embedding.weight"].shape == (21, 16)


def test_the_metrics_are_those_of_the_saved_weights(command: Command, toy: Path):
    """The best epoch is not the last; both test protocols are recomputed from the run folder by hand."""
    from m2rec.compat import data_preparation
    from m2rec.data.dataset import HistoryDataset
    from m2rec.models.m2rec import M2Rec
    from m2rec.training.configuration import build_config

    arguments = small(toy, epochs=30, learning_rate=0.05, stopping_step=3, text_vectors="none")
    folder = Path(command(*as_arguments(arguments))[1].splitlines()[-1])
    metrics = json.loads((folder / "metrics.json").read_text())
    with (folder / "history.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert metrics["best_epoch"] < len(lines) - 1
    assert float(lines[metrics["best_epoch"]]["valid.hit@5"]) == pytest.approx(metrics["valid"]["hit@5"])

    config = build_config({"config_files": str(folder / "config.yaml")})
    test = data_preparation(config, HistoryDataset(config))[2].dataset
    model = M2Rec(config, test)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        scores = model.eval().full_sort_predict(test.inter_feat)
    scores[:, 0] = -torch.inf
    sums = {"test": 0.0, "test_unseen": 0.0}
    items = test.field2token_id["item_id"]
    users = test.field2id_token["user_id"][test.inter_feat["user_id"].numpy()]
    for row, target in enumerate(test.inter_feat["item_id"].tolist()):
        own = [r for r in random_rows() if r[0] == users[row]]
        before = [items[item] for _, item, _ in sorted(own, key=lambda r: r[2])[:-1]]
        rank = 1 + int((scores[row] > scores[row, target]).sum())
        sums["test"] += 1 / rank if rank <= 10 else 0
        unseen = scores[row].clone()
        unseen[before] = -torch.inf
        rank = 1 + int((unseen > unseen[target]).sum())
        sums["test_unseen"] += 1 / rank if rank <= 10 and target not in before else 0
    for part, total in sums.items():
        assert metrics[part]["mrr@10"] == pytest.approx(total / len(users), abs=1e-5)


def test_every_metric_that_is_offered_works(command: Command, toy: Path):
    from m2rec.evaluation.metrics import METRICS

    status, out, err = command(*as_arguments(small(toy, metrics=f"[{', '.join(METRICS)}]", epochs=1)))
    assert status == 0, err
    metrics = json.loads((Path(out.splitlines()[-1]) / "metrics.json").read_text())
    assert len(metrics["test"]) == 2 * len(METRICS)
    assert 0 < metrics["test"]["itemcoverage@10"] <= 1


def test_a_runs_config_repeats_it(command: Command, toy: Path):
    first = Path(command(*as_arguments(small(toy)))[1].splitlines()[-1])
    second = Path(command(f"--config_files={first / 'config.yaml'}")[1].splitlines()[-1])
    assert first != second
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (first, second))
    assert all(a[part] == b[part] for part in ("valid", "test", "test_unseen", "data", "protocol"))
    (ours, about), (theirs, same) = (read_tensors(folder / "model.safetensors") for folder in (first, second))
    assert about == same and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "model", ["SASRec", "BERT4Rec", "GRU4Rec", "NARM", "Caser", "FEARec", "Mamba4Rec", "FPMC"]
)
def test_baselines_report_both_protocols(command: Command, toy: Path, model: str):
    sizes = {"n_layers": 2, "n_heads": 2, "embedding_size": 16, "train_batch_size": 512, "epochs": 1}
    ours = {k: v for k, v in small(toy).items() if k not in ("head_dim", "d_state")}
    status, out, err = command(*as_arguments({**ours, **sizes}), f"--model={model}")
    assert status == 0, err
    metrics = json.loads((Path(out.splitlines()[-1]) / "metrics.json").read_text())
    assert metrics["model"] == model and metrics["protocol"]["rows"] == "prefix"
    assert metrics["test"] != metrics["test_unseen"]


def test_without_text_vectors_it_says_so_and_runs(command: Command, toy: Path):
    status, _, err = command(*as_arguments(small(toy, epochs=1)))
    assert status == 0
    assert "no text vectors for toy (looked for toy.text.safetensors in " in err


def test_the_same_digits_with_any_number_of_workers(command: Command, toy: Path):
    tables = []
    for workers in (0, 1, 2):
        status, out, err = command(*as_arguments(small(toy, worker=workers, text_vectors="none")))
        assert status == 0, err
        tables.append(re.sub(r"\d+ s$|^.*/runs/.*$", "", out, flags=re.M))
    assert tables[0] == tables[1] == tables[2]


def test_two_runs_in_one_second_have_two_folders(command: Command, toy: Path):
    folders = {command(*as_arguments(small(toy, epochs=1)))[1].splitlines()[-1] for _ in range(3)}
    assert len(folders) == 3


def test_the_readmes_own_data(command: Command, tmp_path: Path):
    """The three users' files as README shows them; more items in the ranking than the shop has."""
    shown = re.findall(r"```\n(\w+:token\t.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    assert len(shown) == 2
    folder = tmp_path / "shop"
    folder.mkdir()
    for name, text in zip(("shop.inter", "shop.item"), shown, strict=True):
        (folder / name).write_text(text)
    status, out, err = command("--dataset=shop", f"--data_path={tmp_path}", "--epochs=2", "--gpu_id=")
    assert status == 0, err
    assert "topk: cut to [4], the data set has 4 items" in err and "ndcg@4" in out


def test_a_key_that_the_model_does_not_read_is_named(command: Command, toy: Path):
    base = as_arguments({"dataset": "toy", "data_path": toy, "epochs": 1, "gpu_id": "", **QUICK})
    _, _, err = command(*base, "--model=SASRec", "--filter=none")
    assert "these keys are ignored by SASRec: filter" in err
    _, _, err = command(*base, "--model=Mamba4Rec", "--num_layers=1", "--save_dataset=true")
    assert "these keys are ignored by Mamba4Rec: num_layers, save_dataset" in err


def test_a_full_disk_is_called_by_its_name(command: Command, toy: Path, monkeypatch: pytest.MonkeyPatch):
    """Not blamed on a key; the weights are the first large file of a run."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr("m2rec.tensor_files.save_file", full)
    status, _, err = command(*as_arguments(small(toy)))
    last = err.splitlines()[-1]
    assert status == 2 and "Traceback" not in err
    assert last == "run_mm.py: error: [Errno 28] No space left on device: 'model.safetensors'"


def test_memory_that_ends_in_the_test_costs_no_training(
    command: Command, toy: Path, monkeypatch: pytest.MonkeyPatch
):
    def greedy(*args: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr("m2rec.training.trainer.RunTrainer.evaluate_protocols", greedy)
        status, _, err = command(*as_arguments(small(toy, epochs=2, eval_batch_size=8)))
    last = err.splitlines()[-1]
    assert (
        status == 2
        and "M2Rec can't be tested: out of memory; retry the evaluation with a smaller batch: " in last
    )
    resume, batch = re.findall(r"--\w+=\S+", last)
    assert batch == "--eval_batch_size=2"
    status, out, err = command(resume, batch, runs_dir=False)
    assert status == 0 and " loss " not in err and "M2Rec on toy" in out
    config = yaml.safe_load((Path(out.splitlines()[-1]) / "config.yaml").read_text())
    assert config["eval_batch_size"] == 2 and config["epochs"] == 2


def test_debug_shows_the_trace_of_a_mistake(command: Command, toy: Path):
    status, _, err = command(*as_arguments(small(toy)), "--state=DEBUG", "--hidden_size=x")
    assert status == 2 and "Traceback" in err and err.splitlines()[-1].startswith("run_mm.py: error: ")


def test_a_data_sets_name_stays_inside_the_runs_folder(command: Command, tmp_path: Path):
    write_inter(tmp_path / "a b", "Ä x", random_rows())
    status, out, _ = command(*as_arguments(small(tmp_path / "a b", "Ä x", epochs=1)))
    assert status == 0
    assert Path(out.splitlines()[-1]).parent == tmp_path / "runs"


@pytest.mark.parametrize("model", ["M2Rec", "SASRec"])
def test_nothing_is_pickled_or_unpickled(
    command: Command, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
):
    """RecBole looks for the data loaders of another run in ./saved, or where a key says."""
    ran = tmp_path / "ran"
    monkeypatch.chdir(tmp_path)
    Path("saved").mkdir()
    for name in (f"saved/toy-for-{model}-dataloader.pth", "other.pth"):
        Path(name).write_bytes(pickle.dumps(Trap(ran)))
    given = {"dataset": "toy", "model": model, "data_path": toy, "epochs": 1, "gpu_id": "", **QUICK}
    for keys in ([], ["--dataloaders_save_path=other.pth"], ["--save_dataloaders=true"]):
        assert command(*as_arguments(given), *keys)[0] == 0
    assert not ran.exists() and len(list(Path("saved").iterdir())) == 1


def test_a_run_without_text_resumes_with_id_dropout(command: Command, toy: Path, tmp_path: Path):
    given = small(toy, id_dropout=0.2, runs_dir=str(tmp_path / "runs"))
    given["text_vectors"] = "auto"
    config = build_config(given)
    folder = create_run_folder(config, HistoryDataset(config), None)
    for name in ("checkpoint.safetensors", "history.csv"):
        (folder / name).touch()
    assert build_resumed_config(folder, {})["id_dropout"] == 0.2


def test_bpr_of_a_recbole_model(command: Command, toy: Path):
    given = {"dataset": "toy", "data_path": toy, "epochs": 1, "gpu_id": "", **QUICK}
    status, _, err = command(*as_arguments(given), "--model=GRU4Rec", "--loss_type=BPR", "--topk=[5,10]")
    assert status == 0, err


def test_mixed_precision_trains(command: Command, toy: Path):
    """In bfloat16, whose losses are near those of float32, and others."""
    losses = []
    for enabled in (False, True):
        given = small(toy, enable_amp=enabled, epochs=1, runs_dir=str(toy / f"amp-{enabled}"))
        assert command(*as_arguments(given))[0] == 0
        (history,) = (toy / f"amp-{enabled}").rglob("history.csv")
        with history.open() as file:
            losses.append(float(next(csv.DictReader(file))["loss"]))
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_only_three_interactions_each(command: Command, tmp_path: Path):
    """No validation rows at all: it trains, says so, and tests."""
    write_inter(tmp_path, "toy", [(f"u{u}", f"i{(u + k) % 12}", k) for u in range(12) for k in range(3)])
    status, out, err = command(*as_arguments(small(tmp_path)))
    assert status == 0, err
    assert "no validation rows (no user has four interactions): the last epoch's weights are kept" in err
    assert "valid" not in next(line for line in out.splitlines() if line.startswith("metric")).split()


def test_one_user_and_twelve_items(command: Command, tmp_path: Path):
    write_inter(tmp_path, "toy", [("u", f"i{k}", k) for k in range(12)])
    assert command(*as_arguments(small(tmp_path)))[0] == 0


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 9 TiB"), RuntimeError("[enforce fail] can't allocate memory: 1 TB")],
)
def test_memory_that_runs_out_on_a_cpu(
    command: Command, toy: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("m2rec.training.run.data_preparation", fail)
    status, _, err = command(*as_arguments(small(toy)))
    assert status == 2 and "out of memory; lower train_batch_size, eval_batch_size or MAX_ITEM" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["--hidden_size=x"], "hidden_size: expected a whole number from 1 to 262144, got 'x'"),
        (["--filter=low_pass"], "filter: 'low_pass' sees the future and can't be trained with rows: 'dense'"),
        (["--model=Sasrec"], "model: unknown model 'Sasrec'; did you mean 'SASRec'?"),
        (["--dataset=gone"], "dataset: 'gone' not found: there is no "),
        (["--text_vectors=gone.safetensors"], "text_vectors: no file 'gone.safetensors'"),
        (["--gpu_id=77"], "gpu_id: there is no GPU '77'"),
        (["--scan_backend=mamba_ssm"], "scan_backend: 'mamba_ssm' needs a CUDA device and this is cpu"),
        (["--pre_model_path=x.pth"], "pre_model_path: 'x.pth' would be unpickled"),
        (["--rm_dup_inter=false"], "rm_dup_inter: expected first, last or ~ (keeps all), got False"),
        (["epochs=3"], "argument 'epochs=3': expected --key=value"),
        (["--runs_dir=/dev/null/x"], "runs_dir: can't create "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(command: Command, toy: Path, arguments: list[str], message: str):
    keys = {argument.partition("=")[0] for argument in arguments}
    base = [a for a in as_arguments(small(toy)) if a.partition("=")[0] not in keys]
    status, out, err = command(*base, *arguments)
    last = err.splitlines()[-1]
    assert status == 2 and out == ""
    assert last.startswith("run_mm.py: error: ") and message in last
    assert "Traceback" not in err


HEADER = "user_id:token\titem_id:token\ttimestamp:float"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", [], "toy.inter: the file is empty"),
        (HEADER, [], "dataset: 'toy' has no interactions, only a header"),
        ("user_id:token\titem_id:token\na\tb", [], "toy.inter: column 'timestamp' (TIME_FIELD) is missing"),
        (f"{HEADER}\na\tb\tnoon", [], "column 'timestamp' has 'noon' in line 2, not a number"),
        (f"{HEADER}\na\tb\tNaN", [], "column 'timestamp' has 'NaN' in line 2, not a number"),
        (
            f"{HEADER}\na\tb\t1\na\tc\t2",
            [],
            "no user in 'toy' has three interactions (the most is 2; 1 ",
        ),
        (
            f"{HEADER}\na\tb\t1",
            ["--item_inter_num_interval=[5,inf)"],
            "left after filtering (1 users, 1 items",
        ),
        (HEADER.replace("\t", ","), [], "(field_separator: ',' seems to stand between its columns)"),
        (None, ["--load_col={inter: [user_id]}"], "load_col: 'item_id' (ITEM_ID_FIELD) is left out"),
        (None, ["--load_col={inter: [user_id, item_id, timestamp, x]}"], "toy.inter has no column 'x'"),
        (None, ["--threshold={timestamp: 3}"], "dataset: RecBole can't prepare 'toy' with these keys ("),
        (None, ["--model=SASRec", "--hidden_size=abc"], "model: SASRec can't be made from these keys"),
        (None, ["--model=SASRec", "--attn_dropout_prob=1.5"], "model: SASRec can't be made from these keys"),
        (None, ["--model=SASRec", "--loss_type=sampled"], "dataset: RecBole can't prepare 'toy'"),
        (
            None,
            ["--filter=low_pass", "--rows=prefix", "--MAX_ITEM_LIST_LENGTH=500000"],
            "is too long for filter",
        ),
        (None, ["--model=FEARec", "--n_layers=1"], "model: FEARec can't be made from these keys"),
    ],
)
def test_data_and_keys_that_cannot_be_used(
    command: Command, toy: Path, content: str | None, arguments: list[str], message: str
):
    if content is not None:
        (toy / "toy" / "toy.inter").write_text(content)
    given = {"dataset": "toy", "data_path": toy, "epochs": 1, "gpu_id": ""}
    status, _, err = command(*as_arguments(given), *arguments)
    assert status == 2 and "Traceback" not in err
    assert message in err.splitlines()[-1]


def test_text_vectors_that_cannot_be_used(command: Command, toy: Path, write_vectors: Callable[..., Path]):
    for tokens, message in (
        (["i1", "i2", "i1"], "token 'i1' more than once"),
        (["x"], "no token of this data set"),
    ):
        path = write_vectors(toy, "toy", tokens)
        status, _, err = command(*as_arguments(small(toy)), f"--text_vectors={path}")
        assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def test_a_known_name_that_cannot_be_downloaded(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("no_proxy", raising=False)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # refuses
    status, _, err = command("--dataset=ml-1m", f"--data_path={tmp_path}")
    assert status == 2
    assert (
        f"dataset: 'ml-1m' not found: there is no {tmp_path}/ml-1m/ml-1m.inter, and its download from http"
        in err
    )
    assert ": no connection (" in err and "is there a network?" in err


def test_without_recbole_the_install_line_is_shown():
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'recbole': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import run_mm\n"
        "sys.exit(run_mm.main([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install --no-deps recbole==1.2.1" in done.stderr and "Traceback" not in done.stderr


def test_help(command: Command):
    status, out, _ = command("--help")
    assert status == 0 and "config.yaml" in out
