"""The branches of a layer and the settings that choose them.

To add a branch:
1. Write a subclass of `Branch` in a new file, with `name`, `forward` and, for live users, `advance`.
2. Write a function (settings, max_length, text_dim) -> the branch, or None where its setting is off.
3. Name it in `BRANCHES` under the branch's key: its prefix in the weights and in saved sessions.
4. Add the setting, off by default; CONTRIBUTING.md has an example and the steps.
A mixer or a filter needs a class method `build` and a line in `MIXERS` or `FILTERS` instead.
"""

from collections.abc import Callable

from m2rec.nn.attention import Attention
from m2rec.nn.branch import Branch
from m2rec.nn.filters import CausalFilter, IdentityFilter, LowPassFilter
from m2rec.nn.mamba import Mamba, Mamba2
from m2rec.nn.text_projection import TextBranch
from m2rec.settings import ModelSettings

BranchBuilder = Callable[[ModelSettings, int, int], Branch | None]

MIXERS: dict[str, Callable[[ModelSettings, int], Branch]] = {
    "mamba2": Mamba2.build,
    "mamba": Mamba.build,
    "attention": Attention.build,
}
FILTERS: dict[str, Callable[[ModelSettings, int], Branch]] = {
    "causal": CausalFilter.build,
    "low_pass": LowPassFilter.build,
    "residual": IdentityFilter.build,
}


def build_mixer(settings: ModelSettings, max_length: int, text_dim: int) -> Branch:
    """The temporal branch that `mixer` names."""
    return MIXERS[settings.mixer](settings, max_length)


def build_filter(settings: ModelSettings, max_length: int, text_dim: int) -> Branch | None:
    """The frequency branch that `filter` names; None for `filter: none`."""
    if settings.filter == "none":
        return None
    return FILTERS[settings.filter](settings, max_length)


def build_text(settings: ModelSettings, max_length: int, text_dim: int) -> Branch | None:
    """The semantic branch; None without text in the sequence."""
    if not (text_dim and settings.text_in_sequence):
        return None
    return TextBranch(text_dim, settings.hidden_size, std=1.0)


BRANCHES: dict[str, BranchBuilder] = {"mixer": build_mixer, "filter": build_filter, "text": build_text}
"""Builders by key, in the order of the gate's weights."""
