"""scripts/report.py: README's markers, --check and --paired."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from m2rec.commands import report
from tests.conftest import answer
from tests.test_paired import write_run

Write = Callable[..., Path]
README = "# Title\n\nBefore.\n\n<!-- results:toys:main -->\nold\n<!-- /results -->\n\nAfter.\n"
ROWS = [answer("M2Rec", 1, 0.25), answer("SASRec", 1, 0.125)]


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call main on the temporary README and results; returns exit status, stdout and stderr."""

    def run(*arguments: str, readme: str | None = None) -> tuple[int, str, str]:
        path = tmp_path / "README.md"
        if readme is not None:
            path.write_text(readme, encoding="utf-8")
        status = report.main([f"--page={path}", f"--results={tmp_path / 'results'}", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_readme_is_what_the_results_say(capsys: pytest.CaptureFixture[str]):
    assert report.main(["--check"]) == 0, capsys.readouterr()


def test_fills_markers_and_leaves_the_rest(write_sweep: Write, call: Callable, tmp_path: Path):
    pytest.importorskip("matplotlib")
    write_sweep(*ROWS)
    status, out, _ = call(readme=README)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    before, after = README.split("old\n")
    assert status == 0 and text.startswith(before + "\n| variant | n |") and text.endswith("\n\n" + after)
    assert "| M2Rec | 1 of 2 | **0.5000** | **0.2500** |" in text and "old" not in text
    assert (tmp_path / "results" / "toys-time.svg").exists() and "toys-time.svg" in out
    call()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
    assert call("--check")[:2] == (0, "")


def test_check_writes_nothing(write_sweep: Write, call: Callable, tmp_path: Path):
    write_sweep(*ROWS)
    status, out, err = call("--check", readme=README)
    assert status == 1 and out.count("\n") == 1 and "is not what the results say" in out and err == ""
    assert (tmp_path / "README.md").read_text() == README
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"toys.yaml", "toys.csv"}


def test_all_kinds_of_markers(write_sweep: Write, call: Callable, tmp_path: Path):
    path = write_sweep(*ROWS)
    head = "dataset,protocol,model,hit@10,ndcg@10,status,confidence,source\n"
    path.with_name("reported.csv").write_text(head + "toy,test,SASRec,0.5,0.4,published,A,paper\n")
    marks = "".join(
        README[README.index("<!--") :].replace("main", t)
        for t in ("ablations", "reported", "buckets", "overview")
    )
    assert call(readme=marks)[0] == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Not run: no filter | gate." in text and "| popularity | 0 | 1-5 | 101+ |" in text
    assert "| test | SASRec | 0.5 | 0.4 | 0.1250 | 0.0625 | A | paper |" in text
    assert text.count("<!-- /results -->") == text.count("After.") == 4
    assert "| toy | M2Rec | 1 of 2 | 0.5000 | 0.2500 |" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("results:toys", "results:toy", "<!-- results:toy:main -->: unknown sweep 'toy'; known: toys"),
        (
            ":main",
            ":mian",
            "<!-- results:toys:mian -->: unknown table; known: main, ablations, reported, buc",
        ),
        ("results:toys", "results:toys+toy", "<!-- results:toys+toy:main -->: unknown sweep 'toy'"),
        ("results:toys", "results:toys+toys", "toys+toys:main -->: unknown table; known: overview"),
        ("<!-- /results -->", "", "'<!-- results:toys:main -->' is unmatched; expected"),
        ("<!-- results:toys:main -->", "", "'<!-- /results -->' is unmatched; expected"),
        ("old", "<!-- results:toys:main -->", "'<!-- results:toys:main -->' is unmatched; expected"),
        (":main", "", "'<!-- results:toys -->' is unmatched; expected"),
        (":main", ":reported", "reported.csv has no row of toy"),
    ],
)
@pytest.mark.parametrize("check", [["--check"], []])
def test_markers_that_mean_nothing(
    write_sweep: Write, call: Callable, tmp_path: Path, old: str, new: str, message: str, check: list[str]
):
    write_sweep(*ROWS)
    text = README.replace(old, new)
    status, out, err = call(*check, readme=text)
    assert status == 2 and out == "" and err.startswith("report.py: error: ") and err.count("\n") == 1
    assert message in err
    assert (tmp_path / "README.md").read_text() == text


def test_paired(write_sweep: Write, call: Callable, tmp_path: Path):
    path = write_sweep(*ROWS)
    runs = tmp_path / "elsewhere" / "toys"
    # per user 1/2 (rank 3) on half, 0 on the others; SASRec a quarter
    write_run(runs, "M2Rec", 1, [3] * 30 + [0] * 30)
    write_run(runs, "SASRec", 1, [3] * 15 + [0] * 45)
    status, out, _ = call("--paired=toys", f"--runs={runs.parent}")
    assert status == 0 and out.strip() == str(path.with_name("toys-paired.csv"))
    assert call(readme=README)[0] == 0
    assert "| < 0.001 |" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def finished(write_sweep: Write, tmp_path: Path) -> Callable[[dict[tuple[str, int], int]], Path]:
    """Runs in which so many of 60 users have rank 3, and their CSV; returns the paired tests' path."""

    def write(shares: dict[tuple[str, int], int]) -> Path:
        for (variant, seed), share in shares.items():
            write_run(tmp_path / "runs" / "toys", variant, seed, [3] * share + [0] * (60 - share))
        rows = [answer(variant, seed, share / 120) for (variant, seed), share in shares.items()]
        return write_sweep(*rows).with_name("toys-paired.csv")

    return write


def test_paired_keeps_what_it_cannot_make_again(finished: Callable, call: Callable, tmp_path: Path):
    """Pairs of runs that are elsewhere stay; a pair of fewer seeds than before does not replace it."""
    cells = {("M2Rec", 1): 30, ("no filter | gate", 1): 20, ("SASRec", 1): 15}
    path = finished({**cells, ("M2Rec", 2): 30, ("SASRec", 2): 14})
    assert call("--paired=toys", f"--runs={tmp_path}/runs")[0] == 0
    both = path.read_text()
    assert ",1 2,60," in both
    shutil.rmtree(tmp_path / "runs" / "toys" / "toy" / "no-filter-gate")
    shutil.rmtree(tmp_path / "runs" / "toys" / "toy" / "sasrec" / "2")
    assert call("--paired=toys", f"--runs={tmp_path}/runs")[0] == 0
    assert sorted(path.read_text().splitlines()) == sorted(both.splitlines())


def test_paired_tells_runs_from_others_of_that_name(
    finished: Callable, write_sweep: Write, call: Callable, tmp_path: Path
):
    """What the CSV no longer says is dropped, runs and all, also where nothing can be made again."""
    path = finished({("M2Rec", 1): 30, ("no filter | gate", 1): 20, ("SASRec", 1): 15})
    assert call("--paired=toys", f"--runs={tmp_path}/runs")[0] == 0
    kept = [line for line in path.read_text().splitlines() if ",SASRec," not in line]
    write_sweep(answer("M2Rec", 1, 0.25), answer("no filter | gate", 1, 1 / 6), answer("SASRec", 1, 0.1))
    assert call("--paired=toys", f"--runs={tmp_path}/none")[0] == 2
    assert path.read_text().splitlines() == kept
    assert call("--paired=toys", f"--runs={tmp_path}/runs")[0] == 0
    assert path.read_text().splitlines() == kept


def test_paired_mistakes(write_sweep: Write, call: Callable, tmp_path: Path):
    path = write_sweep()
    for arguments, message in (
        (["--paired=toy"], "toy.yaml' can't be read"),
        (["--paired=toys", f"--runs={tmp_path}/none"], "no seed of 'M2Rec' and another variant"),
    ):
        status, _, err = call(*arguments)
        assert status == 2 and message in err and err.count("\n") == 1
    assert not path.with_name("toys-paired.csv").exists()


def test_no_readme(call: Callable):
    status, _, err = call("--check")
    assert status == 2 and "README.md" in err and err.count("\n") == 1
