"""The tables of README and docs, cell by cell."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from m2rec.experiments.ledger import read_sweep_results
from m2rec.experiments.sweep_plan import Sweep
from m2rec.experiments.tables import make_table
from tests.conftest import SWEEP, answer
from tests.test_results import PAIRED

Write = Callable[..., Path]
ROWS = [answer("M2Rec", 1, 0.1), answer("M2Rec", 2, 0.3), answer("SASRec", 1, 0.15)]


def table_of(path: Path, table: str = "main") -> list[str]:
    return make_table(read_sweep_results(Sweep.read(path)), table, pd.DataFrame()).splitlines()


def test_a_result_table(write_sweep: Write):
    lines = table_of(write_sweep(*ROWS))
    assert lines[0] == (
        "| variant | n | test_unseen HR@10 | test_unseen NDCG@10 | test HR@10 | test NDCG@10 | valid NDCG@10 "
        "| item coverage@10 | epochs to best | s / epoch | vs M2Rec |"
    )
    assert lines[1] == "|" + " --- |" * 11
    assert lines[2] == (
        "| M2Rec | 2 | **0.4000 ± 0.2828** | **0.2000 ± 0.1414** | **0.2000 ± 0.1414** | **0.1000 ± 0.0707** "
        "| 0.6000 | 0.2500 | 4 | 1.2 |  |"
    )
    assert lines[3] == (  # against seed 1 of M2Rec, 0.1
        "| SASRec | 1 of 2 | 0.3000 | 0.1500 | 0.1500 | 0.0750 | 0.6000 | 0.2500 | 4 | 1.2 | +50.0% |"
    )
    assert lines[5] == (
        "Leave-one-out, full ranking, time order exact, ties in file order; "
        "2,000 users, 50 items, 123,456 interactions; timed on cpu. "
        "Made by `python scripts/sweep.py results/toys.yaml`."
    )
    assert len(lines) == 6


def test_nothing_to_compare_with(write_sweep: Write):
    """No seed of both, a reference of zero, no reference."""
    for rows in ([answer("M2Rec", 2, 0.1), answer("SASRec", 1, 0.15)], [answer("M2Rec", 1, 0.0), *ROWS[2:]]):
        lines = table_of(write_sweep(*rows))
        assert "vs M2Rec" not in "".join(lines) and len(lines) == 6
    path = write_sweep(*ROWS)
    text = path.read_text().replace("reference: M2Rec\n", "")
    path.write_text(re.sub("baselines: .*\n", "", text))
    assert "vs " not in "".join(table_of(path))


def test_what_made_the_text_is_said(write_sweep: Write):
    texts = ("lsa: title", "lsa: title plot")
    rows = [answer("M2Rec", seed, 0.1, text=text) for seed, text in enumerate(texts, 1)]
    assert "; text by lsa: title and lsa: title plot; timed on" in table_of(write_sweep(*rows))[-1]
    rows = [answer("M2Rec", seed, 0.1, text="lsa: title", text_sha256=str(seed)) for seed in (1, 2)]
    assert "; text by lsa: title (2 files); timed on" in table_of(write_sweep(*rows))[-1]


def test_threads_are_said(write_sweep: Write):
    rows = [answer("M2Rec", 1, 0.1, threads=1), answer("SASRec", 1, 0.1, threads=2)]
    assert "; timed on cpu, 1 and 2 threads." in table_of(write_sweep(*rows))[-1]
    assert "; timed on cpu, 1 thread." in table_of(write_sweep(rows[0]))[-1]


def test_times_are_of_one_device_and_others_are_named(write_sweep: Write):
    rows = [
        answer("M2Rec", 1, 0.1, threads=2, seconds_per_epoch=60),
        answer("M2Rec", 2, 0.1, device="GPU", threads=8, seconds_per_epoch=1),
        answer("SASRec", 1, 0.1, device="GPU", threads=8, seconds_per_epoch=3),
        answer("SASRec", 2, 0.1, device="GPU", threads=8, seconds_per_epoch=4),
    ]
    lines = table_of(write_sweep(*rows))
    assert [line.split(" | ")[9] for line in lines[2:4]] == ["1", "3.5"]
    assert "; timed on GPU, and where a row says so on cpu, 2 threads." in lines[-1]
    lines = table_of(write_sweep(rows[0], rows[2]))
    assert [line.split(" | ")[9] for line in lines[2:4]] == ["60", "3 on GPU"]
    lines = table_of(write_sweep(rows[0], {**rows[2], "device": ""}))
    assert [line.split(" | ")[9] for line in lines[2:4]] == ["60", "3 on an unknown device"]
    lines = table_of(write_sweep({**rows[0], "device": ""}))
    assert lines[2].split(" | ")[9].startswith("60") and "timed on" not in lines[-1]


def test_a_variant_without_rows_and_a_name_with_a_bar(write_sweep: Write):
    lines = table_of(write_sweep(*ROWS), "ablations")
    assert ". Not run: no filter | gate. Made by " in lines[4]
    assert "**" not in lines[2]  # the best of one is no best


def test_nothing_run_yet(write_sweep: Write):
    path = write_sweep()
    expected = "Not run: M2Rec; SASRec. Made by `python scripts/sweep.py results/toys.yaml`."
    assert table_of(path) == [expected]
    assert table_of(path, "buckets") == [expected]


def test_a_name_with_a_bar(write_sweep: Write):
    lines = table_of(write_sweep(*ROWS, answer("no filter | gate", 1, 0.1)), "ablations")
    assert lines[3].startswith("| no filter \\| gate | 1 of 2 | 0.2000 |")


def test_a_metric_that_one_row_lacks_is_left_out(write_sweep: Write):
    rows = [*ROWS[:1], answer("M2Rec", 2, 0.3, **{"test.hit@10": ""}), ROWS[2]]
    assert table_of(write_sweep(*rows))[2].split(" | ")[4] == ""


def test_each_data_set_has_its_table_and_its_best(write_sweep: Write):
    text = SWEEP.replace("datasets: [toy]", "datasets: [toy, shop]")
    others = [
        answer("SASRec", 1, 0.9, dataset="shop", users=7),
        answer("M2Rec", 1, 0.8, dataset="shop", users=7),
    ]
    whole = "\n".join(table_of(write_sweep(*ROWS, *others, text=text)))
    toy, shop = whole.split("**shop**")
    assert toy.startswith("**toy**\n\n| variant") and "2,000 users" in toy and "7 users" in shop
    assert "| **0.2000 ± 0.1414** |" in toy and "| SASRec | 1 of 2 | **1.8000** | **0.9000** |" in shop


def test_p_of_fewer_seeds_than_the_means_says_which(write_sweep: Write):
    path = write_sweep(*ROWS, answer("SASRec", 2, 0.2))
    line = "toy,test_unseen,ndcg@10,M2Rec,SASRec,{},9,{},{},-0.05,-0.1,0,0.02\n"
    for seeds, means, shown in (("2", (0.3, 0.2), "0.020 (seed 2)"), ("1 2", (0.2, 0.175), "0.020")):
        path.with_name("toys-paired.csv").write_text(PAIRED + line.format(seeds, *means))
        assert table_of(path)[3].endswith(f"| {shown} |")


@pytest.mark.parametrize(
    ("p", "shown"), [("0.000100", "< 0.001"), ("0.0314", "0.031"), ("1.000000", "1.000")]
)
def test_p_values(write_sweep: Write, p: str, shown: str):
    path = write_sweep(*ROWS)
    line = f"toy,test_unseen,ndcg@10,M2Rec,SASRec,1,9,0.1,0.15,-0.05,-0.1,0,{p}\n"
    path.with_name("toys-paired.csv").write_text(PAIRED + line)
    lines = table_of(path)
    assert lines[0].endswith("| p |") and lines[2].endswith("|  |") and lines[3].endswith(f"| {shown} |")


def test_buckets(write_sweep: Write):
    lines = table_of(write_sweep(*ROWS), "buckets")
    assert lines[:5] == [
        "| popularity | 0 | 1-5 | 101+ |",
        "| --- | --- | --- | --- |",
        "| users | 1,000 | 1,000 | 1,000 |",
        "| M2Rec | **0.2000 ± 0.1414** | **0.2000 ± 0.1414** | **0.2000 ± 0.1414** |",
        "| SASRec | 0.1500 | 0.1500 | 0.1500 |",
    ]
    assert "| history | 1-5 | 201+ |" in lines


def test_runs_without_buckets(write_sweep: Write):
    row = {key: value for key, value in ROWS[0].items() if "|" not in key}
    with pytest.raises(ValueError, match=r"no column test_unseen.ndcg@10\|popularity=...; run the sweep"):
        table_of(write_sweep(row), "buckets")


def published(protocol: str, model: str, ndcg: str, status: str = "published") -> dict[str, str]:
    return {
        "status": status,
        "confidence": "B",
        "dataset": "toy",
        "protocol": protocol,
        "model": model,
        "hit@10": "0.5",
        "ndcg@10": ndcg,
        "source": "S",
    }


def test_published_numbers_beside_ours(write_sweep: Write):
    results = read_sweep_results(Sweep.read(write_sweep(*ROWS)))
    rows = [published("test_unseen", "SASRec, tuned", "0.4"), published("test_unseen", "Other", "")]
    rows += [
        published("test", "M2Rec (claimed)", "0.3"),
        published("test_unseen", "Draft", "0.6", "unpublished"),
    ]
    lines = make_table(results, "reported", pd.DataFrame(rows)).splitlines()
    assert lines[0] == (
        "| protocol | model | reported HR@10 | reported NDCG@10 | our HR@10 | our NDCG@10 "
        "| confidence | source |"
    )
    assert lines[2:7] == [
        "| test | M2Rec (claimed) | 0.5 | 0.3 | 0.2000 ± 0.1414 | 0.1000 ± 0.0707 | B | S |",
        "| test_unseen | SASRec, tuned | 0.5 | 0.4 | 0.3000 | 0.1500 | B | S |",
        "| test_unseen | Other | 0.5 |  |  |  | B | S |",
        "| test_unseen | Draft, unpublished | 0.5 | 0.6 |  |  | B | S |",
        "| test_unseen | M2Rec |  |  | 0.4000 ± 0.2828 | 0.2000 ± 0.1414 |  | this project |",
    ]
    with pytest.raises(ValueError, match=r"reported.csv has no row of toy"):
        make_table(results, "reported", pd.DataFrame(rows)[:0])


def write_shuffled(
    path: Path, *rows: dict[str, object], variants: str = "{M2Rec: {}, SASRec: {model: SASRec}}"
) -> Path:
    """Add a sweep of the same variants with shuffled ties, and name it in the sweep."""
    path.write_text(path.read_text() + "ties_shuffled: mixed\n")
    other = path.with_name("mixed.yaml")
    other.write_text(
        f"title: Mixed\ndatasets: [toy]\nseeds: [1]\ncommon: {{ties: shuffled}}\nvariants: {variants}\n"
        "reference: M2Rec\n"
    )
    shuffled = []
    for row in rows:
        settings = {**json.loads(str(row["settings"])), "ties": "shuffled"}
        shuffled.append({**row, "ties": "shuffled", "settings": json.dumps(settings, sort_keys=True)})
    frame = pd.DataFrame(shuffled)
    if len(frame):
        frame.to_csv(other.with_suffix(".csv"), index=False)
    return other


def test_shuffled_ties_stand_in_columns_of_their_own(write_sweep: Write):
    path = write_sweep(*ROWS)
    before = table_of(path)
    write_shuffled(path)
    assert table_of(path) == before
    path = write_sweep(*ROWS)
    write_shuffled(path, answer("SASRec", 1, 0.12))
    lines = table_of(path)
    assert lines[0] == (
        f"{before[0]} ties shuffled: test_unseen HR@10 | ties shuffled: test_unseen NDCG@10 "
        "| ties shuffled: n |"
    )
    assert lines[2] == f"{before[2]}  |  |  |" and lines[3] == f"{before[3]} 0.2400 | 0.1200 | 1 |"
    assert lines[5].startswith(
        before[5].removesuffix(" Made by `python scripts/sweep.py results/toys.yaml`.")
    )
    assert (
        " Ties shuffled: another protocol, made by `python scripts/sweep.py results/mixed.yaml`." in lines[5]
    )


def test_a_table_of_shuffled_ties_says_so(write_sweep: Write):
    other = write_shuffled(write_sweep(*ROWS), answer("M2Rec", 1, 0.2))
    assert "time order exact, ties shuffled; " in table_of(other)[-1]
    results = read_sweep_results(Sweep.read(other))
    given = pd.DataFrame([published("test_unseen", "SASRec", "0.4")])
    assert (
        make_table(results, "overview", given).splitlines()[2]
        == "| toy, ties shuffled | M2Rec | 1 | 0.4000 | 0.2000 |  |  |  |  |  |  |"
    )
    with pytest.raises(
        ValueError, match="mixed: published numbers are of another protocol than toy, ties shuffled"
    ):
        make_table(results, "reported", given)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (
            "{M2Rec: {hidden_size: 32}}",
            "mixed.yaml: 'M2Rec' on toy differs from .*toys.yaml in more than ties: shuffled",
        ),
        ("{M2Rec: {}, GRU4Rec: {model: GRU4Rec}}", "mixed.yaml: variants: .*GRU4Rec"),
    ],
)
def test_shuffled_ties_of_other_settings_are_refused(write_sweep: Write, variants: str, message: str):
    path = write_sweep(*ROWS)
    write_shuffled(path, variants=variants)
    with pytest.raises(ValueError, match=message):
        table_of(path)


def test_a_shuffled_sweep_has_no_shuffled_sweep(write_sweep: Write):
    path = write_sweep(*ROWS, text=SWEEP + "common: {ties: shuffled}\nties_shuffled: toys\n")
    with pytest.raises(ValueError, match="ties_shuffled: the sweep is itself shuffled; leave it out"):
        table_of(path)
