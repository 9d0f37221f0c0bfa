"""Text vectors that run_mm.py makes itself: when, by which encoder, and what stops it."""

import json
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from m2rec.commands import embed_items
from m2rec.data.item_file import ItemTexts
from m2rec.models import m2rec as model_module
from m2rec.storage import lock_path
from m2rec.tensor_files import read_metadata
from m2rec.text import source, vector_file
from m2rec.text.item_text import read_item_texts
from m2rec.text.source import ensure_text_vectors, has_item_text
from m2rec.training.configuration import build_config
from m2rec.training.run import prepare_run
from run_mm import main
from tests.conftest import as_arguments, small
from tests.test_distributed import run_in_two
from tests.text_models import save_model

FILE = Path("toy") / f"toy{vector_file.VECTOR_FILE_SUFFIX}"
TITLES = [
    f"{colour} {thing}" for colour in ("red", "blue", "green", "white") for thing in "tea cup pot".split()
]


@pytest.fixture
def items(toy: Path) -> Path:
    """An item file with titles for twelve of the twenty items."""
    lines = ["item_id:token\ttitle:token_seq", *(f"i{k}\t{title}" for k, title in enumerate(TITLES))]
    path = toy / "toy" / "toy.item"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def trained(toy: Path, tmp_path: Path, **keys: object) -> int:
    return main(as_arguments(small(toy, epochs=1, runs_dir=tmp_path / "runs", **keys)))


def text_of_run(tmp_path: Path) -> dict[str, object] | None:
    (metrics,) = (tmp_path / "runs").glob("*/metrics.json")
    text: dict[str, object] | None = json.loads(metrics.read_text())["text"]
    return text


def test_missing_vectors_are_made_from_the_item_file(
    toy: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert trained(toy, tmp_path) == 0
    text = text_of_run(tmp_path)
    assert text and text["model"] == "lsa" and text["matched"] == 12 and text["items"] == 20
    assert -1 < float(str(text["mean_cosine_whitened"])) < float(str(text["mean_cosine"])) < 1
    err = capsys.readouterr().err
    assert "lsa makes them, from word counts; --text_encoder=MODEL, a model does" in err
    assert re.search(r"text for 12 of 20 items, .*; the first without: i\d+(, i\d+){4}\n", err), err
    made = (toy / FILE).stat().st_mtime_ns
    assert trained(toy, tmp_path) == 0
    assert (toy / FILE).stat().st_mtime_ns == made


def test_files_with_another_separator(toy: Path, items: Path, tmp_path: Path):
    for path in (items, toy / "toy" / "toy.inter"):
        path.write_text(path.read_text().replace("\t", "|"))
    assert trained(toy, tmp_path, field_separator="|") == 0
    text = text_of_run(tmp_path)
    assert text and text["matched"] == 12


def test_a_language_model_makes_them(toy: Path, items: Path, tmp_path: Path):
    pytest.importorskip("sentence_transformers")
    encoder = save_model(tmp_path / "encoder", "bert")
    assert trained(toy, tmp_path, text_encoder=encoder) == 0
    text = text_of_run(tmp_path)
    assert text and text["model"] == encoder and text["matched"] == 12


def test_vectors_of_one_encoder_never_stand_for_those_of_another(
    toy: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert trained(toy, tmp_path, text_encoder="lsa") == 0
    before = (toy / FILE).read_bytes()
    assert trained(toy, tmp_path, text_encoder="some/model") == 2
    error = capsys.readouterr().err
    assert (
        f"text_encoder: 'some/model', but {toy / FILE} has vectors of lsa; run python scripts/embed_items.py"
        in error
    )
    assert (toy / FILE).read_bytes() == before
    assert trained(toy, tmp_path, text_encoder="lsa") == trained(toy, tmp_path) == 0


def test_a_named_file_of_another_encoder(
    toy: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert trained(toy, tmp_path) == 0
    assert trained(toy, tmp_path, text_vectors=toy / FILE, text_encoder="some/model") == 2
    assert f"text_encoder: 'some/model', but {toy / FILE} has vectors of lsa" in capsys.readouterr().err


def test_texts_that_have_changed_since_are_said(
    toy: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert trained(toy, tmp_path) == trained(toy, tmp_path) == 0
    assert "has changed since" not in capsys.readouterr().err
    with items.open("a") as file:
        file.write("i15\tblack tray\n")
    assert trained(toy, tmp_path) == 0
    assert f"{items} has changed since {toy / FILE} was made of it" in capsys.readouterr().err


def test_an_unchanged_item_file_is_not_read_again(toy: Path, items: Path, monkeypatch: pytest.MonkeyPatch):
    """Only if its size or time differ is it compared with what the vectors were made of."""
    config, tokens = build_config(small(toy)), [f"i{k}" for k in range(20)]
    read: list[Path] = []

    def watched(path: Path, *arguments: object, **others: object) -> ItemTexts:
        read.append(path)
        return read_item_texts(path, *arguments, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(source, "read_item_texts", watched)
    assert ensure_text_vectors(config, tokens) == toy / FILE and len(read) == 1
    assert ensure_text_vectors(config, tokens) == toy / FILE and len(read) == 1
    os.utime(items, (1, 1))
    assert ensure_text_vectors(config, tokens) == toy / FILE and len(read) == 2


def test_names_of_columns_may_have_spaces(
    toy: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    items.write_text(items.read_text().replace("title:token_seq", "film title:token_seq"))
    assert trained(toy, tmp_path) == trained(toy, tmp_path) == 0
    err = capsys.readouterr().err
    assert "can't be compared" not in err and "has changed since" not in err


def test_the_model_gets_the_vectors_that_training_loaded(
    toy: Path, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """It does not look for the file a second time."""
    monkeypatch.setattr(model_module, "load_text_vectors", None)
    caplog.set_level(logging.INFO)
    prepared = prepare_run(build_config(small(toy, runs_dir=str(tmp_path / "runs"))))
    handed = prepared.loaders.train.dataset.item_vectors
    assert torch.equal(prepared.trainer.model.encoder.vectors, handed.vectors)
    assert prepared.trainer.model.text_source == handed.provenance
    assert caplog.text.count("text for 12 of 20 items") == 1


def test_a_repeat_with_other_vectors_is_said(
    toy: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By the config of the run, which names them; whenever the same vectors were made, they are the same."""
    assert trained(toy, tmp_path) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    file, stored = toy / FILE, yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["text_fingerprint"] == read_metadata(file)["fingerprint"]

    def repeat(*arguments: str) -> str:
        capsys.readouterr()
        assert main([f"--config_files={folder / 'config.yaml'}", *arguments]) == 0
        return capsys.readouterr().err

    file.unlink()
    assert "text_fingerprint" not in repeat()
    embed = ["--dataset=toy", f"--data-path={toy}", "--text-encoder=lsa", "--template=a {title}"]
    assert embed_items.main(embed) == 0
    start = f"text_fingerprint: {stored['text_fingerprint'][:12]}, but "
    assert start + f"{file} has " in repeat()
    assert "text_fingerprint" not in repeat("--text_fingerprint=any")
    assert "text_fingerprint" not in repeat("--text_vectors=none")
    file.unlink()
    assert start + "there are no text vectors: " in repeat("--text_encoder=none")


def test_vectors_of_a_run_that_had_none(
    toy: Path, write_vectors: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert trained(toy, tmp_path) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    file = write_vectors(toy, "toy", [f"i{k}" for k in range(20)])
    assert main([f"--config_files={folder / 'config.yaml'}"]) == 0
    assert f"text_fingerprint: none, but {file} has " in capsys.readouterr().err


@pytest.mark.parametrize("keys", [{"text_encoder": "none"}, {"text_vectors": "none"}])
def test_none_are_made_where_none_are_wanted(toy: Path, items: Path, tmp_path: Path, keys: dict[str, str]):
    assert trained(toy, tmp_path, **keys) == 0
    assert text_of_run(tmp_path) is None and not (toy / FILE).exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("item_id:token\ttitle:token_seq\n1\tTea\n", "none of the 20 items of the interactions have text"),
        ("item_id:token\n1\n", "no item has text"),
        ("", "empty"),
    ],
)
def test_an_item_file_of_no_use_stops_only_who_asked(
    toy: Path, tmp_path: Path, content: str, reason: str,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    (toy / "toy" / "toy.item").write_text(content, encoding="utf-8")
    assert trained(toy, tmp_path) == 0
    said = capsys.readouterr().err
    assert "text vectors can't be made: " in said and reason in said
    assert trained(toy, tmp_path, text_encoder="lsa") == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first_line", "expected"),
    [
        ("item_id:token\ttitle:token_seq", True),
        ("item_id:token\tprice:float", False),
        ("item_id:token\tsizes:float_seq\tbrand:token", True),
        ("item_id:token", False),
        ("title:token_seq", False),
        ("no header", False),
    ],
)
def test_text_is_a_column_beside_the_item(toy: Path, first_line: str, expected: bool):
    (toy / "toy" / "toy.item").write_text(f"{first_line}\ni1\tTea\n", encoding="utf-8")
    assert has_item_text(build_config(small(toy))) is expected
    assert not has_item_text(build_config(small(toy, text_encoder="none")))


def test_an_encoder_that_can_t_be_had(
    toy: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("sentence_transformers")
    assert trained(toy, tmp_path, text_encoder=tmp_path / "nothing") == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    assert not (toy / FILE).exists() and not (tmp_path / "runs").exists()


def test_an_option_of_the_encoder_is_no_key_of_a_run(
    toy: Path, items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A model with room for two tokens, which a text with its ends does not fit into."""
    pytest.importorskip("sentence_transformers")
    encoder = save_model(tmp_path / "encoder", "bert", max_position_embeddings=2)
    assert trained(toy, tmp_path, text_encoder=encoder) == 2
    err = capsys.readouterr().err
    assert "make its vectors with python scripts/embed_items.py, which takes max_tokens" in err
    assert "--max-tokens" not in err


def test_a_data_folder_that_can_t_be_written(
    toy: Path, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run goes on without text, unless text was asked for."""

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(vector_file, "write_text_vectors", full)
    assert trained(toy, tmp_path) == 0
    assert text_of_run(tmp_path) is None
    assert trained(toy, tmp_path, text_encoder="lsa") == 2


def test_two_processes_share_them(toy: Path, items: Path, tmp_path: Path):
    run_in_two(tmp_path, *as_arguments(small(toy, epochs=1)), f"--runs_dir={tmp_path / 'runs'}")
    text = text_of_run(tmp_path)
    assert text and text["model"] == "lsa"
    assert {path.name for path in (toy / "toy").iterdir()} == {"toy.inter", "toy.item", FILE.name}


def test_the_second_process_waits_for_the_first(
    toy: Path, items: Path, write_vectors: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    config = build_config(small(toy))
    folder = (toy / FILE).parent
    tokens = [f"i{k}" for k in range(20)]
    caplog.set_level(logging.INFO)
    second = threading.Thread(target=ensure_text_vectors, args=(config, tokens))
    with lock_path(folder):
        second.start()
        second.join(0.5)
        assert second.is_alive()
        made = write_vectors(toy, "toy", tokens).read_bytes()
    second.join(30)
    assert not second.is_alive() and (toy / FILE).read_bytes() == made
    assert f"{folder} is locked by another process; waiting" in caplog.text
    assert "can't be made" not in caplog.text
