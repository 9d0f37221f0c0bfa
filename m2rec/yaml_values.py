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
    """The value that a YAML text stands for; plain values only, no objects."""
    loader = _YamlLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def parse_arguments(arguments: Iterable[str]) -> dict[str, Any]:
    """`--key=value` arguments as a mapping; values are read as YAML.

    Raises:
        ValueError: an argument has another form.
    """
    values = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or not key:
            raise UserError(f"argument {argument!r}: expected --key=value")
        values[key] = _parse_value(value)
    return values


def _parse_value(value: str) -> Any:
    try:
        found = _parse_yaml(value)
    except yaml.YAMLError:
        return value
    if value and not value.strip():  # a separator, which for YAML is nothing
        return value
    opens_a_block = found == "" and value.strip() in ("|", ">")  # which on one line is always empty
    return value if opens_a_block else found


def format_value(value: Any) -> str:
    """The value as it is written after `--key=`."""
    if isinstance(value, str) and _parse_value(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def format_argument(key: str, value: Any) -> str:
    """The argument that `parse_arguments` reads as this key and value."""
    return f"--{key}={format_value(value)}"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of keys and values.

    Raises:
        ValueError: there is no such file, or it is not a mapping.
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
