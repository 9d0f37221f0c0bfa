"""Language models of every kind, tiny and random: pooling against a loop, batches, restarts, mistakes."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from m2rec.partial import Partial
from m2rec.text_encoder import EncoderOptions, TextEncoder, batches_by_tokens, pad_right, pool
from tests.text_models import WORDS, save_model, save_tokenizer, token_ids

pytest.importorskip("transformers")

TEXTS = ["toy story . a comedy", "heat", "the long film of the long toy", "a film", "toy story . comedy a"]
KINDS = {"bert": "mean", "t5": "mean", "qwen2": "last", "qwen3": "last", "llama": "last"}


def encoder(folder: str, **others: object) -> TextEncoder:
    return TextEncoder(EncoderOptions(folder, **{"device": "cpu", **others}))  # type: ignore[arg-type]


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
    assert made.decisive["pooling"] == f"{KINDS[kind]}, unit length"
    assert made.decisive["dtype"] == dtype
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


def test_padding_is_on_the_right_and_the_last_real_token_counts():
    ids, mask = pad_right([[5, 6, 7], [8]], padding=3)
    assert ids.tolist() == [[5, 6, 7], [8, 3, 3]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    hidden = torch.tensor([[[3.0, 4], [0, 2], [5, 0]], [[0.0, 7], [9, 9], [9, 9]]])
    assert pool(hidden, mask, "last").tolist() == [[1, 0], [0, 1]]
    assert torch.allclose(pool(hidden, mask, "cls"), torch.tensor([[0.6, 0.8], [0, 1]]))
    assert torch.allclose(pool(hidden, mask, "mean"), torch.tensor([[0.8, 0.6], [0, 1]]))


def test_a_tokenizer_without_padding_uses_the_end_of_a_text(tmp_path: Path):
    made = encoder(save_model(tmp_path, "llama"))
    assert made.tokenizer.pad_token_id is None and made._padding == WORDS.index("</s>")


def test_the_instruction_stands_before_every_text(tmp_path: Path):
    folder = save_model(tmp_path, "qwen3")
    asked = encoder(folder, instruction="the film . ")
    assert np.allclose(asked.encode(["heat"]), encoder(folder).encode(["the film . heat"]))
    assert not np.allclose(asked.encode(["heat"]), encoder(folder).encode(["heat"]), atol=1e-2)
    assert asked.decisive["instruction"] == "the film . "


def test_long_texts_are_cut_from_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = save_model(tmp_path, "llama")
    with caplog.at_level(logging.INFO):
        cut = encoder(folder, max_tokens=4).encode(["the long film of heat", "heat"])
    assert np.allclose(cut, encoder(folder).encode(["the long film", "heat"]), atol=1e-6)
    assert "1 texts reach 4 tokens" in caplog.text


def test_batches_hold_similar_lengths_within_the_limit():
    lengths = [3, 9, 1, 3, 20, 2, 9]
    batches = batches_by_tokens(lengths, 18)
    assert batches == [[4], [1, 6], [0, 3, 5, 2]]  # 20 is more than the limit, and alone
    assert batches_by_tokens([], 5) == []


def test_a_text_without_tokens_gets_a_zero_vector(tmp_path: Path):
    folder = save_model(tmp_path, "llama")
    save_tokenizer(tmp_path, "$A", pad=None)
    vectors = encoder(folder).encode(["heat", " "])
    assert (vectors[1] == 0).all() and vectors[0].any()


def test_a_sentence_encoder_says_how_it_pools(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = save_model(tmp_path, "bert")
    (tmp_path / "1_Pooling").mkdir()
    said = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
    modules = [
        {"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Dense")
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert encoder(folder).pooling == "cls"
    assert "its Dense is not applied" in caplog.text
    assert encoder(folder, pooling="mean").pooling == "mean"
    said = {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
    with pytest.raises(
        ValueError, match=r"^pooling: auto can't follow .* has pooling_mode_max_tokens; choose"
    ):
        encoder(folder)
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    assert encoder(folder).pooling == "last"


def test_other_weights_and_other_settings_are_another_model(tmp_path: Path):
    folder = save_model(tmp_path, "bert")
    before = encoder(folder).decisive
    assert encoder(folder).decisive == before
    assert encoder(folder, dtype="bfloat16").decisive != before
    assert encoder(folder, batch_tokens=7).decisive == before  # decides the speed alone
    weights = load_file(tmp_path / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][4, 4] += 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert encoder(folder).decisive["model_sha256"] != before["model_sha256"]


def test_finished_batches_are_not_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = encoder(save_model(tmp_path / "model", "bert"), batch_tokens=8)
    whole = made.encode(TEXTS)
    path = tmp_path / "x.partial"
    calls: list[int] = []
    real = made._encode_batch

    def stopping(ids: list[list[int]]) -> np.ndarray:
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(ids)

    monkeypatch.setattr(made, "_encode_batch", stopping)
    with pytest.raises(KeyboardInterrupt), Partial(path, "f") as partial:
        made.encode(TEXTS, partial)
    with Partial(path, "f") as partial:
        assert len(partial.kept) == 2
        assert np.allclose(made.encode(TEXTS, partial), whole, atol=1e-6)
    texts = sum(calls[:2]) + sum(calls[3:])
    assert texts == len(TEXTS)
    with Partial(path, "other") as partial:
        assert partial.kept == []


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_record_is_cut_off(tmp_path: Path, damage: str):
    path = tmp_path / "x.partial"
    first, second = np.arange(6.0).reshape(2, 3), np.ones((1, 3))
    with Partial(path, "f") as partial:
        partial.append(np.array([4, 2]), first)
        partial.append(np.array([0]), second)
    data = path.read_bytes()
    path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with Partial(path, "f") as partial:
        assert [rows.tolist() for rows, _ in partial.kept] == [[4, 2]]
        assert (partial.kept[0][1] == first).all()
        partial.append(np.array([7]), second)
    with Partial(path, "f") as partial:
        assert [rows.tolist() for rows, _ in partial.kept] == [[4, 2], [7]]


def test_one_process_at_a_time(tmp_path: Path):
    path = tmp_path / "x.partial"
    with Partial(path, "f"), pytest.raises(ValueError, match=r"x\.partial: another process is at it"):
        Partial(path, "f").__enter__()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"max_tokens": 65}, "max_tokens: 65 is not from 3 to 64"),
        ({"max_tokens": 2}, "max_tokens: 2 is not from 3 to 64"),
        ({"max_tokens": -1}, "max_tokens: -1 is not"),
        ({"batch_tokens": -1}, "batch_tokens: -1 is no limit"),
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
        encoder(folder, **others)


def test_models_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(ValueError, match=r"text_encoder: can't load '.*none'"):
        encoder(str(tmp_path / "none"))
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
    for seed, commit in enumerate(("1" * 40, "3" * 40)):
        save_model(tmp_path / "models--a--one" / "snapshots" / commit, "bert", seed=seed)
    refs = tmp_path / "models--a--one" / "refs"
    refs.mkdir()
    (refs / "main").write_text("3" * 40)
    old, new = encoder("a/one", revision="1" * 40), encoder("a/one")
    assert old.decisive["model_sha256"] == new.decisive["model_sha256"]
    assert (old.decisive["revision"], new.decisive["revision"]) == ("1" * 40, "3" * 40)
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
        encoder(folder)
    assert not (tmp_path / "ran").exists()


def test_without_transformers_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"text_encoder: needs transformers .*; pip install .*\[text\]"):
        encoder("any")
