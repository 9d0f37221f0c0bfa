"""Every benchmark runs, checks its rivals, and leaves a table, JSON and a picture."""

import importlib
import json
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch

from tests.text_models import save_model

ROOT = Path(__file__).parent.parent
SMALL = {
    "scan": ["--lengths", "7", "--positions", "14", "--channels", "32", "--states", "4", "--no-memory"],
    "model": ["--lengths", "7", "--positions", "14", "--items", "20"],
    "stream": ["--histories", "3", "9", "--users", "1", "2", "--items", "20"],
    "loss": ["--catalogues", "30", "--positions", "20", "--largest", "50"],
}
# a few rows of each that must be there, and a column of figures
EXPECTED = {
    "scan": ("what", {"reference", "torch", "ssd: torch", "mixer: m2rec"}, "forward + backward ms"),
    "model": ("model", {"M2Rec", "Mamba4Rec", "SASRec", "BERT4Rec", "GRU4Rec"}, "training ms per row"),
    "stream": ("mixer", {"mamba", "mamba2"}, "ms per event"),
    "loss": ("loss", {"whole softmax, 16 MiB of scores", "gBCE over 256 negatives"}, "peak MiB"),
}


RunBenchmark = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunBenchmark:
    """Run a script of scripts/bench in this process; returns the record that it leaves."""

    def run(name: str, *arguments: str) -> dict[str, Any]:
        path = ROOT / "scripts" / "bench" / f"{name}.py"
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--repeats=1", f"--out={tmp_path}"])
        monkeypatch.chdir(ROOT)
        runpy.run_path(str(path), run_name="__main__")
        return dict(json.loads((tmp_path / f"bench_{name}-cpu.json").read_text()))

    return run


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_leaves_its_results(
    bench: RunBenchmark, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record = bench(name, *SMALL[name], "--device=cpu", "--threads=1")
    column, rows, number = EXPECTED[name]
    assert rows <= {row[column] for row in record["rows"]}
    assert all(row[number] >= 0 if "MiB" in number else row[number] > 0 for row in record["rows"])
    assert record["command"].startswith(f"python scripts/bench/{name}.py") and record["threads"] == 1
    assert "<svg" in (tmp_path / f"bench_{name}-cpu.svg").read_text()
    assert f"| {column} |" in capsys.readouterr().out


def test_steps(bench: RunBenchmark, capsys: pytest.CaptureFixture[str]):
    """Of our loop and RecBole's; what has no GPU is left out."""
    models = ["M2Rec", "M2Rec, mamba_ssm", "M2Rec, RecBole's loop", "SASRec", "SASRec, RecBole's loop"]
    sizes = ["--lengths=7", "--positions=14", "--items=20", "--steps=2", "--threads=1"]
    rows = bench("step", "--device=cpu", "--dropout=0", *sizes, "--models", *models)["rows"]
    assert "without M2Rec, mamba_ssm: " in capsys.readouterr().out
    assert [row["model"] for row in rows] == [name for name in models if "mamba_ssm" not in name]
    assert all(row["ms per step"] > 0 for row in rows)


def test_training_further(bench: RunBenchmark, toy: Path):
    """After half of the data, on all of it: anew and further."""
    sizes = ["auto=false", "hidden_size=16", "inner_size=16", "head_dim=16", "epochs=1", "neighbors=true"]
    data = ["--dataset=toy", f"--data-path={toy}", "--parts=2", "--min-item-count=2", "--device=cpu"]
    record = bench("continued", *data, "--threads=1", "--continued", "epochs=2", "--settings", *sizes)
    first, anew, further = record["rows"]
    assert (first["data"], anew["data"], further["data"]) == ("50%", "100%", "100%")
    assert (first["model"], anew["model"], further["model"]) == ("anew", "anew", "continued")
    assert first["users"] <= anew["users"] == further["users"] and first["epochs"] == anew["epochs"] == 1
    assert further["epochs"] == 2 and 0 < further["training: ratio"] < 20
    quality = "ndcg@10 test_unseen"
    assert further["ndcg@10: ratio"] == pytest.approx(further[quality] / anew[quality])


def test_sparse_updates(bench: RunBenchmark):
    sizes = ["--catalogues", "200", "900", "--dense", "200", "--windows=4", "--length=7"]
    rows = bench("sparse", *sizes, "--threads=1", "--device=cpu")["rows"]
    assert [(row["items"], row["updates"]) for row in rows] == [
        (200, "rows in use"), (900, "rows in use"), (200, "all rows")
    ]  # fmt: skip
    assert rows[0]["step: ratio"] == 1 and all(row["CPU, ms"] > 0 and row["peak MiB"] > 0 for row in rows)


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of a process's peak memory is Linux's")
def test_loading(bench: RunBenchmark):
    """The yardstick and a run's two starts, each in a process of its own."""
    record = bench("data", "--device=cpu", "--rows=3000", "--users=90", "--items=30", "--threads=1")
    yardstick, *starts = record["rows"]
    assert [row["task"] for row in starts] == ["command to model built", "second start"]
    for start in starts:
        assert yardstick["times the yardstick's CPU s"] == 1 < start["times the yardstick's CPU s"]
        assert 0 < yardstick["peak MiB"] < start["peak MiB"]
    assert record["note"].startswith("3,000 interactions, 90 users, 30 items, ")


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of a process's peak memory is Linux's")
def test_preparing_raw_data(bench: RunBenchmark):
    """The same checkout twice; what it writes is compared."""
    sizes = ["--rows=3000", "--users=90", "--items=30", "--threads=1", "--device=cpu"]
    record = bench("raw", *sizes, f"--before={ROOT}")
    assert [row["reader"] for row in record["rows"]] == ["now", "before"]
    assert all(row["rows per CPU s"] > 0 and row["peak MiB"] > 0 for row in record["rows"])
    assert record["note"].startswith("3,000 rows, up to 90 users, 30 items, ")


def test_busy_time_counts_no_moment_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    step = importlib.import_module("step")
    assert step.sum_spans([(5, 7), (0, 2), (1, 3), (1, 2), (7, 8)]) == 6


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_an_exported_graph_and_the_model(bench: RunBenchmark):
    sizes = ["--items=60", "--layers=1", "--length=9", "--batches", "1", "3", "--threads=1"]
    rows = bench("onnx_graph", "--device=cpu", *sizes)["rows"]
    assert [row["histories"] for row in rows] == [1, 3]
    assert all(row["onnxruntime ms"] > 0 for row in rows)


@pytest.mark.slow
def test_busy_cores(bench: RunBenchmark):
    rows = bench("busy", "--loops", "0", "--calls=2", "--items=20")["rows"]
    assert [row["what"] for row in rows] == ["question", "step"]
    assert all(row[f"{way}: ms"] > 0 for row in rows for way in ("plain", "ours"))


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.skipif(
    find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)
def test_encoding_compares_its_rivals(bench: RunBenchmark, tmp_path: Path):
    folder = save_model(tmp_path / "model", "bert")
    items = tmp_path / "toy" / "toy.item"
    items.parent.mkdir()
    rows = [f"{k}\ttoy {'long ' * (k % 9)}film\n" for k in range(30)]
    items.write_text("item_id:token\ttitle:token\n" + "".join(rows))
    data = ["--dataset=toy", f"--data-path={tmp_path}", f"--text-encoder={folder}", "--items=20"]
    rows_made = bench("encode", *data, "--batch-tokens", "16", "64", "--threads=1", "--device=cpu")["rows"]
    names = ["one at a time", "64 as they come", "16 tokens a batch", "64 tokens a batch", "bfloat16"]
    assert [row["what"] for row in rows_made] == names
    assert all(row["texts per second"] > 0 and row["difference"] < 0.03 for row in rows_made)
    assert "<svg" in (tmp_path / "bench_encode-cpu.svg").read_text()


def test_a_rival_without_room_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def no_room() -> None:
        raise torch.OutOfMemoryError

    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    from benchmarking import measure_median_seconds

    assert list(measure_median_seconds({"small": lambda: None, "large": no_room}, 1, "cpu")) == ["small"]
    assert capsys.readouterr().out == "without large: out of memory\n"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    return importlib.import_module("peers")


def test_peers_take_turns(peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """And count the targets of an epoch, which is one batch of all rows."""
    models, answers, ask = ["M2Rec", "RecBole GRU4Rec", "RecBole SASRec"], [], peers.Worker.ask

    def listen(worker: Any, request: str) -> dict[str, Any]:
        answers.append((request, ask(worker, request)))
        return answers[-1][1]

    monkeypatch.setattr(peers.Worker, "ask", listen)
    sizes = ["--users=4", "--length=9", "--width=32", "--histories=3", "--threads=1", "--batch=10000"]
    options = ["--steps=1", "--repeats=1", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["scripts/bench/peers.py", "--models", *models, *sizes, *options])
    monkeypatch.chdir(ROOT)
    peers.main()
    record = json.loads((tmp_path / "bench_peers-cpu.json").read_text())
    n_targets = len(peers.draw_interactions(4)) - 3 * 4
    assert [request for request, _ in answers] == 2 * 3 * ["train 1", "rank"]
    assert {answer["targets"] for request, answer in answers if request == "train 1"} == {n_targets}
    assert [row["targets per epoch"] for row in record["rows"]] == 3 * [n_targets]
    assert [row["model"] for row in record["rows"]] == models
    assert record["rows"][0]["training, ratio"] == record["rows"][0]["inference, ratio"] == 1
    assert all(row["training, s per epoch"] > 0 for row in record["rows"])
    assert record["versions"]["RecBole GRU4Rec"]["torch"] == torch.__version__


@pytest.mark.skipif(find_spec("ensurepip") is None, reason="environments have no pip here")
def test_a_peer_that_cannot_be_installed_is_left_out(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def install_nothing(*_: object) -> None:
        (tmp_path / "constraints.txt").touch()
        peers.install_packages(Path(sys.executable), tmp_path / "constraints.txt", ("./no-such-package",))

    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(peers, "create_environment", install_nothing)
    with peers.start_workers(["RecTools SASRec", "RecTools HSTU"], {}, tmp_path) as ready:
        assert ready == {}
    printed = capsys.readouterr().out
    assert printed.count("without rectools: ERROR: ") == 1 and "no-such-package" in printed


def test_interactions_are_sorted_and_numbered(peers: ModuleType, tmp_path: Path):
    rows = [f"u{user}\ti{item}\t{100 - item}\t5" for item in range(6) for user in range(5)]
    path = tmp_path / "toy.inter"
    header = "user_id:token\titem_id:token\ttimestamp:float\trating:float"
    path.write_text("\n".join([header, *rows, "u0\trare\t0\t5"]) + "\n")
    peers.write_interactions(peers.read_interactions(path), tmp_path / "data.npz")
    columns = numpy.load(tmp_path / "data.npz")
    assert columns["user"].tolist() == [user for user in range(5) for _ in range(6)]
    assert columns["item"].tolist() == 5 * list(range(6))  # by time: item 5 is the first, and gets id 0
    assert columns["time"].tolist() == 5 * [95, 96, 97, 98, 99, 100]


@pytest.mark.parametrize("wrong", ["shape", "nan", "order", "twice"])
def test_wrong_rankings_are_refused(wrong: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench" / "peer_workers")
    worker = importlib.import_module("worker")
    items, scores = numpy.arange(20).reshape(2, 10), numpy.zeros((2, 10))
    worker.check_ranked(worker.Ranked(items, scores), 2)
    if wrong == "twice":
        items[1, 3] = items[1, 4]
    elif wrong == "nan":
        scores[0, 2] = numpy.nan
    elif wrong == "order":
        scores[1, 9] = 1
    with pytest.raises(ValueError):
        worker.check_ranked(worker.Ranked(items, scores), 3 if wrong == "shape" else 2)
