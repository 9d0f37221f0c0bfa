"""Every benchmark runs, checks its rivals, and leaves a table, JSON and a picture."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.text_models import save_model

ROOT = Path(__file__).parent.parent
SMALL = {
    "bench_scan": ["--lengths", "7", "--positions", "14", "--channels", "32", "--states", "4", "--no-memory"],
    "bench_model": ["--lengths", "7", "--positions", "14", "--items", "20"],
    "bench_stream": ["--histories", "3", "9", "--users", "1", "2", "--items", "20"],
    "bench_loss": ["--catalogues", "30", "--positions", "20", "--largest", "50"],
}
# a few rows of each that must be there, and a column of figures
EXPECTED = {
    "bench_scan": ("what", {"reference", "torch", "ssd: torch", "mixer: m2rec"}, "forward + backward ms"),
    "bench_model": ("model", {"M2Rec", "Mamba4Rec", "SASRec", "BERT4Rec", "GRU4Rec"}, "training ms per row"),
    "bench_stream": ("mixer", {"mamba", "mamba2"}, "ms per event"),
    "bench_loss": ("loss", {"whole softmax, 16 MiB of scores", "gBCE over 256 negatives"}, "peak MiB"),
}


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_leaves_its_results(name: str, tmp_path: Path):
    script = f"scripts/bench/{name.removeprefix('bench_')}.py"
    command = [
        sys.executable,
        script,
        *SMALL[name],
        "--device=cpu",
        "--repeats=1",
        "--threads=1",
    ]
    done = subprocess.run([*command, f"--out={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / f"{name}-cpu.json").read_text())
    column, rows, number = EXPECTED[name]
    assert rows <= {row[column] for row in record["rows"]}
    assert all(row[number] >= 0 if "MiB" in number else row[number] > 0 for row in record["rows"])
    assert (
        record["command"].startswith(f"python scripts/bench/{name.removeprefix('bench_')}.py")
        and record["threads"] == 1
    )
    assert "<svg" in (tmp_path / f"{name}-cpu.svg").read_text()
    assert f"| {column} |" in done.stdout


def test_busy_cores(tmp_path: Path):
    command = [
        sys.executable,
        "scripts/bench/busy.py",
        "--loops",
        "0",
        "--calls=2",
        "--repeats=1",
        "--items=20",
    ]
    done = subprocess.run([*command, f"--out={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "bench_busy-cpu.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["question", "step"]
    assert all(row[f"{way}: ms"] > 0 for row in rows for way in ("plain", "ours"))


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.skipif(
    find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)
def test_encoding_compares_its_rivals(tmp_path: Path):
    folder = save_model(tmp_path / "model", "bert")
    items = tmp_path / "toy" / "toy.item"
    items.parent.mkdir()
    rows = [f"{k}\ttoy {'long ' * (k % 9)}film\n" for k in range(30)]
    items.write_text("item_id:token\ttitle:token\n" + "".join(rows))
    command = [sys.executable, "scripts/bench/encode.py", "--dataset=toy", f"--data-path={tmp_path}",
               f"--text-encoder={folder}", "--items=20", "--batch-tokens", "16", "64", "--repeats=1",
               "--threads=1", "--device=cpu", f"--out={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows_made = json.loads((tmp_path / "bench_encode-cpu.json").read_text())["rows"]
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
