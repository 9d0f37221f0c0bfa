"""Neighbours: counted as loops do, chosen as whole rankings choose, and served as measured."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional as F

from m2rec.commands.evaluate import evaluate_run
from m2rec.data import transitions
from m2rec.data.histories import Histories
from m2rec.evaluation.measurement import measure_protocol
from m2rec.evaluation.protocols import Protocol
from m2rec.evaluation.ranking import Ranking, rank_rows
from m2rec.nn import neighbors as module
from m2rec.nn.encoder import Encoder
from m2rec.nn.neighbors import Neighbors, find_similar_items
from m2rec.reports.baselines import describe_comparison, list_compared_models
from m2rec.run_folder import RunFolder
from m2rec.serving.recommender import Recommender
from m2rec.serving.saved_model import build_saved_model
from m2rec.settings import ModelSettings
from m2rec.text import vector_file
from m2rec.training import neighbor_weights
from m2rec.training.configuration import build_config
from m2rec.training.neighbor_weights import build_neighbors, choose_weights
from m2rec.training.run import PreparedRun, RunResult, build_resumed_config, prepare_run, run_experiment
from m2rec.training.signals import RunInterrupted
from tests.conftest import small, write_inter
from tests.test_session import V, make_neighbors, recommender

N_ITEMS = 40


@pytest.fixture
def chains(tmp_path: Path, write_vectors: Callable[..., Path]) -> Path:
    """A data set in which three of four times the next item is the next number; with texts."""
    random = np.random.default_rng(0)
    rows = []
    for user in range(60):
        item = int(random.integers(N_ITEMS))
        for time in range(4 + user % 9):
            rows.append((f"u{user}", f"i{item}", time))
            item = (item + 1) % N_ITEMS if random.random() < 0.75 else int(random.integers(N_ITEMS))
    write_inter(tmp_path / "data", "chains", rows)
    write_vectors(tmp_path / "data", "chains", [f"i{k}" for k in range(N_ITEMS)])
    return tmp_path / "data"


def configure(chains: Path, **keys: object) -> Any:
    runs = str(chains.parent / "runs")
    values = {"neighbors": True, "epochs": 1, "runs_dir": runs, **keys}
    return build_config(small(chains, "chains", **values))


@pytest.fixture
def histories() -> Histories:
    random = np.random.default_rng(1)
    lengths = random.integers(1, 30, 50)
    owner = np.repeat(np.arange(1, 51), lengths)
    return Histories(owner, random.integers(1, 20, len(owner)))


def test_in_blocks_or_at_once(histories: Histories, monkeypatch: pytest.MonkeyPatch):
    whole = transitions.count_transitions(histories, 25)
    assert len(whole.offsets) == 26 and whole.offsets[-1] == len(whole.targets) > 200
    for size in (1, 100, 3000):
        monkeypatch.setattr(transitions, "_BLOCK_PAIRS", size)
        for ours, theirs in zip(transitions.count_transitions(histories, 25), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_strongest_edges_are_kept(histories: Histories):
    whole, few = (transitions.count_transitions(histories, 25, n) for n in (None, 5))
    for item in range(25):
        edges = range(*whole.offsets[item : item + 2])
        strongest = sorted(edges, key=lambda e: (-whole.strengths[e], whole.targets[e]))[:5]
        kept = slice(*few.offsets[item : item + 2])
        assert few.targets[kept].tolist() == [whole.targets[e] for e in sorted(strongest)]
        assert few.strengths[kept].tolist() == [whole.strengths[e] for e in sorted(strongest)]


def test_without_a_history_there_are_none():
    nothing = Histories(np.array([1]), np.array([3]))
    assert transitions.count_transitions(nothing, 5).offsets.tolist() == [0] * 6


def test_scores_are_those_of_the_definition():
    """Shorter and longer histories than count, an item twice, neighbours twice."""
    neighbors = make_neighbors(V)
    for items in ([3], [5, 5, 7], [1, 2, 3, 4, 5, 6, 7, 3]):
        expected = torch.zeros(V)
        for kind, decay in (("transitions", 0.7), ("text", 0.5)):
            table = neighbors[kind]
            for age, item in enumerate(items[::-1][:5]):
                for near, strength in zip(table.ids[item], table.strengths[item], strict=True):
                    expected[near] += table.weight * decay**age * strength
        padded = torch.tensor([items + [0] * 4])
        found = neighbors.add_to_all_scores(torch.ones(1, V), padded, torch.tensor([len(items)]))[0] - 1
        torch.testing.assert_close(found, expected)
        for item in (0, 3, 20):
            given = (torch.ones(1), torch.tensor([item]), padded, torch.tensor([len(items)]))
            torch.testing.assert_close(neighbors.add_to_item_scores(*given)[0] - 1, expected[item])


@pytest.mark.parametrize("width", [3, 64])
@pytest.mark.parametrize("block", [1, 70, 2**24])
def test_similar_items_are_those_of_greatest_cosine(width: int, block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_BLOCK_SCORES", block)
    vectors = torch.randn(30, 4)
    vectors[[0, 7]] = 0  # padding, and an item without text
    table = find_similar_items(vectors, width)
    cosines = F.cosine_similarity(vectors[:, None], vectors[None], dim=2)
    for item in range(30):
        near = {j: float(cosines[item, j]) for j in range(30) if j != item and cosines[item, j] > 1e-6}
        best = sorted(near, key=near.__getitem__, reverse=True)[:width]
        n = len(best)
        assert table.ids[item, :n].tolist() == best and not table.ids[item, n:].any()
        assert table.strengths[item, :n].tolist() == pytest.approx([near[j] for j in best], abs=1e-5)
        assert not table.strengths[item, n:].any()


def test_new_items_are_neighbours_as_if_they_had_been_there():
    vectors = F.pad(torch.randn(40, 5), (0, 0, 1, 0))
    neighbors = make_neighbors(31, width=8)
    neighbors["text"] = find_similar_items(vectors[:31], 8)
    longer = neighbors.with_more_items(vectors)
    expected = find_similar_items(vectors, 8)
    torch.testing.assert_close(longer["text"].strengths, expected.strengths)
    assert torch.equal(longer["text"].ids, expected.ids)
    assert torch.equal(longer["transitions"].ids[:31], neighbors["transitions"].ids)
    assert not longer["transitions"].ids[31:].any() and longer["transitions"].weight == 3


@pytest.fixture
def prepared(chains: Path) -> PreparedRun:
    prepared = prepare_run(configure(chains))
    prepared.train()
    prepared.trainer.load_best_weights()
    prepared.trainer.model.eval()
    return prepared


def rank_with(prepared: PreparedRun, neighbors: Neighbors, weights: tuple[float, ...]) -> Ranking:
    """The whole rankings of all items, with neighbours of these weights in the network."""
    for table, weight in zip(neighbors.values(), weights, strict=True):
        table.weight.fill_(weight)
    prepared.trainer.model.encoder.neighbors = neighbors
    protocols = (Protocol.ALL, Protocol.UNSEEN)
    ranking = rank_rows(prepared.trainer.score, prepared.loaders.valid, iter, protocols)
    prepared.trainer.model.encoder.neighbors = None
    return ranking


def take_protocol(ranking: Ranking, protocol: Protocol) -> Ranking:
    return replace(ranking, items={protocol: ranking.items[protocol]})


def test_the_weights_are_the_best_of_all_pairs(prepared: PreparedRun, monkeypatch: pytest.MonkeyPatch):
    """Against a whole ranking of all items for each pair, by two metrics under both protocols."""
    monkeypatch.setattr(neighbor_weights, "_BATCH_SCORES", 300)
    monkeypatch.setattr(neighbor_weights, "_FACTORS", ())
    prepared.config["metrics"] = ["NDCG", "ItemCoverage"]
    trainer, loader = prepared.trainer, prepared.loaders.valid
    trainer.evaluate_protocols(loader)
    neighbors = build_neighbors(trainer.model.encoder, prepared.loaders.train.dataset)
    kinds = list(product(["NDCG@10", "ItemCoverage@5"], [Protocol.ALL, Protocol.UNSEEN]))
    choices = {}
    for metric, protocol in kinds:
        prepared.config["valid_metric"] = metric
        choices[metric, protocol] = choose_weights(neighbors, trainer.score, loader, protocol)
    pairs = list(product(*neighbor_weights._WEIGHTS.values()))
    rankings = {pair: rank_with(prepared, neighbors, pair) for pair in pairs}
    for metric, protocol in kinds:
        choice, results = choices[metric, protocol], {}
        for pair, ranking in rankings.items():
            own = take_protocol(ranking, protocol)
            results[pair] = measure_protocol(own, protocol, loader.dataset)[metric.lower()]
        assert choice.without == results[0, 0], (metric, protocol)
        assert choice.best == max(results.values()) == results[tuple(choice.weights.values())]
        assert choice.best > choice.without and choice.n_users == len(loader.dataset)


def test_both_weights_grow_as_long_as_validation_loses_no_more_than_its_error(
    prepared: PreparedRun, monkeypatch: pytest.MonkeyPatch
):
    trainer, loader = prepared.trainer, prepared.loaders.valid
    trainer.evaluate_protocols(loader)
    neighbors = build_neighbors(trainer.model.encoder, prepared.loaders.train.dataset)
    factors = (1.2, 1.5, 2, 3, 100)
    assert choose_weights(neighbors, trainer.score, loader, Protocol.UNSEEN).factor == 1  # of so few users
    monkeypatch.setattr(neighbor_weights, "_MIN_USERS_TO_MULTIPLY", 60)
    monkeypatch.setattr(neighbor_weights, "_FACTORS", ())
    pair = choose_weights(neighbors, trainer.score, loader, Protocol.UNSEEN).weights
    assert all(pair.values())
    monkeypatch.setattr(neighbor_weights, "_FACTORS", factors)
    choice = choose_weights(neighbors, trainer.score, loader, Protocol.UNSEEN)
    gains = {}
    for factor in (1, *factors):
        weights = tuple(factor * weight for weight in pair.values())
        ranking = take_protocol(rank_with(prepared, neighbors, weights), Protocol.UNSEEN)
        ranks, _ = ranking.select_rows(Protocol.UNSEEN)
        gains[factor] = np.where(ranks > 0, 1 / np.log2(np.maximum(ranks, 1) + 1), 0)
    best = max(gains.values(), key=np.mean)
    kept = 1
    for factor, gain in gains.items():
        lost = [(best - gain)[fold::20].mean() for fold in range(20)]
        if np.mean(best - gain) <= np.std(lost, ddof=1) / 20**0.5 + 1e-9:
            kept = factor
    assert kept not in (1, 100) and choice.factor == kept
    assert choice.weights == {kind: kept * weight for kind, weight in pair.items()}
    assert choice.best == pytest.approx(gains[kept].mean(), abs=1e-4)
    monkeypatch.setattr(neighbor_weights, "_WEIGHTS", {kind: (weight,) for kind, weight in pair.items()})
    choice = choose_weights(neighbors, trainer.score, loader, Protocol.UNSEEN)
    assert choice.factor == 1 and choice.weights == pair  # no weight is greater than those of the pairs


def test_few_users_choose_where_there_are_many(prepared: PreparedRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neighbor_weights, "_MAX_USERS", 20)
    trainer = prepared.trainer
    trainer.evaluate_protocols(prepared.loaders.valid)
    neighbors = build_neighbors(trainer.model.encoder, prepared.loaders.train.dataset)
    assert choose_weights(neighbors, trainer.score, prepared.loaders.valid, Protocol.ALL).n_users == 20


def test_many_texts_are_not_compared(
    prepared: PreparedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(neighbor_weights, "_MAX_SIMILARITY_WORK", 100)
    neighbors = build_neighbors(prepared.trainer.model.encoder, prepared.loaders.train.dataset)
    assert list(neighbors) == ["transitions"]
    assert "neighbors: none by text: to compare 41 items would take too long" in caplog.text


def run(chains: Path, **keys: object) -> RunResult:
    return run_experiment(configure(chains, **keys))


def test_a_run_reports_what_its_folder_reaches(chains: Path):
    """And beside it the network alone, as a run without neighbours has it."""
    result = run(chains, report=True)
    plain = run(chains, neighbors=False, report=True)
    pages = [(one.folder / "report.html").read_text() for one in (result, plain)]
    assert ["is the trained network alone" in page for page in pages] == [True, False]
    metrics = result.metrics
    encoder = Recommender.load(result.folder).model.encoder
    assert encoder.neighbors is not None and "transitions" in encoder.neighbors
    assert metrics["valid"]["ndcg@10"] > plain.metrics["valid"]["ndcg@10"]
    protocols = ("valid", "valid_unseen", "valid_new", "test", "test_unseen", "test_new")
    assert metrics["without_neighbors"] == {name: plain.metrics[name] for name in protocols}
    assert list(list_compared_models(metrics)) == ["M2Rec", "M2Rec without neighbors"]
    assert plain.metrics["without_neighbors"] == {} == list_compared_models(plain.metrics)
    assert describe_comparison(metrics) == ""
    for part in ("valid", "test"):
        found = evaluate_run(result.folder, part)["metrics"]
        for protocol in (part, f"{part}_unseen", f"{part}_new"):
            assert found[protocol] == pytest.approx(metrics[protocol], abs=1e-6)


def test_a_run_that_is_killed_at_its_end_is_the_same(chains: Path, monkeypatch: pytest.MonkeyPatch):
    """After the weights were written with neighbours, before metrics.json was."""
    whole = run(chains)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_ranks", stop)
        with pytest.raises(RunInterrupted):
            run(chains)
    (folder,) = (path for path in (chains.parent / "runs").iterdir() if path != whole.folder)
    assert not (folder / "metrics.json").exists()
    assert Recommender.load(folder).model.encoder.neighbors is not None
    resumed = run_experiment(build_resumed_config(folder, {"gpu_id": ""}), folder)
    for name in ("valid", "test_unseen", "without_neighbors"):
        assert resumed.metrics[name] == whole.metrics[name]


def test_a_finished_run_is_evaluated_again(chains: Path):
    """Its weights on disk have neighbours by then."""
    prepared = prepare_run(configure(chains))
    prepared.train()
    first = prepared.evaluate().metrics
    found = prepared.trainer.evaluate(prepared.loaders.test, load_best_model=True)
    assert found == first["test"]
    assert prepared.evaluate().metrics["test"] == first["test"]


def test_without_validation_there_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [(f"u{user}", f"i{(user + time) % 7}", time) for user in range(9) for time in range(3)]
    write_inter(tmp_path / "data", "chains", rows)
    result = run(tmp_path / "data", text_encoder="none")
    assert "neighbors: none without validation targets" in caplog.text
    assert Recommender.load(result.folder).model.encoder.neighbors is None


def test_none_are_kept_where_they_do_not_help(chains: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neighbor_weights, "_WEIGHTS", {"transitions": (0, -9), "text": (0, -9)})
    result = run(chains)
    assert Recommender.load(result.folder).model.encoder.neighbors is None
    assert result.metrics["without_neighbors"] == {}


def test_new_items_by_their_texts(chains: Path, monkeypatch: pytest.MonkeyPatch):
    """A new item with the text of an old one is a neighbour of the same items."""
    monkeypatch.setattr(neighbor_weights, "_WEIGHTS", {"transitions": (0,), "text": (0, 2)})
    monkeypatch.setattr(neighbor_weights, "measure_protocol", _prefer_greater_weights())
    folder = run(chains).folder
    model = Recommender.load(folder)
    names, vectors, _ = vector_file.read_text_vectors(chains / "chains" / "chains.text.safetensors")
    model.add_items(["twin"], vectors[[names.index("i5")]])
    table = model.model.encoder.neighbors["text"]
    twin, five = model.to_ids(["twin", "i5"])
    nearest = table.ids[twin][table.strengths[twin] > 0].tolist()
    assert nearest[0] == five and table.strengths[twin, 0] == pytest.approx(1, abs=1e-4)
    assert twin in table.ids[five].tolist()
    copied = chains.parent / "copied"
    model.save(copied)
    loaded = Recommender.load(copied)
    assert loaded.recommend(["twin"], k=5) == model.recommend(["twin"], k=5)


def _prefer_greater_weights() -> Callable[..., dict[str, float]]:
    calls = iter(range(1000))
    return lambda *_: {"ndcg@10": float(next(calls))}


@pytest.fixture
def large() -> Recommender:
    """Untrained, of so many items that an index is worth it."""
    encoder = Encoder(ModelSettings(hidden_size=16, inner_size=16, head_dim=16, d_state=4), 4001, 12).eval()
    torch.nn.init.normal_(encoder.id_embedding.weight)
    encoder.neighbors = make_neighbors(4001, width=20)
    encoder.neighbors["text"].weight.fill_(20)
    tokens = ["[PAD]", *(f"i{k}" for k in range(4000))]
    nothing: dict[str, Any] = {"titles": {}, "text_mean": None, "text_basis": None, "text_source": {}}
    config = {"MAX_ITEM_LIST_LENGTH": 12}
    return Recommender(build_saved_model(encoder, tokens, counts=range(4001), config=config, **nothing))


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_every_way_to_rank_finds_the_same(
    large: Recommender, exclude_seen: bool, monkeypatch: pytest.MonkeyPatch
):
    """By scores, in a batch, in chunks of items, through an index, and by int8."""
    histories = [["i1", "i2", "i1"], [f"i{k}" for k in range(50)], ["i3999"], ["i7", "i9", "i7", "i7"]]
    exact = []
    for history in histories:
        (scores,) = large.scores([history])
        if exclude_seen:
            scores[large.to_ids(history)] = -torch.inf
        best = scores.topk(10)
        exact.append((best.indices.tolist(), best.values.tolist()))

    def check(found: Any) -> None:
        for ranking, (ids, values) in zip(found, exact, strict=True):
            assert large.to_ids([entry.item for entry in ranking]) == ids
            assert [entry.score for entry in ranking] == pytest.approx(values, rel=1e-4)

    check(large.recommend_batch(histories, 10, exclude_seen))
    check(large.recommend(history, 10, exclude_seen) for history in histories)
    with monkeypatch.context() as patch:
        patch.setattr("m2rec.serving.top_k._MAX_SCORES", 1000)
        check(large.recommend_batch(histories, 10, exclude_seen))
    large.use_index(probes=10_000)
    check(large.recommend_batch(histories, 10, exclude_seen))
    monkeypatch.setattr("m2rec.serving.int8_table._MIN_ITEMS", 0)
    coarse = Recommender(large.model, precision="int8")
    check(coarse.recommend(history, 10, exclude_seen) for history in histories)


def test_the_last_items_of_a_session_are_kept_in_their_order():
    """An item that comes again is the last one again, also in a session of an earlier version."""
    model = recommender(neighbors=True)
    live = model.session(["i1", "i2", "i3", "i1"])
    live.add("i2")
    recent = model.to_ids(["i1", "i2", "i3", "i1", "i2"])
    assert live._state.recent == recent
    data = live.to_bytes()
    assert model.restore_session(data)._state.recent == recent
    tensors = load(data[32:])
    del tensors["recent"]
    earlier = save(tensors)
    state = model.restore_session(hashlib.sha256(earlier).digest() + earlier)._state
    assert state.recent == model.to_ids(["i1", "i2", "i3"])


def test_predict_is_the_full_ranking(prepared: PreparedRun):
    model = prepared.trainer.model
    model.encoder.neighbors = make_neighbors(len(model.encoder.id_embedding.weight))
    rows = prepared.loaders.test.dataset.inter_feat
    with torch.no_grad():
        every = model.full_sort_predict(rows)
        torch.testing.assert_close(
            model.predict(rows), every.gather(1, rows["item_id"][:, None])[:, 0], rtol=1e-5, atol=1e-5
        )


def test_unknown_tokens_of_a_neighbour_table_are_refused(chains: Path):
    """Weights whose tables are those of fewer items."""
    folder = run(chains).folder
    files = RunFolder(folder)
    weights, metadata = files.read_weights("cpu")
    weights["encoder.neighbors.transitions.ids"] = weights["encoder.neighbors.transitions.ids"][:-1]
    files.write_weights(weights, metadata)
    with pytest.raises(ValueError, match="the weights don't fit"):
        Recommender.load(folder)


@pytest.mark.parametrize(("exclude_seen", "protocol"), [(True, "valid_unseen"), (False, "valid")])
def test_the_log_says_what_was_chosen(
    chains: Path, caplog: pytest.LogCaptureFixture, exclude_seen: bool, protocol: str
):
    """By the ranking that `recommend` gives."""
    caplog.set_level("INFO")
    metrics = run(chains, exclude_seen=exclude_seen).metrics
    (line,) = (message for message in caplog.messages if "validation targets:" in message)
    assert line.startswith("neighbors: transitions x ")
    assert f"ndcg@10 {metrics[protocol]['ndcg@10']:.4f} on {protocol}, without " in line
