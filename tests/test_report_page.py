"""report.html: what it says, and how it looks in a browser."""

import json
import re
import shutil
import subprocess
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path

import pytest

from m2rec.commands import report as script
from m2rec.reports import run_page
from m2rec.training import run
from m2rec.training.configuration import build_config
from tests.conftest import small

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TITLES = ["i1\tTea & <b>biscuits</b>", "i2\tA title of " + "very " * 30 + "many words"]
# the page reports of itself; text and pictures must be inside, and only a table may scroll in its box
MEASURE = """<script>window.onload = () => {
  const wide = [...document.querySelectorAll('main *')].filter(e => !e.closest('.wide') &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
  const broken = [...document.images].filter(i => !i.naturalWidth).length;
  document.body.dataset.found = JSON.stringify({wide, broken, images: document.images.length,
    over: document.documentElement.scrollWidth - innerWidth, width: innerWidth});
}</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model with text and with hostile titles."""
    from tests.conftest import random_rows, write_inter

    root = tmp_path_factory.mktemp("report")
    write_inter(root, "toy", random_rows())
    (root / "toy" / "toy.item").write_text("item_id:token\ttitle:token_seq\n" + "\n".join(TITLES) + "\n")
    return run.run_experiment(
        build_config(small(root, runs_dir=str(root / "runs"), epochs=2, report=True))
    ).folder


class Page(HTMLParser):
    """Tags that were opened and closed, alternatives of pictures, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.alternatives, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        self.alternatives += [dict(attributes).get("alt")] if tag == "img" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_it_says_what_the_run_found(folder: Path):
    text = (folder / "report.html").read_text()
    page = Page(text)
    words = " ".join(page.words)
    assert page.open == [] and "http" not in re.sub(r"base64,[^\"]+", "", text)
    metrics = json.loads((folder / "metrics.json").read_text())
    for part in ("valid", "test", "test_unseen", "test_new"):
        assert f"{metrics[part]['ndcg@5']:.4f}" in words
    for section in (
        "Quality", "Training", "Quality by group", "Gate weights by branch",
        "Frequency response of the filter", "Examples", "Settings",
    ):  # fmt: skip
        assert section in words
    assert len(page.alternatives) == 9 and all(len(said) > 30 for said in page.alternatives)
    assert f"python run_mm.py --config_files={folder / 'config.yaml'}" in words
    assert f"python scripts/recommend.py {folder} --interactive" in words
    for caution in ("ties", "returning"):
        assert metrics["protocol"][caution] in words
    for example in json.loads((folder / "insights.json").read_text())["examples"]:
        place = f"at rank {example['place']:,}." if example["place"] else "which the user had before."
        assert f"User {example['user']}" in words and place in " ".join(words.split())
    assert "<b>biscuits" not in text


def test_the_same_run_is_the_same_page(folder: Path):
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert script.main([str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == before


def test_a_run_from_before_there_were_insights(folder: Path, tmp_path: Path):
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    (old / "insights.json").unlink()
    page = Page(run_page.write_run_page(old).read_text())
    assert "Quality" in page.words and "Examples" not in page.words and len(page.alternatives) == 4


def test_runs_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("hidden_size: 16", "hidden_size: 32"))
    metrics = json.loads((other / "metrics.json").read_text())
    metrics["test"]["ndcg@5"] = 0.98765
    (other / "metrics.json").write_text(json.dumps(metrics))
    out = tmp_path / "both.html"
    assert script.main([str(folder), str(other), f"--output={out}"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    words = Page(out.read_text()).words
    assert "0.9877" in words and "hidden_size" in words and "n_layers" not in words
    namesake = Path(shutil.copytree(folder, tmp_path / "elsewhere" / folder.name))
    assert script.main([str(folder), str(namesake), f"--output={out}"]) == 0
    assert str(namesake) in Page(out.read_text()).words
    assert script.main([str(folder), str(folder)]) == 2
    assert "a run is given twice" in capsys.readouterr().err


def test_pictures_as_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert script.main([str(folder), f"--pictures={tmp_path / 'svg'}"]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert set(written) == set((tmp_path / "svg").iterdir()) and len(written) == 5
    page = run_page.write_run_page(folder).read_text()
    for path in written:
        assert b64encode(path.read_bytes()).decode() in page, path.name
    assert script.main([str(folder), str(folder), "--pictures=x"]) == 2
    assert "--pictures is for one run" in capsys.readouterr().err
    assert script.main(["--check", "--paired=ml-100k"]) == 2
    assert "--check writes nothing, and --paired does" in capsys.readouterr().err
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "insights.json").unlink()
    assert script.main([str(other), f"--pictures={tmp_path / 'none'}"]) == 2
    assert (
        "no gate, no learned filter, or no insights.json" in capsys.readouterr().err
        and not (tmp_path / "none").exists()
    )


@pytest.mark.parametrize("arguments", [["--check"], ["--paired=x"], ["--output=x.html"]])
def test_options_that_mean_nothing_for_a_run(
    folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert script.main([str(folder), *arguments]) == 2
    assert capsys.readouterr().err.startswith("report.py: error: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [("metrics.json", "{}"), ("titles.json", '{"i1": 3}'), ("insights.json", '{"gate": {}, "filter": [3]}'),
     ("insights.json", '{"examples": 3}'), ("config.yaml", "3"), ("history.csv", "epoch,loss\nx,y\n")],
)  # fmt: skip
def test_files_that_are_not_as_a_run_leaves_them(
    folder: Path, tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / name).write_text(content)
    assert script.main([str(copy)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(copy) in line


def test_a_report_that_fails_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from tests.conftest import random_rows, write_inter

    def fail(*_: object) -> None:
        raise KeyError("anything")

    monkeypatch.setattr(run_page, "write_run_page", fail)
    write_inter(tmp_path, "toy", random_rows())
    result = run.run_experiment(
        build_config(small(tmp_path, runs_dir=str(tmp_path / "runs"), epochs=1, report=True))
    )
    assert (result.folder / "metrics.json").is_file()
    assert "could not write report.html (KeyError: 'anything'); the run itself is complete" in caplog.text


def test_a_run_without_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It can be made later."""
    from run_mm import main
    from tests.conftest import as_arguments, random_rows, write_inter

    write_inter(tmp_path, "toy", random_rows())
    assert main(as_arguments(small(tmp_path, runs_dir=str(tmp_path / "runs"), epochs=1))) == 0
    *_, use, repeat, last = capsys.readouterr().out.splitlines()
    assert use.startswith("use it: ") and repeat.startswith("repeat it: ")
    assert not (Path(last) / "report.html").exists() and (Path(last) / "insights.json").exists()
    assert run_page.write_run_page(Path(last)).exists()


def test_a_small_catalogue_has_its_curves(tmp_path: Path):
    """The lengths of the ranking are cut to the number of items."""
    from tests.conftest import write_inter

    write_inter(tmp_path, "tiny", [(f"u{u}", f"i{(u + t) % 4}", t) for u in range(9) for t in range(4)])
    keys = small(
        tmp_path, dataset="tiny", runs_dir=str(tmp_path / "runs"), epochs=2, text_vectors="none", report=True
    )
    text = (run.run_experiment(build_config(keys)).folder / "report.html").read_text()
    page = Page(text)
    assert "Quality by group" in page.words and any("on valid by epoch" in said for said in page.alternatives)


@pytest.mark.parametrize("broken", ["metrics.json", "config.yaml", "insights.json", "titles.json"])
def test_folders_that_can_t_be_shown(
    folder: Path, tmp_path: Path, broken: str, capsys: pytest.CaptureFixture
):
    assert script.main([str(tmp_path)]) == 2
    assert "is not a finished run: metrics.json is missing" in capsys.readouterr().err
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / broken).write_text("[1")
    assert script.main([str(copy)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("report.py: error: ")
    assert "can't be read" in line or "not valid YAML" in line
    assert str(copy / broken) in line


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("several", [False, True])
def test_in_a_browser(folder: Path, tmp_path: Path, width: int, several: bool):
    """It renders, nothing is cut off, every picture is there, and the console stays empty."""
    page = tmp_path / "page.html"
    if several:
        others = [shutil.copytree(folder, tmp_path / f"M2Rec-toy-20261124-16590{k}") for k in range(4)]
        run_page.write_comparison_page(others, page)
    else:
        page.write_bytes((folder / "report.html").read_bytes())
    # Chromium's window is never narrower than 500, so the page is looked at through a frame
    inner = page.read_text().replace("</head>", MEASURE + "</head>").replace("<details>", "<details open>")
    page.write_text(inner)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="page.html" width="{width}" height="900" style="border:0"></iframe><script>'
        "const f = document.getElementById('f'); f.onload = () => "
        "{ document.title = f.contentDocument.body.dataset.found; }</script>"
    )
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=5000",
        "--window-size=1600,1000", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1].replace("&amp;", "&"))
    assert found["width"] == width and found["images"] == (2 if several else 9)
    assert (found["wide"], found["broken"]) == ([], 0) and found["over"] <= 0
    assert "CONSOLE" not in done.stderr


def test_runs_from_before_returning_targets_were_misses(folder: Path, tmp_path: Path):
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    metrics = json.loads((old / "metrics.json").read_text())
    del metrics["data"]["test_returning"], metrics["test_new"]
    (old / "metrics.json").write_text(json.dumps(metrics))
    page = tmp_path / "page.html"
    run_page.write_comparison_page([folder, old], page)
    assert "old: measured when targets that return were no misses in test_unseen." in page.read_text()
    run_page.write_comparison_page([folder], page)
    assert "measured when" not in page.read_text()
