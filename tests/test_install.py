"""What installing gives: a wheel with every file of the package, and what RecBole needs but not its ray."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import yaml

from m2rec import __version__, cli
from m2rec.commands import main as m2rec_command
from m2rec.commands.config_file import find_config_file
from m2rec.commands.main import COMMANDS
from m2rec.training.configuration import build_config, resolve_settings
from tests.conftest import small

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INSTALL = "pip install --no-deps recbole==1.2.1"


def name(requirement: str) -> str:
    """The project's name at the start of a requirement, in one spelling."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip install .` makes, built by setuptools itself: no network, no files in the tree."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path_factory.mktemp("wheel") / "tree"
    copytree(ROOT / "m2rec", tree / "m2rec", ignore=ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        (tree / file).write_bytes((ROOT / file).read_bytes())
    code = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = tree.parent.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        inside = {info.filename: archive.read(info) for info in archive.infolist()}
    inside = {path: data for path, data in inside.items() if path.startswith("m2rec/")}
    files = [path for path in (ROOT / "m2rec").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert inside == {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the wheel in it."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run_outside(site: Path, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in another folder, with the wheel and without the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def call_m2rec(*arguments: object) -> str:
    """Code that runs the console command that the wheel declares."""
    return (
        "from importlib.metadata import distribution\n"
        "(script,) = distribution('m2rec').entry_points.select(group='console_scripts')\n"
        f"import sys\nsys.argv = {[str(argument) for argument in ('m2rec', *arguments)]!r}\n"
        "assert script.name == 'm2rec'\nsys.exit(script.load()())\n"
    )


def test_without_recbole_the_wheel_recommends_and_names_the_line(site: Path, tmp_path: Path):
    """A saved model ranks, from Python and by the command; training says what is missing."""
    run = ROOT / "tests" / "old_runs" / "runs" / "finished"
    code = (
        "import sys\nsys.modules['recbole'] = None\n"
        "import m2rec\n"
        f"recommender = m2rec.Recommender.load({str(run)!r})\n"
        "print(m2rec.__file__, recommender.recommend(['i1'], 1)[0].item)\n"
    )
    done = run_outside(
        site, tmp_path, code + call_m2rec("recommend", run, "--history", "i1", "-k", 1, "--json")
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    package, item = first.split()
    assert package == str(site / "m2rec" / "__init__.py")
    assert [entry["item"] for entry in json.loads(second)] == [item]

    done = run_outside(site, tmp_path, code + call_m2rec("train"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"m2rec train: error: recbole is not installed; run: {INSTALL} ")


def test_the_wheel_trains_in_another_folder(site: Path, toy: Path, tmp_path: Path):
    """With the config.yaml of that folder; what it prints can be typed there."""
    values = small(Path("data"), epochs=1)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    done = run_outside(site, tmp_path, "from m2rec.models import M2Rec\nprint(M2Rec)\n" + call_m2rec("train"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<class 'm2rec.models.m2rec.M2Rec'>\n")
    use_it, repeat_it, run = done.stdout.splitlines()[-3:]
    assert use_it == f"use it:     m2rec recommend {run} --interactive"
    assert repeat_it == f"repeat it:  m2rec train --config_files={run}/config.yaml"
    header, *settings = (tmp_path / run / "config.yaml").read_text().splitlines()
    assert header == f"# m2rec train --config_files={run}/config.yaml repeats this run"
    assert "hidden_size: 16" in settings


def test_without_a_config_file_the_settings_are_those_of_config_yaml():
    """So the wheel, which has none, makes the same run."""
    plain, named = build_config({}), build_config({}, ROOT / "config.yaml")
    assert resolve_settings(plain) == resolve_settings(named) and plain.open_keys == named.open_keys


def test_an_installed_package_reads_the_config_file_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert find_config_file() == ROOT / "config.yaml"
    assert find_config_file(checkout=tmp_path / "site") is None
    (tmp_path / "config.yaml").touch()
    assert find_config_file(checkout=tmp_path / "site") == tmp_path / "config.yaml"


def test_every_command_is_a_script_of_the_checkout():
    assert list(COMMANDS) == list(cli.SCRIPTS)
    for script in cli.SCRIPTS.values():
        assert (ROOT / script).is_file()


def test_m2rec_lists_its_commands_and_refuses_others(capsys: pytest.CaptureFixture[str]):
    assert m2rec_command.main([]) == 0
    assert re.findall(r"^  (\w+) ", capsys.readouterr().out, re.M) == list(COMMANDS)
    assert m2rec_command.main(["--version"]) == 0 and capsys.readouterr().out == f"m2rec {__version__}\n"
    assert m2rec_command.main(["recomend"]) == 2
    assert capsys.readouterr().err.startswith(
        "m2rec: error: unknown command 'recomend'; did you mean 'recommend'?"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_itself(name: str, capsys: pytest.CaptureFixture[str]):
    """In its help and in its mistakes; the scripts keep their names."""
    with suppress(SystemExit):
        m2rec_command.main([name, "--help"])
    shown = capsys.readouterr().out
    own = [script for script in map(Path, cli.SCRIPTS.values()) if script.name in shown]
    assert f"m2rec {name}" in shown and not own
    assert m2rec_command.main([name, "--no_such_key"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"m2rec {name}: error: ")
    assert cli.name_command("train") == "python run_mm.py" and cli.name_program("embed") == "embed_items.py"


def test_a_search_needs_a_budget_first(capsys: pytest.CaptureFixture[str]):
    assert m2rec_command.main(["search", "--dataset=toy"]) == 2
    assert capsys.readouterr().err == (
        "m2rec search: error: expected a time or a number of trials first, such as 30m, 2h or 40\n"
    )
    assert m2rec_command.main(["search", "soon"]) == 2
    assert capsys.readouterr().err.startswith("m2rec search: error: search: ")


def test_what_recbole_requires_comes_along_or_is_left_out():
    """By RecBole's own list; what is left out for uv is not pinned for pip either."""
    required = {name(line) for line in metadata.requires("recbole") or [] if "extra ==" not in line}
    ours = {name(line) for line in PROJECT["project"]["dependencies"]}
    left_out = {name(line) for line in PROJECT["tool"]["uv"]["override-dependencies"]}
    pinned = {name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"}
    assert required - ours == left_out and "ray" in left_out
    assert not left_out & (ours | pinned) and ours <= pinned


def test_every_page_installs_the_same_recbole():
    assert PROJECT["dependency-groups"]["recbole"] == ["recbole==1.2.1"]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "environment.yaml"]
    pages += [ROOT / "constraints.txt", ROOT / "m2rec" / "compat.py"]
    found = {page.name: re.findall(r"(?<![\w/])recbole==\S*\d", page.read_text()) for page in pages}
    assert {version for versions in found.values() for version in versions} == {"recbole==1.2.1"}
    assert all(found[page] for page in ("README.md", "environment.yaml", "constraints.txt", "compat.py"))
    readme = (ROOT / "README.md").read_text()
    for extra, then in ((".", "python run_mm.py"), ('".[test]"', "pytest")):
        assert f"\npip install -c constraints.txt -e {extra} && {INSTALL} && {then}\n" in readme
