"""One run: config -> seed -> data -> model -> trainer -> run folder."""

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from m2rec import distributed
from m2rec.compat import Config, data_preparation, init_seed
from m2rec.data.dataset import HistoryDataset
from m2rec.data.presplit import PresplitDataset
from m2rec.errors import UserError
from m2rec.evaluation.insights import collect_insights
from m2rec.evaluation.ranking import ALL, NEW, UNSEEN
from m2rec.git import read_commit
from m2rec.models.m2rec import M2Rec
from m2rec.models.registry import find_model_class
from m2rec.run_folder import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    HISTORY_FILE,
    INSIGHTS_FILE,
    METRICS_FILE,
    RANKS_FILE,
    REPORT_FILE,
    TEXT_FILE,
)
from m2rec.storage import write_text
from m2rec.text.source import ensure_text_vectors, find_vector_file, load_text_vectors
from m2rec.training import provenance
from m2rec.training.configuration import build_config
from m2rec.training.new_run import create_run_folder, lock_run_folder, update_eval_batch_size
from m2rec.training.provenance import (
    collect_fixed_settings,
    describe_caveats,
    describe_data,
    describe_device,
    describe_machine,
    describe_protocol,
    hash_training_data,
    list_item_tokens,
)
from m2rec.training.recbole_keys import check_reranker_size
from m2rec.training.resuming import CannotResume
from m2rec.training.signals import RunInterrupted, StopRequest
from m2rec.training.trainer import RunTrainer
from m2rec.yaml_values import read_yaml

logger = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What a run leaves: its folder and the content of metrics.json, with which it counts as finished."""

    folder: Path
    metrics: dict[str, Any]


@dataclass
class _PhaseTimer:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=perf_counter)

    def lap(self, phase: str) -> None:
        now = perf_counter()
        self.seconds[phase] = round(now - self._last, 3)
        self._last = now


class TrainingStopped(Exception):
    """Raised by the `watch` of `train_model` to end the training; it leaves `train_model` as it is."""


@dataclass
class PreparedRun:
    """A run that has all but its training; `parts` are the loaders of training, validation and test."""

    config: Config
    dataset: HistoryDataset
    parts: tuple[Any, Any, Any]
    data: dict[str, int]
    trainer: RunTrainer
    clock: _PhaseTimer

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation row."""
        return len(self.parts[1].dataset) > 0

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        return sum(p.numel() for p in self.trainer.model.parameters())


def load_run_data(folder: Path, **others: Any) -> tuple[Config, HistoryDataset, tuple[Any, Any, Any]]:
    """A run's config and data, wherever it was trained.

    Args:
        folder: the run folder.
        others: keys that are stronger than the run's, such as data_path; None leaves it to the run.

    Returns:
        The config, and what `load_data` returns.

    Raises:
        ValueError: the data can't be loaded here.
    """
    here = {"scan_backend": "auto", "use_gpu": False, "log_wandb": False, "tensorboard": False}
    here |= {key: value for key, value in others.items() if value is not None}
    config = build_config({"config_files": [str(folder / CONFIG_FILE)], **here})
    return config, *load_data(config)


def load_data(config: Config) -> tuple[HistoryDataset, tuple[Any, Any, Any]]:
    """The data set, and the loaders of training, validation and test.

    Raises:
        ValueError: the data can't be used as asked.
    """
    init_seed(config["seed"], config["reproducibility"])
    with _explain_errors(f"dataset: RecBole can't prepare {config['dataset']!r} with these keys"):
        dataset = (PresplitDataset if config["benchmark_filename"] else HistoryDataset)(config)
        train, valid, test = data_preparation(config, dataset)
    return dataset, (train, valid, test)


def prepare_run(config: Config, folder: Path | None = None) -> PreparedRun:
    """Load the data, make the model and a new run folder.

    Args:
        config: from `configuration.build_config`.
        folder: that of a run that goes on; None for a new one.

    Raises:
        ValueError: the data can't be used as asked, or the model can't be made.
    """
    clock = _PhaseTimer()
    logger.info("%s", describe_device(config))
    dataset, (train, valid, test) = load_data(config)
    check_reranker_size(config, dataset.item_num - 1)
    _clip_topk(config, dataset.item_num - 1)
    data = describe_data(dataset, train, valid, test)
    logger.info("data: %s", ", ".join(f"{name} {count:,}" for name, count in data.items()))
    for caution in describe_caveats(data, dataset.tie_order).values():
        logger.info("%s", caution)
    clock.lap("data")
    resumes = folder is not None
    if config["model"] == M2Rec.__name__:
        tokens = list_item_tokens(dataset)
        file = find_vector_file(config) if resumes else ensure_text_vectors(config, tokens[1:])
        train.dataset.item_vectors = load_text_vectors(config, file, tokens)
        if config["device"].type == "cuda":
            torch.cuda.reset_peak_memory_stats(config["device"])
        clock.lap("text")

    init_seed(config["seed"], config["reproducibility"])
    with _explain_errors(f"model: {config['variant']} can't be made from these keys and this data"):
        with redirect_stdout(sys.stderr):  # FEARec prints while it is made
            model = find_model_class(config["model"])(config, train.dataset).to(config["device"])
    logger.info("%s: %s parameters", config["variant"], f"{sum(p.numel() for p in model.parameters()):,}")
    text = getattr(model, "text_source", None)
    if folder is None:
        own = create_run_folder(config, dataset, text) if distributed.is_main_process() else None
        folder = distributed.broadcast_value(own)
    torch.manual_seed(config["seed"] + distributed.process_rank())  # each process drops out its own
    trainer = RunTrainer(config, model, folder, resumes)
    parts = (train, valid, test)
    trainer.notes = {
        "data": hash_training_data(dataset, parts),
        "text": text and text["sha256"],
        "settings": collect_fixed_settings(config),
        "threads": torch.get_num_threads(),
        "commit": read_commit(),  # of the code as it is now, whatever happens to it meanwhile
    }
    return PreparedRun(config, dataset, parts, data, trainer, clock)


def train_model(prepared: PreparedRun, watch: Callable[[int, float], None] | None = None) -> None:
    """Train; no test row is scored.

    Args:
        prepared: the run.
        watch: called after each validation with the epoch, from 0, and its valid_metric; ends the
            training by raising `TrainingStopped`.

    Raises:
        ValueError: training diverged, or can't be done with these keys.
        Interrupted: Ctrl-C or SIGTERM asked it to stop; the run can go on.
    """
    config, trainer, (train, valid, _) = prepared.config, prepared.trainer, prepared.parts
    if not prepared.has_validation:
        reasons = {"leave_one_out": "no user has four interactions", "files": "no file of them is named"}
        why = reasons.get(prepared.dataset.split, "see valid_from")
        logger.warning("no validation rows (%s): the last epoch's weights are kept", why)
    with _explain_errors(f"model: {config['variant']} can't be trained with these keys and this data"):
        validated = valid if prepared.has_validation else None
        trainer.fit(train, validated, show_progress=config["show_progress"], callback_fn=watch)
    prepared.clock.lap("training")
    prepared.clock.seconds["training"] = round(trainer.seconds, 3)


def build_resumed_config(folder: Path, machine: Mapping[str, Any]) -> Config:
    """The config of a run that was stopped, for `run(config, folder)`.

    Args:
        folder: the run folder.
        machine: keys that belong to the machine, such as gpu_id.

    Raises:
        CannotGoOn: the folder holds no run that can go on.
        ValueError: its settings can't be used here.
    """
    needed = (CONFIG_FILE, CHECKPOINT_FILE, HISTORY_FILE)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        cure = "the run is finished" if (folder / METRICS_FILE).is_file() else "start a new run"
        raise CannotResume(f"resume: {folder} has no {missing[0]} to go on from; {cure}")
    given: dict[str, Any] = {**machine, "config_files": [str(folder / CONFIG_FILE)]}
    if read_yaml(folder / CONFIG_FILE).get("text_vectors") == "auto":  # the file of then, not of now
        try:
            file = json.loads((folder / TEXT_FILE).read_text(encoding="utf-8"))["file"]
        except OSError:
            file = "none"
        except (ValueError, LookupError, TypeError) as error:
            raise CannotResume(
                f"resume: {folder / TEXT_FILE} is damaged ({error}); start a new run"
            ) from None
        given["text_vectors"] = file
    return build_config(given)


def run_experiment(config: Config, folder: Path | None = None) -> RunResult:
    """Train and evaluate one model; everything it leaves is in a new run folder.

    Under torchrun all processes call it, share the work, and return the same.

    Args:
        config: from `configuration.build_config`.
        folder: that of a run that goes on, of which `config` is; None for a new one.

    Raises:
        ValueError: the data can't be used as asked, training diverged, or another process is at this run.
        Interrupted: Ctrl-C or SIGTERM asked it to stop; the run can go on.
    """
    with distributed.join_process_group(config["device"]), ExitStack() as held:
        try:
            if folder is not None:
                held.enter_context(lock_run_folder(folder))
            prepared = prepare_run(config, folder)
            last = StopRequest(at_once=True)
            if folder is None:
                held.enter_context(lock_run_folder(prepared.trainer.folder))
            elif distributed.is_main_process():
                update_eval_batch_size(folder, config)
            try:
                train_model(prepared)
                with (
                    last,
                    _explain_errors(
                        f"model: {config['variant']} can't be tested", _suggest_smaller_batch(prepared)
                    ),
                ):
                    return _evaluate_best_weights(prepared)
            except KeyboardInterrupt:
                own = prepared.trainer.folder
                number = prepared.trainer.stop_signal or last.signal or signal.SIGINT
                raise RunInterrupted(number, own if (own / CHECKPOINT_FILE).exists() else None) from None
        except Exception as error:
            if not distributed.is_main_process():  # the first one may only see that this one is gone
                logger.error("process %s: %s", distributed.process_rank(), error)
            raise


def _evaluate_best_weights(prepared: PreparedRun) -> RunResult:
    """Test the best weights and write metrics.json, the run's last file but for its report."""
    config, trainer, (_, valid, test) = prepared.config, prepared.trainer, prepared.parts
    trainer.load_best_weights()
    tested = trainer.evaluate_protocols(test)
    nothing: dict[str, dict[str, float]] = {ALL: {}, UNSEEN: {}, NEW: {}}
    validated = trainer.evaluate_protocols(valid).metrics if prepared.has_validation else nothing
    metrics = {
        "model": config["variant"],
        "dataset": config["dataset"],
        "valid": validated[ALL],
        "valid_unseen": validated[UNSEEN],
        "valid_new": validated[NEW],
        "test": tested.metrics[ALL],
        "test_unseen": tested.metrics[UNSEEN],
        "test_new": tested.metrics[NEW],
        "test_by": tested.rows.metrics_by_bucket(config["topk"], config["metric_decimal_place"]),
    }
    prepared.clock.lap("evaluation")
    seconds = prepared.clock.seconds
    metrics |= {
        "valid_metric": config["valid_metric"].lower(),
        "best_epoch": trainer.best_epoch,
        "epochs": len(trainer.train_loss_dict),
        "protocol": {
            **describe_protocol(config, prepared.dataset),
            **describe_caveats(prepared.data, prepared.dataset.tie_order),
        },
        "seed": config["seed"],
        "commit": trainer.notes["commit"],
        "versions": provenance.read_versions(),
        "data": prepared.data,
        "text": getattr(trainer.model, "text_source", None),
        "parameters": prepared.parameters,
        "recommends": isinstance(trainer.model, M2Rec),  # whether Recommender can load it
        **describe_machine(config),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 3)},
    }
    if distributed.is_main_process():
        tested.rows.write_csv(trainer.folder / RANKS_FILE)
        write_text(trainer.folder / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
        trainer.remove_checkpoint()
        _write_insights_and_report(prepared)
    return RunResult(trainer.folder, metrics)


def _write_insights_and_report(prepared: PreparedRun) -> None:
    """Write insights.json and report.html; the run is finished, whatever goes wrong with them."""
    trainer, test = prepared.trainer, prepared.parts[2].dataset
    try:
        found = collect_insights(trainer.model, trainer.score, test, prepared.dataset)
        write_text(trainer.folder / INSIGHTS_FILE, json.dumps(found, ensure_ascii=False) + "\n")
        if prepared.config["report"]:
            from m2rec.reports import run_page  # matplotlib takes a second

            run_page.write_run_page(trainer.folder)
    except (Exception, KeyboardInterrupt) as error:
        logger.debug("traceback", exc_info=True)
        said = f"{type(error).__name__}: {error}"
        logger.warning("no %s (%s); the run is complete", REPORT_FILE, " ".join(said.split()))


def _suggest_smaller_batch(prepared: PreparedRun) -> str:
    """What helps a trained run that needs too much memory for its test."""
    folder, batch = prepared.trainer.folder, prepared.config["eval_batch_size"]
    return f"python run_mm.py --resume={folder} --eval_batch_size={max(1, batch // 4)} goes on with less"


@contextmanager
def _explain_errors(
    what: str, memory: str = "lower train_batch_size, eval_batch_size or MAX_ITEM_LIST_LENGTH"
) -> Iterator[None]:
    """Turn RecBole's many ways to trip over a key into one line; `--state=DEBUG` shows the trace.

    Args:
        what: what can't be done.
        memory: the cure where memory runs out.
    """
    try:
        yield
    except (UserError, OSError, TrainingStopped):  # ours, which name their key; a full disk; a stop
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(f"{what}: out of memory; {memory}") from error
    except Exception as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # PyTorch's on a CPU
            raise UserError(f"{what}: out of memory; {memory}") from error
        raise UserError(f"{what} ({type(error).__name__}: {error}); --state=DEBUG shows where") from error


def _clip_topk(config: Config, n_items: int) -> None:
    """Cut the lengths of the ranking to the number of items, and say so."""
    if max(config["topk"]) <= n_items:
        return
    topk = sorted({min(k, n_items) for k in config["topk"]})
    metric, _, cut = config["valid_metric"].partition("@")
    config["topk"], config["valid_metric"] = topk, f"{metric}@{min(int(cut), n_items)}"
    logger.warning("topk: cut to %s, the data set has %s items", topk, n_items)
