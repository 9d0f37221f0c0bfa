"""The overview at the head of README, cell by cell."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from m2rec.experiments.ledger import read_sweep_results
from m2rec.experiments.sweep_plan import Sweep
from m2rec.experiments.tables import make_table
from tests.conftest import SWEEP, answer
from tests.test_results import PAIRED
from tests.test_tables import ROWS, published

Write = Callable[..., Path]


def overview(path: Path, *rows: dict[str, str]) -> list[str]:
    return make_table(read_sweep_results(Sweep.read(path)), "overview", pd.DataFrame(rows)).splitlines()


def test_an_overview(write_sweep: Write):
    """The best baseline is by its mean, the best published one by the number; no other protocol's."""
    path = write_sweep(*ROWS)
    line = "toy,test_unseen,ndcg@10,M2Rec,SASRec,1,9,0.1,0.15,-0.05,-0.1,0,0.02\n"
    path.with_name("toys-paired.csv").write_text(PAIRED + line)
    rows = [published("test_unseen", "Low", "0.31"), published("test_unseen", "High, tuned", "0.32")]
    rows += [published("test_unseen", "Lower", ""), published("test", "Other", "0.9")]
    rows += [published("test_unseen", "Draft", "0.8", "unpublished")]
    heads, _, toy, _, words = overview(path, *rows)
    assert heads == (
        "| data set | variant | n | HR@10 | NDCG@10 | NDCG@10 without text | published HR@10 "
        "| published NDCG@10 | NDCG@10 of the strongest baseline here | vs M2Rec | p |"
    )
    assert toy == (
        "| toy | M2Rec | 2 | 0.4000 ± 0.2828 | 0.2000 ± 0.1414 |  | 0.5 (Low) | 0.32 (High) "
        "| 0.1500 (n 1): SASRec | +50.0% | 0.020 |"
    )
    assert words.startswith("test_unseen, full ranking")


def test_an_overview_of_a_split_by_time_and_without_text(write_sweep: Write):
    """Published numbers are of leave-one-out; what was not run says so."""
    given = published("test_unseen", "A", "0.4")
    assert overview(write_sweep(), given)[2].startswith("| toy | M2Rec | 0 of 2 | not run |")
    text = SWEEP + "common: {split: global_time}\nwithout_text: no filter | gate\n"
    rows = [*ROWS[:2], answer("no filter | gate", 1, 0.1)]
    rows = [{**row, "settings": '{"split": "global_time"}'} for row in rows]
    rows[2]["settings"] = '{"filter": "none", "split": "global_time"}'
    line = overview(write_sweep(*rows, text=text), given)[2]
    assert (
        line == "| toy, split by time | M2Rec | 2 | 0.4000 ± 0.2828 | 0.2000 ± 0.1414 | 0.1000 (n 1) "
        "|  |  |  |  |  |"
    )


def test_an_overview_shows_the_headline_once_it_was_run(write_sweep: Write):
    """The best baseline is then compared with it, on the seeds of both, and not tested."""
    text = SWEEP + "headline: no filter | gate\nheadline_without_text: SASRec\n"
    given = published("test_unseen", "A", "0.4")
    before = overview(write_sweep(*ROWS, text=text), given)[2]
    assert before.startswith("| toy | M2Rec | 2 |")
    ours = [answer("no filter | gate", seed, 0.1 * seed) for seed in (1, 2)]
    for row in ours:
        row["settings"] = '{"filter": "none"}'
    line = overview(write_sweep(*ROWS, *ours, text=text), given)[2]
    assert line.startswith(r"| toy | no filter \| gate | 2 | ")
    assert "| 0.1500 ± 0.0707 | 0.1500 (n 1) |" in line and line.endswith(
        "| 0.1500 (n 1): SASRec | +50.0% |  |"
    )


def test_an_overview_needs_one_reference(write_sweep: Write):
    sweep = Sweep.read(write_sweep(*ROWS))
    other = sweep.model_copy(update={"name": "others", "reference": "SASRec"})
    (results,) = read_sweep_results(sweep)
    for sweeps in ([sweep, other], [sweep.model_copy(update={"reference": None})]):
        all_results = [results._replace(sweep=sweep) for sweep in sweeps]
        with pytest.raises(ValueError, match=r"same reference, got toys: (M2Rec, others: SASRec|None)$"):
            make_table(all_results, "overview", pd.DataFrame())
