"""What the report is told of a model, against the model itself."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from m2rec.compat import Interaction
from m2rec.evaluation import insights
from m2rec.evaluation.breakdown import tabulate_rows
from m2rec.evaluation.ranking import rank_rows
from m2rec.models.registry import find_model_class
from m2rec.training.configuration import build_config
from m2rec.training.run import load_data, run_experiment
from tests.conftest import random_rows, small, write_inter


@pytest.fixture
def prepared(toy: Path):
    config = build_config(small(toy, text_vectors="none"))
    dataset, (train, _, test) = load_data(config)
    torch.manual_seed(3)
    model = find_model_class("M2Rec")(config, train.dataset).eval()
    for layer in model.encoder.layers:
        torch.nn.init.normal_(layer.gate.logits.weight)
    return model, test.dataset, dataset


def scores_of(model: nn.Module) -> Callable[[Interaction], torch.Tensor]:
    """As the trainer scores rows."""

    def score(rows: Interaction) -> torch.Tensor:
        scores = model.full_sort_predict(rows)
        scores[:, 0] = -torch.inf
        return scores

    return score


def test_the_gate(prepared: tuple):
    """Every position of every test row counts once."""
    model, test, dataset = prepared
    gate = insights.collect_insights(model, scores_of(model), test, dataset)["gate"]
    assert gate["branches"] == ["temporal", "frequency"]
    rows = test.inter_feat
    items, lengths = rows["item_id_list"], rows["item_length"]
    with torch.no_grad():
        _, weights = model.encoder.encode_with_gate_weights(items, lengths)
    means = torch.stack([layer.mean(-1) for layer in weights])  # (layers, B, L, K)
    there = torch.arange(items.shape[1]) < lengths[:, None]
    for number, layer in enumerate(means, 1):
        assert gate["by_layer"][str(number)] == pytest.approx(layer[there].mean(0).tolist(), abs=1e-4)
    mean = means.mean(0)
    assert gate["by_position"]["1"] == pytest.approx(mean[:, 0].mean(0).tolist(), abs=1e-4)
    place = torch.arange(1, items.shape[1] + 1).expand_as(items)
    for bucket, (low, high) in {"3-5": (3, 5), "6-10": (6, 10)}.items():
        inside = there & (place >= low) & (place <= high)
        assert gate["by_position"][bucket] == pytest.approx(mean[inside].mean(0).tolist(), abs=1e-4)
    counts = torch.from_numpy(test.histories.training_counts(test.item_num))[items]
    inside = there & (counts >= 6) & (counts <= 20)
    assert gate["by_popularity"]["6-20"] == pytest.approx(mean[inside].mean(0).tolist(), abs=1e-4)


def test_a_gate_that_is_not_learned_has_no_weights_to_show(toy: Path):
    config = build_config(small(toy, text_vectors="none", gate="mean"))
    dataset, (train, _, test) = load_data(config)
    model = find_model_class("M2Rec")(config, train.dataset).eval()
    found = insights.collect_insights(model, scores_of(model), test.dataset, dataset)
    assert "gate" not in found and "filter" in found


def test_the_filter(prepared: tuple):
    """A channel with a single slow mode lets its period through and little else."""
    model, test, dataset = prepared
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.filter.frequency.fill_(2 * np.pi / 5)
            layer.filter.log_damping.fill_(-6.0)
            layer.filter.cosine.fill_(1.0)
            layer.filter.sine.zero_()
    first, *others = insights.collect_insights(model, scores_of(model), test, dataset)["filter"]
    assert len(others) == 1
    loudest = first["period"][int(np.argmax(first["median"]))]
    assert loudest == pytest.approx(5, rel=0.15)
    strongest = int(np.argmax(first["strength"]))
    assert first["edges"][strongest] <= 5 <= first["edges"][strongest + 1]
    assert sum(first["strength"]) == pytest.approx(1, abs=1e-3)


def test_examples_are_the_models_ranking(prepared: tuple):
    model, test, dataset = prepared
    found = insights.collect_insights(model, scores_of(model), test, dataset)["examples"]
    assert len(found) == 6 and len({example["user"] for example in found}) == 6
    own = {}
    for user, item, _ in sorted(random_rows(), key=lambda row: row[2]):
        own.setdefault(user, []).append(item)
    tokens = list(test.field2id_token["item_id"])
    users = list(test.field2id_token["user_id"][test.inter_feat["user_id"].numpy()])
    with torch.no_grad():
        scores = model.full_sort_predict(test.inter_feat)
    for example in found:
        history = own[example["user"]][:-1]
        assert example["history"] == history[-8:] and example["length"] == len(history)
        assert example["next"] == own[example["user"]][-1]
        row = scores[users.index(example["user"])]
        left = [i for i in range(1, len(tokens)) if tokens[i] not in history]
        ranked = sorted(left, key=lambda i: -row[i].item())
        assert example["recommended"] == [tokens[i] for i in ranked[:5]]
        place = 0 if example["next"] in history else 1 + [tokens[i] for i in ranked].index(example["next"])
        assert example["place"] == place
    assert len({example["place"] == 0 for example in found}) == 2


def test_gaps_are_in_the_files_unit(tmp_path: Path):
    rows = [("a", "i1", 100), ("a", "i2", 110), ("a", "i3", 130), ("a", "i1", 170), ("b", "i2", 5)]
    write_inter(tmp_path, "gaps", [*rows, ("b", "i3", 85), ("b", "i1", 245), ("b", "i2", 565)])
    config = build_config(small(tmp_path, dataset="gaps", text_vectors="none"))
    dataset, _ = load_data(config)
    assert dataset.gap_quartiles == tuple(np.quantile([10, 20, 40, 80, 160, 320], [0.25, 0.5, 0.75]))


def test_a_baseline_has_examples_only(toy: Path):
    ours = {k: v for k, v in small(toy).items() if k not in ("head_dim", "d_state")}
    config = build_config({**ours, "model": "SASRec", "n_layers": 1, "n_heads": 2, "train_batch_size": 64})
    dataset, (train, _, test) = load_data(config)
    model = find_model_class("SASRec")(config, train.dataset)
    found = insights.collect_insights(model, scores_of(model), test.dataset, dataset)
    assert set(found) == {"examples", "gaps"}


def test_columns_of_other_names(tmp_path: Path):
    """RecBole names the column of the histories after that of the items."""
    rows = random_rows()
    write_inter(tmp_path, "other", rows, header="who:token\twhat:token\tthen:float")
    names = {"USER_ID_FIELD": "who", "ITEM_ID_FIELD": "what", "TIME_FIELD": "then"}
    for own in ({}, {"loss_type": "sampled", "n_negatives": 5, "negative_sampling": "popularity"}):
        keys = small(
            tmp_path, dataset="other", runs_dir=str(tmp_path / "runs"), epochs=1, report=True, **names, **own
        )
        folder = run_experiment(
            build_config({**keys, "text_vectors": "none", "load_col": {"inter": [*names.values()]}})
        ).folder
        assert {"insights.json", "report.html"} <= {path.name for path in folder.iterdir()}


def test_what_was_seen_is_not_recommended(tmp_path: Path):
    """Where one item is left, there is one recommendation."""
    items = [f"i{k}" for k in range(6)]
    rows = [(f"u{u}", item, t) for u in range(4) for t, item in enumerate(items[u % 2 :] + items[: u % 2])]
    write_inter(tmp_path, "all", rows)
    config = build_config(small(tmp_path, dataset="all", text_vectors="none"))
    dataset, (train, _, test) = load_data(config)
    model = find_model_class("M2Rec")(config, train.dataset)
    for example in insights.collect_insights(model, scores_of(model), test.dataset, dataset)["examples"]:
        assert example["recommended"] == [example["next"]] and example["place"] == 1


def test_ranks_are_those_of_test_ranks_csv(toy: Path):
    """Also where many scores are equal: there is one rule for ties."""
    config = build_config(small(toy, text_vectors="none"))
    dataset, (train, _, test) = load_data(config)
    model = find_model_class("M2Rec")(config, train.dataset).eval()

    def score(rows: Interaction) -> torch.Tensor:
        return (scores_of(model)(rows) * 4).round()

    table = tabulate_rows(rank_rows(score, test, iter), test.dataset).set_index("user")["test_unseen"]
    examples = insights.collect_insights(model, score, test.dataset, dataset)["examples"]
    within = {e["user"]: e["place"] if e["place"] <= max(config["topk"]) else 0 for e in examples}
    assert max(within.values()) > 0 and within == table[list(within)].to_dict()
