"""YAML as the project reads it: config files, and `--key=value` arguments."""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from m2rec.errors import UserError, format_one_line


class _YamlLoader(yaml.SafeLoader):
    """YAML's safe loader, with 1e-3 read as a number (YAML 1.1 wants 1.0e-3)."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$|[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str) -> Any:
    """Parse YAML text; plain values only, no objects."""
    loader = _YamlLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def parse_arguments(arguments: Iterable[str]) -> dict[str, Any]:
    """`--key=value` arguments as a mapping; values are read as YAML.

    Raises:
        UserError: an argument has another form.
    """
    values = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or not key:
            raise UserError(f"argument {argument!r}: expected --key=value")
        values[key] = _parse_value(value)
    return values


def _parse_value(value: str) -> Any:
    # YAML reads a separator of spaces or tabs as nothing, and `|` or `>` as the start of an empty block
    if value and value.strip() in ("", "|", ">"):
        return value
    try:
        return _parse_yaml(value)
    except yaml.YAMLError:
        return value


def format_value(value: Any) -> str:
    """Format a value for `--key=`."""
    if isinstance(value, str) and _parse_value(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def format_argument(key: str, value: Any) -> str:
    """The argument that `parse_arguments` reads as this key and value."""
    return f"--{key}={format_value(value)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        UserError: the file can't be read, or is not a mapping.
    """
    try:
        content = _parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config file {str(path)!r} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = format_one_line(error)
        raise UserError(f"config file {str(path)!r} is not valid YAML: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config file {str(path)!r}: expected lines of 'key: value'")
    return content


def suggest_spelling(word: str, words: Iterable[str]) -> str:
    """A hint such as `; did you mean 'learning_rate'?`, or nothing."""
    by_lower = {w.lower(): w for w in words}
    match = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[match[0]]!r}?" if match else ""


def describe_unknown(word: object, known: Iterable[str], what: str = "key") -> str:
    """The message for a word that is not a known one."""
    return f"unknown {what} {word!r}{suggest_spelling(str(word), known)}"
