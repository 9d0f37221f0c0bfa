"""What a sweep asks for, the folders of its runs, and the mistakes in its file."""

import os
from pathlib import Path

import pytest

from m2rec.experiments.sweep_plan import (
    PlannedRun,
    Sweep,
    find_finished_run,
    get_planned_run_folder,
    slugify_variant,
)

WHOLE = """
title: Two sets
command: python scripts/sweep.py results/two.yaml --jobs=2
datasets: [ml-100k, toy]
seeds: [2, 1]
common: {epochs: 5, learning_rate: 1e-3, hidden_size: 32}
dataset_keys: {toy: {epochs: 6, n_layers: 1}}
variants:
  M2Rec:
  SASRec: {model: SASRec, epochs: 7}
tables: {main: [SASRec, M2Rec], alone: [M2Rec]}
reference: M2Rec
baselines: [SASRec]
without_text: SASRec
"""
SHORT = "title: T\ndatasets: [toy]\nseeds: [1]\nvariants: {A: {}, B: {}}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "two.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_every_key(tmp_path: Path):
    sweep = Sweep.read(write(tmp_path, WHOLE))
    assert (sweep.name, sweep.path, sweep.title) == ("two", tmp_path / "two.yaml", "Two sets")
    assert sweep.command.endswith("--jobs=2") and sweep.datasets == ("ml-100k", "toy")
    assert sweep.seeds == (2, 1) and list(sweep.variants) == ["M2Rec", "SASRec"]
    assert sweep.tables == {"main": ("SASRec", "M2Rec"), "alone": ("M2Rec",)}
    assert (sweep.reference, sweep.baselines) == ("M2Rec", ("SASRec",))
    assert sweep.without_text == "SASRec"


def test_a_cells_keys_are_merged_weakest_first(tmp_path: Path):
    cells = list(Sweep.read(write(tmp_path, WHOLE)).planned_runs())
    assert [cell[:3] for cell in cells] == [
        (d, v, s) for d in ("ml-100k", "toy") for s in (2, 1) for v in ("M2Rec", "SASRec")
    ]
    base = {"learning_rate": 0.001, "hidden_size": 32}
    assert cells[0] == PlannedRun("ml-100k", "M2Rec", 2, {"epochs": 5, **base})
    assert cells[4] == PlannedRun("toy", "M2Rec", 2, {"epochs": 6, "n_layers": 1, **base})
    assert cells[5] == PlannedRun("toy", "SASRec", 2, {"epochs": 7, "n_layers": 1, "model": "SASRec", **base})


def test_what_may_be_left_out(tmp_path: Path):
    sweep = Sweep.read(write(tmp_path, SHORT))
    assert (
        sweep.tables == {"main": ("A", "B")} and sweep.command == "python scripts/sweep.py results/two.yaml"
    )
    assert sweep.reference is None and sweep.baselines == () and sweep.common == {}


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("M2Rec", "m2rec"),
        ("attention, dense rows", "attention-dense-rows"),
        ("M2Rec (S6 + text)", "m2rec-s6-+-text"),
        ("--gBCE 0.75--", "gbce-0.75"),
    ],
)
def test_a_variant_names_its_folder(variant: str, expected: str):
    assert slugify_variant(variant) == expected
    assert get_planned_run_folder(Path("runs"), "toy", variant, 3) == Path("runs/toy") / expected / "3"


def test_the_newest_finished_run_counts(tmp_path: Path):
    assert find_finished_run(tmp_path / "none") is None
    for age, name in enumerate(["newest", "older", "unfinished"]):
        (tmp_path / name).mkdir()
        if name != "unfinished":
            (tmp_path / name / "metrics.json").write_text("{}")
            os.utime(tmp_path / name / "metrics.json", (1000 - age, 1000 - age))
    assert find_finished_run(tmp_path) == tmp_path / "newest"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: T", "titel: T", "unknown key 'titel'; did you mean 'title'?"),
        ("title: T\n", "", "title is missing"),
        ("title: T", "title: T\ndatasets_keys: {}", "did you mean 'dataset_keys'"),
        (
            "variants: {A: {}, B: {}}",
            "variants: {}",
            "variants: there are none",
        ),
        ("variants: {A: {}, B: {}}", "variants:", "variants is missing"),
        (
            "variants: {A: {}, B: {}}",
            "variants: [A]",
            "variants: input should be a valid dictionary",
        ),
        ("A: {}", "A: [1]", "variants: A: input should be a valid dictionary, got \\[1\\]"),
        ("A: {}", "A: {seed: 3}", "variants: A: seed belongs to the list seeds"),
        (
            "A: {}",
            "A: {ties: shuffled}",
            "'B' has no keys of the protocol, 'A' has {'ties': 'shuffled'}; put",
        ),
        ("A: {}", "on: {}", "input should be a valid string, got True; put it into quotes"),
        ("A: {}", "A: {1: 2}", "variants: A: 1: .*input should be a valid string, got 1"),
        ("A: {}", "A: {text_vectors: 2024-01-01}", "variants: A: text_vectors: .*put it into quotes"),
        ("A: {}", "'b': {}", "variants: 'b' and 'B' share the folder 'b'"),
        ("A: {}", "'..': {}", "variants: '..' has no letter or digit"),
        ("seeds: [1]", "seeds: [1, 1]", "seeds: expected distinct whole numbers from 0, got \\[1, 1\\]"),
        ("seeds: [1]", "seeds: [true]", "seeds: expected distinct"),
        ("seeds: [1]", "seeds: 5", "seeds: expected distinct"),
        ("seeds: [1]", "seeds: []", "seeds: expected distinct"),
        ("datasets: [toy]", "datasets: toy", "datasets: expected a list of distinct names, got 'toy'"),
        (
            "datasets: [toy]",
            "datasets: [toy, toy]",
            "datasets: expected a list of distinct names",
        ),
        ("title: T", "title: T\ncommon: {dataset: x}", "common: dataset belongs to the list datasets"),
        ("title: T", "title: T\ndataset_keys: {tou: {}}", "unknown data set 'tou'; did you mean 'toy'?"),
        ("title: T", "title: T\ntables: {main: [A, C]}", "tables: main: unknown variant 'C'"),
        ("title: T", "title: T\ntables: {buckets: [A]}", "tables: 'buckets' can't name a table"),
        ("title: T", "title: T\nreference: a", "reference: unknown variant 'a'; did you mean 'A'?"),
        ("title: T", "title: T\nreference: [A]", "reference: input should be a valid string, got \\['A'\\]"),
        ("title: T", "title: T\nwithout_text: {A: 1}", "without_text: input should be a valid string"),
        ("title: T", "title: T\nreference: A\nbaselines: [D]", "baselines: unknown variant 'D'"),
        ("title: T", "title: T\nbaselines: [B]", "baselines: there is nothing to compare them with"),
    ],
)
def test_a_mistake_is_one_line_with_the_file(tmp_path: Path, old: str, new: str, message: str):
    assert old in SHORT
    path = write(tmp_path, SHORT.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        Sweep.read(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_missing_and_an_empty_file(tmp_path: Path):
    with pytest.raises(ValueError, match="can't be read"):
        Sweep.read(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="title is missing"):
        Sweep.read(write(tmp_path, ""))
