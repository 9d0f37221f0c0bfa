"""RecBole models of this project. M2Rec is imported when it is asked for: it needs RecBole."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2rec.models.m2rec import M2Rec

__all__ = ["M2Rec"]


def __getattr__(name: str) -> Any:
    if name == "M2Rec":
        from m2rec.models.m2rec import M2Rec

        return M2Rec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
