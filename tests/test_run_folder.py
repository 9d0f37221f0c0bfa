"""The files of a run folder, read and written by one class."""

import shutil
from pathlib import Path

import pytest

from m2rec import Recommender, tensor_files
from m2rec.reports.run_page import write_run_page
from m2rec.run_folder import RunFolder, list_run_folders

FINISHED_RUN = Path(__file__).parent / "old_runs" / "runs" / "finished"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FINISHED_RUN, tmp_path / "run"))


def test_a_number_that_was_written_by_hand(folder: Path):
    """YAML 1.1 reads 1e-3 as text."""
    path = RunFolder(folder).config_file
    text = path.read_text()
    assert "learning_rate: 0.001\n" in text
    path.write_text(text.replace("learning_rate: 0.001\n", "learning_rate: 1e-3\n"))
    assert RunFolder(folder).read_config()["learning_rate"] == 0.001
    Recommender.load(folder)
    write_run_page(folder)


def test_an_interrupted_save_can_not_be_loaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even over an earlier save, whose weights would be mixed with the new items."""
    recommender = Recommender.load(folder)
    recommender.save(tmp_path / "saved")
    Recommender.load(tmp_path / "saved")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tensor_files, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        recommender.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"model\.safetensors can't be read"):
        Recommender.load(tmp_path / "saved")


def test_a_save_leaves_nothing_of_an_earlier_one(folder: Path, tmp_path: Path):
    files = RunFolder(tmp_path)
    files.write_inputs({"seed": 1}, ["[PAD]", "a"], [0, 3], {"a": "A"}, {"model": "lsa"})
    assert (files.read_config(), files.read_tokens()) == ({"seed": 1}, ["[PAD]", "a"])
    assert (files.read_counts(2), files.read_titles()) == ([0, 3], {"a": "A"})
    files.write_inputs({"seed": 1}, ["[PAD]", "b"], [], {}, {})
    assert (files.read_counts(2), files.read_titles(), files.read_text_source()) == ([], {}, {})


def test_run_folders_of_a_folder(tmp_path: Path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
    (tmp_path / "log.txt").touch()
    assert [run.path.name for run in list_run_folders(tmp_path)] == ["a", "b"]
    assert list_run_folders(tmp_path / "none") == []
