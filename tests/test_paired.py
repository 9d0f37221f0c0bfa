"""Paired tests from the ranks in run folders."""

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from m2rec.experiments import paired
from m2rec.experiments.ledger import PAIRED_COLUMNS, format_csv
from m2rec.experiments.sweep_plan import Sweep, get_planned_run_folder

USERS = [f"u{k}" for k in range(60)]


def write_run(runs: Path, variant: str, seed: int, ranks: list[int], users: list[str] = USERS) -> Path:
    """A finished run whose two protocols have the same ranks."""
    folder = get_planned_run_folder(runs, "toy", variant, seed) / "run"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({}))
    lines = [f"{user},i{user},3,4,{rank},{rank}" for user, rank in zip(users, ranks, strict=True)]
    text = "\n".join(["user,item,history,popularity,test,test_unseen", *lines])
    (folder / "test_ranks.csv").write_text(text + "\n")
    return folder


def compared(sweep: Sweep, runs: Path) -> list[dict[str, Any]]:
    """`paired.compare_with_baselines` with a CSV that has a row of each run."""
    rows = []
    for variant in sweep.variants:
        for seed in sweep.seeds:
            for path in get_planned_run_folder(runs, "toy", variant, seed).glob("*/test_ranks.csv"):
                ranks = [int(line.split(",")[-1]) for line in path.read_text().splitlines()[1:]]
                gains = [1 / math.log2(rank + 1) if 0 < rank <= 10 else 0 for rank in ranks]
                rows.append(finished_run(variant, seed, round(sum(gains) / len(gains), 6)))
    return paired.compare_with_baselines(sweep, pd.DataFrame(rows), runs).to_dict("records")


def finished_run(variant: str, seed: int, quality: float) -> dict[str, object]:
    """A row of the frame of finished runs."""
    return {"dataset": "toy", "variant": variant, "seed": str(seed), "test_unseen.ndcg@10": quality}


@pytest.fixture
def sweep(write_sweep: Callable[..., Path]) -> Sweep:
    return Sweep.read(write_sweep())


def test_compares_by_user_over_common_seeds(sweep: Sweep, tmp_path: Path):
    runs = tmp_path / "runs"
    write_run(runs, "M2Rec", 1, [1] * 60)
    write_run(runs, "M2Rec", 2, [0] * 60)  # SASRec has no such seed
    write_run(runs, "SASRec", 1, ([3] * 30 + [11] * 30)[::-1], USERS[::-1])
    rows = compared(sweep, runs)
    assert [(row["protocol"], row["metric"]) for row in rows] == [
        ("test", "hit@10"), ("test", "ndcg@10"), ("test_unseen", "hit@10"), ("test_unseen", "ndcg@10"),
    ]  # fmt: skip
    assert {(row["variant"], row["baseline"], row["seeds"], row["users"]) for row in rows} == {
        ("M2Rec", "SASRec", "1", 60)
    }
    hit, ndcg = rows[2:]
    assert (hit["variant_mean"], hit["baseline_mean"], hit["difference"]) == (1.0, 0.5, 0.5)
    assert (ndcg["variant_mean"], ndcg["baseline_mean"]) == (1.0, 0.25)
    assert 0 < hit["p"] < 0.01 and hit["low"] < 0.5 < hit["high"]


def test_seeds_are_averaged_before_users_are_drawn(sweep: Sweep, tmp_path: Path):
    runs = tmp_path / "runs"
    for seed, ours in ((1, 1), (2, 0)):
        write_run(runs, "M2Rec", seed, [ours] * 60)
        write_run(runs, "SASRec", seed, [1 - ours] * 60)
        write_run(runs, "no filter | gate", seed, [ours] * 60)
    rows = compared(sweep, runs)
    assert [row["baseline"] for row in rows[::4]] == ["SASRec", "no filter | gate"]
    for row in rows:
        assert (row["seeds"], row["variant_mean"], row["baseline_mean"], row["p"]) == ("1 2", 0.5, 0.5, 1.0)


def test_a_run_that_is_not_in_the_csv_is_left_out(sweep: Sweep, tmp_path: Path):
    """The other seed is still compared."""
    for seed in (1, 2):
        write_run(tmp_path, "M2Rec", seed, [1] * 60)
        write_run(tmp_path, "SASRec", seed, [seed] * 60)
    rows = pd.DataFrame([finished_run(name, seed, 1.0) for name in sweep.variants for seed in (1, 2)])
    assert {*paired.compare_with_baselines(sweep, rows, tmp_path)["seeds"]} == {"1"}
    rows = rows[(rows["variant"] != "SASRec") | (rows["seed"] == "2")]
    with pytest.raises(ValueError, match="has a finished run of the CSV"):
        paired.compare_with_baselines(sweep, rows, tmp_path)


def test_ranks_meet_their_users(sweep: Sweep, tmp_path: Path):
    ranks = list(np.random.default_rng(0).integers(0, 20, 60))
    write_run(tmp_path, "M2Rec", 1, ranks)
    write_run(tmp_path, "SASRec", 1, ranks[::-1], USERS[::-1])
    assert {(row["difference"], row["p"]) for row in compared(sweep, tmp_path)} == {(0.0, 1.0)}


def test_the_csv(sweep: Sweep, tmp_path: Path):
    write_run(tmp_path, "M2Rec", 1, [1] * 60)
    write_run(tmp_path, "no filter | gate", 1, [2] * 60)
    text = format_csv(pd.DataFrame(compared(sweep, tmp_path)))
    row = list(csv.DictReader(io.StringIO(text)))[3]
    assert list(row) == list(PAIRED_COLUMNS)
    assert row["baseline"] == "no filter | gate" and row["variant_mean"] == "1.000000"
    assert row["baseline_mean"] == "0.630930" and row["p"] == "0.000100"


def test_a_user_of_one_run_only(sweep: Sweep, tmp_path: Path):
    write_run(tmp_path, "M2Rec", 1, [1] * 60)
    write_run(tmp_path, "SASRec", 1, [1] * 59, USERS[1:])
    with pytest.raises(ValueError, match=r"user 'u0' is in only one of .*m2rec/1/run and .*sasrec/1/run"):
        compared(sweep, tmp_path)


def test_seeds_of_the_reference_with_different_users(sweep: Sweep, tmp_path: Path):
    write_run(tmp_path, "M2Rec", 1, [1] * 60)
    write_run(tmp_path, "M2Rec", 2, [1] * 59, USERS[1:])
    write_run(tmp_path, "SASRec", 1, [1] * 60)
    with pytest.raises(ValueError, match="user 'u0' is in only one of"):
        compared(sweep, tmp_path)


def test_another_target_of_the_same_user(sweep: Sweep, tmp_path: Path):
    write_run(tmp_path, "M2Rec", 1, [1] * 60)
    path = write_run(tmp_path, "SASRec", 1, [1] * 60) / "test_ranks.csv"
    path.write_text(path.read_text().replace("u7,iu7", "u7,other"))
    with pytest.raises(ValueError, match="user 'u7' has another test item in"):
        compared(sweep, tmp_path)


def test_nothing_to_compare(sweep: Sweep, write_sweep: Callable[..., Path], tmp_path: Path):
    write_run(tmp_path, "M2Rec", 1, [1] * 60)
    with pytest.raises(ValueError, match="another variant has a finished run of the CSV"):
        compared(sweep, tmp_path)
    text = sweep.path.read_text().replace("reference: M2Rec\nbaselines: [SASRec]\n", "")
    with pytest.raises(ValueError, match="reference: name the variant"):
        compared(Sweep.read(write_sweep(text=text)), tmp_path)


def test_one_user(sweep: Sweep, tmp_path: Path):
    write_run(tmp_path, "M2Rec", 1, [1], ["a"])
    write_run(tmp_path, "SASRec", 1, [1], ["a"])
    with pytest.raises(ValueError, match="toy: the paired test needs at least two users, got 1"):
        compared(sweep, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't be read"),
        ("", "column 'user' is missing; expected user, item, test"),
        ("user,item,test\na,i,1\n", "column 'test_unseen' is missing"),
        ("user,item,test,test_unseen\na,i,1,1.5\n", "test_unseen is '1.5' in row 1, expected a whole number"),
        ("user,item,test,test_unseen\na,i,-1,1\n", "test is '-1' in row 1"),
        ("user,item,test,test_unseen\na,i,,1\n", "test is '' in row 1"),
        ("user,item,test,test_unseen\na,i,1\n", "row 1 has more or fewer values than the header"),
        ("user,item,test,test_unseen\na,i,1,1\na,i,1,1\n", "user 'a' is duplicated"),
    ],
)
def test_unusable_ranks(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "test_ranks.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        paired.read_target_ranks(tmp_path)


def test_tokens_stay_text(tmp_path: Path):
    (tmp_path / "test_ranks.csv").write_text("user,item,test,test_unseen\n01,NA,1,0\n1,x,2,3\n")
    ranks = paired.read_target_ranks(tmp_path)
    assert list(ranks.targets.index) == ["01", "1"] and list(ranks.targets) == ["NA", "x"]
    assert ranks.values.tolist() == [[1, 0], [2, 3]]
