"""How well items are ranked that training has never met: python scripts/new_items.py --dataset=NAME.

A share of the items is taken out of the data with all that anybody did with them, and M2Rec is
trained on the rest. Then the items are added to the trained model by their text vectors alone,
and the users whose last item is one of them are tested: that item is ranked among all items, old and
new, but those that the user had before. One line per seed goes into the output file.
"""

import argparse
import csv
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2rec import text_vectors
from m2rec.compat import Config
from m2rec.configuration import build_config, parse_arguments
from m2rec.experiment import commit, load_data, run
from m2rec.histories import NONE, Histories
from m2rec.recommender import Recommender
from m2rec.statistics import metric_of_ranks

CONFIG = Path(__file__).parent.parent / "config.yaml"
K = 10
BATCH = 256
NAME = "kept"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--share", type=float, default=0.1, help="share of the items taken out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of split and training")
    parser.add_argument("--output", type=Path, default=Path("results/new-items.csv"))
    options, keys = parser.parse_known_args(arguments)
    try:
        for seed in options.seeds:
            row = measure(parse_arguments([*keys, f"--seed={seed}"]), options.share)
            append(options.output, row)
            sys.stdout.write("".join(f"{name:<16}{value}\n" for name, value in row.items()))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"new_items.py: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def measure(given: dict[str, Any], share: float) -> dict[str, Any]:
    """Train without some items, add them by text, and rank them; a row for the output.

    Args:
        given: keys of run_mm.py.
        share: of the items that are taken out, between 0 and 1.

    Raises:
        ValueError: nothing is taken out or left, or the data has no text.
    """
    config = build_config(given, CONFIG)
    dataset, _ = load_data(config)
    tokens = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    file = _vectors_of(config)
    names, raw, _ = text_vectors.read(file)
    row_of = {name: i for i, name in enumerate(names) if raw[i].any()}
    with_text = np.array([i for i, token in enumerate(tokens) if i > 0 and token in row_of])
    taken = np.zeros(len(tokens), dtype=bool)
    draw = np.random.default_rng(config["seed"]).permutation(with_text)
    taken[draw[: round(share * len(with_text))]] = True
    if not taken.any() or taken[1:].all():
        raise ValueError(f"share: {share} takes out {taken.sum()} of {len(with_text)} items with text")
    assert dataset.histories is not None
    with tempfile.TemporaryDirectory() as folder:
        _write_without(Path(folder), dataset.histories, taken, tokens)
        override = {
            "dataset": NAME,
            "data_path": folder,
            "text_vectors": str(file.resolve()),
            "user_inter_num_interval": "[0,inf)",
            "item_inter_num_interval": "[0,inf)",
            "MAX_ITEM_LIST_LENGTH": config["MAX_ITEM_LIST_LENGTH"],
        }
        result = run(build_config({**given, **override}, CONFIG))
    recommender = Recommender.load(result.folder)
    known = set(recommender.tokens)
    added = [token for i, token in enumerate(tokens) if i > 0 and taken[i]]
    recommender.add_items(added, raw[[row_of[token] for token in added]])
    others = {key: value for key, value in given.items() if key not in ("dataset", "seed", "data_path")}
    return {
        "dataset": config["dataset"],
        "seed": config["seed"],
        "share": share,
        "commit": commit(),
        "settings": json.dumps(others, sort_keys=True),
        "items": len(recommender.tokens) - 1,
        "new_items": len(added),
        **_ranked(recommender, dataset.histories, tokens, known, set(added)),
    }


def _vectors_of(config: Config) -> Path:
    """The text-vector file of a run with this config."""
    name, folder = config["dataset"], Path(config["data_path"])
    asked = Path(config.external_config_dict.get("data_path", folder.parent)) / name
    file = text_vectors.find(config["text_vectors"], name, asked, folder)
    if file is None:
        raise ValueError(f"text_vectors: {name} has none; make them with scripts/embed_items.py")
    return file


def _write_without(folder: Path, histories: Histories, taken: np.ndarray, tokens: list[str]) -> None:
    """The interactions with the items that stay, as a data set; the time is their number."""
    (folder / NAME).mkdir()
    with (folder / NAME / f"{NAME}.inter").open("w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for time, (user, item) in enumerate(zip(histories.owner, histories.items, strict=True)):
            if not taken[item]:
                file.write(f"{user}\t{tokens[item]}\t{time}\n")


def _ranked(
    recommender: Recommender, histories: Histories, tokens: list[str], known: set[str], added: set[str]
) -> dict[str, Any]:
    """Metrics of the users whose last item is new, and of the others, all items in the ranking."""
    targets = histories.split.targets["test"]
    places: dict[str, list[Tensor]] = {"new": [], "old": [], "new_among_new": []}
    is_new = torch.tensor([token in added for token in recommender.tokens])
    chance = []
    users = np.flatnonzero(targets != NONE)
    for start in range(0, len(users), BATCH):
        rows = users[start : start + BATCH]
        pasts = [[tokens[i] for i in histories.items[histories.start[u] : targets[u]]] for u in rows]
        wanted = [tokens[i] for i in histories.items[targets[rows]]]
        usable = [i for i, w in enumerate(wanted) if w in known or w in added]
        pasts, wanted = [pasts[i] for i in usable], [wanted[i] for i in usable]
        pasts = [[token for token in past if token in known or token in added] for past in pasts]
        scores = recommender.scores(pasts)
        ids = torch.tensor(recommender.to_ids(wanted))
        own = scores.gather(1, ids[:, None])
        for row, past in zip(scores, pasts, strict=True):
            row[recommender.to_ids(past)] = -torch.inf
        scores.scatter_(1, ids[:, None], own)
        place = (scores > own).sum(1) + 1
        new = is_new[ids]
        places["new"].append(place[new])
        places["old"].append(place[~new])
        among = (scores[:, is_new] > own).sum(1) + 1
        places["new_among_new"].append(among[new])
        chance += [K / (len(recommender.tokens) - 1 - len(set(past))) for past in pasts]
    row: dict[str, Any] = {}
    for group, parts in places.items():
        ranks = torch.cat(parts).numpy()
        ranks = np.where(ranks <= K, ranks, 0)
        row[f"{group}.users"] = len(ranks)
        for metric in ("hit", "ndcg"):
            row[f"{group}.{metric}@{K}"] = round(float(metric_of_ranks(f"{metric}@{K}", ranks).mean()), 6)
    row["chance.hit"] = round(float(np.mean(chance)), 6)
    row["chance_among_new.hit"] = round(K / len(added), 6)
    return row


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a CSV file, which gets its header with the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
