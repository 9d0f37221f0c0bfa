"""The conversation: finding items by title, and what is shown after each."""

import io
from typing import Any

import pytest
from rapidfuzz import process

from m2rec.serving.dialogue import Dialogue, format_rank_change
from m2rec.serving.formatting import format_reasons
from m2rec.serving.title_search import MAX_WANTED, TitleSearch
from tests.test_session import TOKENS, V, recommender

TITLES = {
    "50": "Star Wars (1977)",
    "172": "Empire Strikes Back, The (1980)",
    "181": "Return of the Jedi (1983)",
    "222": "Star Trek: First Contact (1996)",
    "227": "Star Trek VI (1991)",
    "1": "Amélie (2001)",
    "2": "Amélie (2001)",
    "12": "12 Monkeys",
}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("50", ["50"]),
        ("Star Wars (1977)", ["50"]),
        ("STAR wars", ["50"]),
        ("jedi", ["181"]),
        ("empire back", ["172"]),
        ("star trek", ["227", "222"]),
        ("star", ["50", "227", "222"]),
        ("retrun of the jedi", ["181"]),
        ("Star Wras", ["50"]),
        ("Retrun of the Jedi (1983)", ["181"]),
        ("amélie 2001", ["1", "2"]),
        ("AMÉLIE", ["1", "2"]),
        ("nameless", ["nameless"]),
        ("12", ["12"]),
        ("qqq", []),
        ("?!", []),
        ("", []),
    ],
)
def test_finding(text: str, found: list[str]):
    assert TitleSearch([*TITLES, "nameless"], TITLES).find(text) == found


def test_of_a_long_text_the_beginning_counts():
    search = TitleSearch(["1"], {"1": "tea " * MAX_WANTED})
    assert search.find("tea " * 10_000) == search.find("tae " * 10_000) == ["1"]


def test_other_threads_run_during_a_search(monkeypatch: pytest.MonkeyPatch):
    """rapidfuzz keeps Python's lock, so no call may compare many names."""
    titles = {str(n): f"tea of the year {n} " * 5 for n in range(3_000)}
    sizes = []

    def compare(wanted: list[str], names: list[str], **options: Any) -> Any:
        sizes.append(len(names))
        return cdist(wanted, names, **options)

    cdist = process.cdist
    monkeypatch.setattr(process, "cdist", compare)
    assert TitleSearch(titles, titles).find("qqqq xxxx zzzz") == []
    assert sum(sizes) == 3 * len(titles) and max(sizes) < 300


def test_moved():
    assert [format_rank_change(*places) for places in ((None, 1), (2, 2), (5, 2), (1, 4))] == [
        "new",
        "",
        "+3",
        "-3",
    ]


def talk(*lines: str) -> str:
    output = io.StringIO()
    Dialogue(recommender(whole_history=False), 3, output).run([f"{line}\n" for line in lines])
    return output.getvalue()


def places(said: str) -> list[str]:
    """The lines of rankings and choices."""
    return [line for line in said.splitlines()[1:] if line[:3].strip().isdigit()]


def test_the_ranking_changes_with_each_item():
    model = recommender(whole_history=False)
    said = talk("i5", "tea", "quit", "i9")
    assert "39 items. Type a title" in said and "+ i5\n" in said and "+ Tea\n" in said and "i9" not in said
    shown = [line.split()[-1] for line in places(said)]
    expected = [model.recommend(history, k=3) for history in (["i5"], ["i5", "i3"])]
    assert shown == [item.title or item.item for found in expected for item in found]


def test_why_an_item_is_recommended():
    """The reasons of `recommend(explain=True)`; the gate's weights only where training chose them."""
    for gate, n_lines in (("softmax", 3 + 2), ("mean", 3)):
        model = recommender(whole_history=False, gate=gate)
        output = io.StringIO()
        Dialogue(model, 3, output).run(["i5", "tea", "why"])
        lines = output.getvalue().splitlines()[-n_lines:]
        explained = model.recommend(["i5", "i3"], k=3, explain=True)
        assert any(item.influences for item in explained)
        for rank, (item, line) in enumerate(zip(explained, lines, strict=False), 1):
            why = format_reasons(item) or "no item of the history stands out"
            assert line == f"{rank:>3}  {item.title or item.item}: {why}"
        assert all("temporal " in line and "semantic " in line for line in lines[3:])
        assert "temporal" not in "".join(lines[:3])


def test_what_was_seen_stays_or_goes():
    """The history is all items but one: left out, it leaves that one."""
    model = recommender(whole_history=False)
    tokens = model.tokens[1:]
    for exclude_seen, n_shown in ((True, 1), (False, 3)):
        output = io.StringIO()
        Dialogue(model, 3, output, exclude_seen).run(tokens[1:])
        last = output.getvalue().rsplit("\n+ ", 1)[1]
        assert len(places(last)) == n_shown


def test_choosing_by_number():
    said = talk("i2", "i1x", "2")
    offered, chosen = said.split("which number?\n")
    second = places(offered)[4].split()[-1]
    assert chosen.startswith(f"+ {second}\n")
    assert [line.split()[-1] for line in places(chosen)] == [
        item.title or item.item for item in recommender(whole_history=False).recommend(["i2", second], k=3)
    ]


def test_going_back():
    once, twice = talk("i5"), talk("i5", "i7", "undo")
    undone = [line.split()[-1] for line in places(twice)[6:]]
    assert undone == [line.split()[-1] for line in places(once)]
    assert talk("i5", "new", "undo", "why").endswith("nothing to explain yet\n")


def test_digits_that_are_no_choice():
    for text in ("²", "9" * 5000, "99"):
        assert "nothing like" in talk("i1x", text)


def test_a_model_that_keeps_no_state():
    output = io.StringIO()
    Dialogue(recommender(whole_history=False, mixer="attention"), 2, output).run(["i5", "undo", "i5", "why"])
    assert output.getvalue().count("+ i5") == 2


def test_nothing_found():
    assert "nothing like 'qqq'; type a title" in talk("qqq")


def test_a_terminal_that_knows_no_accents():
    raw = io.BytesIO()
    output = io.TextIOWrapper(raw, encoding="ascii")
    Dialogue(recommender(), 1, output).say("Amélie")
    assert raw.getvalue() == b"Am\\xe9lie\n"


def test_every_item_can_be_typed():
    catalogue = TitleSearch(TOKENS[1:], {})
    assert all(catalogue.find(token) == [token] for token in TOKENS[1:V])
