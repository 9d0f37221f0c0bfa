"""The prepared form of each branch."""

from collections.abc import Callable

from m2rec.nn.branch import Branch
from m2rec.nn.filters import CausalFilter
from m2rec.nn.inference.branch import PreparedBranch
from m2rec.nn.inference.filters import PreparedFilter
from m2rec.nn.inference.mamba import PreparedMamba2
from m2rec.nn.inference.text_projection import PreparedText
from m2rec.nn.mamba import Mamba2
from m2rec.nn.text_projection import TextBranch

PREPARED: dict[type[Branch], Callable[..., PreparedBranch]] = {
    Mamba2: PreparedMamba2,
    CausalFilter: PreparedFilter,
    TextBranch: PreparedText,
}
"""The prepared form by a branch's class; a class that is not here runs as it is."""
