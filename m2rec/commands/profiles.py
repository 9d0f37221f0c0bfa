"""Profiles: named sets of settings that a search races against each other at its start."""

from typing import Any

PLAIN = "plain"
"""The run as the user asked for it, without a profile."""
DEFAULTS = "defaults"
"""The fixed defaults, as with `auto: false`."""

VARIATIONS: dict[str, dict[str, Any]] = {
    "S6": {"mixer": "mamba", "init": "mamba4rec"},
    "no filter": {"filter": "none"},
    "learnable gate": {"gate": "softmax"},
    "long histories": {"MAX_ITEM_LIST_LENGTH": 200},
}
"""Profiles beside those two and the rule's: what each changes in the plain run.

Keys that the user sets are stronger than a profile's.
"""
