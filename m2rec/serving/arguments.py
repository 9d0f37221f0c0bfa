"""Validate and convert the arguments of Recommender's methods."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index

import torch

from m2rec.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class InputWarnings:
    """Counts over all histories of a request, for one log line of each kind at its end."""

    skip_unknown: bool = False
    """Whether unknown items are skipped, not refused."""
    n_unknown: int = 0
    first_unknown: str = ""
    n_empty: int = 0

    def count_unknown(self, token: object) -> None:
        """Count an unknown token that was skipped."""
        self.n_unknown += 1
        self.first_unknown = self.first_unknown or repr(token)

    def log_warnings(self) -> None:
        """Log the counts that are not 0."""
        if self.n_unknown:
            logger.warning("skipped %s unknown items, e.g. %s", f"{self.n_unknown:,}", self.first_unknown)
        if self.n_empty:
            logger.warning("%s empty histories: recommended the most popular items", f"{self.n_empty:,}")


def to_token_list(tokens: Iterable[str]) -> list[str]:
    """The tokens as a list.

    Raises:
        ValueError: they are a single string, which would be split into characters.
    """
    if isinstance(tokens, str):
        raise UserError(f"expected a list of item tokens, got one string, {tokens!r}; write [{tokens!r}]")
    return list(tokens)


def tokens_to_ids(
    ids: Mapping[str, int],
    tokens: Iterable[str],
    warnings: InputWarnings | None = None,
    argument: str = "history",
) -> list[int]:
    """Internal ids of tokens.

    Args:
        ids: internal ids by token.
        tokens: the tokens.
        warnings: counts unknown tokens that are skipped; None to refuse them.
        argument: the name of the argument with the tokens, for the error.

    Raises:
        ValueError: an unknown item token, or a single string.
    """
    tokens = to_token_list(tokens)
    try:
        return list(map(ids.__getitem__, tokens))
    except (KeyError, TypeError):  # a token is unknown, or not even hashable
        return _skip_unknown_tokens(ids, tokens, warnings, argument)


def _skip_unknown_tokens(
    ids: Mapping[str, int], tokens: Sequence[str], warnings: InputWarnings | None, argument: str
) -> list[int]:
    """As `tokens_to_ids`, token by token."""
    found = []
    for token in tokens:
        item = ids.get(token) if isinstance(token, str) else None
        if item is not None:
            found.append(item)
        elif warnings is not None and warnings.skip_unknown:
            warnings.count_unknown(token)
        else:
            cure = "remove it or train again" if isinstance(token, str) else "item tokens must be strings"
            raise UserError(f"{argument}: unknown item {token!r}; {cure}")
    return found


def parse_whole_number(argument: str, value: int, minimum: int) -> int:
    """A whole number as Python's int.

    Raises:
        ValueError: it is not one, or less than the minimum.
    """
    try:
        number = index(value)
    except TypeError:
        number = minimum - 1
    if number < minimum or isinstance(value, bool):
        raise UserError(f"{argument}: expected a whole number from {minimum}, got {value!r}")
    return number


def parse_device(device: str | torch.device) -> torch.device:
    """A device that can be used.

    Raises:
        ValueError: its name is invalid, or this machine does not have it.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise UserError(f"device: invalid device {device!r}; use cpu, cuda or cuda:0") from None
    if parsed.type not in ("cpu", "cuda"):
        raise UserError(f"device: {device!r} is not supported; use cpu or cuda")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {parsed} is not available; use cpu")
    return parsed
