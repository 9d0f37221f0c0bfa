"""States of live users: trees of lists, dicts and tuples with tensors as leaves, users first."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[..., Tensor], *trees: Any) -> Any:
    """Apply a function to the tensors at the same position of trees that have the same structure."""
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    if isinstance(first, dict):
        return {key: map_tensors(function, *[tree[key] for tree in trees]) for key in first}
    return type(first)(map_tensors(function, *parts) for parts in zip(*trees, strict=True))


def split_users(tree: Any, n_users: int) -> list[Any]:
    """A tree for each user of a batch; copies, which do not keep the batch in memory."""
    if isinstance(tree, Tensor):
        return [row.clone() for row in tree.split(1)]
    if not tree:
        return [tree] * n_users
    if isinstance(tree, dict):
        parts = zip(*(split_users(part, n_users) for part in tree.values()), strict=True)
        return [dict(zip(tree, part, strict=True)) for part in parts]
    return list(map(type(tree), zip(*(split_users(part, n_users) for part in tree), strict=True)))


def name_tensors(tree: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors by their path: `0.mixer1` is the second tensor of the branch `mixer` in layer 0."""
    if isinstance(tree, Tensor):
        return {name: tree}
    if isinstance(tree, dict):
        parts = [(f"{name}.{key}", part) for key, part in tree.items()]
    else:
        parts = [(f"{name}{index}", part) for index, part in enumerate(tree)]
    named: dict[str, Tensor] = {}
    for path, part in parts:
        named |= name_tensors(part, path)
    return named
