"""Vectors from word counts: width, neighbours, the same each time, few texts and many."""

import numpy as np
import pytest

from m2rec.text.lsa import LsaEncoder

DRINKS = ["green tea", "black tea with milk", "cold milk"]
TOOLS = ["steel hammer", "hammer and nails", "steel nails"]


def test_texts_on_one_thing_are_neighbours_even_without_a_common_word():
    vectors = LsaEncoder(2).encode(DRINKS + TOOLS)
    alike = vectors @ vectors.T
    assert (alike[:3, :3] > 0.9).all() and (alike[3:, 3:] > 0.9).all()
    assert (np.abs(alike[:3, 3:]) < 0.1).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("texts", [["tea"], DRINKS, ["tea", "tea", "tea"], ["a b", "!!", "b"]])
def test_few_texts_get_what_they_allow(texts: list[str]):
    vectors = LsaEncoder().encode(texts)
    assert vectors.shape[0] == len(texts) and 1 <= vectors.shape[1] <= len(texts)
    assert np.isfinite(vectors).all()
    worded = np.array([any(map(str.isalnum, text)) for text in texts])
    assert np.allclose(np.linalg.norm(vectors, axis=1), worded, atol=1e-5)


def test_the_same_each_time_and_whatever_came_before():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{k}" for k in rng.zipf(1.5, 8) % 500) for _ in range(600)]
    first = LsaEncoder(32).encode(texts)
    np.random.seed(7)
    assert (LsaEncoder(32).encode(texts) == first).all() and first.shape == (600, 32)
    assert LsaEncoder(16).encode(texts).shape == (600, 16)


def test_many_texts_without_a_common_word():
    assert LsaEncoder().encode([f"word{k}" for k in range(150)]).shape[0] == 150


def test_mistakes():
    with pytest.raises(ValueError, match=r"^width: expected an integer >= 1, got 0"):
        LsaEncoder(0)
    with pytest.raises(ValueError, match="lsa finds no word in any text"):
        LsaEncoder().encode(["!", "?"])
