"""scripts/new_items.py: what is taken out is in no training row, and what is tested is never trained."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2rec.commands import new_items, new_items_trial
from m2rec.evaluation import cold_start
from m2rec.evaluation.saved_model import EvaluationCases
from m2rec.serving.recommender import Recommender
from m2rec.text import vector_file
from m2rec.training.signals import RunInterrupted
from m2rec.yaml_values import read_yaml
from tests.conftest import as_arguments, small, write_inter
from tests.test_shipped import ship

N = 30


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Users who go round the items, short histories among them; the text says where an item stands."""
    rows = [(f"u{u}", f"i{(3 * u + k) % N}", k) for u in range(60) for k in range(3 + u % 6)]
    path = write_inter(tmp_path / "data", "ring", rows)
    angle = 2 * np.pi * np.arange(N)[:, None] * np.arange(1, 5) / N
    vectors = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    tokens = [f"i{k}" for k in range(N)]
    vector_file.write_text_vectors(
        path.with_name(f"ring{vector_file.VECTOR_FILE_SUFFIX}"), tokens, vectors, {"model": "ring"}
    )
    return tmp_path / "data"


def arguments(data: Path, **others: Any) -> list[str]:
    keys = small(data, "ring", runs_dir=str(data.parent / "runs"), **others)
    return [*as_arguments(keys), f"--output={data.parent / 'out' / 'new.csv'}"]


def test_what_is_tested_is_not_trained(data: Path, monkeypatch: pytest.MonkeyPatch):
    """The rows of the inner run, and the users and targets of the evaluation, by token."""
    trained, tested = set(), set()
    run, ranked = new_items_trial.run_experiment, new_items_trial.evaluate_new_items

    def watched_run(config: Any) -> Any:
        dataset, (train, _, _) = new_items_trial.load_data(config)
        names, users = dataset.field2id_token["item_id"], dataset.field2id_token["user_id"]
        rows = train.dataset.inter_feat
        for user, items, n, last in zip(
            *(rows[c].tolist() for c in ("user_id", "item_id_list", "item_length", "item_id")), strict=True
        ):
            trained.update((int(users[user]), str(names[i])) for i in [*items[:n], last])
        return run(config)

    def watched_ranked(made: Recommender, cases: EvaluationCases, added: list[str]) -> Any:
        # users have the numbers of their first appearance in the remaining data
        tested.update(
            (int(user[1:]) + 1, item) for user, item in zip(cases.users, cases.targets, strict=True)
        )
        assert added and not set(added) & {item for _, item in trained}
        return ranked(made, cases, added)

    monkeypatch.setattr(new_items_trial, "run_experiment", watched_run)
    monkeypatch.setattr(new_items_trial, "evaluate_new_items", watched_ranked)
    assert new_items.main([*arguments(data, epochs=1), "--share=0.3"]) == 0
    assert len(tested) == 60 and trained and not trained & tested


def test_a_line_per_seed(data: Path, capsys: pytest.CaptureFixture[str]):
    assert new_items.main([*arguments(data, epochs=1), "--share=0.2", "--seeds", "1", "2"]) == 0
    with (data.parent / "out" / "new.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["seed"], second["seed"]) == ("1", "2")
    assert first["items"] == "30" and first["new_items"] == "6"
    assert int(first["new.users"]) + int(first["old.users"]) == 60
    assert first["new.users"] == first["new_among_new.users"]
    assert json.loads(first["settings"])["epochs"] == 1 and "new.hit@10" in capsys.readouterr().out


def test_data_of_few_and_of_its_own_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Items that only users have who are left out of the training; columns of other names."""
    rows = [(f"u{u}", f"i{(3 * u + k) % N}", k) for u in range(60) for k in range(6)]
    short = [history for n in range(N) for history in ((f"x{n}", f"i{n}", "i0"), (f"y{n}", f"z{n}", f"i{n}"))]
    rows += [(f"v{v}", item, k) for v, history in enumerate(short) for k, item in enumerate(history)]
    path = write_inter(tmp_path / "data", "ring", rows, "who:token\twhat:token\twhen:float")
    vectors = np.random.default_rng(0).normal(size=(N, 8))
    vector_file.write_text_vectors(
        path.with_name(f"ring{vector_file.VECTOR_FILE_SUFFIX}"),
        [f"i{k}" for k in range(N)],
        vectors,
        {"model": "ring"},
    )
    columns = {
        "USER_ID_FIELD": "who",
        "ITEM_ID_FIELD": "what",
        "TIME_FIELD": "when",
        "val_interval": {"when": "[0,9]"},
    }
    assert new_items.main([*arguments(tmp_path / "data", epochs=1, **columns), "--share=0.3"]) == 0
    assert "9 users are left out, whose items only left-out users have" in caplog.text
    with (tmp_path / "out" / "new.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert int(row["new.users"]) + int(row["old.users"]) == 60 + 2 * N - 9


def test_a_stop_is_said_in_a_line(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(config: Any) -> Any:
        raise RunInterrupted(2)

    monkeypatch.setattr(new_items_trial, "run_experiment", stopped)
    assert new_items.main(arguments(data)) == 130
    assert capsys.readouterr().err.endswith("new_items.py: stopped; finished seeds have their lines\n")


def test_ranks_by_hand(monkeypatch: pytest.MonkeyPatch):
    """The user's history is out of the ranking, and so is padding; who has nothing known is left out."""
    cases = EvaluationCases(
        ["u", "v", "w", "x"], [["a", "b"], ["b", "gone", "c"], ["gone"], ["a"]], ["c", "d", "a", "gone"]
    )
    by_history = {
        ("a", "b"): [-torch.inf, 9.0, 8.0, 5.0, 6.0, 7.0],
        ("b", "c"): [-torch.inf, 1.0, 9.0, 9.0, 3.0, 2.0],
    }

    class Fixed:
        tokens = ("[PAD]", "a", "b", "c", "d", "e")

        def scores(self, histories: list[list[str]]) -> torch.Tensor:
            return torch.tensor([by_history[tuple(history)] for history in histories])

    monkeypatch.setattr(cold_start, "K", 2)
    row = cold_start.evaluate_new_items(Fixed(), cases, {"c", "e"})
    assert (row["new.users"], row["old.users"]) == (1, 1)
    assert row["new.hit@2"] == 0  # third: after e and d
    assert row["new_among_new.hit@2"] == 1 and row["new_among_new.chance@2"] == 1
    assert row["old.hit@2"] == row["old.ndcg@2"] == 1
    assert row["new.chance@2"] == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--share=0"], "--share: expected a number between 0 and 1, got 0.0"),
        (["--share=nan"], "--share: expected a number between 0 and 1, got nan"),
        (["--share=0.001"], "--share: 0.001 takes out 0 of 30 items with text"),
        (["--model=SASRec"], "model: SASRec can't rank an item by its text"),
        (["--text_vectors=none"], "text_in_table: new items need text in the item table"),
        (["--text_in_table=false"], "text_in_table: new items need text in the item table"),
        (["--split=global_time"], "split: 'global_time' is not for new items"),
        (["--output=README.md"], "--output: README.md has other columns"),
        (["--text_vectors=gone"], "text_vectors: no file 'gone'"),
    ],
)
def test_mistakes(data: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str):
    assert new_items.main([*arguments(data), *extra]) == 2
    assert f"new_items.py: error: {message}" in capsys.readouterr().err
    assert not (data.parent / "runs").exists()


def test_the_rest_is_trained_by_the_settings_of_the_whole(data: Path, monkeypatch: pytest.MonkeyPatch):
    """Also by those that are shipped for it, although the rest is another data set of that name."""
    ship(data.parent, monkeypatch, "ring", users=60, items=N, interactions=sum(3 + u % 6 for u in range(60)))
    given = [one for one in arguments(data, epochs=1) if not one.startswith("--hidden_size")]
    assert new_items.main([*given, "--share=0.2"]) == 0
    (inner,) = (data.parent / "runs").glob("M2Rec-*/config.yaml")
    assert read_yaml(inner)["hidden_size"] == 24
