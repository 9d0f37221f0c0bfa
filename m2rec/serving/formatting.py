"""Recommendations as text: a table for people, JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from m2rec.errors import format_count
from m2rec.serving.ranker import Recommendation
from m2rec.serving.reasons import ExplainedItem, Reasons

_MAX_TOKEN_WIDTH = 40  # characters of a token in the table
_SHOWN_HISTORY = 5  # items of the history above the table
_MIN_SHOWN_COSINE = 0.1  # whitened vectors of texts that have nothing in common have about 0


RankedEntries = Sequence[Recommendation | ExplainedItem]
"""Recommended items, best first, with or without reasons."""


def build_json_object(entry: Recommendation | ExplainedItem | Reasons) -> dict[str, Any]:
    """An entry as JSON has it, those in its lists too."""
    fields = entry._asdict()
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = [one._asdict() for one in value]
    return fields


def format_as_json(ranking: RankedEntries) -> str:
    """A JSON list of objects with item, score and title, and their reasons if they have any, in ASCII."""
    return json.dumps([build_json_object(entry) for entry in ranking]) + "\n"


def format_reasons(entry: ExplainedItem) -> str:
    """Why an item is recommended, in one line; empty without a reason."""
    raised = ", ".join(f"{one.title or one.item} ({one.effect:+.2f})" for one in entry.influences)
    likely = [one for one in entry.nearest_by_text if one.cosine >= _MIN_SHOWN_COSINE]
    near = ", ".join(f"{one.title or one.item} ({one.cosine:.2f})" for one in likely)
    parts = [f"because of {raised}" if raised else "", f"nearest by text: {near}" if near else ""]
    return "; ".join(filter(None, parts))


def format_as_table(history: Sequence[str], ranking: RankedEntries, titles: Mapping[str, str]) -> str:
    """The end of the history and the recommendations, a line each; under an item its reasons, if any.

    Args:
        history: item tokens, oldest first.
        ranking: what was recommended after it.
        titles: by token, of the items that have one.
    """
    last = history[-_SHOWN_HISTORY:]
    lengths = [len("item")]
    lengths += map(len, last)
    for entry in ranking:
        lengths.append(len(entry.item))
    width = min(max(lengths), _MAX_TOKEN_WIDTH)
    lines = [f"after {format_count(len(history), 'item')}, the last of them:"]
    for token in last:
        name = _shorten_token(token)
        title = titles.get(token, "")
        lines.append(f"     {name:<{width}}  {title}")
    lines.append("")
    lines.append(f"     {'item':<{width}}     score  title")
    for rank, entry in enumerate(ranking, 1):
        name = _shorten_token(entry.item)
        lines.append(f"{rank:>3}  {name:<{width}}  {entry.score:>8.3f}  {entry.title}")
        reasons = format_reasons(entry) if isinstance(entry, ExplainedItem) else ""
        if reasons:
            lines.append(f"     {reasons}")
    stripped = map(str.rstrip, lines)
    return "\n".join(stripped) + "\n"


def _shorten_token(token: str) -> str:
    if len(token) <= _MAX_TOKEN_WIDTH:
        return token
    return token[: _MAX_TOKEN_WIDTH - 1] + "…"
