"""Text vectors: joined by token, whitened once, and every way for a file to be wrong."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from m2rec.data import shipped
from m2rec.tensor_files import read_tensors, write_tensors
from m2rec.text import vector_file
from m2rec.text.whitening import fit_whitening

TOKENS = ["a", "b b", "é😀", "d", "e", "f"]


def saved(folder: Path, tokens: list[str] = TOKENS, width: int = 4) -> tuple[Path, np.ndarray]:
    vectors = np.random.default_rng(0).normal(size=(len(tokens), width)).astype(np.float32)
    path = folder / f"toy{vector_file.VECTOR_FILE_SUFFIX}"
    vector_file.write_text_vectors(
        path, tokens, vectors, {"model": "m", "columns": "title", "date": "2026-01-01"}
    )
    return path, vectors


def test_round_trip(tmp_path: Path):
    path, vectors = saved(tmp_path)
    tokens, read, provenance = vector_file.read_text_vectors(path)
    assert tokens == TOKENS
    assert np.allclose(read, vectors, atol=2e-3)
    assert provenance == {"model": "m", "columns": "title", "date": "2026-01-01"}


@pytest.mark.parametrize("length", [1e-9, 1.0, 1e9, 1e15])
def test_a_vector_is_kept_whatever_stands_beside_it(tmp_path: Path, length: float):
    """So that vectors of new items, in a file of their own, fit those that a run was trained with."""
    path, vectors = (
        tmp_path / f"one{vector_file.VECTOR_FILE_SUFFIX}",
        length * np.random.default_rng(0).normal(size=(9, 4)),
    )
    for some in (vectors, vectors[:1], np.concatenate([vectors, 50 * vectors])):
        vector_file.write_text_vectors(path, [str(k) for k in range(len(some))], some, {})
        found = vector_file.read_text_vectors(path)[1].numpy()[: len(vectors)]
        assert np.allclose(found, some[: len(vectors)], rtol=2e-3, atol=2e-5 * length)


@pytest.mark.parametrize("scale", ["", "nan", "0.0", "-1.0", "inf"])
def test_a_damaged_scale(tmp_path: Path, scale: str):
    path, _ = saved(tmp_path)
    tensors, about = read_tensors(path)
    write_tensors(path, tensors, {**about, "scale": scale})
    with pytest.raises(ValueError, match="has a damaged scale"):
        vector_file.read_text_vectors(path)


def test_vectors_follow_their_token_under_shuffled_ids(tmp_path: Path):
    path, _ = saved(tmp_path)
    ids = ["[PAD]", "f", "unknown", "a", "é😀"]
    text = vector_file.load_item_vectors(path, ids, "none")
    other = vector_file.load_item_vectors(path, [ids[i] for i in (0, 4, 3, 2, 1)], "none")
    assert text.missing == ("unknown",)
    assert (text.vectors[[0, 2]] == 0).all() and (text.vectors[[1, 3, 4]] != 0).any(1).all()
    assert torch.allclose(text.vectors[[1, 3, 4]], other.vectors[[4, 2, 1]], atol=1e-6)
    _, raw, _ = vector_file.read_text_vectors(path)
    centred = raw[[5, 0, 2]] - raw[[5, 0, 2]].mean(0)
    assert torch.allclose(text.vectors[[1, 3, 4]], centred / centred.norm(dim=1).mean(), atol=1e-5)


@pytest.mark.parametrize("whitening", ["pca", "zca"])
def test_whitened_vectors_are_uncorrelated(whitening: str):
    raw = torch.randn(500, 6) @ torch.randn(6, 6) + 3
    mean, basis = fit_whitening(raw, whitening, 0)
    white = (raw - mean) @ basis
    covariance = white.T @ white / len(white)
    assert torch.allclose(covariance / covariance[0, 0], torch.eye(6), atol=1e-3)
    assert abs(float(white.norm(dim=1).mean()) - 1) < 1e-4


def test_width_keeps_the_largest_components(tmp_path: Path):
    many = [str(k) for k in range(40)]
    path, _ = saved(tmp_path, many)
    assert vector_file.load_item_vectors(path, ["[PAD]", *many], "pca").vectors.shape == (41, 4)
    assert vector_file.load_item_vectors(path, ["[PAD]", *many], "pca", 2).vectors.shape == (41, 2)
    with pytest.raises(
        ValueError, match="text_width: 5 is more than the 4 components that 40 vectors of width 4 allow"
    ):
        vector_file.load_item_vectors(path, ["[PAD]", *many], "pca", 5)


@pytest.mark.parametrize("whitening", ["pca", "zca"])
@pytest.mark.parametrize("n", [12, 100, 1682])
def test_neighbours_survive_whitening(n: int, whitening: str):
    """Also with fewer items than components, where whole whitening makes all equally far."""
    _, raw, _ = vector_file.read_text_vectors(shipped.SHIPPED_FOLDER / "ml-100k.text.safetensors")
    raw = raw[:n]
    mean, basis = fit_whitening(raw, whitening, 0)
    pairs = torch.triu_indices(n, n, 1)
    unit = [torch.nn.functional.normalize(v, dim=1) for v in (raw, (raw - mean) @ basis)]
    before, after = ((v @ v.T)[pairs[0], pairs[1]] for v in unit)
    assert float(torch.corrcoef(torch.stack([before, after]))[0, 1]) > 0.25


def test_a_zero_vector_counts_as_no_text(tmp_path: Path):
    path, vectors = saved(tmp_path)
    vectors[2] = 0
    vector_file.write_text_vectors(path, TOKENS, vectors, {})
    text = vector_file.load_item_vectors(path, ["[PAD]", *TOKENS])
    assert text.missing == (TOKENS[2],) and (text.vectors[3] == 0).all()


@pytest.mark.parametrize("whitening", ["none", "pca", "zca"])
def test_a_single_item_or_equal_vectors_stay_finite(tmp_path: Path, whitening: str):
    path, _ = saved(tmp_path)
    alone = vector_file.load_item_vectors(path, ["[PAD]", "a"], whitening).vectors
    assert torch.isfinite(alone).all() and alone[1].abs().max() > 0
    vector_file.write_text_vectors(path, TOKENS, np.ones((6, 4)), {})
    assert torch.isfinite(vector_file.load_item_vectors(path, ["[PAD]", *TOKENS], whitening).vectors).all()


def test_a_later_item_can_get_the_same_treatment(tmp_path: Path):
    path, _ = saved(tmp_path)
    text = vector_file.load_item_vectors(path, ["[PAD]", *TOKENS], "pca")
    _, raw, _ = vector_file.read_text_vectors(path)
    assert torch.allclose((raw - text.mean) @ text.basis, text.vectors[1:], atol=1e-5)


def test_find(tmp_path: Path):
    assert vector_file.resolve_vector_file("none", "ml-100k", tmp_path) is None
    assert vector_file.resolve_vector_file("auto", "toy", tmp_path) is None
    path, _ = saved(tmp_path)
    assert vector_file.resolve_vector_file("auto", "toy", tmp_path) == path
    assert vector_file.resolve_vector_file(str(path), "other", tmp_path) == path
    with pytest.raises(
        ValueError, match=r"text_vectors: no file 'gone'; make it with python scripts/embed_items\.py"
    ):
        vector_file.resolve_vector_file("gone", "toy", tmp_path)


def test_the_shipped_vectors_are_complete():
    tokens, vectors, provenance = vector_file.read_text_vectors(
        shipped.SHIPPED_FOLDER / "ml-100k.text.safetensors"
    )
    assert vectors.shape == (1682, 384) and set(tokens) == {str(i) for i in range(1, 1683)}
    assert torch.allclose(vectors.norm(dim=1), torch.ones(1682), atol=1e-2)
    assert provenance["model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert provenance["columns"] == "movie_title release_year class" and provenance["date"]


def test_unusable_files_are_named(tmp_path: Path):
    path, _ = saved(tmp_path)
    with pytest.raises(
        ValueError, match=re.escape("has no token of this data set (its first: ['a', 'b b', 'é😀']")
    ):
        vector_file.load_item_vectors(path, ["[PAD]", "x", "y"])
    saved(tmp_path, ["a", "b", "a"])
    with pytest.raises(ValueError, match="has token 'a' more than once"):
        vector_file.read_text_vectors(path)
    vector_file.write_text_vectors(path, ["a"], np.array([[np.nan]]), {})
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        vector_file.read_text_vectors(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is not a text-vector file"):
        vector_file.read_text_vectors(path)
    save_file({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is not a text-vector file"):
        vector_file.read_text_vectors(path)
    for ends in (
        torch.tensor([2, 1]),
        torch.tensor([[1, 2]]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([1, 9]),
    ):
        data = torch.zeros(2, dtype=torch.uint8)
        save_file({"vectors": torch.ones(2, 4), "tokens": data, "token_ends": ends}, path)
        with pytest.raises(ValueError, match="has damaged tokens"):
            vector_file.read_text_vectors(path)
    data = torch.full((2,), 255, dtype=torch.uint8)
    save_file({"vectors": torch.ones(2, 4), "tokens": data, "token_ends": torch.tensor([1, 2])}, path)
    with pytest.raises(ValueError, match="has a token that is not UTF-8"):
        vector_file.read_text_vectors(path)
    ends = torch.tensor([1, 2])
    save_file(
        {"vectors": torch.ones(3, 4), "tokens": torch.zeros(2, dtype=torch.uint8), "token_ends": ends}, path
    )
    with pytest.raises(ValueError, match=re.escape("vectors of the wrong width, shape (3, 4) for 2 tokens")):
        vector_file.read_text_vectors(path)
