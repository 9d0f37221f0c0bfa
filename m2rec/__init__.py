"""M2Rec: multi-scale Mamba for sequential recommendation, as a RecBole plugin."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2rec.commands.fit import fit
    from m2rec.serving.partitions import recommend_partitions
    from m2rec.serving.recommender import Recommender

__version__ = "0.1.0"
__all__ = ["Recommender", "__version__", "fit", "recommend_partitions"]


def __getattr__(name: str) -> Any:
    """The functions and classes, imported when they are asked for: torch takes a second."""
    if name == "Recommender":
        from m2rec.serving.recommender import Recommender

        return Recommender
    if name == "recommend_partitions":
        from m2rec.serving.partitions import recommend_partitions

        return recommend_partitions
    if name == "fit":
        from m2rec.commands.fit import fit

        return fit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
