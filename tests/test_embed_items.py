"""scripts/embed_items.py from the command line: files, restarts after kill -9, changes, mistakes."""

import logging
import signal
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from m2rec.commands import embed_items
from m2rec.text import vector_file
from tests.text_models import save_model

ITEMS = "item_id:token\ttitle:token_seq\tgenre:token_seq\n1\tToy Story\tComedy\n2\tHeat\t\n3\t\t\n"


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    """A folder with a tiny BERT and its tokenizer."""
    pytest.importorskip("sentence_transformers")
    return save_model(tmp_path / "encoder", "bert")


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "toy" / "toy.item"
    path.parent.mkdir(parents=True)
    path.write_text(ITEMS)
    return path


def run(items: Path, *arguments: str) -> int:
    return embed_items.main(["--dataset=toy", f"--data_path={items.parent.parent}", *arguments])


def made(items: Path) -> tuple[list[str], torch.Tensor, dict[str, str]]:
    return vector_file.read_text_vectors(items.parent / "toy.text.safetensors")


def test_makes_vectors_beside_the_data(encoder: str, items: Path):
    template = "title: {title}; genre: {genre}"
    given = ["--device=cpu", "--instruction=film ", "--model-name=tiny", "--revision=v1"]
    assert run(items, f"--text-encoder={encoder}", f"--template={template}", *given) == 0
    tokens, vectors, about = made(items)
    assert tokens == ["1", "2"]  # item 3 has no text
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-2)
    expected = {
        "model": "tiny",
        "revision": "v1",
        "pooling": "mean, unit length",
        "columns": "title genre",
        "template": template,
        "instruction": "film ",
        "max_tokens": "64",
        "dtype": "float32",
    }
    assert expected.items() <= about.items()
    assert about["torch"] == torch.__version__ and about["transformers"] and about["date"]
    assert len(about["texts_sha256"]) == len(about["model_sha256"]) == len(about["fingerprint"]) == 64
    assert {path.name for path in items.parent.iterdir()} == {"toy.item", "toy.text.safetensors"}


def test_the_name_of_the_model_is_recorded(encoder: str, items: Path):
    assert run(items, f"--text-encoder={encoder}") == 0
    assert made(items)[2]["model"] == encoder


def test_nothing_is_done_twice_and_changes_are_named(
    encoder: str, items: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    output = items.parent / "toy.text.safetensors"
    command = [items, f"--text-encoder={encoder}", "--device=cpu"]
    assert run(*command) == 0
    first = output.stat().st_mtime_ns
    assert run(*command) == 0
    assert output.stat().st_mtime_ns == first and "is up to date" in caplog.text
    assert caplog.text.count("pooling mean, unit length, at most 64 tokens") == 1  # no weights are read again
    for change, message in (
        (["--max-tokens=9"], "toy.text.safetensors: asked_max_tokens 'auto' -> '9'"),
        (["--pooling=cls"], "asked_pooling 'auto' -> 'cls'; asked_max_tokens '9' -> 'auto'"),
        (["--dtype=bfloat16"], "dtype 'float32' -> 'bfloat16'"),
        (["--columns", "title"], "columns 'title genre' -> 'title'; texts changed"),
    ):
        before, was = output.read_bytes(), len(caplog.text)
        assert run(*command, *change) == 0
        assert message in caplog.text[was:] and output.read_bytes() != before
    assert run(*command) == 0
    items.write_text(ITEMS.replace("Heat", "Story"))
    assert run(*command) == 0
    assert f"rebuilding {output}: texts changed\n" in caplog.text
    changed = output.stat().st_mtime_ns
    assert run(*command, "--force") == 0
    assert output.stat().st_mtime_ns != changed


def test_a_model_that_can_t_be_loaded_leaves_nothing(
    encoder: str, items: Path, capsys: pytest.CaptureFixture[str]
):
    weights = Path(encoder) / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    assert run(items, f"--text-encoder={encoder}") == 2
    assert f"error: --text-encoder: can't load '{encoder}'" in capsys.readouterr().err
    assert [path.name for path in items.parent.iterdir()] == ["toy.item"]


def test_files_of_before_there_were_fingerprints_load_and_are_made_again(
    encoder: str, items: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    output = items.parent / "toy.text.safetensors"
    old = {"model": encoder, "columns": "title genre", "date": "2026-01-01", "pooling": "mean, unit length"}
    vector_file.write_text_vectors(output, ["1"], np.ones((1, 4)), old)
    assert made(items)[2] == old
    assert run(items, f"--text-encoder={encoder}") == 0
    assert "encoder was not recorded" in caplog.text and "model " not in caplog.text.split("rebuilding ")[1]
    assert made(items)[0] == ["1", "2"]


def test_what_is_no_text_vector_file_stays(items: Path, capsys: pytest.CaptureFixture[str]):
    output = items.parent / "notes.txt"
    output.write_text("mine")
    assert run(items, "--text-encoder=lsa", f"--output={output}") == 2
    assert (
        f"--force: needed to overwrite {output}, not a valid" in capsys.readouterr().err
        and output.read_text() == "mine"
    )
    assert run(items, "--text-encoder=lsa", f"--output={output}", "--force") == 0
    assert vector_file.read_text_vectors(output)[0] == ["1", "2"]


def test_without_an_encoder_it_is_lsa(items: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    assert run(items) == 0
    assert "no --text-encoder: lsa, from word counts" in caplog.text
    about = made(items)[2]
    assert about["model"] == "lsa" and about["width"] == "256" and about["scikit-learn"]
    assert made(items)[1].shape == (2, 2)
    assert run(items) == 0 and "is up to date" in caplog.text


def test_the_work_of_a_model_is_not_replaced_by_accident(
    encoder: str, items: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(items, f"--text-encoder={encoder}", "--model-name=tiny") == 0
    assert run(items) == 2
    assert "has vectors of tiny; name an encoder" in capsys.readouterr().err
    assert run(items, "--text-encoder=lsa") == 0 and made(items)[2]["model"] == "lsa"


def test_items_without_text_are_named(items: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    inter = items.with_suffix(".inter")
    inter.write_text("user_id:token\titem_id:token\n" + "".join(f"u\t{k}\n" for k in (2, 3, 9, 2)))
    assert run(items) == 0
    assert "1 of 3 items of the interactions have text; the first without: 3, 9\n" in caplog.text


def test_tokens_that_fit_nowhere(items: Path, capsys: pytest.CaptureFixture[str]):
    items.with_suffix(".inter").write_text("user_id:token\titem_id:token\nu\ti1\n")
    assert run(items) == 2
    assert "none of the 1 items of the interactions have text (theirs: ['i1']" in capsys.readouterr().err
    assert not (items.parent / "toy.text.safetensors").exists()


def test_vectors_made_elsewhere(items: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    np.save(tmp_path / "v.npy", 1e9 * np.eye(2))
    (tmp_path / "ids.txt").write_text("2\n1\n")
    given = [f"--vectors={tmp_path / 'v.npy'}", f"--ids={tmp_path / 'ids.txt'}", "--model-name=big"]
    assert run(items, *given) == 0
    tokens, vectors, about = made(items)
    assert tokens == ["2", "1"] and about["model"] == "big"
    torch.testing.assert_close(vectors, 1e9 * torch.eye(2), rtol=1e-3, atol=0.0)
    assert run(items, *given) == 0 and "is up to date" in caplog.text
    np.save(tmp_path / "v.npy", np.ones((2, 3)))
    assert run(items, *given) == 0 and "toy.text.safetensors: vectors changed" in caplog.text


def embed_three_batches(command: list[str], has_three: Event) -> None:
    """The command with a file for each batch, which waits in the fourth until it is killed."""
    from m2rec.text import language_model
    from m2rec.text.language_model import TextEncoder

    real, calls = TextEncoder._encode_batch, []

    def encode(self: TextEncoder, texts: list[str]) -> np.ndarray:
        if len(calls) == 3:
            has_three.set()
            signal.pause()
        calls.append(texts)
        return real(self, texts)

    language_model.BATCHES_PER_FILE = 1
    TextEncoder._encode_batch = encode  # type: ignore[method-assign]
    embed_items.main(command)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
def test_a_killed_run_goes_on_where_it_stopped(
    encoder: str, items: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from m2rec.text.language_model import TextEncoder

    caplog.set_level(logging.INFO)
    rows = [f"{k}\t{'long ' * (k % 5)}toy {'story' if k % 2 else 'film'}\t\n" for k in range(20)]
    items.write_text(ITEMS.splitlines()[0] + "\n" + "".join(rows))
    command = ["--dataset=toy", f"--data_path={items.parent.parent}", f"--text-encoder={encoder}",
               "--batch-tokens=16", "--device=cpu"]  # fmt: skip
    assert embed_items.main([*command, f"--output={items.parent / 'whole'}"]) == 0
    forks = get_context("fork")  # it has imported transformers already
    has_three = forks.Event()
    child = forks.Process(target=embed_three_batches, args=(command, has_three))
    child.start()
    assert has_three.wait(100)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    partial = items.parent / "toy.text.safetensors.partial"
    assert len(list(partial.iterdir())) == 3 and not (items.parent / "toy.text.safetensors").exists()
    encoded: list[int] = []
    real = TextEncoder._encode_batch

    def counting(self: TextEncoder, texts: list[str]) -> np.ndarray:
        encoded.append(len(texts))
        return real(self, texts)

    monkeypatch.setattr(TextEncoder, "_encode_batch", counting)
    assert embed_items.main(command) == 0
    found = [line for line in caplog.messages if "texts already encoded" in line]
    kept = int(found[0].split()[1])
    assert 0 < kept < 20 and sum(encoded) == 20 - kept
    tokens, vectors, _ = made(items)
    whole_tokens, whole, _ = vector_file.read_text_vectors(items.parent / "whole")
    assert tokens == whole_tokens and torch.allclose(vectors, whole, atol=1e-3)
    assert not partial.exists()


def test_a_partial_file_of_other_settings_is_not_used(
    encoder: str, items: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from m2rec.text import language_model
    from m2rec.text.language_model import TextEncoder

    caplog.set_level(logging.INFO)
    command = [items, f"--text-encoder={encoder}", "--batch-tokens=1", "--device=cpu"]
    monkeypatch.setattr(language_model, "BATCHES_PER_FILE", 1)
    real, calls = TextEncoder._encode_batch, []

    def stopping(self: TextEncoder, texts: list[str]) -> np.ndarray:
        calls.append(texts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, texts)

    monkeypatch.setattr(TextEncoder, "_encode_batch", stopping)
    assert run(*command) == 130
    monkeypatch.setattr(TextEncoder, "_encode_batch", real)
    assert run(*command, "--pooling=cls") == 0
    assert "already encoded" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "plot"], "column 'plot' is missing, the file has item_id, title, genre"),
        pytest.param(
            ["--text-encoder=gone/none"],
            "--text-encoder: can't load 'gone/none'",
            marks=pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="not installed"),
        ),
        (["--id-column=asin"], "column 'asin' is missing, the file has item_id"),
        (["--template={plot}"], "column 'plot' is missing"),
        (["--columns", "title", "--template={title}"], "error: --columns: not together with template"),
        (["--template={"], "error: --template: '{' can't be read"),
        (["--pooling=max"], "argument --pooling: invalid choice: 'max'"),
        (["--max-tokens=many"], "argument --max-tokens: invalid int value: 'many'"),
        (["--lsa-width=0"], "--lsa-width: expected an integer >= 1, got 0"),
        (["--colums=x"], "unrecognized arguments: --colums=x"),
        (["--ids=x"], "--ids: x needs --vectors"),
        (["--vectors=x.pkl"], "error: --vectors: x.pkl can hold a pickle"),
        (["--vectors=x.npy"], "error: --vectors: no file x.npy"),
        (["--vectors=x.npy", "--text-encoder=lsa"], "--text-encoder: not together with --vectors"),
    ],
)
def test_mistakes(items: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert run(items, *arguments) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("embed_items.py: error: ")]
    assert message in lines[0] and "Traceback" not in err
    assert [path.name for path in items.parent.iterdir()] == ["toy.item"]


def test_a_data_set_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert embed_items.main(["--dataset=gone", f"--data_path={tmp_path}"]) == 2
    assert "no item file" in capsys.readouterr().err


def test_files_with_another_separator(items: Path, capsys: pytest.CaptureFixture[str]):
    assert run(items, "--text-encoder=lsa") == 0
    tokens, vectors, about = made(items)
    items.write_text(ITEMS.replace("\t", "|"))
    (items.parent / "toy.inter").write_text("item_id:token|user_id:token\n1|a\n2|a\n")
    assert run(items, "--text-encoder=lsa", "--separator=|", "--force") == 0
    again, same, now = made(items)
    assert again == tokens and torch.equal(same, vectors)
    assert now["texts_sha256"] == about["texts_sha256"]
    assert run(items, "--text-encoder=lsa", "--force") == 2
    assert "(field_separator: '|' seems to stand between its columns)" in capsys.readouterr().err
    assert run(items, "--text-encoder=lsa", "--separator=") == 2
    assert "--separator: empty" in capsys.readouterr().err
