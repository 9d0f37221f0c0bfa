"""The baselines beside a run: the numbers of their own runs, in metrics.json, the table and the page."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2rec.commands.run import format_metrics_table
from m2rec.data.time_statistics import count_recent_items
from m2rec.errors import UserError
from m2rec.reports.baselines import describe_comparison, list_compared_models
from m2rec.training import baselines
from m2rec.training.configuration import build_config
from m2rec.training.run import run_experiment
from tests.conftest import small, write_inter

PARTS = [f"{part}{protocol}" for part in ("valid", "test") for protocol in ("", "_unseen", "_new")]


@pytest.fixture
def run(toy: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Content of metrics.json after a run with these keys."""

    def call(**keys: Any) -> dict[str, Any]:
        values = {"epochs": 1, "baselines": "auto", "runs_dir": str(tmp_path / "runs"), **keys}
        return run_experiment(build_config(small(toy, **values))).metrics

    return call


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
def test_they_are_the_numbers_of_their_own_runs(
    run: Callable[..., dict[str, Any]], toy: Path, write_vectors: Callable[..., Path], split: str
):
    """To the digit, although M2Rec's text is whitened and theirs is not."""
    write_vectors(toy, "toy", [f"i{number}" for number in range(20)])
    beside = run(split=split)["baselines"]
    names = {"Popularity": "Popularity", "TransitionGraph": "TransitionGraph"}
    if split == "global_time":
        names["Popularity, last 7 days"] = "RecentPopularity"
    assert set(beside) == set(names)
    for name, model in names.items():
        own = run(model=model, split=split)
        assert beside[name] == {part: own[part] for part in PARTS}
        assert beside[name]["test"]["ndcg@10"] > 0
        assert model not in own["baselines"] and name not in own["baselines"]
    assert beside["TransitionGraph"] != beside["Popularity"]


def test_a_model_without_text_is_beside_a_graph_without_text(
    run: Callable[..., dict[str, Any]], toy: Path, write_vectors: Callable[..., Path]
):
    write_vectors(toy, "toy", [f"i{number}" for number in range(20)])
    beside = run(model="SASRec", n_heads=1)["baselines"]["TransitionGraph"]
    without = run(model="TransitionGraph", text_vectors="none")
    assert beside == {part: without[part] for part in PARTS}
    assert beside["test"] != run(model="TransitionGraph")["test"]


def test_without_validation_rows(tmp_path: Path):
    write_inter(tmp_path, "toy", [(f"u{u}", f"i{(u + t) % 5}", t) for u in range(9) for t in range(3)])
    values = small(tmp_path, runs_dir=str(tmp_path / "runs"), baselines=True, topk=[3], valid_metric="NDCG@3")
    metrics = run_experiment(build_config(values)).metrics
    assert set(metrics["baselines"]["TransitionGraph"]) == {"test", "test_unseen", "test_new"}
    assert "TransitionGraph" in format_metrics_table(metrics)


def test_off_and_too_large(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    assert run(baselines=False)["baselines"] == {}
    assert "baselines" not in caplog.text
    for limit in ("_MAX_SCORES", "_MAX_INTERACTIONS"):
        with monkeypatch.context() as patch:
            patch.setattr(baselines, limit, 10)
            assert run()["baselines"] == {}
            assert "no baselines beside this run: " in caplog.text
            assert run(baselines=True)["baselines"]
        caplog.clear()


def test_one_that_fails_does_not_fail_the_run(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(baselines.TransitionGraph, "full_sort_predict", fail)
    metrics = run()
    assert metrics["test"] and list(metrics["baselines"]) == ["Popularity"]
    warning = "could not evaluate all baselines (MemoryError: no room); the run itself is complete"
    assert caplog.text.count(warning) == 1


def test_table_and_page(run: Callable[..., dict[str, Any]], tmp_path: Path):
    metrics = run(report=True)
    *_, first, popularity, graph, sentence = format_metrics_table(metrics).splitlines()
    assert first.split()[0] == "M2Rec" and popularity.split()[0] == "Popularity"
    values = [metrics["baselines"]["TransitionGraph"][part]["ndcg@10"] for part in ("valid", "test")]
    assert graph.split()[:3] == ["TransitionGraph", *(f"{value:.4f}" for value in values)]
    assert sentence == describe_comparison(metrics) and sentence.startswith("M2Rec is ")
    (page,) = (tmp_path / "runs").glob("*/report.html")
    text = page.read_text()
    assert "Beside simple baselines" in text and f"<p>{sentence}.</p>" in text
    assert f">TransitionGraph</th>\n<td>{values[0]:.4f}</td>" in text
    assert "by the similarity of their texts" not in text  # it has none


def test_the_page_explains_recent_popularity(run: Callable[..., dict[str, Any]], tmp_path: Path):
    run(report=True, split="global_time")
    (page,) = (tmp_path / "runs").glob("*/report.html")
    text = " ".join(page.read_text().split())
    assert "data. Popularity, last 7 days, counts only that end of the training data. TransitionGraph" in text
    assert " parameters, 1 epoch (best " in text


def describe(ours: float, metric: str = "ndcg@10", **others: float) -> str:
    baselines = {name: {"test_unseen": {metric: value}} for name, value in others.items()}
    own = {"model": "M2Rec", "valid_metric": metric, "protocol": {}, "test_unseen": {metric: ours}}
    return describe_comparison({**own, "baselines": baselines})


def test_the_sentence():
    end = "in NDCG@10 on test_unseen"
    assert describe(0.21, A=0.1, B=0.2) == f"M2Rec is 2.1 times as good as A, and 5% better than B {end}"
    assert describe(0.16, A=0.1) == f"M2Rec is 1.6 times as good as A {end}"
    assert describe(0.05, A=0.1) == f"M2Rec is 50% worse than A {end}"
    assert describe(0.1001, A=0.1, B=0.0) == f"M2Rec is as good as A {end}"
    assert describe(0.1, A=0.0) == "" and describe(0.1) == ""
    assert describe(9.0, "averagepopularity@10", A=1.0) == ""
    assert list_compared_models({"model": "M2Rec"}) == {} == list_compared_models({"baselines": {}})


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_the_sentence_is_about_what_recommend_does(run: Callable[..., dict[str, Any]], exclude_seen: bool):
    metrics = run(exclude_seen=exclude_seen)
    part = "test_unseen" if exclude_seen else "test"
    metrics["test"]["ndcg@10"], metrics["test_unseen"]["ndcg@10"] = 0.3, 0.1
    for measured in metrics["baselines"].values():
        measured[part]["ndcg@10"] = metrics[part]["ndcg@10"] / 2
    same = "2.0 times as good as"
    assert describe_comparison(metrics) == (
        f"M2Rec is {same} Popularity, and {same} TransitionGraph in NDCG@10 on {part}"
    )


DAY = 86_400
START = 1_000_000_000


@pytest.mark.parametrize(
    ("unit", "period", "recent"),
    [(1, "last 7 days", {1: 7}), (1_000, "last 7 days", {1: 7}), (1e-6, "last 5% of training", {1: 4})],
)
def test_what_is_popular_in_the_last_days(unit: float, period: str, recent: dict[int, int]):
    """A user has an item a day for 90 days, item 1 in the last ten of training; another has one item."""
    days = np.arange(90)
    times = (START + DAY * np.append(days, 79)) * unit
    items = np.append(np.where(days < 70, 2, 1), 3)
    users = np.append(np.full(90, 1), 2)
    counted = count_recent_items(users, items, times, 81.5 / 91, n_items=5)
    assert counted.period == period
    assert {item: count for item, count in enumerate(counted.counts) if count} == recent


def test_a_quiet_end_takes_more_days():
    """300 interactions on a day, then one each twelfth day: 7 days have one, which is too few."""
    times = START + DAY * np.append(np.zeros(300), 12 * np.arange(1, 11)).astype(np.int64)
    users, items = np.ones(310, dtype=int), np.append(np.ones(300, dtype=int), np.full(10, 2))
    counted = count_recent_items(users, items, times, 0.999, n_items=3)
    assert counted.period == "last 90 days" and counted.counts.tolist() == [0, 0, 8]


def test_recent_popularity_needs_an_end_of_training(run: Callable[..., dict[str, Any]]):
    with pytest.raises(UserError, match=r"RecentPopularity needs one moment .* set split: global_time"):
        run(model="RecentPopularity")
