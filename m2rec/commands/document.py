"""Write docs/settings.md from m2rec/settings.py and config.yaml: python scripts/document.py [--check].

With --check nothing is written, and the exit status is 1 if the file would change.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from m2rec.settings import ModelSettings, RunSettings, describe_allowed_values
from m2rec.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
PAGE_PATH = ROOT / "docs" / "settings.md"
_USUAL_KEYS = ("auto", "exclude_seen", "neighbors")  # shown as `auto: true` has them whatever the data
PAGE_HEADER = (
    "# Settings\n\nMade by `python scripts/document.py` from `m2rec/settings.py` and `config.yaml`. A key is "
    "given in `config.yaml`, in a file that `--config_files` names, or as `--key=value`; the last is the "
    "strongest. The default is that of `python run_mm.py`; data sets and models can have their own "
    "(`m2rec/properties/`). A wrong value is an error of one line that names the key, the value and what is "
    "allowed. Keys without a range are RecBole's.\n"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or with --check report whether it would change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page would change")
    options = parser.parse_args(arguments)
    text = build_settings_page((ROOT / "config.yaml").read_text(encoding="utf-8"))
    if options.check:
        current = PAGE_PATH.exists() and PAGE_PATH.read_text(encoding="utf-8") == text
        if not current:
            print(f"{PAGE_PATH} is out of date; run python scripts/document.py")
        return int(not current)
    write_text(PAGE_PATH, text)
    print(PAGE_PATH)
    return 0


def build_settings_page(config: str) -> str:
    """The whole page from the text of config.yaml."""
    from m2rec.training.configuration import build_config, resolve_settings  # load PyTorch and RecBole

    fields = {**ModelSettings.model_fields, **RunSettings.model_fields}
    usual = resolve_settings(build_config({}, ROOT / "config.yaml"))
    plain = resolve_settings(build_config({"auto": False}, ROOT / "config.yaml"))
    defaults = {**plain, **{key: usual[key] for key in _USUAL_KEYS}}
    lines = [PAGE_HEADER]
    for section, keys in read_config_sections(config):
        lines += [f"## {section}\n", "| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
        for key, meaning in keys.items():
            allowed = describe_allowed_values(fields[key]) if key in fields else ""
            default = _format_default(defaults.get(key))
            lines.append(f"| `{key}` | {default} | {allowed} | {meaning} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def read_config_sections(config: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Headings of config.yaml, each with its keys and what they mean."""
    heading, key, keys = "", "", {}
    for line in config.splitlines():
        if match := re.match(r"(?:# )?(\w+): .*?\s# (.*)", line):
            key = match[1]
            keys[key] = match[2].strip()
        elif match := re.match(r"\s+# (.*)", line):
            keys[key] += f" {match[1].strip()}"
        elif line.startswith("# "):
            if keys:
                yield heading, keys
            heading, keys = line[2:], {}
    yield heading, keys


def _format_default(value: object) -> str:
    if value is None:
        return ""
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"
