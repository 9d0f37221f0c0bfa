"""What interactions should not hold: a user or item that is a placeholder or a giant, labels of 0."""

from collections.abc import Sequence

import numpy as np

LABEL_COLUMNS = frozenset({"label", "click", "clicked", "is_click", "is_clicked"})
"""Names, in lower case, of columns that say whether something was done at all."""
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
    """What to say about the most frequent user or item, or None when nothing is odd about it.

    It is odd when it is named like a missing value, or has more than half of all interactions.

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
