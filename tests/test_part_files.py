"""Recommendations in parts: the same rows in the same order, whoever writes them and however often."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from m2rec.serving import part_files
from m2rec.serving.ranking_options import parse_ranking_options
from m2rec.serving.recommender import Recommender
from tests.serving import save_model
from tests.test_session import events, recommender

ROOT = Path(__file__).parent.parent
N = 23


@pytest.fixture
def histories(tmp_path: Path) -> Path:
    path = tmp_path / "in.parquet"
    columns = {"user": [f"u{i}" for i in range(N)], "history": [events(1 + i % 4, seed=i) for i in range(N)]}
    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_files, "PART_ROWS", 5)


def read(path: Path) -> list[dict[str, object]]:
    return parquet.read_table(path).to_pylist()


def assert_same_rows(ours: Path, expected: Path) -> None:
    """But for the last digit of scores, which depends on the size of a batch."""
    rows = list(zip(read(ours), read(expected), strict=True))
    assert len(rows) == N
    for row, other in rows:
        assert (row["user"], row["items"]) == (other["user"], other["items"])
        assert row["scores"] == pytest.approx(other["scores"], abs=1e-6)


def write_one_file(histories: Path) -> Path:
    path = histories.with_name("one.parquet")
    assert recommender().recommend_file(histories, path, 3) == N
    return path


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_parts_are_the_file(histories: Path, tmp_path: Path):
    """`part-00004` has the rest; the folder is read as one table."""
    assert recommender().recommend_file(histories, f"{tmp_path}/out/", 3) == N
    folder = tmp_path / "out"
    assert list_names(folder) == ["_job.json", *(f"part-{n:05d}.parquet" for n in range(5))]
    assert len(read(folder / "part-00004.parquet")) == 3
    assert_same_rows(folder, write_one_file(histories))


def test_a_stopped_job_writes_what_is_missing(histories: Path, tmp_path: Path):
    folder = tmp_path / "out"
    recommender().recommend_file(histories, f"{folder}/", 3)
    kept = folder / "part-00000.parquet"
    before = kept.stat().st_mtime_ns
    for number in (1, 4):
        (folder / f"part-{number:05d}.parquet").unlink()
    assert recommender().recommend_file(histories, folder, 3) == 5 + 3
    assert kept.stat().st_mtime_ns == before
    assert_same_rows(folder, write_one_file(histories))
    assert recommender().recommend_file(histories, folder, 3) == 0


def test_processes_write_a_share_each(histories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, written = tmp_path / "out", []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        written.append(recommender().recommend_file(histories, f"{folder}/", 3))
    assert written == [5 + 5 + 3, 5 + 5]
    with pytest.raises(
        ValueError, match=r"output: several processes write a folder of parts; name it x.parquet/"
    ):
        recommender().recommend_file(histories, "x.parquet", 3)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert_same_rows(folder, write_one_file(histories))


def test_parts_of_another_job_are_not_mixed(histories: Path, tmp_path: Path):
    folder = f"{tmp_path}/out/"
    parquet.write_table(parquet.read_table(histories), histories, compression="none")
    recommender().recommend_file(histories, folder, 3)
    with pytest.raises(ValueError, match="has parts of another job, whose k was 3 and is now 4"):
        recommender().recommend_file(histories, folder, 4)
    other = recommender()
    with torch.no_grad():
        other.model.encoder.id_embedding.weight[3] += 1
    with pytest.raises(ValueError, match="another job, whose model is another one"):
        other.recommend_file(histories, folder, 3)
    content = histories.read_bytes()
    middle = content.index(b"u12")  # a user's name, of the same length
    histories.write_bytes(content[:middle] + b"u21" + content[middle + 3 :])
    with pytest.raises(ValueError, match="another job, whose histories is another one"):
        recommender().recommend_file(histories, folder, 3)
    (Path(folder) / "_job.json").unlink()
    with pytest.raises(ValueError, match=r"has parts, but no _job\.json"):
        recommender().recommend_file(histories, folder, 3)


def test_a_copy_of_the_histories_is_the_same_input(histories: Path, tmp_path: Path):
    """As on another machine: in another folder, of another time."""
    folder = tmp_path / "out"
    recommender().recommend_file(histories, f"{folder}/", 3)
    (folder / "part-00001.parquet").unlink()
    copy = tmp_path / "elsewhere" / "copy.parquet"
    copy.parent.mkdir()
    copy.write_bytes(histories.read_bytes())
    os.utime(copy, (1, 1))
    assert recommender().recommend_file(copy, folder, 3) > 0
    assert_same_rows(folder, write_one_file(histories))


def test_what_decides_the_rankings_besides_options(histories: Path, tmp_path: Path):
    folder = f"{tmp_path}/out/"
    ours = recommender()
    ours.recommend_file(histories, folder, 3)
    default = parse_ranking_options(ours.model, 3, None).exclude_seen
    assert ours.recommend_file(histories, folder, 3, exclude_seen=default) == 0
    with pytest.raises(ValueError, match="whose whole_history was "):
        Recommender(ours.model, whole_history=not ours.whole_history).recommend_file(histories, folder, 3)
    with pytest.raises(ValueError, match="whose is_exact was True and is now False"):
        Recommender(ours.model, ours.whole_history, precision="int8").recommend_file(histories, folder, 3)


def test_a_job_without_a_part_may_change(histories: Path, tmp_path: Path):
    folder = tmp_path / "out"
    rows = read(histories)
    rows[0]["history"] = ["nothing"]
    parquet.write_table(pyarrow.Table.from_pylist(rows), histories)
    for k in (0, 3):
        with pytest.raises(ValueError, match=r"k: expected a whole number|unknown item"):
            recommender().recommend_file(histories, f"{folder}/", k)
    assert recommender().recommend_file(histories, folder, 3, skip_unknown=True) == N


def test_no_histories_are_a_part_without_rows(tmp_path: Path):
    histories = tmp_path / "in.csv"
    histories.write_text("user,history\n")
    assert recommender().recommend_file(histories, f"{tmp_path}/out/", 3) == 0
    table = parquet.read_table(tmp_path / "out")
    assert table.num_rows == 0 and table.column_names == ["user", "items", "scores"]


def test_a_folder_where_none_can_be(histories: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"in.parquet is a file; name a folder"):
        recommender().recommend_file(histories, f"{histories}/", 3)
    with pytest.raises(ValueError, match="is a folder, which needs a file of histories"):
        recommender().recommend_users([("a", events(2))], f"{tmp_path}/out/", 3)


def test_a_mistake_leaves_the_whole_parts_before_it(histories: Path, tmp_path: Path):
    rows = read(histories)
    rows[12]["history"] = ["nothing"]
    parquet.write_table(pyarrow.Table.from_pylist(rows), histories)
    with pytest.raises(ValueError, match=r"in.parquet, user 'u12': history: unknown item 'nothing'"):
        recommender().recommend_file(histories, f"{tmp_path}/out/", 3)
    assert list_names(tmp_path / "out") == ["_job.json", "part-00000.parquet", "part-00001.parquet"]


def test_a_folder_of_histories_is_one_input(histories: Path, tmp_path: Path):
    """As Spark writes it, with files that are none of its parts."""
    table, folder = parquet.read_table(histories), tmp_path / "spark"
    folder.mkdir()
    parquet.write_table(table[:9], folder / "part-00000-abc.snappy.parquet")
    parquet.write_table(table[9:], folder / "part-00001-abc.snappy.parquet")
    (folder / "_SUCCESS").touch()
    (folder / ".part-00000-abc.snappy.parquet.crc").write_text("x")
    assert recommender().recommend_file(folder, tmp_path / "out.parquet", 3) == N
    assert_same_rows(tmp_path / "out.parquet", write_one_file(histories))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder has no files"):
        recommender().recommend_file(tmp_path / "empty", tmp_path / "out.parquet", 3)


def test_torchrun_from_the_command_line(histories: Path, tmp_path: Path):
    model = save_model(tmp_path / "model")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "scripts/recommend.py", str(model), f"--input={histories}", f"--output={tmp_path}/out/",
        "-k=3",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert Recommender.load(model).recommend_file(histories, tmp_path / "one.parquet", 3) == N
    assert_same_rows(tmp_path / "out", tmp_path / "one.parquet")
    assert json.loads((tmp_path / "out" / "_job.json").read_text())["k"] == 3
