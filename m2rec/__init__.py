"""M2Rec: multi-scale Mamba for sequential recommendation, as a RecBole plugin."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2rec.commands.fit import fit
    from m2rec.data.frames import read_dataset
    from m2rec.reports.notebook import Report
    from m2rec.serving.partitions import recommend_partitions
    from m2rec.serving.recommender import Recommender

__version__ = "0.1.0"
__all__ = ["Recommender", "Report", "__version__", "fit", "read_dataset", "recommend_partitions"]

_MODULES = {
    "Recommender": "m2rec.serving.recommender",
    "Report": "m2rec.reports.notebook",
    "fit": "m2rec.commands.fit",
    "read_dataset": "m2rec.data.frames",
    "recommend_partitions": "m2rec.serving.partitions",
}


def __getattr__(name: str) -> Any:
    """Names that are imported when they are asked for: torch takes a second."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
