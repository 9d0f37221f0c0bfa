"""One run: config -> seed -> data -> model -> trainer -> run folder."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn

from m2rec import distributed
from m2rec.cli import name_command
from m2rec.compat import Config, data_preparation, init_seed
from m2rec.data.dataset import HistoryDataset
from m2rec.data.presplit import PresplitDataset
from m2rec.errors import UserError, format_one_line
from m2rec.evaluation.breakdown import break_down_metrics
from m2rec.evaluation.insights import collect_insights
from m2rec.evaluation.measurement import EvaluationResult, Metrics
from m2rec.evaluation.protocols import Protocol
from m2rec.git import join_commits, read_commit
from m2rec.models.m2rec import M2Rec
from m2rec.models.registry import find_model_class
from m2rec.run_folder import RunFolder
from m2rec.settings import Role, get_defaults, get_model_settings
from m2rec.text.source import (
    check_fingerprint,
    ensure_text_vectors,
    find_vector_file,
    load_text_vectors,
)
from m2rec.training.baselines import evaluate_baselines
from m2rec.training.checkpoint import CannotResume
from m2rec.training.compilation import resolve_compile
from m2rec.training.configuration import build_config
from m2rec.training.continued_run import ContinuedRun, SourceRun, continue_training
from m2rec.training.neighbor_weights import add_neighbors
from m2rec.training.new_run import create_run_folder, lock_run_folder, update_eval_batch_size
from m2rec.training.provenance import (
    collect_fixed_settings,
    describe_caveats,
    describe_data,
    describe_device,
    describe_machine,
    describe_protocol,
    hash_training_data,
    read_versions,
)
from m2rec.training.recbole_keys import check_reranker_size
from m2rec.training.settling import settle_settings
from m2rec.training.sharding import count_parameters, settle_shard_items
from m2rec.training.signals import RunInterrupted, StopRequest
from m2rec.training.sparse_updates import resolve_sparse_updates
from m2rec.training.trainer import RunTrainer

logger = logging.getLogger(__name__)

_NO_VALIDATION_REASONS = {
    "leave_one_out": "no user has four interactions",
    "global_time": "see valid_from",
    "files": "no file of them is named",
}


@dataclass
class RunResult:
    """A finished run: its folder and the content of metrics.json."""

    folder: Path
    metrics: dict[str, Any]


class Loaders(NamedTuple):
    """RecBole's loaders of the three parts."""

    train: Any
    valid: Any
    test: Any


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
    """Raised by the callback of `PreparedRun.train` to end the training; propagates unchanged out of it."""


@dataclass
class PreparedRun:
    """A run that is ready to be trained."""

    config: Config
    dataset: HistoryDataset
    loaders: Loaders
    data_counts: dict[str, int]
    trainer: RunTrainer
    timer: _PhaseTimer
    continued: ContinuedRun | None = None
    """Of a run that continues another one."""

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation row."""
        return len(self.loaders.valid.dataset) > 0

    @property
    def n_parameters(self) -> int:
        """How many parameters the model has."""
        return count_parameters(self.trainer.model)

    def train(self, on_validation: Callable[[int, float], None] | None = None) -> None:
        """Train; no test row is scored.

        Args:
            on_validation: called after each validation with the epoch, from 0, and its valid_metric; ends the
                training by raising `TrainingStopped`.

        Raises:
            ValueError: training diverged, or is impossible with these keys.
            RunInterrupted: Ctrl-C or SIGTERM asked it to stop; the run can be resumed.
        """
        valid = self.loaders.valid
        if not self.has_validation:
            valid = None
            reason = _NO_VALIDATION_REASONS[self.dataset.split]
            logger.warning("no validation rows (%s): the last epoch's weights are kept", reason)
        train, config = self.loaders.train, self.config
        if valid is not None and 0 < config["valid_users"] < len(valid.dataset):
            logger.info(
                "valid_users: the validations of training rank %s of %s users, the same ones each time",
                f"{config['valid_users']:,}", f"{len(valid.dataset):,}",
            )  # fmt: skip
        with _explain_errors(f"model: {config['variant']} can't be trained with these keys and this data"):
            self.trainer.fit(train, valid, show_progress=config["show_progress"], callback_fn=on_validation)
        self.timer.lap("training")
        self.timer.seconds["training"] = round(self.trainer.train_seconds, 3)

    def evaluate(self) -> RunResult:
        """Test the best weights and write metrics.json, with which the run is finished.

        Raises:
            ValueError: the memory does not suffice.
        """
        trainer = self.trainer
        batch_size = max(1, self.config["eval_batch_size"] // 4)
        cure = (
            f"retry the evaluation with a smaller batch: {name_command('train')} "
            f"--resume={trainer.folder} --eval_batch_size={batch_size}"
        )
        with _explain_errors(f"model: {self.config['variant']} can't be tested", cure):
            trainer.load_best_weights()
            tested, validated, without_neighbors = self._measure()
            topk, digits = self.config["topk"], self.config["metric_decimal_place"]
            buckets = break_down_metrics(tested.rows, topk, digits)
            self.timer.lap("evaluation")
            metrics = {
                "model": self.config["variant"],
                "dataset": self.config["dataset"],
                **validated,
                **tested.metrics,
                "test_by": buckets,
                "without_neighbors": without_neighbors,
                "baselines": {},
                **self._describe_run(),
            }
            if distributed.is_main_process():
                if without_neighbors:
                    trainer.rewrite_best_weights()
                trainer.files.write_ranks(tested.rows.to_csv(index=False, lineterminator="\n"))
                trainer.files.write_metrics(metrics)
                trainer.remove_checkpoint()
        train, valid, test = self.loaders
        metrics["baselines"] = evaluate_baselines(self.config, train.dataset, (valid, test))
        if distributed.is_main_process():
            trainer.files.write_metrics(metrics)
        if distributed.is_main_process() or trainer.is_sharded:
            self._write_insights_and_report()
        return RunResult(trainer.folder, metrics)

    def _measure(self) -> tuple[EvaluationResult, dict[str, Metrics], dict[str, Metrics]]:
        """The result on the test rows, the metrics of validation, and both without the neighbours, if any."""
        model = self.trainer.model
        if not (isinstance(model, M2Rec) and model.settings.neighbors):
            return *self._evaluate_parts(), {}
        if not self.has_validation:
            logger.warning("neighbors: none without validation targets, which choose their weights")
            return *self._evaluate_parts(), {}
        model.encoder.neighbors = None  # of a run that was killed when it was nearly finished
        tested, validated = self._evaluate_parts()
        self._add_neighbors()
        if model.encoder.neighbors is None:
            return tested, validated, {}
        return *self._evaluate_parts(), {**validated, **tested.metrics}

    def _evaluate_parts(self) -> tuple[EvaluationResult, dict[str, Metrics]]:
        """The result on the test rows, and the metrics of validation, empty without a row."""
        show_progress = self.config["show_progress"]
        tested = self.trainer.evaluate_protocols(self.loaders.test, show_progress)
        if not self.has_validation:
            return tested, {p.get_name("valid"): {} for p in Protocol}
        return tested, self.trainer.evaluate_protocols(self.loaders.valid, show_progress).metrics

    def _add_neighbors(self) -> None:
        """Give the model the neighbours that validation asks for, which may be none."""
        start = perf_counter()
        trainer, train = self.trainer, self.loaders.train.dataset
        protocol = Protocol.UNSEEN if self.config["exclude_seen"] else Protocol.ALL
        choice = add_neighbors(trainer.model.encoder, train, trainer.score, self.loaders.valid, protocol)
        weights = ", ".join(f"{kind} x {weight:g}" for kind, weight in choice.weights.items())
        if choice.factor > 1:
            weights += f" (the best pair times {choice.factor:g}, within its standard error)"
        logger.info(
            "neighbors: %s, chosen on %s validation targets: %s %.4f on %s, without %.4f; %.1f s",
            weights, f"{choice.n_users:,}", trainer.valid_metric, choice.best, protocol.get_name("valid"),
            choice.without, perf_counter() - start,
        )  # fmt: skip

    def _describe_run(self) -> dict[str, Any]:
        """What metrics.json holds beside the metrics."""
        config, trainer, seconds = self.config, self.trainer, self.timer.seconds
        return {
            "valid_metric": config["valid_metric"].lower(),
            "best_epoch": trainer.best_epoch,
            "epochs": len(trainer.train_loss_dict),
            "protocol": {
                **describe_protocol(config, self.dataset),
                **describe_caveats(self.data_counts, self.dataset),
            },
            **({} if self.continued is None else {"continued_from": self.continued.facts}),
            "seed": config["seed"],
            "commit": join_commits(trainer.run_inputs["commits"]),
            "versions": read_versions(),
            "data": self.data_counts,
            "text": getattr(trainer.model, "text_source", None),
            "parameters": self.n_parameters,
            "recommends": self.config.model_settings is not None,  # whether Recommender can load it
            **describe_machine(config),
            "seconds": {**seconds, "total": round(sum(seconds.values()), 3)},
        }

    def _write_insights_and_report(self) -> None:
        """Write insights.json and report.html; an error here does not spoil the finished run.

        Where the item table is sharded, all processes take part, since the main one can't score alone.
        """
        trainer = self.trainer
        try:
            test = self.loaders.test.dataset
            insights = collect_insights(trainer.model, trainer.score, test, self.dataset)
            if not distributed.is_main_process():
                return
            trainer.files.write_insights(insights)
            if self.config["report"]:
                from m2rec.reports import run_page  # matplotlib takes a second

                run_page.write_run_page(trainer.folder)
        except (Exception, KeyboardInterrupt) as error:
            logger.debug("traceback", exc_info=True)
            reason = f"{type(error).__name__}: {format_one_line(error)}"
            logger.warning("could not write report.html (%s); the run itself is complete", reason)


def load_run_data(folder: Path, **overrides: Any) -> tuple[Config, HistoryDataset, Loaders]:
    """A run's config and data, on whichever machine it was trained.

    Args:
        folder: the run folder.
        overrides: keys that are stronger than the run's, such as data_path; None leaves it to the run.

    Returns:
        The config, and what `load_data` returns.

    Raises:
        ValueError: the data can't be loaded here.
    """
    keys = {**get_defaults(Role.MACHINE), "use_gpu": False, "auto": False}
    keys |= {key: value for key, value in overrides.items() if value is not None}
    config = build_config({"config_files": [str(RunFolder(folder).config_file)], **keys})
    return config, *load_data(config)


def load_data(config: Config) -> tuple[HistoryDataset, Loaders]:
    """The data set and its loaders.

    Raises:
        ValueError: the data can't be used with these keys.
    """
    init_seed(config["seed"], config["reproducibility"])
    dataset_class = PresplitDataset if config["benchmark_filename"] else HistoryDataset
    with _explain_errors(f"dataset: RecBole can't prepare {config['dataset']!r} with these keys"):
        dataset = dataset_class(config)
        dataset.on_rows = partial(settle_settings, config)
        loaders = Loaders(*data_preparation(config, dataset))
    return dataset, loaders


LoadData = Callable[[Config], tuple[HistoryDataset, Loaders]]


def prepare_run(
    config: Config, folder: Path | None = None, load: LoadData = load_data, comment: str = ""
) -> PreparedRun:
    """Load the data, and create the model and a new run folder.

    Args:
        config: from `configuration.build_config`.
        folder: that of a run to resume; None for a new one.
        load: `load_data`, or one that keeps the data for the next run.
        comment: for the head of config.yaml.

    Raises:
        ValueError: the data can't be used with these keys, or the model can't be created.
    """
    timer = _PhaseTimer()
    logger.info("%s", describe_device(config))
    warning = distributed.describe_unsafe_restart()
    if warning:
        logger.warning("%s", warning)
    _settle_compile(config)
    if config.model_settings is not None:
        settle_shard_items(config)
    source = SourceRun.read(config)
    dataset, loaders, data_counts = _load_and_describe_data(config, load)
    _settle_sparse_updates(config, dataset.item_num, is_resumed=folder is not None)
    timer.lap("data")
    if getattr(config.model_class, "uses_text", False):
        tokens = dataset.item_tokens
        file = ensure_text_vectors(config, tokens[1:]) if folder is None else find_vector_file(config)
        load_vectors = partial(load_text_vectors, config) if source is None else source.load_text_vectors
        text = load_vectors(file, tokens)
        loaders.train.dataset.item_vectors = text
        if folder is None and get_model_settings(config).uses_text:
            config.settle({"text_fingerprint": check_fingerprint(config, text)})
        if config["device"].type == "cuda":
            torch.cuda.reset_peak_memory_stats(config["device"])
        timer.lap("text")
    model = _build_model(config, loaders.train.dataset)
    continued = None
    if source is not None:
        assert isinstance(model, M2Rec)
        continued = continue_training(source, model, dataset, loaders.train)
        loaders = loaders._replace(train=continued.loader)
        timer.lap("continue")
    is_resumed = folder is not None
    if folder is None:
        text = getattr(model, "text_source", None)
        is_main = distributed.is_main_process()
        new_folder = create_run_folder(config, dataset, text, comment) if is_main else None
        folder = distributed.broadcast_value(new_folder)
    trainer = _build_trainer(config, model, dataset, loaders, folder, is_resumed)
    return PreparedRun(config, dataset, loaders, data_counts, trainer, timer, continued)


def _settle_compile(config: Config) -> None:
    """Decide whether training is compiled; a run that is resumed has the answer in its config."""
    if config.model_settings is None:
        return
    choice = resolve_compile(config["compile"], config["device"])
    what = "steps %scaptured" if config["device"].type == "cuda" else "layers %scompiled"
    logger.info(f"{what} (%s)", "" if choice.is_compiled else "not ", choice.reason)
    config.settle({"compile": choice.is_compiled})


def _settle_sparse_updates(config: Config, n_items: int, is_resumed: bool) -> None:
    """Decide whether a step updates only the rows that it uses."""
    if config.model_settings is None:
        return
    choice = resolve_sparse_updates(config, n_items, is_resumed)
    if choice.is_sparse:
        logger.info("sparse updates of the ID embedding (%s)", choice.reason)
    config.settle({"sparse_updates": choice.is_sparse})


def _load_and_describe_data(config: Config, load: LoadData) -> tuple[HistoryDataset, Loaders, dict[str, int]]:
    dataset, loaders = load(config)
    check_reranker_size(config, dataset.item_num - 1)
    _clip_topk(config, dataset.item_num - 1)
    counts = describe_data(dataset, *loaders)
    formatted = [f"{name} {count:,}" for name, count in counts.items()]
    logger.info("data: %s", ", ".join(formatted))
    for caveat in describe_caveats(counts, dataset).values():
        logger.info("%s", caveat)
    return dataset, loaders, counts


def _build_model(config: Config, train_dataset: Any) -> nn.Module:
    """The model; its initial weights depend on the seed alone, not on what the data has drawn."""
    init_seed(config["seed"], config["reproducibility"])
    with _explain_errors(f"model: {config['variant']} can't be made from these keys and this data"):
        with redirect_stdout(sys.stderr):  # FEARec prints in its constructor
            model: nn.Module = find_model_class(config["model"])(config, train_dataset).to(config["device"])
    logger.info("%s: %s parameters", config["variant"], f"{count_parameters(model):,}")
    return model


def _build_trainer(
    config: Config,
    model: nn.Module,
    dataset: HistoryDataset,
    loaders: Loaders,
    folder: Path,
    is_resumed: bool,
) -> RunTrainer:
    """The trainer of a run in its folder."""
    text = getattr(model, "text_source", None)
    data = hash_training_data(dataset, loaders)
    distributed.require_same(
        (data, text and text["sha256"]),
        lambda rank: (
            f"data_path: process {rank} has other interactions or text vectors of {config['dataset']!r} than "
            f"the main process; copy {config['data_path']} to every machine"
        ),
    )
    torch.manual_seed(config["seed"] + distributed.process_rank())  # each process has its own dropout
    trainer = RunTrainer(config, model, folder, is_resumed)
    trainer.run_inputs = {
        "data": data,
        "text": text["sha256"] if text else None,
        "settings": collect_fixed_settings(config),
        "threads": torch.get_num_threads(),
        "commits": [read_commit()],  # read now: the code may change during the training
    }
    return trainer


def build_resumed_config(folder: Path, machine: Mapping[str, Any]) -> Config:
    """The config of a stopped run, for `run_experiment(config, folder)`.

    Args:
        folder: the run folder.
        machine: keys that belong to the machine, such as gpu_id.

    Raises:
        CannotResume: a file is missing or damaged.
        ValueError: the run's settings can't be used here.
    """
    files = RunFolder(folder)
    for path in (files.config_file, files.checkpoint_file, files.history_file):
        if not path.is_file():
            cure = "the run is finished" if files.is_finished else "start a new run"
            raise CannotResume(f"can't resume {folder}: {path.name} is missing; {cure}")
    given: dict[str, Any] = {**machine, "auto": False, "config_files": [str(files.config_file)]}
    if files.read_config().get("text_vectors") == "auto":  # the file of the first start, not a newer one
        given["text_vectors"] = _read_text_file_name(files)
    return build_config(given)


def _read_text_file_name(files: RunFolder) -> str:
    """The file of text vectors that a run was started with, or `none`."""
    try:
        source = files.read_text_source()
        return str(source["file"]) if source else "none"
    except (UserError, LookupError) as error:
        raise CannotResume(f"can't resume: {files.text_file} is damaged ({error}); start a new run") from None


def run_experiment(config: Config, folder: Path | None = None, comment: str = "") -> RunResult:
    """Train and evaluate one model; all results are in its run folder.

    Under torchrun all processes call it, share the work, and return the same.

    Args:
        config: from `configuration.build_config`.
        folder: that of a run to resume, whose `config` this is; None for a new one.
        comment: for the head of config.yaml.

    Raises:
        ValueError: the data can't be used with these keys, training diverged, or another process has locked
            the run.
        RunInterrupted: Ctrl-C or SIGTERM asked it to stop; the run can be resumed.
    """
    with distributed.join_process_group(config["device"]), ExitStack() as locks:
        try:
            distributed.require_same(
                folder and str(folder),
                lambda rank: (
                    f"resume: process {rank} does not find the same run as the main process; let all "
                    f"machines share the folder that runs_dir names, or start a new run"
                ),
            )
            if folder is not None:
                locks.enter_context(lock_run_folder(folder))
            prepared = prepare_run(config, folder, comment=comment)
            if folder is None:
                locks.enter_context(lock_run_folder(prepared.trainer.folder))
            elif distributed.is_main_process():
                update_eval_batch_size(prepared.trainer.files, config["eval_batch_size"])
            return _train_and_evaluate(prepared)
        except Exception as error:
            if distributed.local_rank():  # a line of 0's may say only that this process is gone
                logger.error("process %s: %s", distributed.process_rank(), error)
            raise


def _train_and_evaluate(prepared: PreparedRun) -> RunResult:
    stop_request = StopRequest(at_once=True)
    try:
        prepared.train()
        with stop_request:
            return prepared.evaluate()
    except KeyboardInterrupt:
        files = prepared.trainer.files
        number = prepared.trainer.stop_signal or stop_request.signal or signal.SIGINT
        raise RunInterrupted(number, files.path if files.checkpoint_file.exists() else None) from None


@contextmanager
def _explain_errors(
    what: str, memory_cure: str = "lower train_batch_size, eval_batch_size or MAX_ITEM_LIST_LENGTH"
) -> Iterator[None]:
    """Wrap unexpected errors from RecBole in one that names the step; `--state=DEBUG` shows the traceback.

    Args:
        what: the step that fails.
        memory_cure: what to do where memory runs out.
    """
    try:
        yield
    except (UserError, OSError, TrainingStopped):  # with a message for the user; a full disk; a stop
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise UserError(f"{what}: out of memory; {memory_cure}") from error
        if distributed.is_lost_process(error):
            raise UserError(
                f"torchrun: another process is gone ({format_one_line(error)}); the epochs so far are kept, "
                f"--max-restarts or --resume goes on with them"
            ) from error
        raise UserError(f"{what} ({type(error).__name__}: {error}); --state=DEBUG shows where") from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # PyTorch's on a CPU


def _clip_topk(config: Config, n_items: int) -> None:
    """Clip the lengths of the ranking to the number of items."""
    if max(config["topk"]) <= n_items:
        return
    topk = sorted({min(k, n_items) for k in config["topk"]})
    metric, _, k = config["valid_metric"].partition("@")
    config["topk"] = topk
    config["valid_metric"] = f"{metric}@{min(int(k), n_items)}"
    logger.warning("topk: cut to %s, the data set has %s items", topk, n_items)
