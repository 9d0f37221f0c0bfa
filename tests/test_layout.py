"""What holds the project together: import direction, the tree of files, committed text."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "m2rec"

# which rooms a room may import; commands may import all, the ground files of m2rec/ none
MAY_IMPORT = {
    "ops": set(),
    "nn": {"ops"},
    "data": set(),
    "text": {"data"},
    "models": {"nn", "data", "text"},
    "evaluation": {"nn", "data"},
    "reports": set(),
    "training": {"nn", "models", "evaluation", "reports", "text", "data", "ops"},
    "serving": {"nn", "text", "data"},
    "experiments": {"evaluation", "reports"},
}
ROOMS = {*MAY_IMPORT, "commands"}
GROUND_FILES = {
    "settings", "yaml_values", "storage", "run_folder", "distributed", "git", "cli", "compat", "threads",
    "tensor_files", "errors",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Modules imported anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports from."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("m2rec.")}
    return names & ROOMS


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_table(path: Path):
    room, *below = path.relative_to(PACKAGE).parts
    if not below:
        assert path.stem in GROUND_FILES, "a new ground file is named in GROUND_FILES"
        assert not imported_rooms(path)
    elif room != "commands":
        assert imported_rooms(path) <= MAY_IMPORT[room] | {room}
    recbole = {name for name in imports(path) if name.split(".")[0] == "recbole"}
    assert not recbole or path == PACKAGE / "compat.py"
    assert not any("quick_start" in name for name in recbole)


def test_the_first_look_shows_few_names():
    shown = [p for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    assert len(shown) - 1 <= 25


def loaded_by(*names: str) -> set[str]:
    """The packages that a fresh process has loaded after it imported these modules."""
    code = f"import sys, {', '.join(names)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def modules_of(*rooms: str) -> list[str]:
    paths = [path for room in rooms for path in sorted((PACKAGE / room).rglob("*.py"))]
    return [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths]


def test_serving_and_reading_results_need_no_recbole():
    names = modules_of("ops", "nn", "serving", "reports", "experiments", "data/raw")
    names = [
        name for name in names if not name.endswith(("triton", "mamba_ssm_backend"))
    ]  # optional packages
    assert "m2rec" in (loaded := loaded_by(*names)) and "recbole" not in loaded


def test_tables_and_plots_need_no_torch():
    loaded = loaded_by(*modules_of("experiments", "reports"))
    assert "matplotlib" in loaded and not {"torch", "recbole"} & loaded


def tracked() -> list[Path]:
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines()]


def test_the_tree_names_every_room_and_file_at_the_top():
    tree = (ROOT / "CONTRIBUTING.md").read_text()
    shown = {path.relative_to(ROOT).parts[0] for path in tracked()}
    shown |= {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    for name in shown - {"__init__.py", "__pycache__"}:
        assert name.startswith(".git") or re.search(rf"^ *{re.escape(name)}", tree, re.M), name


def test_every_path_in_the_tree_exists():
    tree = re.search(r"```\n(run_mm\.py.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert tree
    folders = [ROOT]
    for line in tree[1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = folders[: depth + 1]
        target = folders[-1] / name
        assert target.exists(), line
        if name.endswith("/"):
            folders.append(target)


def test_every_yaml_of_the_project_loads():
    found = [path for path in tracked() if path.suffix in (".yaml", ".yml")]
    assert {"config.yaml", "environment.yaml"} <= {path.name for path in found}
    for path in found:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def test_what_is_committed_is_small():
    sizes = {path: path.stat().st_size for path in tracked() if path.is_file()}
    assert max(sizes.values()) < 2_000_000
