"""RecBole's Trainer with atomic checkpoints in the run folder and both test protocols."""

import csv
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from m2rec import distributed
from m2rec.compat import Config, Interaction, Trainer
from m2rec.data.dataset import HistoryDataset
from m2rec.errors import UserError
from m2rec.evaluation.breakdown import tabulate_rows
from m2rec.evaluation.metrics import DEFAULT_TAIL_RATIO, RankedLists, compute_metrics
from m2rec.evaluation.protocols import Protocol
from m2rec.evaluation.ranking import RANKED_PROTOCOLS, Ranking, rank_rows
from m2rec.git import COMMIT_SEPARATOR
from m2rec.run_folder import CHECKPOINT_FILE, HISTORY_FILE, WEIGHTS_FILE
from m2rec.storage import write_text
from m2rec.tensor_files import read_tensors, write_tensors
from m2rec.training import checkpoint, resuming
from m2rec.training.ema import WeightEMA
from m2rec.training.signals import RunInterrupted, StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics by part and protocol, such as `test_unseen`, and the rows that they are made of."""

    metrics: dict[str, dict[str, float]]
    rows: pd.DataFrame


@dataclass(frozen=True)
class _EpochProgress:
    """How far an epoch has come: steps, the sum of their losses, and the time they took."""

    steps: int = 0
    loss: float = 0.0
    seconds: float = 0.0


class RunTrainer(Trainer):
    """Trains one model into one run folder.

    The best weights so far are `model.safetensors`, replaced as a whole; `history.csv` gets a
    line per epoch; `checkpoint.safetensors` has what it takes to go on: written after each epoch, every
    `checkpoint_minutes` within one, and when the run is asked to stop. No pickle is written or read.
    Under torchrun the rows of each batch are shared out over the processes, and the first one writes.

    Args:
        config: a RecBole Config.
        model: any RecBole sequential model.
        folder: the run folder, which exists.
        resumes: whether it holds a run that goes on.
    """

    def __init__(self, config: Config, model: nn.Module, folder: Path, resumes: bool = False) -> None:
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
        self.saved_model_file = str(folder / WEIGHTS_FILE)
        self.best_epoch: int | None = None
        self.validates = True
        self.seconds = 0.0  # of training, in all processes that this run has had
        self.notes: dict[str, Any] = {}  # what else a checkpoint keeps
        self._resumes = resumes
        self._request = StopRequest()
        self._so_far = _EpochProgress()
        self._place = 0, 0  # epoch and step, from 1
        self.average: WeightEMA | None = None
        names = [f"valid.{metric.lower()}@{k}" for metric in config["metrics"] for k in config["topk"]]
        self._columns = ["epoch", "loss", "seconds", *names]
        distributed.broadcast_weights(model)
        if distributed.is_main_process():
            if not resumes:
                write_text(folder / HISTORY_FILE, ",".join(self._columns) + "\n")
            if config["tensorboard"]:
                self.tensorboard = SummaryWriter(str(folder / "tensorboard"))

    def fit(self, train_data: Any, valid_data: Any = None, *, callback_fn: Any = None, **kwargs: Any) -> Any:
        """RecBole's fit, with our own line per epoch instead of its four, and checkpoints.

        Args:
            train_data, valid_data: the loaders; without validation the last weights are kept.
            callback_fn: called with epoch and score after each validation.
            kwargs: RecBole's others, by name.

        Raises:
            Interrupted: it was asked to stop, and has kept what it takes to go on.
        """
        self.validates = valid_data is not None
        self._loader = train_data.generator
        looks_back = self.config["average_epochs"] * len(train_data)
        self.average = WeightEMA(self.model, max(1.0, looks_back)) if looks_back else None
        if self._resumes:
            self._load_checkpoint()
        self._started = perf_counter() - self.seconds
        self._kept_at = perf_counter()

        def after_validation(epoch: int, score: float) -> None:
            self._checkpoint_epoch(epoch)
            if callback_fn:
                callback_fn(epoch, score)

        kwargs = {"verbose": False, "callback_fn": after_validation, **kwargs}
        with self._request:
            outcome = super().fit(train_data, valid_data, **kwargs)
            if request := self._global_stop_signal():
                raise RunInterrupted(request)
        return outcome

    @property
    def stop_signal(self) -> int | None:
        """The signal that asked the training to stop, None if none did."""
        return self._request.signal

    def _checkpoint_epoch(self, epoch: int) -> None:
        """Write what it takes to go on after this epoch.

        Raises:
            Interrupted: the run was asked to stop.
        """
        self._write_checkpoint(epoch, _EpochProgress())
        if request := self._global_stop_signal():
            raise RunInterrupted(request)

    def _write_checkpoint(self, epoch: int, so_far: _EpochProgress) -> None:
        """Write the checkpoint after this epoch and a part of the next one, which has come so far."""
        self.seconds = perf_counter() - self._started
        self._kept_at = perf_counter()
        loader = self._loader
        if so_far.steps:
            loader = torch.Generator()
            loader.set_state(self._epoch_began)
        if distributed.is_main_process():
            numbers = {
                "epoch": epoch,
                "cur_step": self.cur_step,
                "best_epoch": self.best_epoch,
                "best_valid_score": float(self.best_valid_score),
                "losses": self.train_loss_dict,
                "seconds": self.seconds,
                "notes": self.notes,
                "partial": asdict(so_far),
            }
            checkpoint.save_checkpoint(self.folder / CHECKPOINT_FILE, self._training_state(loader), numbers)

    def _training_state(self, loader: torch.Generator) -> checkpoint.TrainingState:
        """What a checkpoint keeps beside numbers."""
        return checkpoint.TrainingState(self.model, self.optimizer, loader, self.average, self.device)

    def _load_checkpoint(self) -> None:
        """Go on where the run was kept; lines of history.csv after it are dropped.

        Raises:
            CannotGoOn: the checkpoint can't be used, or is of other data.
        """
        try:
            self._restore_state()
        except ValueError as error:
            raise resuming.CannotResume(str(error)) from error

    def _restore_state(self) -> None:
        numbers = checkpoint.load_checkpoint(
            self.folder / CHECKPOINT_FILE,
            self._training_state(self._loader),
            lambda found: resuming.check_unchanged_inputs(found["notes"], self.notes, self.folder),
        )
        self._so_far = _EpochProgress(**numbers["partial"])
        stopped = numbers["cur_step"] > self.stopping_step  # early stopping was due, only the test is left
        self.start_epoch = self.epochs if stopped else numbers["epoch"] + 1
        self.cur_step, self.best_epoch = numbers["cur_step"], numbers["best_epoch"]
        self.best_valid_score = numbers["best_valid_score"]
        self.train_loss_dict = {int(epoch): loss for epoch, loss in numbers["losses"].items()}
        self.seconds = numbers["seconds"]
        self._merge_notes(numbers["notes"])
        if distributed.is_main_process():
            if newer := resuming.check_best_weights(self.folder, numbers["epoch"], self.best_epoch):
                self.best_epoch, self.best_valid_score = newer
            resuming.truncate_history_file(self.folder, numbers["epoch"])
            for left in self.folder.glob(".*.tmp"):  # of a write that was cut off
                left.unlink(missing_ok=True)
        else:  # only the first one's random state was kept
            torch.manual_seed(self.config["seed"] + distributed.process_rank() + 1_000_003 * self.start_epoch)
        best = distributed.broadcast_value((self.best_epoch, self.best_valid_score))
        self.best_epoch, self.best_valid_score = best  # all must stop early together
        steps = f" and {self._so_far.steps} steps" if self._so_far.steps else ""
        logger.info("goes on after epoch %s%s, best %s so far", numbers["epoch"], steps, best[1])

    def _merge_notes(self, began: dict[str, Any]) -> None:
        """Those of the checkpoint, with this code beside what trained before."""
        code, before = self.notes.get("commit"), began.get("commit")
        threads, earlier = self.notes.get("threads"), began.get("threads", self.notes.get("threads"))
        if threads != earlier:
            logger.warning(
                "trained so far with %s threads, now with %s: the last digits may differ; OMP_NUM_THREADS=%s "
                "before the command keeps them",
                earlier, threads, earlier,
            )  # fmt: skip
        self.notes = began
        if str(code) not in str(before).split(COMMIT_SEPARATOR):
            logger.warning("trained in part by commit %s, in part by %s", before, code)
            self.notes["commit"] = f"{before}{COMMIT_SEPARATOR}{code}"

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False
    ) -> float:
        """One pass over the training rows; returns the sum of the steps' losses."""
        done, self._so_far = self._so_far, _EpochProgress()
        start = perf_counter() - done.seconds
        self.model.train()
        self._epoch_began = self._loader.get_state()
        total, steps = torch.tensor(done.loss, device=self.device), done.steps
        batches = self._remaining_batches(done.steps, train_data)
        what, left = f"train {epoch_idx:>4}", len(train_data) - done.steps
        for batch in self._progress_bar(batches, what, show_progress, left):
            steps += 1
            self._place = epoch_idx, steps
            total += self._train_step(batch.to(self.device), train_data.dataset.rows == "dense")
            request = self._global_stop_signal()
            if steps < len(train_data) and (request or self._checkpoint_is_due()):
                self._write_checkpoint(
                    epoch_idx - 1, _EpochProgress(steps, total.item(), perf_counter() - start)
                )
                if request:
                    raise RunInterrupted(request)
        if steps < len(train_data):  # data-loader workers got the signal too, and are gone
            self._write_checkpoint(epoch_idx - 1, _EpochProgress(steps, total.item(), perf_counter() - start))
            raise RunInterrupted(self._global_stop_signal())
        loss = total.item()
        seconds = round(perf_counter() - start, 3)
        self._epoch = {"epoch": epoch_idx, "loss": loss / len(train_data), "seconds": seconds}
        if not self.validates or (epoch_idx + 1) % self.eval_step:
            self._log_epoch({})
            if self.validates:  # else it is kept with the weights
                self.train_loss_dict[epoch_idx] = loss
                self._checkpoint_epoch(epoch_idx)
        return loss

    def _remaining_batches(self, steps: int, train_data: Any) -> Iterator[Interaction]:
        """An epoch's batches without the first ones, which were trained before the run was stopped.

        Those are drawn all the same, since later ones depend on it; what they drew from other generators
        than the loader's is put back.
        """
        state = checkpoint.get_random_state(self.device)
        batches: Iterator[Interaction] = iter(train_data)
        for _ in range(steps):
            next(batches)
        if steps:
            checkpoint.set_random_state(self.device, *state)
        while (batch := self._next_batch(batches)) is not None:
            yield batch

    def _next_batch(self, batches: Iterator[Interaction]) -> Interaction | None:
        """The next batch; None at the end, or where the signal that asks to stop has killed the workers."""
        try:
            return next(batches, None)
        except RuntimeError:
            if distributed.world_size() > 1 or self._request.signal is None:
                raise
            return None

    def _checkpoint_is_due(self) -> bool:
        minutes: float = self.config["checkpoint_minutes"]
        return perf_counter() - self._kept_at > 60 * minutes

    def _global_stop_signal(self) -> int:
        """The signal that asks the run to stop, 0 if none does, whichever process it came to."""
        return distributed.reduce_max(self._request.signal or 0, self.device)

    def _train_step(self, batch: Interaction, dense: bool) -> Tensor:
        """One step of the optimiser on a batch, this process's rows of it; returns the loss of all."""
        self.optimizer.zero_grad()
        own, share = self._shard_batch(batch, dense)
        loss = torch.zeros((), device=self.device)
        if len(own):
            with torch.autocast(self.device.type) if self.enable_amp else nullcontext():
                losses = self.model.calculate_loss(own)
            # GCSAN's and TransRec's have the shape (1,)
            loss = torch.stack(losses).sum() if isinstance(losses, tuple) else losses.reshape(())
            loss = loss if share == 1 else loss * share
            loss.backward()
        loss = distributed.sum_gradients(self.model.parameters(), loss.detach())
        self._check_nan(loss)
        if self.clip_grad_norm:
            clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return loss

    def _averaged_weights(self) -> AbstractContextManager[None]:
        """The weights that are judged: their average, if the run takes one."""
        return nullcontext() if self.average is None else self.average.average_parameters()

    def _shard_batch(self, batch: Interaction, dense: bool) -> tuple[Interaction, float]:
        """This process's rows of a batch, and their share of its targets, which weighs their mean loss."""
        if distributed.world_size() == 1:
            return batch, 1.0
        own = batch[torch.arange(distributed.process_rank(), len(batch), distributed.world_size())]
        if not dense:
            return own, len(own) / len(batch)
        lengths = self.config["ITEM_LIST_LENGTH_FIELD"]
        return own, float(own[lengths].sum() / batch[lengths].sum())

    def _progress_bar(
        self, steps: Iterable[Any], what: str, shown: bool, total: int | None = None
    ) -> Iterable[Any]:
        shown = shown and distributed.is_main_process()
        return tqdm(steps, desc=what, total=total, leave=False, ncols=100) if shown else steps

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> Any:
        with self._averaged_weights():
            score, result = super()._valid_epoch(valid_data, show_progress)
        self._log_epoch(result)
        return score, result

    def _log_epoch(self, result: dict[str, float]) -> None:
        """One line of log and one of history.csv for the epoch that has just ended."""
        row = {**self._epoch, **{f"valid.{k}": v for k, v in result.items()}}
        words = f"epoch {row['epoch']:>3}  loss {row['loss']:.4f}  {row['seconds']:.1f} s"
        if result:
            better = max if self.valid_metric_bigger else min
            best = better(float(self.best_valid_score), float(result[self.valid_metric]))
            words += f"  valid {self.valid_metric} {result[self.valid_metric]:.4f}, best {best:.4f}"
        left = (self.epochs - row["epoch"] - 1) * row["seconds"] / 60
        words += f", up to {left:.0f} min left" if left >= 1 else ""
        logger.info("%s", words)
        if distributed.is_main_process():
            with (self.folder / HISTORY_FILE).open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerow(row)
                file.flush()
                os.fsync(file.fileno())  # a checkpoint must not be on the disk before it

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """What RecBole calls for a new best: write the weights; checkpoints are `_keep`'s."""
        if epoch < 0:  # RecBole's, when there is no epoch left to train
            return
        if distributed.is_main_process():
            with self._averaged_weights():
                about = {"epoch": str(epoch), "score": str(float(self.best_valid_score))}
                write_tensors(Path(self.saved_model_file), self.model.state_dict(), about)
        self.best_epoch = epoch
        if not self.validates:
            self._checkpoint_epoch(epoch)

    def remove_checkpoint(self) -> None:
        """Take away what is only needed to go on."""
        if distributed.is_main_process():
            (self.folder / CHECKPOINT_FILE).unlink(missing_ok=True)

    def _check_nan(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            kept = "" if self.best_epoch is None else f"; the weights of epoch {self.best_epoch} are kept"
            raise UserError(
                f"training loss became {loss.item()} in epoch {self._place[0]}, step {self._place[1]}; lower "
                f"learning_rate (now {self.learning_rate}) or set clip_grad_norm: {{max_norm: 5}}{kept}"
            )

    def load_best_weights(self) -> None:
        """Put the best weights back into the model."""
        if distributed.is_main_process():
            weights, _ = read_tensors(Path(self.saved_model_file), str(self.device))
            self.model.load_state_dict(weights)
        distributed.broadcast_weights(self.model)

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
        return self._protocol_metrics(ranking, Protocol.ALL, eval_data.dataset)

    def evaluate_protocols(self, data: Any) -> EvaluationResult:
        """Metrics under every protocol, from one scoring; those of NEW are empty without new targets.

        Args:
            data: the loader of the rows to evaluate, from a `HistoryDataset`.
        """
        ranking = self._rank_rows(data, show_progress=False)
        metrics = {
            protocol.get_name(data.dataset.part): self._protocol_metrics(ranking, protocol, data.dataset)
            for protocol in Protocol
        }
        return EvaluationResult(metrics, tabulate_rows(ranking, data.dataset))

    def _rank_rows(
        self, data: Any, show_progress: bool, protocols: Sequence[Protocol] = RANKED_PROTOCOLS
    ) -> Ranking:
        self.model.eval()
        self.tot_item_num = data.dataset.item_num
        self.item_tensor = data.dataset.get_item_feature().to(self.device)
        progress = partial(self._progress_bar, what="evaluate  ", shown=show_progress)
        return rank_rows(self.score, data, progress, protocols)

    def score(self, interaction: Interaction) -> Tensor:
        """Rows -> (b, V), by the model's full ranking or item by item where it has none."""
        scores: Tensor = self._full_sort_batch_eval((interaction, None, None, None))[1]
        return scores

    def _protocol_metrics(
        self, ranking: Ranking, protocol: Protocol, dataset: HistoryDataset
    ) -> dict[str, float]:
        """The metrics that the config names, rounded, as `metric_definitions` defines them."""
        assert dataset.histories is not None
        config, tail_ratio = self.config, self.config["tail_ratio"]
        lists = RankedLists(
            *ranking.select_rows(protocol),
            n_items=dataset.item_num,
            count_targets=cache(partial(dataset.histories.count_training_targets, dataset.item_num)),
            tail_ratio=tail_ratio if tail_ratio and tail_ratio > 0 else DEFAULT_TAIL_RATIO,
        )
        return compute_metrics(
            lists,
            config["metrics"],
            config["topk"],
            config["metric_definitions"],
            config["metric_decimal_place"],
        )
