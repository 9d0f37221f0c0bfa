"""What is read from a sweep's CSV files, and what is refused."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from m2rec.experiments.ledger import (
    SeedStatistics,
    read_csv_table,
    read_finished_runs,
    read_headline_tests,
    read_published_results,
    summarize_seeds,
)
from m2rec.experiments.sweep_plan import Sweep
from tests.conftest import answer

HEAD = "dataset,variant,seed,settings,test.ndcg@10\n"


def test_one_row_per_seed_the_last_of_equal_cells(write_sweep: Callable[..., Path]):
    rows = [answer("M2Rec", 2, 0.2), answer("M2Rec", 1, 0.9), answer("M2Rec", 1, 0.1)]
    answers = read_finished_runs(Sweep.read(write_sweep(*rows)))
    columns = answers[["variant", "seed", "test_unseen.ndcg@10"]]
    assert columns.values.tolist() == [["M2Rec", "1", 0.1], ["M2Rec", "2", 0.2]]


def test_rows_of_other_cells_are_left_out_and_counted(
    write_sweep: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    rows = [answer("M2Rec", 1, 0.1), answer("M2Rec", 3, 0.1), answer("old", 1, 0.1)]
    rows.append(answer("M2Rec", 2, 0.9, settings='{"dropout_prob": 0.9}'))  # as the sweep was once
    with caplog.at_level(logging.WARNING):
        answers = read_finished_runs(Sweep.read(write_sweep(*rows)))
    assert answers[["variant", "seed"]].values.tolist() == [["M2Rec", "1"]]
    assert "ignored 3 rows that toys.yaml does not plan (other run or other settings)" in caplog.text


def test_no_file_and_no_rows_are_no_runs(write_sweep: Callable[..., Path]):
    path = write_sweep()
    assert read_finished_runs(Sweep.read(path)).empty
    path.with_suffix(".csv").write_text(HEAD)
    assert read_finished_runs(Sweep.read(path)).empty


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 'dataset' is missing"),
        ("dataset,variant\ntoy,M2Rec\n", "column 'seed' is missing; expected dataset, variant, seed"),
        (HEAD + "toy,M2Rec,1\n", "row 1 has more or fewer values than the header"),
        (HEAD + "toy,M2Rec,1,{},0.1,7\n", "row 1 has more or fewer values than the header"),
        (HEAD + "toy,M2Rec,1,{},nan\n", "row 1: test.ndcg@10 is 'nan', expected a number"),
        (HEAD + "toy,M2Rec,1,{},x\n", "test.ndcg@10 is 'x'"),
        (
            HEAD.replace("test.ndcg@10", "users") + "toy,M2Rec,1,{},5\ntoy,M2Rec,2,{},6\n",
            "differ in users: 5 and 6",
        ),
    ],
)
def test_unusable_rows(write_sweep: Callable[..., Path], text: str, message: str):
    path = write_sweep()
    path.with_suffix(".csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_finished_runs(Sweep.read(path))
    assert str(path.with_suffix(".csv")) in str(caught.value)


def test_no_csv_at_all(tmp_path: Path):
    with pytest.raises(ValueError, match="can't be read"):
        read_csv_table(tmp_path / "none.csv", [])
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a CSV file in UTF-8"):
        read_csv_table(tmp_path / "bytes.csv", [])


def test_mean_and_sample_standard_deviation():
    runs = pd.DataFrame({"x": [1.0, 2.0, 6.0], "gap": [1.0, 2.0, math.nan]})
    assert summarize_seeds(runs, "x") == SeedStatistics(3.0, pytest.approx(7**0.5))
    assert summarize_seeds(runs[:1], "x") == SeedStatistics(1.0, None)
    for none in (summarize_seeds(runs, "gap"), summarize_seeds(runs[:0], "x"), summarize_seeds(runs, "y")):
        assert none is None


PAIRED = (
    "dataset,protocol,metric,variant,baseline,seeds,users,variant_mean,baseline_mean,difference,low,high,p\n"
)


def test_the_test_that_tables_show(write_sweep: Callable[..., Path]):
    rows = [answer("M2Rec", 1, 0.2), answer("M2Rec", 2, 0.3), answer("SASRec", 2, 0.1)]
    sweep = Sweep.read(write_sweep(*rows))
    answers = read_finished_runs(sweep)
    assert read_headline_tests(sweep, answers).empty
    path = sweep.path.with_name("toys-paired.csv")
    line = "toy,{},ndcg@10,M2Rec,SASRec,2,9,{},0.1,0.2,0.1,0.3,{}\n"
    path.write_text(PAIRED + line.format("test", 0.15, 0.5) + line.format("test_unseen", 0.3, 0.25))
    assert read_headline_tests(sweep, answers)["p"].tolist() == [0.25]
    path.write_text(PAIRED + line.format("test_unseen", 0.31, 0.25))
    with pytest.raises(ValueError, match="'M2Rec' on toy was computed from runs that are no longer in"):
        read_headline_tests(sweep, answers)
    path.write_text(PAIRED + line.format("test_unseen", 0.3, ""))
    with pytest.raises(ValueError, match="row 1: p is '', expected a number"):
        read_headline_tests(sweep, answers)


def test_published_numbers(tmp_path: Path):
    path = tmp_path / "reported.csv"
    head = "dataset,protocol,model,hit@10,ndcg@10,status,confidence,source\n"
    path.write_text(head + "toy,test,A,0.1,,published,,paper\n")
    assert read_published_results(path)["ndcg@10"].tolist() == [""]
    for row, message in {
        "toy,UNMASK,A,0.1,,published,A,paper": "protocol is 'UNMASK', expected test or test_unseen",
        "toy,test,A,0.1,,,A,paper": "status is '', expected published or unpublished",
        "toy,test,A,0.1,,published,sure,paper": "confidence is 'sure', expected A or B or C",
    }.items():
        path.write_text(f"{head}{row}\n")
        with pytest.raises(ValueError, match=f"row 1: {message}"):
            read_published_results(path)


def test_the_published_numbers_of_the_project():
    rows = read_published_results(Path(__file__).parent.parent / "results" / "reported.csv")
    assert {"ml-1m", "amazon-beauty", "amazon-sports-outdoors", "amazon-toys-games"} == {*rows["dataset"]}
    for row in rows.to_dict("records"):
        assert row["source"] and row["model"]
        assert row["hit@10"] or row["ndcg@10"]
        assert 0 < float(row["ndcg@10"] or 0.01) < float(row["hit@10"] or 0.99) < 1


def test_rows_from_before_there_was_a_choice_of_ties(write_sweep: Callable[..., Path]):
    """They count as ties in file order; rows of another protocol are refused beside them."""
    old, new = answer("M2Rec", 1, 0.1), answer("M2Rec", 2, 0.2, ties="file")
    runs = read_finished_runs(Sweep.read(write_sweep(old)))
    assert runs["ties"].tolist() == ["file"]
    runs = read_finished_runs(Sweep.read(write_sweep(old, new)))
    assert runs["ties"].tolist() == ["file", "file"]
    for column, value in {"ties": "shuffled", "time_order": "recbole", "split": "global_time"}.items():
        path = write_sweep(old, {**new, column: value})
        with pytest.raises(ValueError, match=f"rows on toy differ in {column}: .* and {value}; make a sweep"):
            read_finished_runs(Sweep.read(path))


def test_rows_from_before_returning_targets_were_misses(write_sweep: Callable[..., Path]):
    """They count where no target returns, else they are refused beside rows of today."""
    old, new = answer("M2Rec", 1, 0.1), answer("M2Rec", 2, 0.2, test_returning="0")
    assert len(read_finished_runs(Sweep.read(write_sweep(old, new))).index) == 2
    path = write_sweep(old, {**new, "test_returning": "3"})
    with pytest.raises(ValueError, match="'M2Rec' on toy, seed 1, was measured when targets that"):
        read_finished_runs(Sweep.read(path))
