"""Users and items that dominate a data set, or whose name stands for a missing value."""

from collections.abc import Sequence

import numpy as np

PLACEHOLDER_NAMES = {
    "", "na", "n/a", "nan", "nat", "null", "none", "nil", "undefined", "unknown", "missing", "empty",
    "not set", "\\n",
}  # fmt: skip
_STRIPPED_CHARACTERS = " \t-_()[]<>\"'"


def is_placeholder(name: object) -> bool:
    """Whether a name stands for a missing value: NA, null, (not set), -, blanks, in any case."""
    return str(name).strip(_STRIPPED_CHARACTERS).lower() in PLACEHOLDER_NAMES


def describe_dominant_entity(
    kind: str, names: Sequence[object], counts: Sequence[int] | np.ndarray
) -> str | None:
    """A warning about the most frequent user or item, or None.

    The name stands for a missing value, or has more than half of all interactions.

    Args:
        kind: `user` or `item`, for the message.
        names, counts: (n,) each, with the interactions of each name; lists or arrays.
    """
    if not len(names):
        return None
    top = int(np.argmax(counts))
    name, count, total = str(names[top]), int(counts[top]), int(np.sum(counts))
    has = f"{kind} {name!r} has {count:,} of {total:,} interactions ({count / total:.1%})"
    if is_placeholder(name):
        return f"{has} and is named like a missing value; remove these lines, or they train as one {kind}"
    if 2 * count > total:
        return f"{has}, more than half; if it stands for many {kind}s or for none, remove these lines"
    return None
