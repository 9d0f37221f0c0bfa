"""README and docs: commands that would be understood, links that lead somewhere, pages that are current.

What the commands do is tested where the scripts are; here each one is read by the script's own parser.
"""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from m2rec.cli import SCRIPTS
from m2rec.commands import document
from m2rec.experiments.bootstrap import N_RESAMPLES
from m2rec.experiments.search_budget import parse_budget
from m2rec.experiments.search_plan import SearchPlan
from m2rec.training.configuration import collect_known_keys
from m2rec.yaml_values import parse_arguments

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Understood(BaseException):
    """A parser has read the arguments and left over these; nothing else ran."""


def commands() -> list[tuple[str, str]]:
    """Page and command, of all blocks without a language, and of code within a line that starts as one."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [line for block in re.findall(r"```\n(.*?)```", text, re.S) for line in block.splitlines()]
        lines += re.findall(
            r"`((?:\w+=\w+ )?(?:python|torchrun|m2rec) [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S)
        )
        for line in lines:
            line = re.sub(r"^(\$ |[a-z ]+: +)", "", line)
            for part in line.split("&&"):
                part = re.sub(r"^(\w+=\S+ )+", "", part.strip())
                if part.startswith(("python ", "torchrun ", "m2rec ")):
                    found.append((page.name, part))
    return found


def test_there_are_commands():
    assert len(commands()) > 30


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_is_understood(page: str, command: str, monkeypatch: pytest.MonkeyPatch):
    words = shlex.split(command, comments=True)
    if words[0] == "m2rec":
        words = ["python", SCRIPTS[words[1]], *words[2:]]
    script = next(k for k, word in enumerate(words) if word.endswith(".py"))
    path, arguments = ROOT / words[script], [word for word in words[script + 1 :] if word != "..."]
    assert path.is_file(), path
    if path.name == "run_mm.py":
        if command.startswith("m2rec search "):
            parse_budget(*parse_arguments([f"--search={arguments.pop(0)}"]).values())
        given = parse_arguments([a for a in arguments if a not in ("[--key=value", "...]", "--key=value")])
        assert set(given) <= {*collect_known_keys(), "resume", "search", "config_files"}, given
        return
    if any(word[0] in "[<" for word in arguments):
        return  # a form, not a command
    monkeypatch.syspath_prepend(str(path.parent))  # as when it is started
    package = "scripts.bench" if path.parent.name == "bench" else "m2rec.commands"
    module = importlib.import_module(f"{package}.{path.stem}")
    if path.name == "tune.py" and arguments != ["--help"]:
        SearchPlan.read(
            ROOT / arguments[0], parse_arguments(arguments[1:]), collect_known_keys()
        )  # it has no parser
        return
    parse = argparse.ArgumentParser.parse_known_args

    def understand(parser: argparse.ArgumentParser, given: Sequence[str] | None = None, *_: object) -> None:
        _, rest = parse(parser, arguments if given is None else given)
        raise Understood(rest)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", understand)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    try:
        assert module.main() == 0 and arguments == ["--help"]
    except SystemExit as stop:
        assert stop.code == 0 and "--help" in arguments
    except Understood as stop:
        left = {word.partition("=")[0].removeprefix("--") for word in stop.args[0]}
        assert left <= (set(collect_known_keys()) if path.name == "new_items.py" else set()), left


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, place = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)", path.read_text(), re.M)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert place in slugs, target


def test_the_settings_are_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert document.main(["--check"]) == 0, "run python scripts/document.py"
    monkeypatch.setattr(document, "PAGE_PATH", tmp_path / "settings.md")
    assert document.main(["--check"]) == 1
    assert document.main([]) == 0 and document.main(["--check"]) == 0
    page = (tmp_path / "settings.md").read_text()
    assert "| `n_layers` | `2` | a whole number from 1 to 1000 | number of layers |" in page
    assert all(f"| `{key}` |" in page for key in ("gate", "rows", "topk", "text_encoder", "tensorboard"))


def test_the_results_say_how_p_was_made():
    assert f"({N_RESAMPLES:,} resamples," in (ROOT / "docs" / "results.md").read_text()


def test_every_message_in_troubleshooting_exists():
    source = " ".join(
        path.read_text() for folder in ("m2rec", "scripts") for path in (ROOT / folder).rglob("*.py")
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = [m for line in re.findall(r"^(`.*)\n: ", page, re.M) for m in re.findall(r"`([^`]+)`", line)]
    assert len(messages) > 15
    assert [message for message in messages if message not in source] == []
