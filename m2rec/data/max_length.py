"""`MAX_ITEM_LIST_LENGTH: auto`: how long a history the model sees, chosen by the histories."""

import logging

import numpy as np

logger = logging.getLogger(__name__)

LENGTHS = (50, 100, 200)
_COVERED_SHARE = (
    0.75  # of the histories, which fit as a whole unless they are longer than the last of LENGTHS
)
_MAX_HELD_ITEMS = 2**28  # items in all rows: prefix rows repeat a history once for each of its targets


def choose_max_length(lengths: np.ndarray, n_rows: int = 0) -> int:
    """The shortest of LENGTHS that holds most histories, and log it.

    Args:
        lengths: (m,), items of each history in training, at least one history.
        n_rows: rows that are held in memory with L items each; 0 for dense rows, which hold each item once.
    """
    wanted = float(np.quantile(lengths, _COVERED_SHARE))
    longest = next((length for length in LENGTHS if length >= wanted), LENGTHS[-1])
    chosen = max([length for length in LENGTHS if length * n_rows <= _MAX_HELD_ITEMS], default=LENGTHS[0])
    chosen = min(chosen, longest)
    limit = ", limited by the memory of prefix rows" if chosen < longest else ""
    logger.info(
        "MAX_ITEM_LIST_LENGTH: %s (%.0f%% of the histories have at most %.0f items%s)",
        chosen, 100 * _COVERED_SHARE, wanted, limit,
    )  # fmt: skip
    return chosen
