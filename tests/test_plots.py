"""The pictures of a sweep."""

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from m2rec.experiments.ledger import read_sweep_results
from m2rec.experiments.plots import write_sweep_plots
from m2rec.experiments.sweep_plan import Sweep
from tests.conftest import SWEEP, answer

pytest.importorskip("matplotlib")
Write = Callable[..., Path]
ROWS = [answer("M2Rec", 1, 0.1), answer("M2Rec", 2, 0.3), answer("no filter | gate", 1, 0.15)]


def pictures(path: Path) -> dict[str, str]:
    written = write_sweep_plots(read_sweep_results(Sweep.read(path)))
    return {p.name: p.read_text(encoding="utf-8") for p in written}


def texts(svg: str) -> set[str]:
    return {
        "".join(node.itertext()).strip()
        for node in ElementTree.fromstring(svg).iter()
        if node.tag.endswith("text")
    }


def test_three_pictures_with_text(write_sweep: Write):
    found = pictures(write_sweep(*ROWS))
    assert list(found) == ["toys-time.svg", "toys-ablations.svg", "toys-popularity.svg"]
    time, ablations, popularity = (texts(svg) for svg in found.values())
    assert {
        "Toys",
        "M2Rec",
        "no filter | gate",
        "training, seconds, of runs on cpu",
        "test_unseen NDCG@10",
    } <= time
    assert {
        "reference",
        "+0.0500",
        "test_unseen NDCG@10, difference to M2Rec on the same seeds (its mean: 0.2000)",
    } <= ablations
    assert {"0", "1-5", "101+", "1,000 users", "M2Rec"} <= popularity and "SASRec" not in popularity


def test_the_same_results_are_the_same_file(write_sweep: Write):
    path = write_sweep(*ROWS)
    first = pictures(path)
    assert pictures(path) == first
    assert not any(re.search("<dc:date>", svg) for svg in first.values())


def test_a_panel_per_data_set(write_sweep: Write):
    text = SWEEP.replace("datasets: [toy]", "datasets: [toy, shop, never]")
    found = pictures(write_sweep(*ROWS, answer("M2Rec", 1, 0.9, dataset="shop"), text=text))
    assert {"toy", "shop"} <= texts(found["toys-time.svg"]) and "never" not in texts(found["toys-time.svg"])


def test_times_are_of_one_device(write_sweep: Write):
    found = pictures(write_sweep(*ROWS[:2], answer("no filter | gate", 1, 0.15, device="GPU")))
    time = texts(found["toys-time.svg"])
    assert {"training, seconds, of runs on cpu", "M2Rec"} <= time and "no filter | gate" not in time


def test_what_was_not_measured_is_not_drawn(write_sweep: Write):
    assert pictures(write_sweep()) == {}
    row = {key: value for key, value in ROWS[0].items() if "|" not in key and key != "seconds_training"}
    assert list(pictures(write_sweep(row))) == ["toys-ablations.svg"]
    text = re.sub(r"reference.*", "", SWEEP, flags=re.DOTALL)
    assert pictures(write_sweep(row, text=text)) == {}
