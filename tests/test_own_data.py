"""README's way from a CSV of clicks and one of products to recommendations, command by command."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import as_arguments, random_rows, small

ROOT = Path(__file__).parent.parent
USER = "anna"


def readme_commands() -> list[list[str]]:
    """The commands of the section, installation apart."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Your own data\n")[1]
    (block,) = re.findall(r"```\n(pip install.*?)```", section.split("\n## ")[0], re.DOTALL)
    return [shlex.split(line)[1:] for line in block.strip().splitlines()[1:]]


def write_shop(folder: Path) -> None:
    clicks = [(USER if user == "u0" else user, item, time) for user, item, time in random_rows()]
    clicks += [(USER, f"i{k}", 978400000 + k) for k in range(4)]
    lines = ["when,customer,sku", *(f"{time},{user},{item}" for user, item, time in clicks)]
    (folder / "clicks.csv").write_text("\n".join(lines) + "\n")
    names = [f'i{k},"tea, kind {k % 5} of {k % 3}",cups' for k in range(20)]
    (folder / "products.csv").write_text("\n".join(["sku,name,category", *names]) + "\n")


def test_from_two_csv_files_to_recommendations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_shop(tmp_path)
    monkeypatch.chdir(tmp_path)
    said: dict[str, str] = {}
    for script, *arguments in readme_commands():
        name = Path(script).stem
        if name == "embed_items":
            arguments[-1] = "--text-encoder=lsa"  # the one that needs no download
        if name == "run_mm":
            keys = {k: v for k, v in small(tmp_path, "shop", epochs=2).items() if k != "data_path"}
            arguments += as_arguments(keys)
        if name == "recommend":
            arguments[0] = said["run_mm"].splitlines()[-1]
        main = importlib.import_module("run_mm" if name == "run_mm" else f"m2rec.commands.{name}").main
        assert main(arguments) == 0, (script, capsys.readouterr().err)
        said[name] = capsys.readouterr().out
    assert list(said) == ["prepare_data", "embed_items", "run_mm", "recommend"]
    metrics = json.loads((Path(said["run_mm"].splitlines()[-1]) / "metrics.json").read_text())
    assert (metrics["text"]["model"], metrics["text"]["matched"], metrics["data"]["users"]) == ("lsa", 20, 30)
    shown = re.findall(r"^ +\d+  (i\d+) +-?\d\.\d+  tea, kind \d of \d$", said["recommend"], re.MULTILINE)
    assert len(set(shown)) == 10 and not {"i0", "i1", "i2", "i3"} & set(shown), said["recommend"]
