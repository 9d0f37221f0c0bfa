"""What costs seconds, beside each run: popularity and the transition graph on the same rows and protocols."""

import logging
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from m2rec import distributed
from m2rec.compat import Config, Interaction
from m2rec.data.dataset import HistoryDataset
from m2rec.errors import format_one_line
from m2rec.evaluation.measurement import Metrics, measure_protocols
from m2rec.evaluation.ranking import rank_rows
from m2rec.models.popularity import Popularity, RecentPopularity
from m2rec.models.registry import Model
from m2rec.models.transition_graph import TransitionGraph
from m2rec.settings import get_run_settings
from m2rec.text.vector_file import TextVectors, load_item_vectors

logger = logging.getLogger(__name__)

# with `baselines: auto`: at this size they take about two minutes of one thread
_MAX_SCORES = 3_000_000_000  # rows of validation and test times items
_MAX_INTERACTIONS = 5_000_000

BaselineMetrics = dict[str, dict[str, Metrics]]
"""By name of the baseline, then by part and protocol."""


def evaluate_baselines(config: Config, train: HistoryDataset, loaders: Iterable[Any]) -> BaselineMetrics:
    """Metrics of the baselines that the run is not itself; an error is logged, and those before it are kept.

    They see what the model sees: its training interactions, its item texts, and the histories of the rows.
    All processes call it.

    Args:
        config: of the run.
        train: its training rows, with the run's text vectors.
        loaders: of its validation and test rows.
    """
    loaders = [loader for loader in loaders if len(loader.dataset)]
    if not _is_wanted(config, train, loaders):
        return {}
    start = perf_counter()
    measured: BaselineMetrics = {}
    try:
        for name, model_class in _list_baselines(train).items():
            if model_class.__name__ != config["model"]:
                measured[name] = _evaluate_baseline(model_class, config, train, loaders)
    except (Exception, KeyboardInterrupt) as error:
        if distributed.world_size() > 1:  # the other processes wait for this one; metrics.json is written
            raise
        logger.debug("traceback", exc_info=True)
        reason = f"{type(error).__name__}: {format_one_line(error)}"
        logger.warning("could not evaluate all baselines (%s); the run itself is complete", reason)
    logger.info("baselines (%s): %.1f s", "; ".join(measured), perf_counter() - start)
    return measured


def _is_wanted(config: Config, train: HistoryDataset, loaders: list[Any]) -> bool:
    setting = get_run_settings(config).baselines
    if setting != "auto":
        return setting is True
    n_rows = sum(len(loader.dataset) for loader in loaders)
    n_interactions = train.counts["interactions"]
    if n_rows * train.item_num <= _MAX_SCORES and n_interactions <= _MAX_INTERACTIONS:
        return True
    logger.info(
        "no baselines beside this run: %s rows x %s items, %s interactions would take minutes; "
        "set baselines: true, or run --model=TransitionGraph",
        f"{n_rows:,}", f"{train.item_num - 1:,}", f"{n_interactions:,}",
    )  # fmt: skip
    return False


def _list_baselines(train: HistoryDataset) -> dict[str, Model]:
    """The baselines of a data set by name."""
    baselines: dict[str, Model] = {"Popularity": Popularity}
    if train.recent_counts is not None:
        baselines[f"Popularity, {train.recent_counts.period}"] = RecentPopularity
    return {**baselines, "TransitionGraph": TransitionGraph}


@torch.no_grad()
def _evaluate_baseline(
    model_class: Model, config: Config, train: HistoryDataset, loaders: list[Any]
) -> dict[str, Metrics]:
    """Metrics of a baseline under every protocol, as its own run has them."""
    data = train.copy(train.inter_feat)
    data.item_vectors = _load_centred_vectors(train) if getattr(model_class, "uses_text", False) else None
    model = model_class(config, data).to(config["device"])

    def score(interaction: Interaction) -> Tensor:
        scores: Tensor = model.full_sort_predict(interaction.to(config["device"]))
        scores[:, 0] = -torch.inf
        return scores

    metrics: dict[str, Metrics] = {}
    for loader in loaders:
        metrics |= measure_protocols(rank_rows(score, loader, iter), loader.dataset).metrics
    return metrics


def _load_centred_vectors(train: HistoryDataset) -> TextVectors | None:
    """The text vectors of the run without its whitening, as `TransitionGraph` takes them."""
    text: TextVectors | None = getattr(train, "item_vectors", None)
    if text is None:
        return None
    return load_item_vectors(Path(str(text.provenance["file"])), train.item_tokens, whitening="none")
