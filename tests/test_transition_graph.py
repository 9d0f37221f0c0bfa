"""The baseline of transitions and texts, against its definition written as loops."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from m2rec.compat import data_preparation
from m2rec.data.dataset import HistoryDataset
from m2rec.models.transition_graph import TransitionGraph
from m2rec.text.vector_file import load_item_vectors, read_text_vectors
from m2rec.training.configuration import build_config
from tests.conftest import as_arguments, small, write_inter

BOUND = 1e6


def write_histories(folder: Path, *histories: str) -> Path:
    """A data set whose users have these items, one letter each."""
    rows = [(f"u{u}", item, time) for u, items in enumerate(histories) for time, item in enumerate(items)]
    write_inter(folder, "toy", rows)
    return folder


def build(data: Path, **keys: object) -> tuple[TransitionGraph, HistoryDataset]:
    """The model and its test rows."""
    config = build_config(small(data, model="TransitionGraph", text_encoder="none", **keys))
    train, _, test = data_preparation(config, HistoryDataset(config))
    return TransitionGraph(config, train.dataset), test.dataset


def score_by_hand(trained: Sequence[str], history: str, last: bool) -> dict[str, float]:
    """The sum of the docstring without text, by loops over the histories of training."""
    counts: dict[tuple[str, str], float] = {}
    items = sorted({item for items in trained for item in items})
    for items_of_user in trained:
        for i, earlier in enumerate(items_of_user):
            for gap, later in enumerate(items_of_user[i + 1 : i + 11], 1):
                counts[earlier, later] = counts.get((earlier, later), 0) + gap**-0.5
                counts[later, earlier] = counts.get((later, earlier), 0) + 0.1 * gap**-0.5
    scores = {}
    for item in items:
        times = sum(items_of_user.count(item) for items_of_user in trained if len(items_of_user) > 1)
        score = 0.001 * math.log(1 + times)
        for age, source in enumerate(history[::-1][:5]):
            score += 0.7**age * math.log(1 + counts.get((source, item), 0))
        scores[item] = score - BOUND * (last and item in history)
    return scores


@pytest.mark.parametrize("rows", ["dense", "prefix"])
def test_scores_are_those_of_the_definition(tmp_path: Path, rows: str):
    """Users of one and two items, a history that is longer than L, an item that only a test has (z)."""
    users = ("abcdxy", "abxcdy", "bacyx", "c", "ab", "dcbaxyyxbadcdcz")
    model, test = build(write_histories(tmp_path, *users), rows=rows)
    trained = [items[: {1: 1, 2: 2, 3: 2}.get(len(items), len(items) - 2)] for items in users]
    scores = model.full_sort_predict(test.inter_feat)
    tokens = test.field2id_token["item_id"]
    assert scores.shape == (4, 8) and torch.isfinite(scores).all()
    for row, user in zip(scores, test.id2token("user_id", test.inter_feat["user_id"]), strict=True):
        history = users[int(user[1:])][:-1][-10:]
        expected = score_by_hand(trained, history, last=True)
        found = dict(zip(tokens[1:], row[1:].tolist(), strict=True))
        assert found.pop("z") == pytest.approx(0, abs=1e-8)
        assert found == pytest.approx(expected, abs=1e-8)


def test_the_ranking_by_hand(tmp_path: Path):
    """After a: b followed twice, c once, d came before a; e and f are equally popular, so by their ids."""
    data = write_histories(tmp_path, "abxy", "abxy", "acxy", "daxy", "efxy", "eaxy", "fdxy", "zaq")
    model, test = build(data)
    tokens = test.field2id_token["item_id"].tolist()
    rows = test.inter_feat["user_id"]
    row = model.full_sort_predict(test.inter_feat)[test.id2token("user_id", rows).tolist().index("u7")]
    assert test.inter_feat["item_id"][rows == test.token2id("user_id", "u7")].item() == tokens.index("q")
    ranked = [tokens[i] for i in row[1:].argsort(descending=True) + 1]
    # z came before a once more than d and e did not; the history, z and a, is last
    assert ranked[:2] == ["b", "c"] and set(ranked[2:4]) == {"d", "e"} and set(ranked[-2:]) == {"a", "z"}
    first, second = sorted(ranked[2:4], key=tokens.index)
    assert ranked[2:4] == [first, second]  # equal scores


def test_items_that_return_are_not_ranked_last(tmp_path: Path):
    model, test = build(write_histories(tmp_path, "abababab", "babababa", "ababaabb"))
    scores = model.full_sort_predict(test.inter_feat)
    assert (scores[:, 1:] > 0).all()
    history = test.inter_feat["item_id_list"][0, : test.inter_feat["item_length"][0]]
    tokens = test.field2id_token["item_id"]
    trained = ["ababab", "bababa", "ababaa"]
    expected = score_by_hand(trained, "".join(tokens[history]), last=False)
    assert dict(zip(tokens[1:], scores[0, 1:].tolist(), strict=True)) == pytest.approx(expected, abs=1e-8)


def test_text_adds_the_cosine_of_centred_vectors(toy: Path, write_vectors: Callable[..., Path]):
    tokens = [f"i{number}" for number in range(17)]  # three items have no text
    path = write_vectors(toy, "toy", tokens)
    config = build_config(small(toy, model="TransitionGraph"))
    train, _, test = data_preparation(config, HistoryDataset(config))
    without = TransitionGraph(config, train.dataset).full_sort_predict(test.dataset.inter_feat)
    names = [str(token) for token in train.dataset.field2id_token["item_id"]]
    train.dataset.item_vectors = load_item_vectors(path, names, "none")
    model = TransitionGraph(config, train.dataset)
    added = (model.full_sort_predict(test.dataset.inter_feat) - without).numpy()
    raw = read_text_vectors(path).vectors.double().numpy()
    centred = raw - raw.mean(0)
    unit = np.zeros((len(names), 8))
    for name, vector in zip(tokens, centred / np.linalg.norm(centred, axis=1, keepdims=True), strict=True):
        unit[names.index(name)] = vector
    rows = test.dataset.inter_feat
    for row, items, length in zip(added, rows["item_id_list"], rows["item_length"], strict=True):
        recent = items[:length].numpy()[::-1][:5]
        query = sum(0.5**age * unit[item] for age, item in enumerate(recent))
        assert row == pytest.approx(unit @ query, abs=2e-6)


@pytest.mark.parametrize("keys", [{}, {"text_vectors": "none"}, {"split": "global_time"}])
def test_a_run(
    command: Callable[..., tuple[int, str, str]],
    toy: Path,
    write_vectors: Callable[..., Path],
    keys: dict[str, str],
):
    write_vectors(toy, "toy", [f"i{number}" for number in range(20)])
    status, out, err = command(*as_arguments(small(toy, model="TransitionGraph", epochs=50, **keys)))
    assert status == 0, err
    metrics = json.loads((Path(out.splitlines()[-1]) / "metrics.json").read_text())
    assert metrics["model"] == "TransitionGraph" and metrics["epochs"] == 1
    assert (metrics["text"] is None) == (keys == {"text_vectors": "none"})
    assert metrics["test_new"]["hit@10"] > 0 and not metrics["recommends"]


def test_a_key_of_m2rec_is_ignored_and_a_wrong_one_named(
    command: Callable[..., tuple[int, str, str]], toy: Path
):
    keys = small(toy, model="TransitionGraph", text_encoder="none")
    status, _, err = command(*as_arguments(keys), "--gate=mean")
    assert status == 0 and "ignored by TransitionGraph: " in err and "gate" in err
    status, _, err = command(*as_arguments(keys), "--text_vectors=nowhere.safetensors")
    assert status == 2 and "text_vectors: no file 'nowhere.safetensors'" in err.splitlines()[-1]


def test_nothing_of_the_graph_is_saved(toy: Path):
    model, _ = build(toy)
    assert set(model.state_dict()) == {"nothing"}
