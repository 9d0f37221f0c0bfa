"""Models on the hub: pushed and fetched by huggingface_hub itself, against a stand-in of the hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("huggingface_hub")
from huggingface_hub import ModelCard, constants

from m2rec.commands import main as m2rec_command
from m2rec.serving.hub_name import HubName, parse_source
from m2rec.serving.published import hide_folders
from m2rec.serving.recommender import Recommender
from tests.hub import READ_TOKEN, TOKEN, Hub, listen
from tests.serving import T0, save_model, serve

ROOT = Path(__file__).parent.parent
FINISHED = ROOT / "tests" / "old_runs" / "runs" / "finished"
MODEL_FILES = {
    "config.yaml", "items.json", "counts.json", "titles.json", "text.json", "metrics.json",
    "model.safetensors",
}  # fmt: skip
HISTORY = ["i4", "i9", "i2"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to, with a token and an empty cache."""
    with listen() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "saved")


@pytest.fixture
def pushed(hub: Hub, folder: Path) -> str:
    return Recommender.load(folder).push_to_hub("anna/films")


def test_a_pushed_run_is_the_same_model(hub: Hub):
    run = Recommender.load(FINISHED)
    name = run.push_to_hub("anna/films")
    repository = hub.repositories["anna/films"]
    assert name == f"hub:anna/films@{repository.refs['main']}" and not repository.private
    assert set(repository.files) == {*MODEL_FILES, "README.md", ".gitattributes"}

    fetched = Recommender.load("hub:anna/films")
    assert fetched.recommend(["i1", "i2"], 5) == run.recommend(["i1", "i2"], 5)
    assert fetched.folder is not None and {path.name for path in fetched.folder.iterdir()} == MODEL_FILES
    assert fetched.titles == run.titles and "test_unseen" in fetched._repr_html_()
    with pytest.raises(ValueError, match="is a run's own folder"):
        fetched.save(fetched.folder)


def test_nothing_of_the_machine_is_pushed(hub: Hub, tmp_path: Path):
    run = tmp_path / "runs" / "anna-private"
    shutil.copytree(FINISHED, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {
        "data_path": str(tmp_path),
        "runs_dir": "/home/anna/runs",
        "text_encoder": "/home/anna/models/minilm",
        "text_vectors": "../anna/toy.text.safetensors",
        "wandb_project": "anna-secret",
        "dataset_save_path": "/home/anna/saved",
        "field_separator": "/",
    }
    (run / "config.yaml").write_text(
        f"# m2rec train --config_files={run}/config.yaml\n{yaml.safe_dump(config)}"
    )
    for name, text in (("metrics.json", "metrics"), ("text.json", "source")):
        content = json.loads((run / name).read_text())
        source = content["text"] if text == "metrics" else content
        source |= {"file": "C:\\Users\\anna\\toy.text.safetensors", "model": "anna/models/minilm"}
        (run / name).write_text(json.dumps(content))
    Recommender.load(run).push_to_hub("owner/films")
    files = hub.repositories["owner/films"].files
    for name, content in files.items():
        assert b"anna" not in content and str(tmp_path).encode() not in content, name
    stored = yaml.safe_load(files["config.yaml"])
    assert stored["text_encoder"] == "minilm" and stored["text_vectors"] == "toy.text.safetensors"
    assert stored["field_separator"] == "/" and "use_gpu" not in stored and stored["model"] == "M2Rec"
    assert json.loads(files["text.json"])["model"] == "minilm"
    users = {
        line.partition(",")[0].encode() for line in (FINISHED / "test_ranks.csv").read_text().split()[1:]
    }
    assert users and not any(b'"' + user + b'"' in content for user in users for content in files.values())


def test_hidden_folders_leave_names_as_they_are():
    kept = {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "text_encoder": "lsa",
        "columns": "title year",
        "features": "words and pairs, from 1/100",
        "topk": [5, 10],
        "split": None,
        "seq_separator": " ",
    }
    assert hide_folders(kept) == kept
    for path in ("/srv/x/y", "~/y", "./y", "..\\x\\y", "D:\\x\\y", "D:/x/y", "\\\\host\\share\\y"):
        assert hide_folders({"other": [path]}) == {"other": ["y"]}, path


def test_the_card_has_metrics_protocol_and_counts(hub: Hub):
    Recommender.load(FINISHED).push_to_hub("anna/films")
    text = hub.repositories["anna/films"].files["README.md"].decode()
    metrics = json.loads((FINISHED / "metrics.json").read_text())
    card = ModelCard(text)
    assert card.data.library_name == "m2rec" and card.data.model_name == "M2Rec"
    found = {(one.dataset_config, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert len(found) == 36  # three protocols, as some targets are in their history
    for (protocol, metric), value in found.items():
        assert metrics[protocol][metric] == value
    assert "| NDCG@10 | 0.2756 | 0.2617 | 0.2991 |" in text and "| interactions | 180 |" in text
    assert f"- `ranking`: {metrics['protocol']['ranking']}" in text
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code
    names: dict[str, object] = {}
    exec(code[1], names)  # the example of the card
    assert len(names["recommender"].recommend(["i1"], 2)) == 2  # type: ignore[attr-defined]
    assert "There are no metrics" not in text and "were added after" not in text


def test_a_saved_folder_has_a_card_without_metrics(hub: Hub, pushed: str):
    text = hub.repositories["anna/films"].files["README.md"].decode()
    assert "There are no metrics" in text and "model-index" not in text
    assert "metrics.json" not in hub.repositories["anna/films"].files
    assert Recommender.load(pushed).recommend(HISTORY) == Recommender.load("hub:anna/films").recommend(
        HISTORY
    )


def test_a_revision_is_pinned(hub: Hub, folder: Path, pushed: str):
    longer = Recommender.load(folder)
    longer.add_items(["new"], torch.randn(1, T0))
    later = longer.push_to_hub("hub:anna/films")
    assert later != pushed and "new" in Recommender.load("hub:anna/films").tokens
    assert "new" in Recommender.load(later).tokens and "new" not in Recommender.load(pushed).tokens
    hub.repositories["anna/films"].refs["v1"] = pushed.partition("@")[2]
    assert "new" not in Recommender.load("hub:anna/films@v1").tokens


def test_items_that_were_added_to_a_run_are_named(hub: Hub):
    run = Recommender.load(FINISHED)
    run.add_items(["new"], torch.randn(1, len(run.model.text_mean)))  # type: ignore[arg-type]
    run.push_to_hub("anna/films")
    text = hub.repositories["anna/films"].files["README.md"].decode()
    assert "1 items were added after the training. The numbers are without them." in text
    fetched = Recommender.load("hub:anna/films")
    assert fetched.tokens == run.tokens and fetched.push_to_hub("anna/copy")


def test_a_second_push_leaves_no_file_of_the_first(hub: Hub, pushed: str, tmp_path: Path):
    bare = save_model(tmp_path / "bare", seed=1)
    for name in ("titles.json", "counts.json"):
        (bare / name).unlink()
    Recommender.load(bare).push_to_hub("anna/films")
    assert not {"titles.json", "counts.json"} & set(hub.repositories["anna/films"].files)
    fetched = Recommender.load("hub:anna/films")
    assert not fetched.titles and fetched.recommend(HISTORY) == Recommender.load(bare).recommend(HISTORY)
    before = len(hub.repositories["anna/films"].commits)
    Recommender.load(bare).push_to_hub("anna/films")
    assert len(hub.repositories["anna/films"].commits) <= before + 1


def test_only_files_of_a_model_are_fetched(hub: Hub, pushed: str):
    files = hub.repositories["anna/films"].files
    hub.repositories["anna/films"].commit(
        {**files, "pytorch_model.bin": b"pickle", "modeling.py": b"import os", "sub/config.yaml": b"a: 1"}
    )
    hub.requests.clear()
    fetched = Recommender.load("hub:anna/films")
    asked = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert asked <= MODEL_FILES and "model.safetensors" in asked
    assert fetched.folder is not None
    assert {path.name for path in fetched.folder.rglob("*")} <= MODEL_FILES


def test_a_damaged_file_is_an_error_as_in_any_folder(hub: Hub, pushed: str):
    repository = hub.repositories["anna/films"]
    good = repository.files
    weights = bytearray(good["model.safetensors"])
    weights[-1] ^= 1
    for name, content, message in (
        ("model.safetensors", bytes(weights), "model.safetensors"),
        ("items.json", b'["[PAD]", 3]', "items.json must be a list of unique strings"),
        ("config.yaml", b"!!python/object/apply:os.system [ls]", "config.yaml"),
    ):
        repository.commit({**good, name: content})
        with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$"):
            Recommender.load("hub:anna/films")
    hub.add("anna/bert", {"config.json": b"{}", "pytorch_model.bin": b""})
    with pytest.raises(
        ValueError, match=r"^hub: hub:anna/bert is no model of m2rec: config\.yaml is missing$"
    ):
        Recommender.load("hub:anna/bert")


def test_without_a_network_the_cache_is_enough(hub: Hub, pushed: str, monkeypatch: pytest.MonkeyPatch):
    ranked = Recommender.load("hub:anna/films").recommend(HISTORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    for name in ("hub:anna/films", pushed):
        assert Recommender.load(name).recommend(HISTORY) == ranked
    with pytest.raises(
        ValueError, match=r"^hub: hub:anna/teas is not in the cache \S+; unset HF_HUB_OFFLINE once"
    ):
        Recommender.load("hub:anna/teas")
    with pytest.raises(
        ValueError, match=r"^hub: hub:anna/films can't be reached while HF_HUB_OFFLINE is set"
    ):
        Recommender.load(pushed).push_to_hub("anna/films")
    assert not hub.requests

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert Recommender.load("hub:anna/films").recommend(HISTORY) == ranked
    with pytest.raises(
        ValueError, match=r"^hub: hub:anna/teas is not in the cache \S+; connect to the network"
    ):
        Recommender.load("hub:anna/teas")
    with pytest.raises(
        ValueError, match=r"^hub: http://127\.0\.0\.1:9 can't be reached \(.*\); check the network"
    ):
        Recommender.load(pushed).push_to_hub("anna/films")


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        (
            "hub:anna/teas",
            TOKEN,
            "hub: hub:anna/teas does not exist or is private; check the name, or give a ",
        ),
        (
            "hub:anna/secret",
            "",
            "hub: hub:anna/secret does not exist or is private; check the name, or give a ",
        ),
        (
            "hub:anna/films@v9",
            TOKEN,
            "hub: hub:anna/films has no revision 'v9'; give a branch, a tag or a commit",
        ),
        (
            "hub:films",
            TOKEN,
            "hub: 'hub:films' is not a name; expected owner/name or owner/name@revision, such ",
        ),
        ("hub:anna/films@", TOKEN, "hub: 'hub:anna/films@' is not a name"),
        ("hub:../films", TOKEN, "hub: hub:../films: "),
        ("hub:", TOKEN, "hub: 'hub:' is not a name"),
    ],
)
def test_what_can_not_be_fetched_is_one_line(
    name: str, token: str, message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    hub.add("anna/films", {})
    hub.add("anna/secret", {}, private=True)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        Recommender.load(name)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "private", "token", "message"),
    [
        (
            "anna/films",
            False,
            "",
            "hub: hub:anna/films can't be written without a token that may do so; set HF_",
        ),
        (
            "anna/films",
            False,
            READ_TOKEN,
            "hub: hub:anna/films can't be written without a token that may do so; ",
        ),
        ("anna/films@v1", False, TOKEN, "hub: nothing is pushed to a revision; leave out @v1"),
        ("films", False, TOKEN, "hub: 'films' is not a name; expected owner/name"),
        (
            "anna/bert",
            False,
            TOKEN,
            "hub: hub:anna/bert holds something else than a model of m2rec; give anoth",
        ),
        (
            "anna/public",
            True,
            TOKEN,
            "hub: hub:anna/public is public; make it private in its settings on the h",
        ),
    ],
)
def test_what_can_not_be_pushed_is_one_line(
    name: str,
    private: bool,
    token: str,
    message: str,
    hub: Hub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    hub.add("anna/bert", {"config.json": b"{}"})
    hub.add("anna/public", {})
    before = {name: dict(repository.commits) for name, repository in hub.repositories.items()}
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        Recommender.load(folder).push_to_hub(name, private=private)
    assert str(caught.value).startswith(message) and "http" not in str(caught.value)
    assert {name: repository.commits for name, repository in hub.repositories.items()} == before


def test_a_missing_package_is_named(hub: Hub, pushed: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (
        lambda: Recommender.load(pushed),
        lambda: Recommender.load(FINISHED).push_to_hub("anna/teas"),
    ):
        with pytest.raises(
            ValueError, match=r'^hub: hub:anna/\S+ needs huggingface_hub; run: pip install "m2r'
        ):
            call()


def test_damaged_metrics_are_not_pushed(hub: Hub, tmp_path: Path):
    run = shutil.copytree(FINISHED, tmp_path / "run")
    (run / "metrics.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match=r"^\S+metrics\.json has unexpected content \([^\n]*\)$"):
        Recommender.load(run).push_to_hub("anna/films")
    assert not hub.repositories


def test_only_text_that_begins_with_hub_is_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of that name stays a folder, as a Path or with ./ before it."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("hub:anna") / "films")
    assert Recommender.load(Path("hub:anna/films")).folder == Path("hub:anna/films")
    assert (
        Recommender.load("./hub:anna/films").tokens
        == Recommender.load(parse_source("./hub:anna/films")).tokens
    )
    assert parse_source("hub:anna/films") == "hub:anna/films"
    assert HubName.parse("hub:anna/films@refs/pr/1") == ("anna/films", "refs/pr/1")
    with pytest.raises(ValueError, match="hub:anna/films"):  # not the folder: tests are offline
        Recommender.load("hub:anna/films")


def test_commands_push_recommend_and_serve(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert m2rec_command.main(["push", str(folder), "anna/films", "--private"]) == 0
    name = capsys.readouterr().out.strip()
    assert hub.repositories["anna/films"].private and name.startswith("hub:anna/films@")
    assert m2rec_command.main(["recommend", name, "--history", *HISTORY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["item"] for entry in found] == [x.item for x in Recommender.load(folder).recommend(HISTORY)]
    assert m2rec_command.main(["push", str(folder), "films"]) == 2
    assert capsys.readouterr().err.startswith("m2rec push: error: hub: 'films' is not a name")
    with serve("hub:anna/films") as client:
        assert client.ask("GET", "/model")[1]["run"] == "hub:anna/films"


def test_a_fresh_process_finds_the_hub_by_its_environment(hub: Hub, pushed: str, tmp_path: Path):
    """HF_ENDPOINT and HF_HOME, as a user sets them."""
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    script = [str(ROOT / "scripts" / "recommend.py"), "hub:anna/films", "--history", "i4"]
    done = subprocess.run(
        [sys.executable, *script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "score" in done.stdout and not done.stderr
    assert list((tmp_path / "home" / "hub" / "models--anna--films" / "snapshots").iterdir())
