"""scripts/embed_items.py with a small, randomly initialised local BERT."""

from pathlib import Path

import numpy as np
import pytest
import torch

from m2rec import text_vectors
from scripts import embed_items

ITEMS = "item_id:token\ttitle:token_seq\tgenre:token_seq\n1\tToy Story\tComedy\n2\tHeat\t\n3\t\t\n"


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    """A folder with a tiny BERT and its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path / "encoder"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "toy", "story", "heat", "comedy", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "toy" / "toy.item"
    path.parent.mkdir(parents=True)
    path.write_text(ITEMS)
    return path


def test_makes_vectors_beside_the_data(encoder: str, items: Path):
    arguments = ["--dataset=toy", f"--data_path={items.parent.parent}", f"--text-encoder={encoder}"]
    assert embed_items.main(arguments) == 0
    tokens, vectors, provenance = text_vectors.read(items.parent / "toy.text.safetensors")
    assert tokens == ["1", "2"]  # item 3 has no text
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-2)
    assert provenance["model"] == encoder and provenance["columns"] == "title genre" and provenance["date"]


def test_a_vector_does_not_depend_on_its_batch(encoder: str):
    texts = ["toy story . comedy", "heat", "toy"]
    together = embed_items.encode(texts, encoder)
    for text, vector in zip(texts, together, strict=True):
        assert np.allclose(embed_items.encode([text], encoder)[0], vector, atol=1e-5)
    assert not np.allclose(together[0], together[1], atol=1e-3)


def test_texts_join_the_chosen_columns(items: Path):
    assert embed_items.read_texts(items, "item_id", None)[1] == ["Toy Story. Comedy", "Heat"]
    assert embed_items.read_texts(items, "item_id", ["genre"])[:2] == (["1"], ["Comedy"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("item_id:token\ttitle:token\n1\tA\n1\tB\n", "item '1' comes twice, again in line 3"),
        ("item_id:token\ttitle:token\n1\tA\tB\n", "line 2 has more than the 2 columns"),
        ("item_id:token\ttitle:token\n1\t\n", "no item has text in title"),
    ],
)
def test_unusable_item_files(items: Path, content: str, message: str):
    items.write_text(content)
    with pytest.raises(ValueError, match=message):
        embed_items.read_texts(items, "item_id", None)


def test_mistakes(items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = ["--dataset=toy", f"--data_path={items.parent.parent}"]
    for arguments, message in (
        (
            [*base, "--text-encoder=x", "--columns", "plot"],
            "column 'plot' is missing, the file has item_id, title, genre",
        ),
        ([*base, f"--text-encoder={tmp_path}/none"], "--text-encoder: can't load"),
        (["--dataset=gone", "--text-encoder=x", f"--data_path={tmp_path}"], "no item file"),
        ([*base, "--text-encoder=x", "--id-column=asin"], "column 'asin' is missing, the file has item_id"),
    ):
        assert embed_items.main(arguments) == 2
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
