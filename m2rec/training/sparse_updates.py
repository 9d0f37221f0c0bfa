"""The key `sparse_updates`: whether a step updates only those rows of the ID embedding that it uses."""

from typing import NamedTuple

from m2rec import distributed
from m2rec.errors import UserError
from m2rec.models.m2rec import M2Rec
from m2rec.nn.losses import LOSSES
from m2rec.training.configuration import RunConfig

# where a step of 64 x 200 positions that updates all rows begins to cost more (docs/performance.md)
MIN_ITEMS = 500_000


class SparseChoice(NamedTuple):
    """Whether updates are sparse and, for the log, why."""

    is_sparse: bool
    reason: str


def resolve_sparse_updates(config: RunConfig, n_items: int, is_resumed: bool) -> SparseChoice:
    """Turn the key into an answer, which a run that is resumed already has, unless it is older than the key.

    Args:
        config: of a model that is made of M2Rec's parts.
        n_items: V.
        is_resumed: whether the run is resumed.

    Raises:
        UserError: true was asked for, and another key is in the way.
    """
    requested, key = config["sparse_updates"], "sparse_updates"
    if config["shard_items"] and distributed.world_size() > 1:  # which is made of them
        requested, key = True, "shard_items"
    obstacle = _find_obstacle(config)
    if requested == "auto":
        if is_resumed:
            return SparseChoice(False, "auto: the run was started without")
        if obstacle:
            return SparseChoice(False, f"auto: they need {obstacle}")
        compared = "at least" if n_items >= MIN_ITEMS else "fewer than"
        return SparseChoice(n_items >= MIN_ITEMS, f"auto: {n_items:,} items, {compared} {MIN_ITEMS:,}")
    if requested and obstacle:
        raise UserError(f"{key}: True needs {obstacle}; or set {key}: false")
    return SparseChoice(bool(requested), f"named by {key}")


def _find_obstacle(config: RunConfig) -> str:
    """What the updates of single rows need and this run lacks, in words; empty if nothing."""
    loss_type = config["loss_type"]
    if LOSSES[loss_type].draw_negatives is None:
        sampled = ", ".join(name for name, loss in LOSSES.items() if loss.draw_negatives is not None)
        return f"a loss over some items and this is loss_type: {loss_type}: set one of {sampled}"
    if config["learner"] not in ("adam", "adamw"):
        return f"learner: adam or adamw, not {config['learner']}"
    if config["learner"] == "adam" and config["weight_decay"]:
        return (
            f"decoupled decay and weight_decay: {config['weight_decay']} is an L2 term of learner: adam: "
            f"set learner: adamw"
        )
    if config["compile"] is True and config["device"].type == "cuda":
        return "steps that are not captured: set compile: false"
    if config.model_class.calculate_loss is not M2Rec.calculate_loss:
        return f"M2Rec's own loss and {config.model_class.__name__} has another one"
    return ""
