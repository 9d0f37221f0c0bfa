"""M2Rec as a RecBole model: the encoder of `m2rec.nn` with RecBole's four methods.

    e = item_table[s]                                item_table = id embedding + text part
    x = dropout(layer_norm(e))
    each layer:  m, f, t = mamba(x), filter(x), text_projection(text[s])
                 x = layer_norm(x + dropout(sum_k g_k * branch_k)),  g = gate(m, f, t)
                 x = layer_norm(x + feed_forward(x))
    scores = x[last] @ item_table.T + repeat_bias * (the history holds the item)
             + what `nn/neighbors.py` counts, once the network is trained

Paper: M2Rec, arXiv 2505.04445. Deviations: the filter is causal (`nn/filters.py`), so that all
positions of a history can be trained at once; see docs/model.md, "What differs from the paper".
"""

import logging
from typing import Self

import torch
from torch import Tensor

from m2rec import distributed
from m2rec.compat import Config, InputType, Interaction, SequentialDataset, SequentialRecommender
from m2rec.data.dataset import HistoryDataset
from m2rec.data.histories import shift_targets
from m2rec.errors import UserError
from m2rec.nn.batching import PaddedBatch, pad_training_rows
from m2rec.nn.encoder import Encoder
from m2rec.nn.inference.encoder import PreparedEncoder, can_prepare
from m2rec.nn.losses import LossInput, Negatives, NegativeSampler, compute_loss, draw_negatives
from m2rec.nn.mamba import has_hooks
from m2rec.nn.repeat_bias import PaddedRepeatBias, RepeatBias, add_to_item_scores
from m2rec.nn.step_items import StepItems
from m2rec.settings import ModelSettings, get_model_settings
from m2rec.text.source import find_vector_file, load_text_vectors
from m2rec.text.vector_file import TextVectors

logger = logging.getLogger(__name__)


class M2Rec(SequentialRecommender):
    """Multi-scale Mamba for sequential recommendation.

    Args:
        config: a RecBole Config; the keys are those of `ModelSettings`.
        dataset: the training data. On `m2rec.data.dataset.HistoryDataset` with dense rows the
            loss uses every position; on any other, the last one, as stock RecBole does.
    """

    input_type = InputType.POINTWISE  # a row is a history and the item after it
    settings_class = ModelSettings
    supports_dense_rows = True
    uses_text = True
    draws_negatives = True  # for each loss that needs some, see `compat`

    def __init__(self, config: Config, dataset: SequentialDataset) -> None:
        super().__init__(config, dataset)
        if not isinstance(dataset, HistoryDataset):
            _warn_about_ignored_keys(config)
        self.settings = get_model_settings(config)
        self.dense = isinstance(dataset, HistoryDataset) and dataset.is_dense
        text = self._get_item_vectors(config, dataset)
        self.text_source = None if text is None else text.provenance
        self.encoder = Encoder(
            self.settings,
            self.n_items,
            self.max_seq_length,
            None if text is None else text.vectors,
            is_sharded=self.settings.shard_items and distributed.world_size() > 1,
        )
        by_popularity = self.settings.negative_sampling == "popularity"
        counts = self._count_item_targets(dataset) if by_popularity else None
        self.negatives = NegativeSampler(self.n_items, counts)
        # kept with the weights, so that a later item's text can be whitened in the same way
        self.register_buffer("text_mean", None if text is None else text.mean)
        self.register_buffer("text_basis", None if text is None else text.basis)
        self._prepared: PreparedEncoder | None = None
        self._own_table: Tensor | None = None

    def _get_item_vectors(self, config: Config, dataset: SequentialDataset) -> TextVectors | None:
        """The vectors that training put on the data set; in RecBole's own flow load them."""
        if hasattr(dataset, "item_vectors"):
            vectors: TextVectors | None = dataset.item_vectors
            return vectors
        return load_text_vectors(config, find_vector_file(config), dataset.field2id_token[self.ITEM_ID])

    def _count_item_targets(self, dataset: SequentialDataset) -> Tensor:
        """How often each item is a training target, (V,)."""
        counts = torch.zeros(self.n_items)
        for item, count in dataset.counter(self.ITEM_ID).items():
            counts[item] = count
        return counts

    def forward(self, items: Tensor, lengths: Tensor, step: StepItems | None = None) -> Tensor:
        """items: (B, L), lengths: (B,) -> the vector of each last position, (B, D).

        What depends on an item alone is looked up in `step`, or computed anew.
        """
        return self.encoder.last(items, lengths, step)

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Mean loss over the targets of a batch: all positions of dense rows, else the last."""
        self._prepared = None  # a step follows, and a fused optimiser's is not counted as a change
        items, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        targets = interaction[self.ITEM_ID]
        if self.dense:
            targets = shift_targets(items, lengths, targets)
        negatives = self._draw_negatives(targets, self._find_drawn_negatives(interaction))
        step = self.encoder.prepare_step(items, None if negatives is None else [targets, negatives.ids])
        if self.dense:
            x, rows, times = self.encoder.encode_target_positions(items, lengths, targets, step)
            targets = targets[rows, times]
            negatives = None if negatives is None else negatives.select_positions(rows, times)
        else:
            x, times = self(items, lengths, step), lengths - 1
            rows = torch.arange(len(items), device=items.device)
        bias = self.encoder.repeat_bias
        repeats = None if bias is None else RepeatBias(items, rows, times, bias)
        return compute_loss(LossInput(self.encoder, step, x, targets, repeats, negatives))

    def _find_drawn_negatives(self, interaction: Interaction) -> Tensor | None:
        """(B,), one negative for each row of a single target, if the data set has drawn them."""
        is_drawn = not self.dense and self.NEG_ITEM_ID in interaction
        return interaction[self.NEG_ITEM_ID] if is_drawn else None

    def _draw_negatives(
        self, targets: Tensor, drawn: Tensor | None, n_positions: int | None = None
    ) -> Negatives | None:
        """As `losses.draw_negatives`; those that the data set has drawn are taken for BPR."""
        if drawn is not None and self.settings.loss_type == "BPR":
            return Negatives(drawn)
        return draw_negatives(self.settings, targets, self.negatives, n_positions)

    def pad_batch(self, interaction: Interaction, n_rows: int) -> PaddedBatch:
        """The rows of a batch for `calculate_padded_loss`, in full batches of `n_rows`."""
        items, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        targets = interaction[self.ITEM_ID]
        if self.dense:
            targets = shift_targets(items, lengths, targets)
        drawn = self._find_drawn_negatives(interaction)
        return pad_training_rows(items, lengths, targets, n_rows, drawn)

    def calculate_padded_loss(self, batch: PaddedBatch) -> Tensor:
        """As `calculate_loss`, without an operation whose shape or path depends on a value on the device.

        Without dropout and sampling the loss is that of `calculate_loss` up to rounding.
        """
        items, lengths, is_target = batch.items, batch.lengths, batch.targets > 0
        if self.dense:
            x = self.encoder(items, lengths).flatten(0, 1).index_select(0, batch.positions)
        else:
            x = self.encoder.encode_last_positions(items, lengths).index_select(0, batch.rows)
        x = x.masked_fill(~is_target[:, None], 0)
        bias, repeats = self.encoder.repeat_bias, None
        if bias is not None:
            repeats = PaddedRepeatBias(items, batch.rows, batch.times, is_target, bias)
        negatives = self._draw_negatives(batch.targets, batch.negatives, len(batch.targets))
        return compute_loss(LossInput(self.encoder, None, x, batch.targets, repeats, negatives))

    def predict(self, interaction: Interaction) -> Tensor:
        """The score of each row's ITEM_ID, (B,)."""
        history, items = interaction[self.ITEM_SEQ], interaction[self.ITEM_ID]
        x: Tensor = self(history, interaction[self.ITEM_SEQ_LEN])
        scores = (x * self.encoder.embed_items(items)).sum(-1)
        if self.encoder.neighbors is not None:
            lengths = interaction[self.ITEM_SEQ_LEN]
            scores = self.encoder.neighbors.add_to_item_scores(scores, items, history, lengths)
        return add_to_item_scores(scores, items, history, self.encoder.repeat_bias)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """The score of every item for each row, (B, V).

        Raises:
            ValueError: a score is not finite; RecBole would rank such rows as if they were good.
        """
        history = interaction[self.ITEM_SEQ]
        lengths = interaction[self.ITEM_SEQ_LEN]
        if self.encoder.is_sharded:
            return self._check_scores(self._score_with_other_processes(history, lengths))
        prepared = self._find_prepared_encoder()
        if prepared is None:
            scores = self.encoder.score_all_items(self(history, lengths), history)
        else:
            scores = prepared.score_all_items(history, lengths)
        return self._check_scores(scores)

    def _score_with_other_processes(self, history: Tensor, lengths: Tensor) -> Tensor:
        """(B, V), where the item table is sharded; the items of a batch are looked up once."""
        if self._own_table is None:
            self._own_table = self.encoder.compute_own_table()
        step = self.encoder.prepare_step(history, [])
        return self.encoder.score_all_items(self(history, lengths, step), history, self._own_table)

    @staticmethod
    def _check_scores(scores: Tensor) -> Tensor:
        if not torch.isfinite(scores).all():
            raise UserError("scores are NaN or infinite: training diverged; lower learning_rate")
        return scores

    def train(self, mode: bool = True) -> Self:
        """As in `nn.Module`; training forgets the prepared network, and each change of mode the own table."""
        self._own_table = None
        if mode:
            self._prepared = None
        super().train(mode)
        return self

    def _find_prepared_encoder(self) -> PreparedEncoder | None:
        """The network for evaluation on a CPU, made again when weights have changed; None elsewhere."""
        is_own = type(self).forward is M2Rec.forward and not has_hooks(self)
        if self.training or torch.is_grad_enabled() or not (is_own and can_prepare(self.encoder)):
            return None
        if self._prepared is None or not self._prepared.is_current(self.encoder):
            self._prepared = PreparedEncoder(self.encoder, self.encoder.item_table())
        return self._prepared


def _warn_about_ignored_keys(config: Config) -> None:
    """Log the keys that have no effect on RecBole's data set."""
    ignored = []
    stock = {
        **{"rows": "prefix", "time_order": "recbole", "ties": "file", "split": "leave_one_out"},
        "neighbors": False,  # they come after training, by RunTrainer's side
    }
    for key, default in stock.items():
        if key in config and config[key] != default:
            ignored.append(f"{key}: {config[key]}")
    if ignored:
        logger.warning(
            "ignored with RecBole's data set: %s; use run_mm.py, or HistoryDataset(config) but for neighbors",
            ", ".join(ignored),
        )
