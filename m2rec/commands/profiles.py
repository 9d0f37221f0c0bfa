"""Profiles: named sets of settings that a search races against each other before it searches around the best.

A profile holds what differs from the plain run. Keys that the user sets are stronger than a profile's.
"""

from typing import Any

PLAIN = "plain"
"""The run as the user asked for it, without a profile."""

PROFILES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "rare items": {
        "hidden_size": 128,
        "inner_size": 256,
        "learner": "adamw",
        "weight_decay": 1.0,
        "train_batch_size": 256,
        "learning_rate": 0.002,
        "average_epochs": 1.5,
    },
    "much data": {
        "hidden_size": 128,
        "inner_size": 256,
        "dropout_prob": 0.3,
        "learning_rate": 0.002,
        "average_epochs": 1.0,
        "init": "mamba4rec",
        "mixer": "mamba",
        "gate": "mean",
    },
    "long histories": {
        "hidden_size": 128,
        "inner_size": 256,
        "dropout_prob": 0.3,
        "learning_rate": 0.002,
        "average_epochs": 1.0,
        "init": "mamba4rec",
        "mixer": "mamba",
        "gate": "mean",
        "MAX_ITEM_LIST_LENGTH": 200,
    },
    "small data": {"n_layers": 1, "dropout_prob": 0.5, "train_batch_size": 32, "average_epochs": 1.0},
    "mean of branches": {"filter": "none", "gate": "mean"},
}
