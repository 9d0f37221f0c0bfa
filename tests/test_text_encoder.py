"""Language models of every kind, tiny and random: pooling against a loop, batches, restarts, mistakes."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from m2rec.text import language_model
from m2rec.text.language_model import TextEncoder, make_token_batches
from m2rec.text.partial import PartialVectors
from m2rec.text.sentence_model import TextEncoderOptions
from tests.text_models import WORDS, save_model, save_tokenizer, token_ids

pytest.importorskip("sentence_transformers")

TEXTS = ["toy story . a comedy", "heat", "the long film of the long toy", "a film", "toy story . comedy a"]
KINDS = {"bert": "mean", "t5": "mean", "qwen2": "last", "qwen3": "last", "llama": "last"}


def encoder(folder: str, **others: object) -> TextEncoder:
    return TextEncoder(TextEncoderOptions(folder, **{"device": "cpu", **others}))  # type: ignore[arg-type]


def by_a_loop(folder: str, kind: str, text: str, pooling: str, dtype: torch.dtype) -> torch.Tensor:
    """One text, no padding, no mask, the model class by its name."""
    import transformers as hf

    names = {"bert": "BertModel", "t5": "T5EncoderModel", "llama": "LlamaModel"}
    name = names.get(kind, f"{kind.capitalize()}Model")
    model = getattr(hf, name).from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        hidden = model(torch.tensor([token_ids(kind, text)])).last_hidden_state[0].float()
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    return vector / vector.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_vectors_are_those_of_a_plain_loop(tmp_path: Path, kind: str, dtype: str, tolerance: float):
    folder = save_model(tmp_path, kind)
    made = encoder(folder, dtype=dtype)
    assert made.describe()["pooling"] == f"{KINDS[kind]}, unit length"
    assert made.fingerprint_fields["dtype"] == dtype
    assert made.model.dtype == getattr(torch, dtype)
    found = torch.from_numpy(made.encode(TEXTS))
    for text, vector in zip(TEXTS, found, strict=True):
        expected = by_a_loop(folder, kind, text, KINDS[kind], getattr(torch, dtype))
        assert torch.allclose(vector, expected, atol=tolerance), text
    assert float((found @ found.T - torch.eye(len(TEXTS))).max()) < 0.999  # the texts are told apart


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_can_be_chosen(tmp_path: Path, kind: str, pooling: str):
    folder = save_model(tmp_path, kind)
    found = torch.from_numpy(encoder(folder, pooling=pooling).encode(TEXTS))
    for text, vector in zip(TEXTS, found, strict=True):
        assert torch.allclose(vector, by_a_loop(folder, kind, text, pooling, torch.float32), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_does_not_depend_on_its_batch(tmp_path: Path, kind: str):
    folder = save_model(tmp_path, kind)
    made = encoder(folder, batch_tokens=1000)
    together = made.encode(TEXTS)
    alone = encoder(folder, batch_tokens=1)
    assert np.allclose(together, alone.encode(TEXTS), atol=1e-5)
    assert np.allclose(together[::-1], made.encode(TEXTS[::-1]), atol=1e-5)
    assert np.allclose(together[:2], made.encode(TEXTS[:2]), atol=1e-5)


def test_a_tokenizer_without_padding_uses_the_end_of_a_text(tmp_path: Path):
    made = encoder(save_model(tmp_path, "llama"))
    assert made.model.tokenizer.pad_token_id == WORDS.index("</s>")


def test_the_instruction_stands_before_every_text(tmp_path: Path):
    folder = save_model(tmp_path, "qwen3")
    asked = encoder(folder, instruction="the film . ")
    assert np.allclose(asked.encode(["heat"]), encoder(folder).encode(["the film . heat"]))
    assert not np.allclose(asked.encode(["heat"]), encoder(folder).encode(["heat"]), atol=1e-2)
    assert asked.fingerprint_fields["instruction"] == "the film . "


def test_long_texts_are_cut_from_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = save_model(tmp_path, "llama")
    with caplog.at_level(logging.INFO):
        cut = encoder(folder, max_tokens=4).encode(["the long film of heat", "heat"])
    assert np.allclose(cut, encoder(folder).encode(["the long film", "heat"]), atol=1e-6)
    assert "1 texts reach max_tokens=4" in caplog.text


def test_batches_hold_similar_lengths_within_the_limit():
    lengths = [3, 9, 1, 3, 20, 2, 9]
    batches = make_token_batches(lengths, 18)
    assert batches == [[4], [1, 6], [0, 3, 5, 2]]  # 20 is more than the limit, and alone
    assert make_token_batches([], 5) == []


def test_a_text_without_tokens_gets_a_zero_vector(tmp_path: Path):
    folder = save_model(tmp_path, "llama")
    save_tokenizer(tmp_path, "$A", pad=None)
    vectors = encoder(folder).encode(["heat", " "])
    assert (vectors[1] == 0).all() and vectors[0].any()


def save_sentence_encoder(folder: Path, **pooling: object) -> str:
    """BERT that reads 8 tokens, though its tokenizer would let it read more; pooled, 16 -> 4 wide."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    torch.manual_seed(1)
    save_model(folder / "bert", "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(16, **pooling)]  # type: ignore[arg-type]
    dense = Dense(modules[1].pooling_output_dimension, 4)
    path = folder / "sentences"
    SentenceTransformer(modules=[*modules, dense, Normalize()], device="cpu").save(str(path))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 8, "do_lower_case": false}')
    return str(path)


def by_sentence_transformers(folder: str, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", local_files_only=True)
    return np.asarray(model.encode(texts, normalize_embeddings=True, batch_size=2))


@pytest.mark.parametrize(
    ("mode", "name"), [("cls", "cls"), ("lasttoken", "last"), (["mean", "max"], "mean + max")]
)
def test_a_sentence_encoders_vectors_are_its_own(tmp_path: Path, mode: object, name: str):
    """Its limit, its pooling and its Dense layer."""
    folder = save_sentence_encoder(tmp_path, pooling_mode=mode)
    made = encoder(folder, batch_tokens=16)
    found = made.encode([*TEXTS, "the " * 7 + "heat", "the " * 7 + "toy"])
    assert found.shape == (7, 4)
    expected = by_sentence_transformers(folder, [*TEXTS, "the " * 7 + "heat", "the " * 7 + "toy"])
    assert np.allclose(found, expected, atol=1e-6)
    assert np.allclose(found[5], found[6], atol=1e-6)  # they differ behind the eighth token only
    about = made.describe()
    assert about["pooling"] == f"{name}, Dense, unit length" and about["max_tokens"] == "8"


def test_a_sentence_encoder_can_be_told_otherwise(tmp_path: Path):
    folder = save_sentence_encoder(tmp_path, pooling_mode="cls")
    longer = encoder(folder, max_tokens=12).encode(["the " * 7 + "heat", "the " * 7 + "toy"])
    assert not np.allclose(longer[0], longer[1], atol=1e-3)
    made = encoder(folder, pooling="mean")
    assert made.describe()["pooling"] == "mean, Dense, unit length"
    assert not np.allclose(made.encode(TEXTS), encoder(folder).encode(TEXTS), atol=1e-2)
    two = save_sentence_encoder(tmp_path / "two", pooling_mode=["mean", "max"])
    with pytest.raises(ValueError, match=r"pooling: 'mean' can't be set for .*; leave it at auto"):
        encoder(two, pooling="mean").encode(TEXTS)


def test_the_prompt_of_a_sentence_encoder_stands_where_no_instruction_does(tmp_path: Path):
    folder = save_sentence_encoder(tmp_path)
    path = Path(folder) / "config_sentence_transformers.json"
    config = json.loads(path.read_text()) | {"prompts": {"film": "a film . "}, "default_prompt_name": "film"}
    path.write_text(json.dumps(config))
    assert np.allclose(encoder(folder).encode(TEXTS), by_sentence_transformers(folder, TEXTS), atol=1e-6)
    asked = encoder(folder, instruction="a film . ").encode(TEXTS)
    assert np.allclose(asked, encoder(folder).encode(TEXTS), atol=1e-6)
    assert not np.allclose(encoder(folder, instruction="the ").encode(TEXTS), asked, atol=1e-2)


def test_a_layer_in_a_pickle_is_refused(tmp_path: Path):
    """sentence-transformers itself would read it."""
    folder = save_sentence_encoder(tmp_path)
    dense = Path(folder) / "2_Dense"
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    assert by_sentence_transformers(folder, TEXTS).shape == (5, 4)
    read = torch.load
    with pytest.raises(ValueError, match=r"can't load .*pytorch_model.bin can hold a pickle"):
        encoder(folder).encode(TEXTS)
    assert torch.load is read


def test_a_layer_of_its_own_code_is_not_run(tmp_path: Path):
    folder = Path(save_sentence_encoder(tmp_path))
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "evil.Dense"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"can't load .*evil\.Dense"):
        encoder(str(folder)).encode(TEXTS)
    assert not (tmp_path / "ran").exists()


def test_other_weights_and_other_settings_are_another_model(tmp_path: Path):
    folder = save_model(tmp_path, "bert")
    before = encoder(folder).fingerprint_fields
    assert encoder(folder).fingerprint_fields == before
    assert encoder(folder, dtype="bfloat16").fingerprint_fields != before
    assert encoder(folder, batch_tokens=7).fingerprint_fields == before  # decides the speed alone
    weights = load_file(tmp_path / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][4, 4] += 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert encoder(folder).fingerprint_fields["model_sha256"] != before["model_sha256"]


def test_other_weights_of_a_layer_are_another_model(tmp_path: Path):
    folder = save_sentence_encoder(tmp_path)
    before = encoder(folder).fingerprint_fields
    path = Path(folder) / "2_Dense" / "model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(path).items()}, path, {"format": "pt"})
    after = encoder(folder).fingerprint_fields
    assert after["model_sha256"] != before["model_sha256"]
    pooling = Path(folder) / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"pooling_mode": "cls"}))
    assert encoder(folder).fingerprint_fields == after | {
        "layers_sha256": encoder(folder).fingerprint_fields["layers_sha256"]
    }
    assert encoder(folder).fingerprint_fields != after


def test_finished_batches_are_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = encoder(save_model(tmp_path / "model", "bert"), batch_tokens=8)
    whole = made.encode(TEXTS)
    monkeypatch.setattr(language_model, "BATCHES_PER_FILE", 1)
    calls: list[int] = []
    real = made._encode_batch

    def stopping(texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(texts)

    monkeypatch.setattr(made, "_encode_batch", stopping)
    partial = PartialVectors(tmp_path / "x.partial", "f")
    with pytest.raises(KeyboardInterrupt):
        made.encode(TEXTS, partial)
    assert len(list(partial.folder.iterdir())) == 2
    assert PartialVectors(partial.folder, "other").restore(np.zeros_like(whole)) == []
    assert np.array_equal(made.encode(TEXTS, partial), whole)
    assert sum(calls[:2]) + sum(calls[3:]) == len(TEXTS)
    partial.remove()
    assert not partial.folder.exists()


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_file_is_left_out(tmp_path: Path, damage: str):
    partial = PartialVectors(tmp_path / "x.partial", "f")
    partial.append([4, 2], np.arange(6.0).reshape(2, 3))
    partial.append([0], np.ones((1, 3)))
    _, path = sorted(partial.folder.iterdir())
    data = path.read_bytes()
    path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    vectors = np.zeros((5, 3))
    assert partial.restore(vectors) == [0]
    assert (vectors[0] == 1).all() and not vectors[1:].any()
    partial.append([4, 2], np.arange(6.0).reshape(2, 3))
    assert partial.restore(vectors) == [0, 4, 2] and vectors[2].tolist() == [3, 4, 5]


def test_a_partial_file_of_an_earlier_version_makes_room(tmp_path: Path):
    path = tmp_path / "x.partial"
    path.write_bytes(b"m2rec vectors 1 f\n")
    partial = PartialVectors(path, "f")
    assert partial.restore(np.zeros((1, 3))) == []
    partial.append([0], np.ones((1, 3)))
    assert path.is_dir()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"max_tokens": 65}, "max_tokens: expected a number from 3 to 64 for .*, got 65"),
        ({"max_tokens": 2}, "max_tokens: expected a number from 3 to 64 for .*, got 2"),
        ({"max_tokens": -1}, "max_tokens: expected .*, got -1"),
        ({"batch_tokens": -1}, r"batch_tokens: expected a positive integer .*, got -1"),
        pytest.param(
            {"device": "cuda"},
            "device: cuda, but PyTorch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, others: dict[str, object], message: str):
    folder = save_model(tmp_path, "bert")
    with pytest.raises(ValueError, match=message):
        encoder(folder, **others).encode(TEXTS)


def test_models_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(ValueError, match=r"text_encoder: can't load '.*none'"):
        encoder(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"text_encoder: can't load '.*empty'"):
        encoder(str(tmp_path / "empty")).encode(TEXTS)
    folder = save_model(tmp_path / "bert", "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for encoder\.layer\.1\.output\.dense\.weight"):
        encoder(folder).encode(TEXTS)


def test_a_name_on_the_hub_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two revisions with one config.json and other weights, in a cache as the hub's client makes it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for seed, commit in enumerate(("1" * 40, "3" * 40)):
        save_model(tmp_path / "models--a--one" / "snapshots" / commit, "bert", seed=seed)
    refs = tmp_path / "models--a--one" / "refs"
    refs.mkdir()
    (refs / "main").write_text("3" * 40)
    old, new = encoder("a/one", revision="1" * 40), encoder("a/one")
    assert (old.fingerprint_fields["revision"], new.fingerprint_fields["revision"]) == ("1" * 40, "3" * 40)
    assert not np.allclose(old.encode(TEXTS), new.encode(TEXTS), atol=0.1)


def test_weights_are_never_unpickled(tmp_path: Path):
    folder = save_model(tmp_path, "bert")
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="text_encoder: can't load"):
        encoder(folder).encode(TEXTS)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path):
    folder = save_model(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="text_encoder: can't load"):
        encoder(folder).encode(TEXTS)
    assert not (tmp_path / "ran").exists()


def test_without_sentence_transformers_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        ValueError, match=r"text_encoder: needs sentence-transformers; pip install .*\[text\]"
    ):
        encoder(str(tmp_path)).encode(TEXTS)
