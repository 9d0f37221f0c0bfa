"""What comes with the project goes to the data set that it is of, whatever others call theirs."""

import json
import shutil
from pathlib import Path

import pytest

from m2rec.data import download, shipped
from m2rec.text.source import find_vector_file
from m2rec.training import configuration
from m2rec.training.configuration import build_config
from m2rec.training.run import load_data
from run_mm import main
from tests.conftest import as_arguments, random_rows, small, write_inter

COUNTS = {"users": 30, "items": 20, "interactions": len(random_rows())}


def ship(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "toy", **counts: int) -> None:
    """Have settings for a data set of this name and these numbers among the shipped ones."""
    properties = folder / "properties"
    shutil.copytree(configuration.PROPERTIES_FOLDER, properties)
    belongs_to = json.dumps({**COUNTS, **counts})
    (properties / "dataset" / f"{name}.yaml").write_text(f"hidden_size: 24\nbelongs_to: {belongs_to}\n")
    monkeypatch.setattr(configuration, "PROPERTIES_FOLDER", properties)
    monkeypatch.setattr(shipped, "SHIPPED_FOLDER", properties / "dataset")


def test_every_shipped_file_says_whose_it_is():
    files = {path.name.partition(".")[0] for path in shipped.SHIPPED_FOLDER.iterdir()}
    assert len(files) >= 5
    for name in files:
        assert {"users", "items", "interactions"} <= set(shipped.read_origin(name)), name


def test_ml_100k_gets_its_vectors():
    path = find_vector_file(build_config({}))
    assert path is not None and path == shipped.find_shipped_vectors("ml-100k")


def test_others_data_of_that_name_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [(user, item[1:], time) for user, item, time in random_rows()]  # tokens that are films there
    path = write_inter(tmp_path, "ml-100k", rows)
    titles = "".join(f"{item}\tgarden tool {item}\n" for item in range(20))
    path.with_suffix(".item").write_text("item_id:token\ttitle:token_seq\n" + titles)
    keys = small(tmp_path, "ml-100k", epochs=1, runs_dir=tmp_path / "runs")
    assert main(as_arguments(keys)) == 0
    (metrics,) = (tmp_path / "runs").glob("*/metrics.json")
    assert json.loads(metrics.read_text())["text"]["model"] == "lsa"
    items = path.with_suffix(".item")
    said = f"shipped text vectors for ml-100k not used: {items} "
    assert said + "has different items or titles" in capsys.readouterr().err
    items.unlink()
    path.with_name("ml-100k.text.safetensors").unlink()
    assert main(as_arguments(keys)) == 0
    assert said + "does not exist, to compare titles with" in capsys.readouterr().err


def test_settings_go_to_data_of_the_same_numbers(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    given = {key: value for key, value in small(toy).items() if key != "hidden_size"}
    ship(tmp_path, monkeypatch)
    assert build_config(given)["hidden_size"] == 24
    assert "not used" not in caplog.text
    with (toy / "toy" / "toy.inter").open("a") as file:
        file.write("u0\tnew\t978300000\n")
    assert build_config(given)["hidden_size"] == 64
    assert "the settings shipped for toy are not used" in caplog.text
    assert f"toy.inter has 21 items, not 20, {COUNTS['interactions'] + 1} interactions, not" in caplog.text


def test_columns_of_other_names_are_counted(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ship(tmp_path, monkeypatch)
    path = toy / "toy" / "toy.inter"
    path.write_text(path.read_text().replace("user_id:", "who:").replace("\t", "|"))
    given = {key: value for key, value in small(toy).items() if key != "hidden_size"}
    assert build_config({**given, "USER_ID_FIELD": "who", "field_separator": "|"})["hidden_size"] == 24


def test_a_download_of_other_data_is_noticed(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The settings were chosen before the file was there."""
    ship(tmp_path, monkeypatch, users=31)
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr(
        download, "download_dataset", lambda name, folder, url: shutil.copytree(toy / name, folder)
    )
    config = build_config(small(elsewhere))
    with pytest.raises(ValueError, match=r"is not the data set that .* \(30 users, not 31\); run the same"):
        load_data(config)
    load_data(build_config(small(elsewhere)))
