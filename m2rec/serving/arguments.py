"""What a recommender is asked: tokens, numbers and devices, checked and as it needs them."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index

import torch

from m2rec.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class InputWarnings:
    """What the log should say once at the end, however many histories there were."""

    n_unknown: int = 0
    first_unknown: str = ""
    n_empty: int = 0

    def log_warnings(self) -> None:
        """Log it."""
        if self.n_unknown:
            logger.warning(
                "%s unknown items were left out, such as %s", f"{self.n_unknown:,}", self.first_unknown
            )
        if self.n_empty:
            logger.warning("empty histories, which get what is popular: %s", f"{self.n_empty:,}")


def to_token_list(tokens: Iterable[str]) -> list[str]:
    """The tokens one by one.

    Raises:
        ValueError: they are a single text, which would fall into its letters.
    """
    if isinstance(tokens, str):
        raise UserError(f"expected a list of item tokens, got one text, {tokens!r}; write [{tokens!r}]")
    return list(tokens)


def is_known_token(ids: Mapping[str, int], token: object) -> bool:
    """Whether it is the token of an item."""
    return isinstance(token, str) and token in ids


def tokens_to_ids(
    ids: Mapping[str, int], tokens: list[str], skipped: InputWarnings | None = None, what: str = "history"
) -> list[int]:
    """Internal ids; unknown tokens are left out and counted by `skipped`, where that is given.

    Args:
        ids: internal ids by token.
        tokens: of the argument `what`.
        skipped: told of what is left out.
        what: an argument's name, for the error.

    Raises:
        ValueError: a token that nobody knows.
    """
    try:
        return [ids[token] for token in tokens]
    except (KeyError, TypeError):  # one is unknown, or no text
        known = [is_known_token(ids, token) for token in tokens]
    first = tokens[known.index(False)]
    if skipped is None:
        text = "" if isinstance(first, str) else "; tokens are texts"
        raise UserError(f"{what}: the model knows no item {first!r}{text}")
    skipped.n_unknown += known.count(False)
    skipped.first_unknown = skipped.first_unknown or repr(first)
    return [ids[token] for token, there in zip(tokens, known, strict=True) if there]


def parse_k(k: int) -> int:
    """A number of items as Python's int.

    Raises:
        ValueError: it is no whole number from 1.
    """
    try:
        number = index(k)
    except TypeError:
        number = 0
    if number < 1 or isinstance(k, bool):
        raise UserError(f"k: expected a whole number from 1, got {k!r}")
    return number


def parse_device(device: str | torch.device) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: it is none, or not here.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device: {device!r} is none; cpu, cuda or cuda:0") from error
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"device: {device!r} is not supported; cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: there is no {found} here; take cpu")
    return found
