"""Profiles: named sets of settings that a search races against each other at its start."""

from typing import Any

from m2rec.training import automatic_settings

PLAIN = "plain"
"""The run as the user asked for it, without a profile."""

PROFILES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    **automatic_settings.PROFILES,
    "S6": {"mixer": "mamba", "init": "mamba4rec"},
    "no filter": {"filter": "none"},
    "learnable gate": {"gate": "softmax"},
    "long histories": {"MAX_ITEM_LIST_LENGTH": 200},
}
"""What each changes in the plain run. Keys that the user sets are stronger than a profile's."""
