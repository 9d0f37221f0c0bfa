"""What holds the project together: import direction, the README's tree, committed text."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "m2rec"

# each module may import from its own and from later ranks
RANKS = [
    {"plots", "dialogue", "evaluate_run"},
    {"tables", "overview", "paired"},
    {"table_parts"},
    {"results"},
    {"experiment", "sweeps", "studies", "recommender"},
    {"ranker"},
    {"export", "session", "ranking", "item_index", "history_files", "questions"},
    {"report", "run_folder"},
    {"provenance"},
    {"configuration"},
    {"trainer"},
    {"insights"},
    {"evaluation", "model", "popularity", "presplit"},
    {"dataset", "text_source"},
    {"compat"},
    {"trained", "nested_state"},
    {"encoder"},
    {"loss"},
    {"make_vectors", "shipped"},
    {
        "layer",
        "text_vectors",
        "repeats",
        "atomic",
        "checkpoint",
        "item_text",
        "text_encoder",
        "raw",
        "resuming",
    },
    {
        "settings",
        "charts",
        "page",
        "checks",
        "text",
        "files",
        "averaging",
        "distributed",
        "histories",
        "statistics",
        "command_line",
        "diversity",
        "own_process",
        "threads",
        "signals",
        "partial",
        "lsa",
        "vector_import",
        "rows",
        "raw_rows",
        "raw_times",
        "raw_values",
        "dominant",
    },
    {"mamba", "attention", "fourier", "gate"},
    {"ops"},
]
KNOWS_RECBOLE = {"compat"}
NEEDS_COMPAT = {
    "compat",
    "experiment",
    "run_folder",
    "provenance",
    "configuration",
    "trainer",
    "evaluation",
    "insights",
    "model",
    "popularity",
    "presplit",
    "dataset",
    "text_source",
    "atomic",
}


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


def short(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path):
    rank = {name: k for k, names in enumerate(RANKS) for name in names}
    own = short(path)
    assert own in rank, "give the new module a rank"
    for name in imports(path):
        if name.startswith("m2rec.") and (other := name.split(".")[1]) in rank and other != "compat":
            assert rank[other] >= rank[own], f"{own} imports {other}"
        if name.split(".")[0] == "recbole":
            assert own in KNOWS_RECBOLE
            assert "quick_start" not in name
        if name.startswith("m2rec.compat"):
            assert own in NEEDS_COMPAT


def tracked() -> list[Path]:
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines()]


def test_the_readme_names_every_file_of_the_project():
    tree = (ROOT / "README.md").read_text()
    for path in tracked():
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("m2rec", "scripts") and path.suffix == ".py" and path.name != "__init__.py":
            assert re.search(rf"\b{re.escape(path.name)}\b", tree), relative
        if len(relative.parts) == 1 and not path.name.startswith("."):
            assert path.name in tree, relative


def test_every_path_in_the_readme_exists():
    tree = re.search(r"```\n(run_mm\.py.*?)```", (ROOT / "README.md").read_text(), re.S)
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
    assert {"config.yaml", "environment.yaml", "overall.yaml"} <= {path.name for path in found}
    for path in found:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def test_what_is_committed_is_small():
    sizes = {path: path.stat().st_size for path in tracked() if path.is_file()}
    assert max(sizes.values()) < 2_000_000
