"""Train without some items, add them by their text, and rank them: one row of scripts/new_items.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from m2rec.commands.config_file import find_config_file
from m2rec.compat import Config
from m2rec.errors import UserError
from m2rec.evaluation.cold_start import (
    GROUPS,
    MEASURES,
    choose_new_items,
    evaluate_new_items,
    write_remaining_data,
)
from m2rec.evaluation.saved_model import collect_cases
from m2rec.git import read_commit
from m2rec.serving.recommender import Recommender
from m2rec.settings import Role, collect_keys
from m2rec.text import vector_file
from m2rec.text.source import ensure_text_vectors
from m2rec.training.configuration import build_config, resolve_settings
from m2rec.training.recbole_keys import DataSettings
from m2rec.training.run import load_data, run_experiment

# keys with columns of their own, and where files are
NON_SETTING_KEYS = collect_keys(Role.DATASET, Role.SEED, Role.FOLDER)
COLUMNS = ["dataset", "seed", "share", "commit", "settings", "items", "new_items"]
COLUMNS += [f"{group}.{measure}" for group in GROUPS for measure in MEASURES]


def measure_new_items(given: dict[str, Any], share: float) -> dict[str, Any]:
    """Train without some items, add them by text, and rank them; a row for the output.

    Args:
        given: keys of run_mm.py.
        share: of the items with text that are taken out, between 0 and 1.

    Raises:
        ValueError: no item is taken out or remains, or the model can't have new items.
    """
    config = build_config(given, find_config_file())
    check_model(config)
    dataset, (_, _, test) = load_data(config)
    assert dataset.histories is not None
    tokens = np.array(dataset.item_tokens)
    vectors = ensure_text_vectors(config, tokens[1:].tolist())
    if vectors is None:
        raise UserError(f"text_vectors: {config['dataset']} has none; make them with scripts/embed_items.py")
    names, raw, _ = vector_file.read_text_vectors(vectors)
    row_of = {name: row for row, name in enumerate(names) if raw[row].any()}
    taken = choose_new_items(np.isin(tokens, list(row_of)), share, config["seed"])
    data = Path(config["runs_dir"]) / "new-items" / f"{config['dataset']}-{share}-{config['seed']}"
    write_remaining_data(data, config["dataset"], dataset.histories, taken, tokens)
    remaining = {**DataSettings.defaults(), "data_path": str(data), "text_vectors": str(vectors.resolve())}
    run = run_experiment(build_config({**resolve_settings(config), **remaining}))
    recommender = Recommender.load(run.folder)
    added = tokens[taken].tolist()
    recommender.add_items(added, raw[[row_of[token] for token in added]])
    settings = {key: value for key, value in given.items() if key not in NON_SETTING_KEYS}
    return {
        "dataset": config["dataset"],
        "seed": config["seed"],
        "share": share,
        "commit": read_commit(),
        "settings": json.dumps(settings, sort_keys=True),
        "items": len(tokens) - 1,
        "new_items": len(added),
        **evaluate_new_items(recommender, collect_cases(test.dataset), added),
    }


def check_model(config: Config) -> None:
    """Check that the model can have new items: its item table must have text.

    Raises:
        ValueError: the model is not M2Rec, its table has no text, or the split is by time.
    """
    settings = config.model_settings
    if settings is None:
        raise UserError(f"model: {config['variant']} can't rank an item by its text; set model: M2Rec")
    if settings.text_vectors == "none" or not settings.text_in_table:
        raise UserError("text_in_table: new items need text in the item table; leave it and text_vectors on")
    if config["benchmark_filename"]:
        raise UserError("benchmark_filename: not for new items; give whole histories in NAME.inter")
    if config["split"] != "leave_one_out":
        raise UserError(f"split: {config['split']!r} is not for new items; set leave_one_out")
