"""scripts/recommend.py from the command line, on a run that was trained for it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from m2rec.commands import recommend
from m2rec.serving import int8_table
from m2rec.serving.recommender import Recommender
from m2rec.training.configuration import build_config
from m2rec.training.run import run_experiment
from tests.conftest import copy_run, random_rows, small, write_inter

ROOT = Path(__file__).parent.parent
# i1 and i10 to i14 have titles
TITLES = {"i1": "Green tea", **{f"i{k}": f"Cup no. {k}" for k in range(10, 15)}}


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, in which some items have titles, and the run of it in `runs`."""
    root = tmp_path_factory.mktemp("trained")
    write_inter(root / "data", "toy", random_rows())
    lines = ["item_id:token\tbrand_name:token\ttitle:token_seq"]
    lines += [f"{token}\tours\t{title}" for token, title in TITLES.items()]
    items = root / "data" / "toy" / "toy.item"
    items.write_text("\n".join([*lines, "i2\tours\t"]) + "\n", encoding="utf-8")
    keys = small(root / "data", epochs=1, runs_dir=str(root / "runs"), text_vectors="none")
    run_experiment(build_config(keys))
    return root


@pytest.fixture
def folder(trained_once: Path, tmp_path: Path) -> Path:
    return copy_run(trained_once, tmp_path)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    return capsys


def test_a_table_with_titles(folder: Path, said: pytest.CaptureFixture[str]):
    assert recommend.main([str(folder), "--history", "i1", "i2", "-k", "18"]) == 0
    lines = said.readouterr().out.splitlines()
    assert lines[:3] == ["after 2 items, the last of them:", "     i1    Green tea", "     i2"]
    assert recommend.main([str(folder), "--history", "i1"]) == 0
    assert said.readouterr().out.startswith("after 1 item, the last of them:")
    found = Recommender.load(folder).recommend(["i1", "i2"], 18)
    assert len(lines) == 5 + 18
    for place, (line, item) in enumerate(zip(lines[5:], found, strict=True), 1):
        title = TITLES.get(item.item, "")
        assert item.title == title
        assert line.split(maxsplit=3) == [
            str(place),
            item.item,
            f"{item.score:.3f}",
            *([title] if title else []),
        ]


def test_json_and_tokens_between_quotes(folder: Path, said: pytest.CaptureFixture[str]):
    assert recommend.main([str(folder), "--history", "i1 i2", "i3", "--json", "--keep-seen", "-k=2"]) == 0
    expected = Recommender.load(folder).recommend(["i1", "i2", "i3"], 2, exclude_seen=False)
    assert json.loads(said.readouterr().out) == [item._asdict() for item in expected]


def test_a_user_of_the_data_set(toy: Path, tmp_path: Path, said: pytest.CaptureFixture[str]):
    """All that the user did, the test item included, in the order of time."""
    rows = [(user, f"i{k}", time) for user in ("u", "v w") for k, time in ((5, 3), (1, 1), (7, 9), (2, 2))]
    write_inter(toy, "few", rows)
    keys = small(toy, "few", epochs=1, runs_dir=str(tmp_path / "runs"))
    folder = run_experiment(build_config(keys)).folder
    assert recommend.main([str(folder), "--user=v w", "--keep-seen"]) == 0
    assert said.readouterr().out.splitlines()[:5] == [
        "after 4 items, the last of them:", "     i1", "     i2", "     i5", "     i7"
    ]  # fmt: skip
    toy.rename(tmp_path / "moved")
    assert recommend.main([str(folder), "--user=v w"]) == 2
    assert recommend.main([str(folder), "--user=v w", f"--data-path={tmp_path / 'moved'}"]) == 0


def test_an_item_that_the_run_does_not_know_yet(folder: Path, toy: Path, said: pytest.CaptureFixture[str]):
    path = toy / "toy" / "toy.inter"
    path.write_text(path.read_text() + "u5\tbrand-new\t2e9\n")
    assert recommend.main([str(folder), "--user=u5"]) == 2
    assert "history: unknown item 'brand-new'; remove it or train again" in said.readouterr().err


def test_a_terminal_without_accents(folder: Path):
    (folder / "titles.json").write_text('{"i1": "Thé"}', encoding="utf-8")
    code = """
import sys
from m2rec.commands.recommend import main
sys.exit(main(sys.argv[1:]) or main([*sys.argv[1:], "--json"]))
"""
    arguments = [str(folder), "--history", "i1", "--keep-seen", "-k=20"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *table, as_json = done.stdout.splitlines()
    assert "Th\\xe9" in "\n".join(table)
    assert "Thé" in [item["title"] for item in json.loads(as_json)]


def test_nothing_is_answered_with_what_is_popular(folder: Path, said: pytest.CaptureFixture[str]):
    said.readouterr()
    assert recommend.main([str(folder), "--history", " ", "-k=2", "--json"]) == 0
    counts = json.loads((folder / "counts.json").read_text())
    assert [item["score"] for item in json.loads(said.readouterr().out)] == sorted(counts, reverse=True)[:2]


def test_unknown_items_can_be_skipped(folder: Path, said: pytest.CaptureFixture[str]):
    for arguments in (["i1"], ["nothing", "i1", "--skip-unknown"]):
        assert recommend.main([str(folder), "--json", "--history", *arguments]) == 0
    first, second = [line for line in said.readouterr().out.splitlines() if line.startswith("[")]
    assert first == second


def test_int8_finds_the_same(folder: Path, said: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(int8_table, "_MIN_ITEMS", 0)
    monkeypatch.setattr(int8_table, "_SPARE_ITEMS", 0)
    request = [str(folder), "--json", "-k=1", "--keep-seen", "--history", "i1"]
    assert recommend.main(request) == 0
    monkeypatch.setattr("m2rec.serving.ranker.select_top_k", None)  # would score all items
    assert recommend.main([*request, "--precision=int8"]) == 0
    first, second = [line for line in said.readouterr().out.splitlines() if line.startswith("[")]
    assert [item["item"] for item in json.loads(first)] == [item["item"] for item in json.loads(second)]


def test_a_file_of_histories(folder: Path, tmp_path: Path, said: pytest.CaptureFixture[str]):
    (tmp_path / "in.csv").write_text("user,history\nanna,i1 i2\nbert,i7\n")
    files = ["--input", str(tmp_path / "in.csv"), "--output", str(tmp_path / "out.parquet")]
    said.readouterr()
    assert recommend.main([str(folder), *files, "-k=3"]) == 0
    assert said.readouterr().out == f"2 users: {tmp_path / 'out.parquet'}\n"
    expected = [item.item for item in Recommender.load(folder).recommend(["i1", "i2"], k=3)]
    assert pandas.read_parquet(tmp_path / "out.parquet")["items"][0].tolist() == expected


def test_a_conversation(folder: Path, said: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("green tea\nwhy\n"))
    said.readouterr()
    assert recommend.main([str(folder), "--interactive", "-k=3"]) == 0
    out = said.readouterr().out
    assert "+ Green tea\n" in out and "Green tea: temporal" in out


@pytest.mark.parametrize("flag", ["--keep-seen", "--exclude-seen"])
def test_a_conversation_takes_the_flags(
    folder: Path, said: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str
):
    """After all items but one, k = 1000 shows all of them or that one."""
    recommender = Recommender.load(folder)
    tokens = [token for token in recommender.tokens[1:] if len(recommender.recommend([token])) > 0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(tokens[1:]) + "\n"))
    said.readouterr()
    assert recommend.main([str(folder), "--interactive", "-k=1000", flag]) == 0
    last = said.readouterr().out.rsplit("\n+ ", 1)[1]
    assert len(last.splitlines()) - 1 == (len(tokens) if flag == "--keep-seen" else 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--history", "i1", "nothing"], "history: unknown item 'nothing'"),
        (["--history", "i1", "-k=0"], "k: expected a whole number from 1, got 0"),
        (["--user", "nobody"], "--user: the data set has no user 'nobody'"),
        (["--user", ""], "--user: the data set has no user ''"),
        (["--user", "[PAD]"], "--user: the data set has no user '[PAD]'"),
        ([], "one of the arguments --history --user --interactive --input --all-users is required"),
        (["--input", "a.csv"], "--output requires --input or --all-users, and they require --output"),
        (["--input", "a.csv", "--output", "b", "--json"], "--json requires --history or --user"),
        (["--history", "i1", "--data-path=x"], "--data-path requires --user"),
        (["--history", "i1", "--dataset=x"], "--dataset requires --all-users"),
        (["--all-users"], "--output requires --input or --all-users, and they require --output"),
        (
            ["--interactive", "--skip-unknown"],
            "--interactive can't be combined with --skip-unknown",
        ),
        (
            ["--history", "i1", "--output", "a.parquet"],
            "--output requires --input or --all-users, and they require --output",
        ),
        (["--input", "none.csv", "--output", "a.parquet"], "none.csv"),
        (["--history", "i1", "--device=tpu9"], "device: invalid device 'tpu9'"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, said: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    said.readouterr()
    assert recommend.main([str(folder), *arguments]) == 2
    captured = said.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("recommend.py: error: ")]
    assert message in line and not captured.out


def test_a_folder_that_is_none(tmp_path: Path, said: pytest.CaptureFixture[str]):
    assert recommend.main([str(tmp_path), "--history", "i1"]) == 2
    assert "config.yaml' can't be read" in said.readouterr().err


@pytest.mark.parametrize("content", ['["a"]', '{"i1": 3}', "{", ""])
def test_titles_that_can_t_be_used(folder: Path, content: str):
    (folder / "titles.json").write_text(content)
    with pytest.raises(ValueError, match=r"titles\.json"):
        Recommender.load(folder)


def test_ids_that_begin_with_a_dash(tmp_path: Path, said: pytest.CaptureFixture[str]):
    """Such as those of videos; after = they are taken, several with blanks between them."""
    rows = [(f"-u{u}", f"-i{(u + k) % 7}", k) for u in range(8) for k in range(5)]
    write_inter(tmp_path / "data", "toy", rows)
    keys = small(tmp_path / "data", epochs=1, runs_dir=str(tmp_path / "runs"), text_vectors="none")
    folder = str(run_experiment(build_config(keys)).folder)
    said.readouterr()
    for given in ("--history=-i1 -i2", "--user=-u3"):
        assert recommend.main([folder, given, "-k=2"]) == 0
        assert said.readouterr().out.startswith("after ")
    for given in (["--history", "-i1", "-i2"], ["--user", "-u3"], ["--history", "i1", "-i2"]):
        assert recommend.main([folder, *given]) == 2
        assert "given after =, such as --option='-value'" in said.readouterr().err
