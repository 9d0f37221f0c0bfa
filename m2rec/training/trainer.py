"""RecBole's Trainer with a plain training loop, checkpoints in the run folder and all test protocols."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from m2rec import distributed
from m2rec.compat import Config, Interaction, Trainer
from m2rec.data.dataset import HistoryDataset
from m2rec.errors import UserError
from m2rec.evaluation.measurement import EvaluationResult, Metrics, measure_protocol, measure_protocols
from m2rec.evaluation.metrics import IntArray
from m2rec.evaluation.protocols import Protocol
from m2rec.evaluation.ranking import RANKED_PROTOCOLS, Ranking, rank_rows, sample_rows
from m2rec.models.m2rec import M2Rec
from m2rec.nn.neighbors import load_neighbors
from m2rec.run_folder import RunFolder
from m2rec.training import checkpoint
from m2rec.training.captured_step import CapturedSteps
from m2rec.training.compilation import compile_layers
from m2rec.training.ema import WeightEMA
from m2rec.training.lazy_adam import LazyAdam, expose_gradient_rows
from m2rec.training.sharding import (
    clip_with_own_rows,
    describe_shards,
    list_own_names,
    load_weights,
    require_shared_folder,
    write_weights,
)
from m2rec.training.signals import RunInterrupted, StopRequest

logger = logging.getLogger(__name__)

# between checks of the loss where steps are captured: a check waits until the GPU is done
_CHECKED_STEPS = 50


@dataclass
class _EpochProgress:
    """How far an epoch has come."""

    epoch: int
    loss: Tensor
    """The sum over the steps so far."""
    steps: int = 0
    seconds: float = 0.0
    loader_state: Tensor | None = None
    """Of the loader's generator at the start of the epoch; None before it."""


class RunTrainer(Trainer):
    """Trains one model into one run folder.

    `model.safetensors` holds the best weights so far; `history.csv` gets a line per epoch;
    `checkpoint.safetensors` holds the full training state, written after each epoch, every
    `checkpoint_minutes` within one, and when the run is asked to stop. No pickle is written or read.
    Under torchrun each batch is sharded across the processes, and the main process writes all files. With
    `shard_items` each process also writes its part of the ID embedding beside each checkpoint.

    Args:
        config: a RecBole Config.
        model: any RecBole sequential model.
        folder: the run folder, which exists.
        is_resumed: whether it holds a stopped run to resume.

    Attributes:
        run_inputs: what must not change until the run is finished, and what trained it; kept in checkpoints.
        train_seconds: seconds of training up to the last checkpoint, over all processes of a resumed run.
    """

    best_valid_score: float
    best_valid_result: Metrics | None

    def __init__(self, config: Config, model: nn.Module, folder: Path, is_resumed: bool = False) -> None:
        config["checkpoint_dir"] = str(folder)
        if not distributed.is_main_process():
            config["log_wandb"] = False  # one run, not one for each process
        super().__init__(config, model)
        # for enable_amp: float16, the default on CUDA, would need a loss scaler
        torch.set_autocast_dtype(self.device.type, torch.bfloat16)
        if self.enable_amp and self.device.type == "cuda":
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                logger.warning("enable_amp: this GPU only emulates bfloat16; float32 may be faster")
        self.folder = folder
        self.files = RunFolder(folder)
        self.saved_model_file = str(self.files.weights_file)
        self.best_epoch: int | None = None
        self.train_seconds = 0.0
        self.run_inputs: dict[str, Any] = {}
        self.ema: WeightEMA | None = None
        self._table_optimizer: LazyAdam | None = None
        self._captured: CapturedSteps | None = None
        self._is_resumed = is_resumed
        self._stop_request = StopRequest()
        self._generator = torch.Generator()  # replaced by the training loader's
        self._progress = self._begin_epoch(0)
        self._started_at = self._checkpointed_at = perf_counter()
        self._history_columns = ["epoch", "loss", "seconds"]
        for metric in config["metrics"]:
            self._history_columns += [f"valid.{metric.lower()}@{k}" for k in config["topk"]]
        distributed.broadcast_weights(model, list_own_names(model))
        if self.is_sharded:
            require_shared_folder(folder)
            logger.info("%s", describe_shards(model))
        if distributed.is_main_process():
            if not is_resumed:
                self.files.append_history(self._history_columns)
            if config["tensorboard"]:
                from torch.utils.tensorboard import SummaryWriter  # takes a moment

                self.tensorboard = SummaryWriter(str(folder / "tensorboard"))

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the ID embedding; all then look up and score together."""
        return isinstance(self.model, M2Rec) and self.model.encoder.is_sharded

    @property
    def _table(self) -> nn.Embedding | None:
        """The embedding that `sparse_updates` is about, this process's part of it; None without."""
        if self.config["sparse_updates"] is not True or not isinstance(self.model, M2Rec):
            return None
        return self.model.encoder.own_embedding

    @property
    def _table_weight(self) -> nn.Parameter | None:
        """The weight of `_table`, whose gradients are sparse."""
        return None if self._table is None else cast(nn.Parameter, self._table.weight)

    def _build_optimizer(self, **kwargs: Any) -> torch.optim.Optimizer:
        """RecBole's, without `_table_weight`."""
        optimizer: torch.optim.Optimizer = super()._build_optimizer(**kwargs)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not self._table_weight]
        return optimizer

    @property
    def stop_signal(self) -> int | None:
        """The signal that asked the training to stop, None without one."""
        return self._stop_request.signal

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        *,
        show_progress: bool = False,
        callback_fn: Callable[[int, float], None] | None = None,
        **_: Any,
    ) -> tuple[float, Metrics | None]:
        """Train, validate, keep the best weights and write a checkpoint, epoch by epoch.

        RecBole's arguments `verbose` and `saved` have no effect: every run logs and saves.

        Args:
            train_data, valid_data: the loaders; without validation the last weights are kept.
            show_progress: whether to show progress bars.
            callback_fn: called with epoch and score after each validation.

        Returns:
            The best validation score and its metrics.

        Raises:
            RunInterrupted: the run was asked to stop; its checkpoint is written.
        """
        self._prepare_fit(train_data)
        with self._stop_request:
            for epoch in range(self.start_epoch, self.epochs):
                if self.cur_step > self.stopping_step:
                    break  # early stopping
                loss = self._train_epoch(train_data, epoch, show_progress=show_progress)
                if self._table_optimizer is not None:
                    self._table_optimizer.catch_up_all()
                self.train_loss_dict[epoch] = loss
                self._add_train_loss_to_tensorboard(epoch, loss)
                self.wandblogger.log_metrics(
                    {"epoch": epoch, "train_loss": loss, "train_step": epoch}, head="train"
                )
                score: float | None = None
                result: Metrics = {}
                keeps_weights = valid_data is None
                if valid_data is not None and (epoch + 1) % self.eval_step == 0:
                    score, result = self._valid_epoch(valid_data, show_progress)
                    keeps_weights = self._update_best_score(score, result)
                    self.tensorboard.add_scalar("Vaild_score", score, epoch)
                    valid_step = epoch // self.eval_step
                    self.wandblogger.log_metrics({**result, "valid_step": valid_step}, head="valid")
                self._log_epoch(epoch, loss / len(train_data), result)
                if keeps_weights:
                    self._save_checkpoint(epoch)
                self._progress = self._begin_epoch(epoch + 1)
                self._write_checkpoint()
                try:
                    if score is not None and callback_fn is not None:
                        callback_fn(epoch, score)
                finally:  # a resumed run begins with the next epoch
                    self._raise_if_stopped()
            self._raise_if_stopped()
        self._add_hparam_to_tensorboard(self.best_valid_score)
        return self.best_valid_score, self.best_valid_result

    def _prepare_fit(self, train_data: Any) -> None:
        """Create what depends on the training data, and restore the state of a resumed run."""
        if self.config["train_neg_sample_args"].get("dynamic", False):
            train_data.get_model(self.model)
        self._generator = train_data.generator
        ema_steps = self.config["average_epochs"] * len(train_data)
        if ema_steps:
            self.ema = WeightEMA(self.model, max(1.0, ema_steps), self._table_weight)
        if self._table is not None and self._table_weight is not None:
            group = self.optimizer.param_groups[0]  # of the parameters without marks
            average = None if self.ema is None else self.ema.find_average(self._table_weight)
            self._table_optimizer = LazyAdam(self._table, group, average)
        if self._is_resumed:
            self._load_checkpoint()
        if self.config["compile"] is True:
            self._compile(len(train_data.dataset))
        self._checkpointed_at = perf_counter()
        self._started_at = perf_counter() - self.train_seconds

    def _compile(self, n_rows: int) -> None:
        """Compile the layers, or on CUDA capture the steps; `n_rows` are all training rows."""
        batch = self.config["train_batch_size"]
        if self.device.type == "cuda":
            self._captured = self._capture_steps(min(batch, n_rows))
        else:
            length = self.config["MAX_ITEM_LIST_LENGTH"]
            compile_layers(self.model, batch // distributed.world_size(), length, self._precision())

    def _capture_steps(self, n_rows: int) -> CapturedSteps | None:
        if not isinstance(self.model, M2Rec):
            return None
        if type(self.model).calculate_loss is not M2Rec.calculate_loss:
            name = type(self.model).__name__
            logger.warning("compile: %s has a calculate_loss of its own, so that steps run as without", name)
            return None
        return CapturedSteps(self.model, n_rows, self._precision)

    def _begin_epoch(self, epoch: int) -> _EpochProgress:
        return _EpochProgress(epoch, loss=torch.tensor(0.0, device=self.device))

    def _update_best_score(self, score: float, result: Metrics) -> bool:
        """Whether this is the best score so far; counts the validations since the best one."""
        best = self.best_valid_score
        is_best = score >= best if self.valid_metric_bigger else score <= best
        if is_best:
            self.best_valid_score, self.best_valid_result = score, result
            self.cur_step = 0
        else:
            self.cur_step += 1
        return bool(is_best)

    def _write_checkpoint(self) -> None:
        """Write the full training state: after the last whole epoch, and after `partial` of the next one."""
        self.train_seconds = perf_counter() - self._started_at
        self._checkpointed_at = perf_counter()
        if not (distributed.is_main_process() or self.is_sharded):
            return
        progress = self._progress
        numbers = {
            "epoch": progress.epoch - 1,
            "cur_step": self.cur_step,
            "best_epoch": self.best_epoch,
            "best_valid_score": float(self.best_valid_score),
            "losses": self.train_loss_dict,
            "seconds": self.train_seconds,
            "notes": self.run_inputs,
            "partial": {"steps": progress.steps, "loss": progress.loss.item(), "seconds": progress.seconds},
        }
        checkpoint.save_checkpoint(self.files, self._training_state(), numbers)

    def _training_state(self) -> checkpoint.TrainingState:
        generator = self._generator
        if self._progress.loader_state is not None:
            generator = torch.Generator()
            generator.set_state(self._progress.loader_state)
        return checkpoint.TrainingState(
            self.model,
            self.optimizer,
            generator,
            self.ema,
            self.device,
            self._table_optimizer,
            list_own_names(self.model),
        )

    def _load_checkpoint(self) -> None:
        """Restore the training state of a stopped run.

        Raises:
            CannotResume: the checkpoint is invalid, or the run's inputs have changed.
            UserError: the ID embedding is sharded over another number of processes.
        """
        checkpoint.check_shards(self.files, self._training_state())
        try:
            numbers = checkpoint.load_checkpoint(self.files, self._training_state(), self.run_inputs)
            self._restore_progress(numbers)
            if distributed.is_main_process():
                self._restore_files(numbers["epoch"])
        except ValueError as error:
            raise checkpoint.CannotResume(str(error)) from error
        if not (distributed.is_main_process() or self.is_sharded):  # their random state is in no file
            seed = self.config["seed"] + distributed.process_rank()
            torch.manual_seed(seed + 1_000_003 * self.start_epoch)
        best = (self.best_epoch, self.best_valid_score)  # all processes must stop early together
        self.best_epoch, self.best_valid_score = distributed.broadcast_value(best)
        step = f", step {self._progress.steps}" if self._progress.steps else ""
        score = self.best_valid_score
        logger.info("resumed after epoch %s%s; best score %s", numbers["epoch"], step, score)

    def _restore_progress(self, numbers: dict[str, Any]) -> None:
        self.start_epoch = numbers["epoch"] + 1
        saved = numbers["partial"]
        self._progress = self._begin_epoch(self.start_epoch)
        self._progress.loss += saved["loss"]
        self._progress.steps = saved["steps"]
        self._progress.seconds = saved["seconds"]
        self.cur_step = numbers["cur_step"]
        self.best_epoch = numbers["best_epoch"]
        self.best_valid_score = numbers["best_valid_score"]
        self.train_loss_dict = {int(epoch): loss for epoch, loss in numbers["losses"].items()}
        self.train_seconds = numbers["seconds"]
        self.run_inputs = checkpoint.merge_run_inputs(numbers["notes"], self.run_inputs)

    def _restore_files(self, epoch: int) -> None:
        """Make the other files those of a run that has just finished this epoch."""
        newer = checkpoint.check_best_weights(self.files, epoch, self.best_epoch)
        if newer is not None:
            self.best_epoch, self.best_valid_score = newer
        self.files.truncate_history(epoch)
        self.files.remove_temporary_files()

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False
    ) -> float:
        """Train on all rows, or on the rest of a resumed epoch; returns the sum of all steps' losses."""
        progress, n_steps = self._progress, len(train_data)
        is_dense = train_data.dataset.is_dense
        start = perf_counter() - progress.seconds
        progress.loader_state = self._generator.get_state()
        self.model.train()
        batches = self._remaining_batches(train_data)
        description = f"train {epoch_idx:>4}"
        for batch in self._progress_bar(batches, description, show_progress, n_steps - progress.steps):
            progress.steps += 1
            progress.loss += self._train_step(batch, is_dense)
            progress.seconds = perf_counter() - start
            signal = self._global_stop_signal()
            is_saved = progress.steps < n_steps and (signal or self._is_checkpoint_due())
            is_due = is_saved or progress.steps == n_steps or progress.steps % _CHECKED_STEPS == 0
            if self._captured is not None and is_due:
                self._check_nan(progress.loss)
            if is_saved:
                self._write_checkpoint()
                if signal:
                    raise RunInterrupted(signal)
        return progress.loss.item()

    def _remaining_batches(self, train_data: Any) -> Iterator[Interaction]:
        """An epoch's batches without those that were trained before the run was stopped.

        The skipped batches are drawn all the same, since later ones depend on them; the states of all
        generators but the loader's are restored afterwards.

        Raises:
            RunInterrupted: the signal that asked to stop has ended the data-loader workers.
        """
        random_state = checkpoint.get_random_state(self.device)
        batches: Iterator[Interaction] = iter(train_data)
        for _ in range(self._progress.steps):
            next(batches)
        if self._progress.steps:
            checkpoint.set_random_state(self.device, *random_state)
        try:
            yield from batches
        except RuntimeError:
            signal = self._stop_request.signal
            if signal is None or distributed.world_size() > 1:
                raise
            self._write_checkpoint()
            raise RunInterrupted(signal) from None

    def _is_checkpoint_due(self) -> bool:
        minutes: float = self.config["checkpoint_minutes"]
        is_due = perf_counter() - self._checkpointed_at > 60 * minutes
        if not self.is_sharded:
            return is_due
        return bool(distributed.reduce_max(int(is_due), self.device))  # all write together; clocks differ

    def _global_stop_signal(self) -> int:
        """The signal that asked any of the processes to stop, 0 without one."""
        return distributed.reduce_max(self._stop_request.signal or 0, self.device)

    def _raise_if_stopped(self) -> None:
        signal = self._global_stop_signal()
        if signal:
            raise RunInterrupted(signal)

    def _train_step(self, batch: Interaction, is_dense: bool) -> Tensor:
        """One step of the optimizer on this process's shard of a batch; returns the loss of the batch."""
        self.model.zero_grad()
        if self._captured is None:
            loss = self._compute_gradients(batch.to(self.device), is_dense)
        else:
            loss = self._captured.compute_gradients(batch)
        if self.clip_grad_norm:
            self._clip_gradients()
        self.optimizer.step()
        average_weight = 0.0 if self.ema is None else self.ema.update()
        if self._table_optimizer is not None:
            self._table_optimizer.step(average_weight)
        return loss

    def _clip_gradients(self) -> None:
        """Scale all gradients so that their norm is at most that of clip_grad_norm."""
        parameters: list[Tensor] = list(self._list_dense_parameters())
        if self._table_weight is not None and self._table_weight.grad is not None:
            rows = expose_gradient_rows(self._table_weight)
            if self.is_sharded:
                return clip_with_own_rows(parameters, rows, **self.clip_grad_norm)
            parameters.append(rows)
        clip_grad_norm_(parameters, **self.clip_grad_norm)
        return None

    def _compute_gradients(self, batch: Interaction, is_dense: bool) -> Tensor:
        """Set the gradients of a batch's loss, on every process; returns the loss."""
        shard, weight = self._shard_batch(batch, is_dense)
        loss = torch.zeros((), device=self.device)
        if len(shard):
            with self._precision(), self._catch_up_when_read():
                losses = self.model.calculate_loss(shard)
            if isinstance(losses, tuple):
                losses = torch.stack(losses).sum()
            loss = losses.reshape(()) * weight  # GCSAN's and TransRec's have the shape (1,)
            loss.backward()
        elif self.is_sharded:
            with self._catch_up_when_read():  # others read this process's rows
                part = self.model.encoder.take_part_in_lookup()
            part.backward()
        loss = distributed.sum_gradients(self._list_dense_parameters(), loss.detach())
        if self._table_weight is not None and not self.is_sharded:
            distributed.sum_sparse_gradient(self._table_weight)
        self._check_nan(loss)
        return loss

    def _list_dense_parameters(self) -> list[nn.Parameter]:
        """All parameters but `_table_weight`."""
        return [p for p in self.model.parameters() if p is not self._table_weight]

    def _catch_up_when_read(self) -> AbstractContextManager[None]:
        """Let a forward pass read rows of `_table` as they are after all steps so far."""
        return nullcontext() if self._table_optimizer is None else self._table_optimizer.catch_up_when_read()

    def _precision(self) -> AbstractContextManager[Any]:
        """Of the forward pass in training."""
        return torch.autocast(self.device.type) if self.enable_amp else nullcontext()

    def _shard_batch(self, batch: Interaction, is_dense: bool) -> tuple[Interaction, float]:
        """This process's rows of a batch, and the share of the batch's targets in them."""
        n_processes = distributed.world_size()
        if n_processes == 1:
            return batch, 1.0
        shard = batch[torch.arange(len(batch))[distributed.process_rank() :: n_processes]]
        if not is_dense:
            return shard, len(shard) / len(batch)
        lengths = self.config["ITEM_LIST_LENGTH_FIELD"]
        return shard, float(shard[lengths].sum() / batch[lengths].sum())

    def _check_nan(self, loss: Tensor) -> None:
        if torch.isfinite(loss):
            return
        kept = "" if self.best_epoch is None else f"; the weights of epoch {self.best_epoch} are kept"
        raise UserError(
            f"training loss became {loss.item()} in epoch {self._progress.epoch}, step "
            f"{self._progress.steps}; lower learning_rate (now {self.learning_rate}) or set "
            f"clip_grad_norm: {{max_norm: 5}}{kept}"
        )

    def _progress_bar(
        self, steps: Iterable[Any], what: str, shown: bool, total: int | None = None
    ) -> Iterable[Any]:
        shown = shown and distributed.is_main_process()
        return tqdm(steps, desc=what, total=total, leave=False, ncols=100) if shown else steps

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> tuple[float, Metrics]:
        """Metrics on the validation rows, or on a sample of them, with the weights that are evaluated."""
        part: HistoryDataset = valid_data.dataset
        rows = sample_rows(len(part), self.config["valid_users"])
        with self._averaged_weights():
            ranking = self._rank_rows(valid_data, show_progress, (Protocol.ALL,), rows)
        result = measure_protocol(ranking, Protocol.ALL, part)
        return result[self.valid_metric], result

    def _averaged_weights(self) -> AbstractContextManager[None]:
        """Use the weights that are evaluated: their average, if the run takes one."""
        return nullcontext() if self.ema is None else self.ema.average_parameters()

    def _log_epoch(self, epoch: int, loss: float, result: Metrics) -> None:
        """Write an epoch's line to the log and to history.csv.

        Args:
            epoch: its number, from 0.
            loss: the mean over its steps.
            result: the metrics of its validation, empty without one.
        """
        seconds = round(self._progress.seconds, 3)
        line = f"epoch {epoch:>3}  loss {loss:.4f}  {seconds:.1f} s"
        if result:
            metric = self.valid_metric
            line += f"  valid {metric} {result[metric]:.4f}, best {float(self.best_valid_score):.4f}"
        minutes = (self.epochs - epoch - 1) * seconds / 60
        if minutes >= 1:
            line += f", up to {minutes:.0f} min left"
        logger.info("%s", line)
        if distributed.is_main_process():
            row = {"epoch": epoch, "loss": loss, "seconds": seconds}
            row |= {f"valid.{name}": value for name, value in result.items()}
            self.files.append_history([row.get(column, "") for column in self._history_columns])

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Write the weights as the best ones; `_write_checkpoint` writes the training state."""
        if distributed.is_main_process() or self.is_sharded:
            metadata = {"epoch": str(epoch), "score": str(float(self.best_valid_score))}
            with self._averaged_weights():
                write_weights(self.files, self.model, metadata)
        self.best_epoch = epoch

    def rewrite_best_weights(self) -> None:
        """Write the best weights again, with what was added to the model after training."""
        _, metadata = self.files.read_weights("cpu")
        self.files.write_weights(self.model.state_dict(), metadata)

    def remove_checkpoint(self) -> None:
        """Remove the training state of a finished run."""
        if distributed.is_main_process():
            for path in (self.files.checkpoint_file, *self.files.list_shards()):
                path.unlink(missing_ok=True)
            self.files.launch_file.unlink(missing_ok=True)

    def load_best_weights(self) -> None:
        """Load the best weights into the model."""
        if self.is_sharded:
            return load_weights(self.files, self.model)
        weights: dict[str, Tensor] = {}
        if distributed.is_main_process():
            weights, _ = self.files.read_weights(str(self.device))
        if isinstance(self.model, M2Rec):  # a finished run may have neighbours
            neighbors = load_neighbors(weights, "encoder.neighbors.")
            self.model.encoder.neighbors = distributed.broadcast_value(neighbors)
            self.model.to(self.device)
        if distributed.is_main_process():
            self.model.load_state_dict(weights)
        distributed.broadcast_weights(self.model)
        return None

    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = False,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> Any:
        """RecBole's evaluation on the weights as they are, or on the best ones of this run.

        Args:
            load_best_model: false by default, unlike in RecBole.
            model_file: no other than this run's.

        Raises:
            ValueError: another file of weights is named.
        """
        if model_file not in (None, self.saved_model_file):
            raise UserError(f"model_file: {model_file!r} is not of this run; it has {self.saved_model_file}")
        if load_best_model:
            self.load_best_weights()
        ranking = self._rank_rows(eval_data, show_progress, (Protocol.ALL,))
        return measure_protocol(ranking, Protocol.ALL, eval_data.dataset)

    def evaluate_protocols(self, data: Any, show_progress: bool = False) -> EvaluationResult:
        """Metrics under every protocol, from one scoring; those of NEW are empty without new targets.

        Args:
            data: the loader of the rows to evaluate, from a `HistoryDataset`.
        """
        return measure_protocols(self._rank_rows(data, show_progress), data.dataset)

    def _rank_rows(
        self,
        data: Any,
        show_progress: bool,
        protocols: Sequence[Protocol] = RANKED_PROTOCOLS,
        rows: IntArray | None = None,
    ) -> Ranking:
        self.model.eval()
        self.tot_item_num = data.dataset.item_num
        self.item_tensor = data.dataset.get_item_feature().to(self.device)
        progress = partial(self._progress_bar, what="evaluate  ", shown=show_progress)
        take_part = self.model.encoder.take_part_in_scoring if self.is_sharded else None
        return rank_rows(self.score, data, progress, protocols, rows, take_part)

    def score(self, interaction: Interaction) -> Tensor:
        """Rows -> (b, V), by the model's full ranking or item by item where it has none."""
        scores: Tensor = self._full_sort_batch_eval((interaction, None, None, None))[1]
        return scores
