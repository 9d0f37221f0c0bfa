"""Recommendations as text: a table for people, JSON for programs."""

import json
from collections.abc import Mapping, Sequence

from m2rec.serving.ranker import Ranking

_MAX_TOKEN_WIDTH = 40  # characters of a token in the table
_SHOWN_HISTORY = 5  # items of the history above the table


def format_as_json(ranking: Ranking) -> str:
    """A JSON list of objects with item, score and title, in ASCII."""
    return json.dumps([entry._asdict() for entry in ranking]) + "\n"


def format_as_table(history: Sequence[str], ranking: Ranking, titles: Mapping[str, str]) -> str:
    """The end of the history and the recommendations, a line each.

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
    lines = [f"after {len(history):,} items, the last of them:"]
    for token in last:
        name = _shorten_token(token)
        title = titles.get(token, "")
        lines.append(f"     {name:<{width}}  {title}")
    lines.append("")
    lines.append(f"     {'item':<{width}}     score  title")
    for rank, entry in enumerate(ranking, 1):
        name = _shorten_token(entry.item)
        lines.append(f"{rank:>3}  {name:<{width}}  {entry.score:>8.3f}  {entry.title}")
    stripped = map(str.rstrip, lines)
    return "\n".join(stripped) + "\n"


def _shorten_token(token: str) -> str:
    if len(token) <= _MAX_TOKEN_WIDTH:
        return token
    return token[: _MAX_TOKEN_WIDTH - 1] + "…"
