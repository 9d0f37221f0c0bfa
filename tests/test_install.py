"""What installing gives: a wheel with every file of the package, and what RecBole needs but not its ray."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

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


def test_the_wheel_works_in_another_folder_and_names_the_line_for_recbole(wheel: Path, tmp_path: Path):
    """From the wheel alone, without RecBole: a saved model's class loads, training says what is missing."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "sys.modules['recbole'] = None\n"
        "import m2rec\n"
        "print(m2rec.__file__, m2rec.Recommender.load.__name__)\n"
        "import m2rec.training.run\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "site" / "m2rec" / "__init__.py"), "load"], done.stderr
    assert done.stderr.splitlines()[-1].startswith("m2rec.errors.UserError: recbole is not installed;")
    assert INSTALL in done.stderr


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
