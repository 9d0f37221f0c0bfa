"""Reasons beside each recommended item: from Python, in frames and notebooks, on the command line."""

import json
from pathlib import Path

import pandas as pd
import pytest

from m2rec.commands import recommend as command
from m2rec.serving.formatting import build_json_object, format_reasons
from m2rec.serving.ranker import Recommendation
from m2rec.serving.reasons import ExplainedItem, Influence, TextNeighbor
from m2rec.serving.recommender import Recommender
from tests.serving import HISTORY, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def recommender(folder: Path) -> Recommender:
    return Recommender.load(folder)


def test_each_item_has_its_reasons(recommender: Recommender):
    """The ranking is the same as without them, and they are those of `find_reasons`."""
    for options in ({}, {"exclude_seen": False, "candidates": ["i9", "i5", "i2"]}, {"exclude": ["i5"]}):
        plain = recommender.recommend(HISTORY, 6, **options)
        explained = recommender.recommend(iter(HISTORY), 6, explain=True, **options)
        assert [entry[:3] for entry in explained] == plain
        reasons = recommender.find_reasons(HISTORY, [entry.item for entry in plain])
        assert [(e.item, e.influences, e.nearest_by_text, e.title) for e in explained] == reasons
        for entry in explained:
            assert entry.item not in [one.item for one in entry.nearest_by_text]
            assert len(entry.influences) <= 3 and {one.item for one in entry.influences} <= set(HISTORY)
    assert all(type(entry) is Recommendation for entry in plain)


def test_there_may_be_no_reason(recommender: Recommender):
    """After nothing; after one item, without which there is no ranking; for an empty ranking."""
    assert all(not e.influences and not e.nearest_by_text for e in recommender.recommend([], 3, explain=True))
    (alone,) = recommender.recommend(["i4", "i4"], 1, explain=True)
    assert not alone.influences
    assert recommender.recommend(HISTORY, candidates=[], explain=True) == []
    skipped = recommender.recommend(["new", *HISTORY], 3, skip_unknown=True, explain=True)
    assert skipped == recommender.recommend(HISTORY, 3, explain=True)
    with pytest.raises(ValueError, match="ranking: unknown item 'tea'"):
        recommender.explain_ranking(HISTORY, [Recommendation("tea", 1.0)])
    with pytest.raises(ValueError, match="n: expected a whole number from 1, got 0"):
        recommender.explain_ranking(HISTORY, [], 0)


def test_a_frame_has_columns_of_reasons(recommender: Recommender):
    histories = {"a": HISTORY, "b": [], "c": ["i7", "i3"]}
    plain = recommender.recommend_frame(histories, 3)
    explained = recommender.recommend_frame(histories, 3, explain=True)
    reasons = ["raised_by", "nearest_by_text"]
    pd.testing.assert_frame_equal(explained.drop(columns=reasons), plain)
    rows = iter(explained[reasons].itertuples(index=False))
    for history in histories.values():
        for entry in recommender.recommend(history, 3, explain=True):
            row = next(rows)
            assert row.raised_by == [one.item for one in entry.influences]
            assert row.nearest_by_text == [one.item for one in entry.nearest_by_text]
    polars = pytest.importorskip("polars")
    clicks = polars.DataFrame({"user_id": ["a"] * 4, "item_id": HISTORY, "timestamp": [1, 2, 3, 4]})
    ranked = recommender.recommend_frame(clicks, 3, explain=True)
    assert ranked["raised_by"].to_list() == explained["raised_by"].tolist()[:3]


def test_reasons_in_words():
    influences = [Influence("1", "Star Wars", 1.234), Influence("2", "", 0.5)]
    near = [TextNeighbor("3", "Alien", 0.777), TextNeighbor("4", "Heat", 0.06)]  # the last is no reason
    assert format_reasons(ExplainedItem("9", 1.0, "", influences, near)) == (
        "because of Star Wars (+1.23), 2 (+0.50); nearest by text: Alien (0.78)"
    )
    assert format_reasons(ExplainedItem("9", 1.0, "", [], near)) == "nearest by text: Alien (0.78)"
    assert format_reasons(ExplainedItem("9", 1.0, "", [], [])) == ""


def test_a_notebook_shows_them(recommender: Recommender):
    shown = recommender.recommend(HISTORY, 3, explain=True)._repr_html_()
    assert shown.count("<tr>") == 4 and "<th>reasons</th>" in shown and "because of " in shown


def test_on_the_command_line(folder: Path, recommender: Recommender, capsys: pytest.CaptureFixture[str]):
    expected = recommender.recommend(HISTORY, 4, explain=True)
    arguments = [str(folder), "--history", *HISTORY, "-k=4", "--explain"]
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines if "because of" in line or "by text" in line] == [
        text for text in map(format_reasons, expected) if text
    ]
    assert command.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps([build_json_object(entry) for entry in expected]))
    assert list(found[0]) == ["item", "score", "title", "influences", "nearest_by_text"]
    assert command.main([str(folder), "--interactive", "--explain"]) == 2
    assert "--explain requires --history or --user" in capsys.readouterr().err
