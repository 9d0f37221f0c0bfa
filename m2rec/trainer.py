"""RecBole's Trainer with atomic checkpoints in the run folder and both test protocols."""

import csv
import logging
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from m2rec.compat import Collector, Config, Interaction, Trainer
from m2rec.files import write_tensors, write_text

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
HISTORY = "history.csv"


class RunTrainer(Trainer):
    """Trains one model into one run folder.

    The best weights so far are `model.safetensors`, replaced as a whole; `history.csv` gets a
    line per epoch. No pickle is written or read.

    Args:
        config: a RecBole Config.
        model: any RecBole sequential model.
        folder: the run folder, which exists.
    """

    def __init__(self, config: Config, model: nn.Module, folder: Path) -> None:
        config["checkpoint_dir"] = str(folder)
        super().__init__(config, model)
        # for enable_amp: float16, the default on CUDA, would need a loss scaler
        torch.set_autocast_dtype(self.device.type, torch.bfloat16)
        self.folder = folder
        self.saved_model_file = str(folder / WEIGHTS)
        self.best_epoch: int | None = None
        self.validates = True
        names = [f"valid.{metric.lower()}@{k}" for metric in config["metrics"] for k in config["topk"]]
        self._columns = ["epoch", "loss", "seconds", *names]
        write_text(folder / HISTORY, ",".join(self._columns) + "\n")
        if config["tensorboard"]:
            self.tensorboard = SummaryWriter(str(folder / "tensorboard"))

    def fit(self, train_data: Any, valid_data: Any = None, *args: Any, **kwargs: Any) -> Any:
        """RecBole's fit, with our own line per epoch instead of its four."""
        self.validates = valid_data is not None
        return super().fit(train_data, valid_data, *args, **{"verbose": False, **kwargs})

    def _build_optimizer(self, **kwargs: Any) -> torch.optim.Optimizer:
        """RecBole's optimiser, without weight decay on the parameters that are marked so."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        marked = [p for p in parameters if getattr(p, "_no_weight_decay", False)]
        marked_ids = {id(p) for p in marked}
        groups = [{"params": [p for p in parameters if id(p) not in marked_ids]}]
        groups += [{"params": marked, "weight_decay": 0.0}] if marked else []  # type: ignore[dict-item]
        return super()._build_optimizer(params=groups, **kwargs)  # type: ignore[no-any-return]

    def _train_epoch(self, train_data: Any, epoch_idx: int, *args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        total = super()._train_epoch(train_data, epoch_idx, *args, **kwargs)
        seconds = perf_counter() - start
        loss = (sum(total) if isinstance(total, tuple) else total) / len(train_data)
        self._epoch = {"epoch": epoch_idx, "loss": loss, "seconds": round(seconds, 3)}
        if not self.validates or (epoch_idx + 1) % self.eval_step:
            self._report({})
        return total

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> Any:
        score, result = super()._valid_epoch(valid_data, show_progress)
        self._report(result)
        return score, result

    def _report(self, result: dict[str, float]) -> None:
        """One line of log and one of history.csv for the epoch that has just ended."""
        row = {**self._epoch, **{f"valid.{k}": float(v) for k, v in result.items()}}
        words = f"epoch {row['epoch']:>3}  loss {row['loss']:.4f}  {row['seconds']:.1f} s"
        if result:
            better = max if self.valid_metric_bigger else min
            best = better(float(self.best_valid_score), float(result[self.valid_metric]))
            words += f"  valid {self.valid_metric} {result[self.valid_metric]:.4f}, best {best:.4f}"
        logger.info("%s", words)
        with (self.folder / HISTORY).open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        write_tensors(Path(self.saved_model_file), self.model.state_dict())
        self.best_epoch = epoch

    def _check_nan(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise ValueError(
                f"training loss became {loss.item()}; lower learning_rate "
                f"(now {self.learning_rate}) or set clip_grad_norm: {{max_norm: 5}}"
            )

    def load_best(self) -> None:
        """Put the best weights back into the model."""
        device = str(self.device)
        self.model.load_state_dict(load_file(self.saved_model_file, device=device))

    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = False,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> Any:
        """RecBole's evaluation on the weights as they are, or on the best ones."""
        if load_best_model:
            self.load_best()
        return super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)

    @torch.no_grad()
    def evaluate_both(self, data: Any, train_data: Any, n_last: int) -> dict[str, dict[str, float]]:
        """Metrics with the user's history in the ranking and without it, from one scoring.

        Args:
            data: the rows to evaluate, from a `HistoryDataset`.
            train_data: the training rows, which some metrics count.
            n_last: how many of a user's last items are not yet history: 2 for validation
                rows, 1 for test rows.

        Returns:
            `all`, RecBole's protocol, and `unseen`: items that the user had before, other
            than the target, are taken out of the ranking.
        """
        self.model.eval()
        self.tot_item_num = data.dataset.item_num
        self.item_tensor = data.dataset.get_item_feature().to(self.device)
        collectors = {"all": Collector(self.config), "unseen": Collector(self.config)}
        for collector in collectors.values():
            collector.data_collect(train_data)
        for batch in data:
            interaction, scores, rows, targets = self._full_sort_batch_eval(batch)
            collectors["all"].eval_batch_collect(scores, interaction, rows, targets)
            _remove_history(scores, interaction, targets, data.dataset, n_last)
            collectors["unseen"].eval_batch_collect(scores, interaction, rows, targets)
        return {
            name: {k: float(v) for k, v in self.evaluator.evaluate(c.get_data_struct()).items()}
            for name, c in collectors.items()
        }


def _remove_history(
    scores: Tensor, interaction: Interaction, targets: Tensor, dataset: Any, n_last: int
) -> None:
    """Set the scores of each row's earlier items to -inf, but keep its target's."""
    rows = torch.arange(len(scores), device=scores.device)
    targets = targets.to(scores.device)
    kept = scores[rows, targets]
    users = interaction[dataset.uid_field].cpu().numpy()
    owner, items = dataset.histories.before(users, n_last)
    scores[torch.from_numpy(owner).to(scores.device), torch.from_numpy(items).to(scores.device)] = -np.inf
    scores[rows, targets] = kept
