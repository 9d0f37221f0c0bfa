"""The command: whole runs through run_mm.main, the run folder, and its errors."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import as_arguments, random_rows, small, write_inter

ROOT = Path(__file__).parent.parent
Command = Callable[..., tuple[int, str, str]]


def test_a_run_end_to_end(command: Command, toy: Path, write_vectors: Callable[..., Path]):
    write_vectors(toy, "toy", [f"i{k}" for k in range(15)])
    status, out, err = command(*as_arguments(small(toy, seed=5)))
    assert status == 0, err
    lines = out.splitlines()
    folder = Path(lines[-1])
    assert folder.parent.name == "runs" and folder.name.startswith("M2Rec-toy-")
    assert "device cpu (" in err and "scan backend torch (auto: " in err
    assert "text for 15 of 20 items, toy.text.safetensors (random, 8 wide)" in err
    assert next(line for line in lines if line.startswith("metric")).split() == [
        "metric",
        "valid",
        "test",
        "test_unseen",
    ]
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "metrics.json", "history.csv", "model.safetensors", "items.json",
    }  # fmt: skip

    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"protocol", "seed", "commit", "versions", "data", "seconds"} <= set(metrics)
    assert metrics["seed"] == 5 and metrics["versions"]["torch"] == torch.__version__
    names = {f"{metric}@{k}" for metric in ("hit", "ndcg", "mrr") for k in (5, 10)}
    for part in ("valid", "test", "test_unseen"):
        assert set(metrics[part]) == names
        assert all(0 <= value <= 1 for value in metrics[part].values())
    counts = metrics["data"]
    assert counts["users"] == 30 and counts["items"] == 20 and counts["interactions"] == len(random_rows())
    tokens = json.loads((folder / "items.json").read_text())
    assert tokens[0] == "[PAD]" and len(set(tokens)) == 21
    assert load_file(folder / "model.safetensors")["encoder.id_embedding.weight"].shape == (21, 16)


def test_a_runs_config_repeats_it(command: Command, toy: Path):
    first = Path(command(*as_arguments(small(toy)))[1].splitlines()[-1])
    second = Path(command(f"--config_files={first / 'config.yaml'}")[1].splitlines()[-1])
    assert first != second
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (first, second))
    assert all(a[part] == b[part] for part in ("valid", "test", "test_unseen", "data", "protocol"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize("model", ["SASRec", "BERT4Rec", "GRU4Rec", "NARM", "Caser", "FEARec", "Mamba4Rec"])
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


def test_two_runs_in_one_second_have_two_folders(command: Command, toy: Path):
    folders = {command(*as_arguments(small(toy, epochs=1)))[1].splitlines()[-1] for _ in range(3)}
    assert len(folders) == 3


def test_only_three_interactions_each(command: Command, tmp_path: Path):
    """No validation rows at all: it trains, says so, and tests."""
    write_inter(tmp_path, "toy", [(f"u{u}", f"i{(u + k) % 12}", k) for u in range(12) for k in range(3)])
    status, out, err = command(*as_arguments(small(tmp_path)))
    assert status == 0, err
    assert "no validation rows, the last epoch's weights are kept" in err
    assert "valid" not in next(line for line in out.splitlines() if line.startswith("metric")).split()


def test_one_user_and_twelve_items(command: Command, tmp_path: Path):
    write_inter(tmp_path, "toy", [("u", f"i{k}", k) for k in range(12)])
    assert command(*as_arguments(small(tmp_path)))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["--hidden_size=x"], "hidden_size: expected a whole number of at least 1, got 'x'"),
        (["--filter=low_pass"], "filter: 'low_pass' sees the future and can't be trained with rows: 'dense'"),
        (["--model=Sasrec"], "model: unknown model 'Sasrec'; did you mean 'SASRec'?"),
        (["--dataset=gone"], "dataset: 'gone' not found: there is no "),
        (["--text_vectors=gone.safetensors"], "text_vectors: no file 'gone.safetensors'"),
        (["--gpu_id=77"], "gpu_id: there is no GPU '77'"),
        (
            ["--scan_backend=triton"],
            "scan_backend: 'triton' can't run here; choose one of auto, reference, torch",
        ),
        (
            ["--topk=[500]", "--valid_metric=NDCG@500"],
            "topk: [500] is more than the 20 items of the data set",
        ),
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


def test_a_known_name_that_cannot_be_downloaded(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import urllib.request
    from urllib.error import URLError

    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    status, _, err = command("--dataset=ml-1m", f"--data_path={tmp_path}")
    assert status == 2
    assert (
        f"dataset: 'ml-1m' not found: there is no {tmp_path}/ml-1m/ml-1m.inter, and its download from http"
        in err
    )
    assert "failed (<urlopen error no route>)" in err


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
