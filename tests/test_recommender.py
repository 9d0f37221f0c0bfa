"""A run folder as a Python object: the model's own ranking, and items that it has never met."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import m2rec
from m2rec.nn.encoder import Encoder
from m2rec.serving.id_lists import IdLists
from m2rec.serving.recommender import Recommender
from m2rec.serving.saved_model import build_saved_model
from m2rec.settings import ModelSettings
from m2rec.text import vector_file
from m2rec.training import run
from m2rec.training.configuration import build_config
from tests.conftest import copy_run, random_rows, small, write_inter, write_random_vectors
from tests.test_encoder import SMALL

TOKENS = [f"i{k}" for k in range(20)]


@pytest.fixture
def vectors(toy: Path, write_vectors: Callable[..., Path]) -> Path:
    return write_vectors(toy, "toy", [*TOKENS, "new", "newer"])


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, which has text vectors, and the run of it in `runs`."""
    root = tmp_path_factory.mktemp("trained")
    write_inter(root / "data", "toy", random_rows())
    write_random_vectors(root / "data", "toy", [*TOKENS, "new", "newer"])
    trained(root / "data", root)
    return root


@pytest.fixture
def folder(trained_once: Path, tmp_path: Path) -> Path:
    return copy_run(trained_once, tmp_path)


def trained(toy: Path, tmp_path: Path, **others: object) -> Path:
    return run.run_experiment(build_config(small(toy, runs_dir=str(tmp_path / "runs"), **others))).folder


def raw(vectors: Path, *tokens: str) -> torch.Tensor:
    names, all_vectors, _ = vector_file.read_text_vectors(vectors)
    return all_vectors[[names.index(token) for token in tokens]]


def test_scores_are_those_of_the_model(toy: Path, tmp_path: Path, folder: Path):
    """Each test row's history, as tokens, through the folder alone."""
    config = build_config(small(toy))
    dataset, (train, _, test) = run.load_data(config)
    model = run.find_model_class("M2Rec")(config, train.dataset)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    rows = test.dataset.inter_feat
    expected = model.eval().full_sort_predict(rows)
    names = dataset.field2id_token["item_id"]
    histories = [
        [str(names[i]) for i in items[:n]]
        for items, n in zip(rows["item_id_list"].tolist(), rows["item_length"].tolist(), strict=True)
    ]
    scores = Recommender.load(folder).scores(histories)
    torch.testing.assert_close(scores[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-5)
    assert (scores[:, 0] == -torch.inf).all()


def test_metrics_are_what_recommend_reaches(folder: Path):
    """Among the test targets are some that return; without the history they can't be recommended."""
    metrics = json.loads((folder / "metrics.json").read_text())
    ordered: dict[str, list[str]] = {}
    for user, item, _ in sorted(random_rows(), key=lambda row: row[2]):
        ordered.setdefault(str(user), []).append(str(item))
    tested = [items for items in ordered.values() if len(items) >= 3]
    recommender = Recommender.load(folder)

    def hits(exclude_seen: bool) -> list[bool]:
        ranked = recommender.recommend_batch([items[:-1] for items in tested], 5, exclude_seen)
        return [items[-1] in {i.item for i in best} for items, best in zip(tested, ranked, strict=True)]

    new = [items[-1] not in items[:-1] for items in tested]
    assert 0 < sum(new) < len(new) and metrics["data"]["test_returning"] == len(new) - sum(new)
    unseen = hits(exclude_seen=True)
    assert metrics["test"]["hit@5"] == pytest.approx(np.mean(hits(exclude_seen=False)), abs=1e-6)
    assert metrics["test_unseen"]["hit@5"] == pytest.approx(np.mean(unseen), abs=1e-6)
    assert metrics["test_new"]["hit@5"] == pytest.approx(np.mean(np.array(unseen)[new]), abs=1e-6)


def test_recommend(folder: Path):
    recommender = Recommender.load(str(folder))
    history = ["i3", "i5", "i3"]
    (scores,) = recommender.scores([history])
    found = recommender.recommend(history, k=4)
    assert [r.score for r in found] == sorted((r.score for r in found), reverse=True)
    seen = recommender.to_ids(history)
    left = {token: float(scores[i]) for i, token in enumerate(recommender.tokens) if i not in {0, *seen}}
    assert (found[0].item, found[0].score) == max(left.items(), key=lambda pair: pair[1])
    assert len(recommender.recommend(history, k=100)) == 18
    assert len(recommender.recommend(history, k=100, exclude_seen=False)) == 20


def test_only_the_end_of_a_long_history_counts(folder: Path):
    """But none of it is recommended."""
    recommender = Recommender.load(folder)
    end = TOKENS[:10]
    torch.testing.assert_close(recommender.scores([TOKENS[10:] + end]), recommender.scores([end]))
    found = recommender.recommend([*TOKENS[10:15], *end], k=100)
    assert {r.item for r in found} == set(TOKENS[15:])


def test_only_some_may_be_recommended(folder: Path):
    recommender, history = Recommender.load(folder), ["i3", "i5"]
    everything = recommender.recommend(history, k=100, exclude_seen=False)
    some = ["i9", "i3", "i1", "i17", "i9"]
    found = recommender.recommend(history, candidates=some, exclude=["i17", "nobody knows"])
    assert [r.item for r in found] == [r.item for r in everything if r.item in {"i9", "i1"}]
    found = recommender.recommend(history, exclude_seen=False, candidates=some)
    assert [r.item for r in found] == [r.item for r in everything if r.item in some]
    assert recommender.recommend(history, candidates=[]) == []
    with pytest.raises(ValueError, match="candidates: unknown item 'tea'"):
        recommender.recommend(history, candidates=["tea"])
    (only,) = recommender.recommend(history, candidates=["tea", "i9"], skip_unknown=True)
    assert only.item == "i9"


def test_after_nothing_the_popular_items(folder: Path, toy: Path, caplog: pytest.LogCaptureFixture):
    recommender = Recommender.load(folder)
    dataset, _ = run.load_data(build_config(small(toy)))
    counts = dataset.histories.training_counts(dataset.item_num)
    found = recommender.recommend([], k=30)
    assert [r.score for r in found] == sorted(counts[1:], reverse=True) and len(found) == 20
    assert all(counts[recommender.to_ids([r.item])[0]] == r.score for r in found)
    assert "1 empty histories: recommended the most popular items" in caplog.text
    (folder / "counts.json").unlink()
    with pytest.raises(ValueError, match="history: empty, and this run has no item counts to fall back on"):
        Recommender.load(folder).recommend([])


@pytest.mark.parametrize("content", ["[1, 2]", "{}", "[-1]", "[1.5]", "", "[true]"])
def test_counts_that_can_t_be_used(folder: Path, content: str):
    (folder / "counts.json").write_text(content)
    with pytest.raises(ValueError, match=r"counts\.json"):
        Recommender.load(folder)


def test_similar_items(folder: Path):
    recommender = Recommender.load(folder)
    found = recommender.similar_items("i3", k=100)
    assert len(found) == 19 and "i3" not in {r.item for r in found}
    table = torch.nn.functional.normalize(recommender.model.table[1:])
    cosines = dict(
        zip(recommender.tokens[1:], (table @ table[recommender.to_ids(["i3"])[0] - 1]).tolist(), strict=True)
    )
    assert [r.score for r in found] == pytest.approx([cosines[r.item] for r in found], abs=1e-5)
    assert [r.score for r in found] == sorted((r.score for r in found), reverse=True)
    assert [r.item for r in recommender.similar_items("i3", k=1)] == [found[0].item]


def test_numbers_of_numpy_and_arrays_of_tokens(folder: Path):
    recommender = Recommender.load(folder)
    expected = recommender.recommend(["i3"], k=2, exclude=["i5"])
    assert recommender.recommend(np.array(["i3"]), k=np.int64(2), exclude=np.array(["i5"])) == expected
    for wrong in (0, True, 1.5, "2"):
        with pytest.raises(ValueError, match="k: expected a whole number from 1"):
            recommender.recommend_batch([], k=wrong)


def test_scores_have_no_gradient(folder: Path, toy: Path, tmp_path: Path):
    bare = Recommender.load(trained(toy, tmp_path, epochs=1, text_vectors="none"))
    for recommender in (bare, Recommender.load(folder)):
        assert not recommender.scores([["i3"]]).requires_grad
        assert not recommender.model.table.requires_grad


def test_a_model_that_never_sees_more_than_in_training(toy: Path, tmp_path: Path):
    own = trained(toy, tmp_path, epochs=1, mixer="attention")
    assert len(Recommender.load(own).recommend(TOKENS, exclude_seen=False)) == 10
    with pytest.raises(ValueError, match="mixer: 'attention' needs the whole history at once"):
        Recommender.load(own, whole_history=True)


def test_explain(folder: Path):
    recommender = Recommender.load(folder)
    history = ["i3", "i5", "i3"]
    explained = recommender.explain(history)
    assert [event.item for event in explained] == history
    _, weights = recommender.model.encoder.encode_with_gate_weights(
        torch.tensor([recommender.to_ids(history)]), torch.tensor([3])
    )
    for place, event in enumerate(explained):
        assert list(event.weights) == ["temporal", "frequency", "semantic"]
        assert sum(event.weights.values()) == pytest.approx(1, abs=1e-5)
        assert len(event.by_layer) == len(weights)
        for layer, own in zip(weights, event.by_layer, strict=True):
            assert list(own.values()) == pytest.approx(layer[0, place].mean(-1).tolist())
    assert len(recommender.explain(TOKENS)) == recommender.model.max_length
    with pytest.raises(ValueError, match="history: empty"):
        recommender.explain([])


def test_it_needs_no_recbole(folder: Path):
    code = (
        "import sys; sys.modules['recbole'] = None\n"
        "from m2rec import Recommender\n"
        f"print(Recommender.load({str(folder)!r}).recommend(['i3'], k=1)[0].item)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == Recommender.load(folder).recommend(["i3"], k=1)[0].item


def test_new_items_from_their_text(folder: Path, vectors: Path):
    """Nothing changes for the old ones; a new one's part of the table is the projection of its text."""
    recommender = Recommender.load(folder)
    histories = [["i1", "i2"], ["i7"]]
    before = recommender.scores(histories)
    recommender.add_items(["new", "newer"], raw(vectors, "new", "newer"))
    after = recommender.scores(histories)
    assert recommender.tokens[-2:] == ("new", "newer") and after.shape == (2, 23)
    torch.testing.assert_close(after[:, :21], before)
    weights = load_file(folder / "model.safetensors")
    treated = (raw(vectors, "newer")[0] - weights["text_mean"]) @ weights["text_basis"]
    row = weights["encoder.table_text.linear.weight"] @ treated
    weights_before = weights["encoder.id_embedding.weight"]
    state = recommender.model.encoder.state_dict()
    assert torch.equal(state["id_embedding.weight"][:21], weights_before)
    torch.testing.assert_close(recommender.model.table[-1], row)
    assert not torch.allclose(recommender.scores([["i1", "new"]]), recommender.scores([["i1", "newer"]]))
    assert len(recommender.recommend(["new"], k=100)) == 21


def test_a_text_that_is_known_ranks_as_that_item_would_without_its_clicks(folder: Path, vectors: Path):
    recommender = Recommender.load(folder)
    known = recommender.to_ids(["i4"])[0]
    recommender.model.encoder.id_embedding.weight.data[known] = 0
    recommender.add_items(["again"], raw(vectors, "i4").numpy())
    scores = recommender.scores([["i1", "i2"]])[0]
    torch.testing.assert_close(scores[-1], scores[known], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["metrics.json", "checkpoint.safetensors", "history.csv"])
def test_a_runs_own_folder_is_left_alone(folder: Path, tmp_path: Path, name: str):
    recommender = Recommender.load(folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("")
    with pytest.raises(ValueError, match=r"save: .* is a run's own folder; give another"):
        recommender.save(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_saving_leaves_nothing_of_another_model(folder: Path, tmp_path: Path):
    recommender = Recommender.load(folder)
    recommender.save(tmp_path / "saved")
    Recommender(replace(recommender.model, item_counts=(), titles={})).save(tmp_path / "saved")
    loaded = Recommender.load(tmp_path / "saved")
    assert loaded.titles == {} and loaded.model.item_counts == ()


def test_added_items_are_saved(folder: Path, tmp_path: Path, vectors: Path):
    recommender = Recommender.load(folder)
    recommender.add_items(["new"], raw(vectors, "new"))
    recommender.save(tmp_path / "more" / "saved")
    loaded = Recommender.load(tmp_path / "more" / "saved")
    assert loaded.tokens == recommender.tokens
    assert torch.equal(loaded.scores([["new", "i3"]]), recommender.scores([["new", "i3"]]))
    loaded.add_items(["newer"], raw(vectors, "newer"))
    assert loaded.recommend(["newer"], k=1)


def test_new_items_from_a_file(folder: Path, vectors: Path, tmp_path: Path):
    """What is known is left alone, what is silent left out; the titles come along."""
    tokens, given, about = vector_file.read_text_vectors(vectors)
    path = tmp_path / "again.text.safetensors"
    vector_file.write_text_vectors(
        path, [*tokens, "silent"], torch.cat([given, torch.zeros(1, 8)]).numpy(), about
    )
    recommender, other = Recommender.load(folder), Recommender.load(folder)
    assert recommender.add_items_from(path, {"new": "New one", "i3": "Old one"}) == ["new", "newer"]
    other.add_items(["new", "newer"], raw(vectors, "new", "newer"))
    assert torch.equal(recommender.scores([["i1", "new"]]), other.scores([["i1", "new"]]))
    assert recommender.titles == {"new": "New one"}
    recommender.save(tmp_path / "saved")
    loaded = Recommender.load(tmp_path / "saved")
    assert loaded.titles == recommender.titles and loaded.text_source == recommender.text_source
    assert loaded.add_items_from(path) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"model": "a"}, {"model": "b"}, "has vectors of b, the run of a, and model is 'b', not 'a'"),
        ({"model": "a", "pooling": "cls"}, {"model": "a", "pooling": "mean"}, "pooling is 'mean', not 'cls'"),
        ({"model": "a", "model_sha256": "1"}, {"model": "a", "model_sha256": "2"}, "model_sha256 is '2'"),
        ({"model": "a", "model_sha256": "1"}, {"model": "b", "model_sha256": "1"}, None),
        (
            {"model": "a", "model_sha256": "1", "revision": "x"},
            {"model": "a", "model_sha256": "1", "revision": "y"},
            "revision is 'y', not 'x'",
        ),
        (  # a hash of the settings, which another version of transformers lists otherwise
            {"model": "a", "model_sha256": "1", "revision": "x"},
            {"model": "a", "model_sha256": "2", "revision": "x"},
            None,
        ),
        ({"model": "a", "instruction": "q: "}, {"model": "a"}, "instruction is '', not 'q: '"),
        ({"model": "a"}, {"model": "a", "instruction": "", "revision": "x"}, None),  # the shipped file
        ({}, {"model": "a"}, "the run does not say which model made its vectors"),
        ({"model": "a"}, {}, "safetensors does not say which model made its vectors"),
        ({"model": "lsa"}, {"model": "lsa"}, "can't be added: lsa is fitted to its own texts"),
    ],
)
def test_only_vectors_that_were_made_alike(
    folder: Path, vectors: Path, ours: dict[str, str], theirs: dict[str, str], message: str | None
):
    tokens, given, _ = vector_file.read_text_vectors(vectors)
    vector_file.write_text_vectors(vectors, tokens, given.numpy(), theirs)
    recommender = Recommender.load(folder)
    recommender = Recommender(replace(recommender.model, text_source=ours))
    if message is None:
        assert recommender.add_items_from(vectors) == ["new", "newer"]
        return
    with pytest.raises(ValueError, match=message):
        recommender.add_items_from(vectors)
    assert len(recommender.tokens) == 21


def test_an_item_with_the_name_of_padding(toy: Path, tmp_path: Path):
    path = toy / "toy" / "toy.inter"
    path.write_text(path.read_text().replace("\ti3\t", "\t[PAD]\t"))
    recommender = Recommender.load(trained(toy, tmp_path, text_vectors="none"))
    assert "[PAD]" in {r.item for r in recommender.recommend(["i1"], k=100)}
    assert recommender.to_ids(["[PAD]"]) != [0] and recommender.recommend(["[PAD]"])


@pytest.mark.parametrize("title", [5, float("nan"), None])
def test_a_title_that_is_no_text(folder: Path, vectors: Path, title: Any):
    recommender = Recommender.load(folder)
    with pytest.raises(ValueError, match="add_items: the title of 'new' is "):
        recommender.add_items_from(vectors, {"new": title})
    assert len(recommender.tokens) == 21


@pytest.mark.parametrize(
    ("tokens", "given", "message"),
    [
        (["i3"], torch.ones(1, 8), "'i3' is already in the catalogue"),
        (["a", "a"], torch.ones(2, 8), "'a' is already in the catalogue"),
        (["a"], torch.ones(1, 7), r"vectors of shape \(1, 7\) for 1 items; expected \(1, 8\)"),
        (["a", "b"], torch.tensor([[1.0] * 8, [0.0] * 8]), "'b' has no text vector"),
        (["a"], torch.tensor([[torch.nan] * 8]), "'a' has no text vector"),
        ("ab", torch.ones(2, 8), "expected a list of item tokens, got one string, 'ab'"),
        ([3], torch.ones(1, 8), "3 is not a string"),
    ],
)
def test_items_that_can_t_be_added(folder: Path, tokens: Any, given: torch.Tensor, message: str):
    recommender = Recommender.load(folder)
    before = recommender.scores([["i1"]])
    with pytest.raises(ValueError, match=message):
        recommender.add_items(tokens, given)
    assert torch.equal(recommender.scores([["i1"]]), before) and len(recommender.tokens) == 21


def test_a_model_without_text_in_the_table_takes_none(toy: Path, tmp_path: Path, vectors: Path):
    for others, message in (
        ({"text_vectors": "none"}, "item text"),
        ({"text_in_table": False}, "text in its item table"),
    ):
        recommender = Recommender.load(trained(toy, tmp_path, epochs=1, **others))
        with pytest.raises(ValueError, match=f"add_items: the model has no {message};"):
            recommender.add_items(["new"], torch.ones(1, 8))
        with pytest.raises(ValueError, match=f"add_items: the model has no {message};"):
            recommender.add_items_from(vectors)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (["i3", "gone"], "unknown item 'gone'; remove it or train again"),
        ("i3", r"expected a list of item tokens, got one string, 'i3'; write \['i3'\]"),
        ([3], "unknown item 3; item tokens must be strings"),
    ],
)
def test_histories_that_can_t_be_used(folder: Path, history: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Recommender.load(folder).recommend(history)


def test_a_folder_of_another_version_says_so(folder: Path):
    config, metrics = (folder / "config.yaml"), (folder / "metrics.json")
    config.write_text(config.read_text().replace("n_layers: 2", "n_layers: 3"))
    with pytest.raises(ValueError, match=r"the weights don't fit config\.yaml and items\.json \(.*\)$"):
        Recommender.load(folder)
    content = json.loads(metrics.read_text())
    content["versions"]["m2rec"] = "9.9"
    metrics.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"; m2rec 9.9 made it, this is {m2rec.__version__}$"):
        Recommender.load(folder)


def test_scores_need_a_history(folder: Path):
    with pytest.raises(ValueError, match="history: empty; give at least one item"):
        Recommender.load(folder).scores([["i1"], []])


def test_odd_but_right_questions(folder: Path):
    recommender = Recommender.load(folder, torch.device("cpu"))
    assert recommender.scores([]).shape == (0, 21)
    assert recommender.recommend(t for t in ["i3"]) == recommender.recommend(["i3"])
    for k in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match=f"k: expected a whole number from 1, got {k}"):
            recommender.recommend(["i3"], k=k)


def test_a_run_is_not_written_over(folder: Path):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"save: .* is a run's own folder"):
        Recommender.load(folder).save(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_other_devices(folder: Path):
    with pytest.raises(ValueError, match="device: 'mps' is not supported; use cpu or cuda"):
        Recommender.load(folder, "mps")
    with pytest.raises(ValueError, match="device: invalid device 'gpu'; use cpu, cuda or cuda:0"):
        Recommender.load(folder, "gpu")
    with pytest.raises(ValueError, match="device: cuda:77 is not available; use cpu"):
        Recommender.load(folder, "cuda:77")


def test_mamba4rec_is_made_of_the_same_parts(toy: Path, tmp_path: Path):
    values = small(
        toy, runs_dir=str(tmp_path / "runs"), model="Mamba4Rec", epochs=1, scan_backend="reference"
    )
    folder = run.run_experiment(build_config(values)).folder
    assert len(Recommender.load(folder).recommend(["i3"], k=5)) == 5


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", None, "config.yaml' can't be read"),
        ("config.yaml", "MAX_ITEM_LIST_LENGTH: ten", "MAX_ITEM_LIST_LENGTH: expected auto or a whole number"),
        ("config.yaml", "- 1", "expected lines of 'key: value'"),
        ("config.yaml", "model: !!python/object/apply:os.getcwd []", "config.yaml' is not valid YAML"),
        ("items.json", "{", "items.json can't be read"),
        ("items.json", '["[PAD]", "a", "a"]', "items.json must be a list of unique strings"),
        ("items.json", '["[PAD]", ["a"]]', "items.json must be a list of unique strings"),
        ("items.json", json.dumps(["[PAD]", "i1"]), "the weights don't fit config.yaml and items.json"),
        ("model.safetensors", "", "model.safetensors can't be read"),
    ],
)
def test_folders_that_can_t_be_used(folder: Path, file: str, content: str | None, message: str):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        Recommender.load(folder)


def test_another_model(toy: Path, tmp_path: Path):
    values = small(toy, runs_dir=str(tmp_path / "runs"), model="SASRec", epochs=1)
    values = {k: v for k, v in values.items() if k not in ("head_dim", "d_state")}
    folder = run.run_experiment(build_config(values)).folder
    with pytest.raises(ValueError, match="model: 'SASRec' is not made of M2Rec's parts"):
        Recommender.load(folder)


@pytest.fixture
def large() -> Recommender:
    """Untrained, of so many items that an index is worth it."""
    torch.manual_seed(1)
    encoder = Encoder(ModelSettings(**SMALL), 4001, 12).eval()
    torch.nn.init.normal_(encoder.id_embedding.weight)
    assert encoder.repeat_bias is not None
    encoder.repeat_bias.data.fill_(2.0)
    tokens = ["[PAD]", *(f"i{k}" for k in range(4000))]
    nothing: dict[str, Any] = {"titles": {}, "text_mean": None, "text_basis": None, "text_source": {}}
    config = {"MAX_ITEM_LIST_LENGTH": 12}
    return Recommender(build_saved_model(encoder, tokens, counts=range(4001), config=config, **nothing))


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_an_index_that_looks_everywhere_misses_nothing(large: Recommender, exclude_seen: bool):
    histories = [["i1", "i2", "i1"], [], [f"i{k}" for k in range(50)], ["i3999"]]
    best = [item.item for item in large.recommend(histories[0])]

    def ranked(**given: Any) -> list[list[Any]]:
        return list(large.recommend_batch(histories, 10, exclude_seen, **given))

    exact = ranked(), ranked(exclude=best)
    large.use_index(probes=10_000)
    for found, expected in zip((ranked(), ranked(exclude=best)), exact, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert [item.item for item in ours] == [item.item for item in theirs] and len(ours) == 10
            assert [item.score for item in ours] == pytest.approx([i.score for i in theirs], rel=1e-5)
    assert large.recall(histories) == 1


def test_what_the_lists_do_not_hold_is_ranked_exactly(large: Recommender):
    exact = large.recommend(["i1"], k=200)
    large.use_index(probes=1)
    assert large.recommend(["i1"], k=200) == exact and len(exact) == 200
    assert large.recommend(["i1"], k=5000) and len(large.recommend(["i1"], k=5000)) == 3999


def test_with_an_index_a_ranking_does_not_depend_on_who_else_asks(large: Recommender):
    large.use_index(probes=2)
    short, long = ["i1", "i2"], [f"i{k}" for k in range(600)]
    together = list(large.recommend_batch([short, long, [*short, "i3"]], 10))
    for history, found in zip([short, long, [*short, "i3"]], together, strict=True):
        alone = large.recommend(history)
        assert [item.item for item in found] == [item.item for item in alone]


def test_a_seen_item_that_the_index_does_not_find_keeps_its_bias(large: Recommender):
    bias = large.model.encoder.repeat_bias
    assert bias is not None
    bias.data.fill_(1000.0)
    large.use_index(probes=1)
    for k in range(20):
        best = large.recommend([f"i{k}", f"i{k + 1}"], k=2, exclude_seen=False)
        assert {item.item for item in best} == {f"i{k}", f"i{k + 1}"}


def test_an_index_finds_more_the_more_it_looks_at(large: Recommender):
    histories = [[f"i{k}", f"i{k + 1}"] for k in range(100)]
    large.use_index(probes=1)
    little = large.recall(histories, k=5)
    large.use_index(probes=50)
    assert 0 < little < large.recall(histories, k=5) < 1
    session = large.session(histories[0])
    assert [item.item for item in session.recommend()] == [i.item for i in large.recommend(histories[0])]


def test_an_index_takes_new_items(folder: Path, vectors: Path, monkeypatch: pytest.MonkeyPatch):
    recommender, exact = Recommender.load(folder), Recommender.load(folder)
    recommender.use_index()
    for one in (recommender, exact):
        one.add_items(["new"], raw(vectors, "new"))

    def never(*_: object) -> None:
        raise AssertionError("ranked without the index")

    monkeypatch.setattr("m2rec.serving.item_index._MIN_CATALOGUE_RATIO", 1)
    best = exact.recommend(["i1"], k=15)
    monkeypatch.setattr("m2rec.serving.ranker.select_top_k", never)
    found = recommender.recommend(["i1"], k=15)
    assert [item.item for item in found] == [item.item for item in best]
    assert "new" in {item.item for item in found}


def test_a_batch_under_way_goes_on_as_it_began(
    folder: Path, vectors: Path, large: Recommender, monkeypatch: pytest.MonkeyPatch
):
    """Whatever is changed meanwhile: new items, an index, how much of it is looked at."""
    monkeypatch.setattr("m2rec.serving.ranker._RANKING_BATCH_SIZE", 1)
    recommender = Recommender.load(folder)
    histories = [["i1"], ["i2"], ["i3"]]
    before = list(recommender.recommend_batch(histories, k=20))
    under_way = recommender.recommend_batch(histories, k=20)
    assert next(under_way) == before[0]
    recommender.add_items(["new"], raw(vectors, "new"))
    assert list(under_way) == before[1:]
    assert "new" in {item.item for item in recommender.recommend(["i1"], k=20)}

    histories = [[f"i{k}", f"i{k + 1}"] for k in range(30)]
    large.use_index(probes=1)
    before = list(large.recommend_batch(histories))
    under_way = large.recommend_batch(histories)
    assert next(under_way) == before[0]
    large.use_index(probes=1000)
    assert list(under_way) == before[1:] != list(large.recommend_batch(histories))[1:]


def test_questions_to_an_index_that_have_no_answer(large: Recommender, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"recall: there is no index; call use_index first"):
        large.recall([["i1"]])
    for probes in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"probes: expected a whole number from 0, got {probes}"):
            large.use_index(probes)  # type: ignore[arg-type]
    large.use_index()
    with pytest.raises(ValueError, match=r"recall: nothing can be recommended after these histories"):
        large.recall([])
    with pytest.raises(ValueError, match=r"recall: nothing can be recommended after these histories"):
        large.recall([[], large.tokens[1:]])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"index: faiss is not installed; run: pip install faiss-cpu"):
        Recommender(large.model).use_index()


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_int8_finds_what_is_then_ranked_exactly(
    large: Recommender, exclude_seen: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("m2rec.serving.int8_table._MIN_ITEMS", 0)
    coarse = Recommender(large.model, precision="int8")
    histories = [[f"i{k}" for k in range(start, start + 15)] for start in range(0, 600, 15)]
    expected = list(large.recommend_batch(histories, 10, exclude_seen, exclude=["i7"]))
    with monkeypatch.context() as patch:
        patch.setattr("m2rec.serving.ranker.select_top_k", None)  # would score all items
        found = [coarse.recommend(history, 10, exclude_seen, exclude=["i7"]) for history in histories]
    for one, other in zip(found, expected, strict=True):
        assert [entry.item for entry in one] == [entry.item for entry in other]
        assert [entry.score for entry in one] == pytest.approx([entry.score for entry in other], abs=1e-5)
    assert list(coarse.recommend_batch(histories, 10, exclude_seen, exclude=["i7"])) == expected
    assert len(coarse.recommend(histories[0], 5000)) == 4000 - 15
    with pytest.raises(ValueError, match="precision: 'int4' is not one of float32, int8"):
        Recommender(large.model, precision="int4")


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_a_batch_ranks_as_item_by_item(large: Recommender, exclude_seen: bool):
    """To the last bit, with duplicates and with items before those that the model sees, which get no bias."""
    generator = np.random.default_rng(0)
    histories = [[f"i{k}" for k in generator.integers(0, 60, size)] for size in (1, 5, 12, 13, 40, 200, 2)]
    ids = [large.to_ids(history) for history in histories]
    vectors = large._ranker._encode_histories(IdLists.build(ids).truncate(12))
    table, bias = large.model.table, np.float32(2)
    found = large.recommend_batch(histories, 50, exclude_seen)
    scores = torch.nn.functional.linear(vectors, table[1:]).detach().numpy()
    for history, row, ranking in zip(ids, scores, found, strict=True):
        expected = []
        for item, score in enumerate(row, start=1):
            if exclude_seen and item in history:
                continue
            if not exclude_seen and item in history[-12:]:
                score += bias
            expected.append((large.tokens[item], float(score), ""))
        expected.sort(key=lambda entry: -entry[1])
        assert ranking == expected[:50]
        alone = large.recommend([large.tokens[item] for item in history], 50, exclude_seen)
        assert [entry.item for entry in alone] == [entry.item for entry in ranking]


def test_histories_of_all_lengths_in_any_order(large: Recommender, monkeypatch: pytest.MonkeyPatch):
    histories = [[f"i{k}" for k in range(n)] for n in (3, 1, 12, 1, 40, 7, 12, 2)]
    alone = [large.recommend(history) for history in histories]
    for at_once in (1, 12, 24, 1000):
        monkeypatch.setattr("m2rec.serving.ranker._POSITION_BUDGETS", {"cpu": at_once})
        for found, own in zip(large.recommend_batch(histories, 10), alone, strict=True):
            assert [item.item for item in found] == [item.item for item in own]
            assert [item.score for item in found] == pytest.approx([i.score for i in own], abs=1e-5)
