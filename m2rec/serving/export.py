"""A trained model as a program that PyTorch runs without this package.

letter  meaning
B, L    histories, their padded length (right-padded with item 0)
V, D    items including padding, model width
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.errors import UserError
from m2rec.nn.encoder import Encoder
from m2rec.nn.neighbors import N_RECENT
from m2rec.run_folder import ITEMS_FILE
from m2rec.serving.arguments import parse_whole_number
from m2rec.serving.saved_model import SavedModel
from m2rec.storage import write_atomically

_TOLERANCE = 1e-4
# histories in the batches that are compared where any number may come; the first batch is traced
_CHECK_BATCH_SIZES = (3, 1, 2, 5, 8)


class ScoringModule(nn.Module):
    """Histories -> the score of every item, by steps whose shapes don't depend on the values.

    Args:
        encoder: a trained network, for inference (`Encoder.make_inference_copy`).
        table: (V, D), the item table.
    """

    def __init__(self, encoder: Encoder, table: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.table: Tensor
        self.register_buffer("table", table)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """items: (B, L) int64, lengths: (B,) int64, at least 1 -> (B, V); padding's score is -inf."""
        scores = F.linear(self.encoder.encode_last_positions(items, lengths), self.table)
        if self.encoder.neighbors is not None:
            padded = F.pad(items, (0, N_RECENT))  # as long as what it reads, whatever L is
            scores = self.encoder.neighbors.add_to_all_scores(scores, padded, lengths)
        if self.encoder.repeat_bias is not None:
            # a duplicate item writes the same score again
            scores = scores.scatter(1, items, scores.gather(1, items) + self.encoder.repeat_bias)
        return mask_padding(scores)


def mask_padding(scores: Tensor) -> Tensor:
    """scores (B, V) with padding's at minus infinity."""
    padding = torch.arange(scores.shape[1], device=scores.device) == 0
    return scores.masked_fill(padding, -torch.inf)


@torch.no_grad()
def export_program(model: SavedModel, path: Path, batch_size: int | None = 1) -> None:
    """Write a torch.export program, load it again and compare it with the model.

    `torch.export.load(path).module()(items, lengths)` runs it without this package: items
    (batch_size, L) int64, internal ids, oldest first, padded with 0 at the end; lengths (batch_size,);
    L is the run's MAX_ITEM_LIST_LENGTH. With batch_size None the program takes any number of
    histories. The tokens by internal id are in its extra file items.json.

    Raises:
        ValueError: batch_size is less than 1, or the program's scores differ from the model's.
    """
    if batch_size is not None:
        batch_size = parse_whole_number("batch_size", batch_size, 1)
    examples = []
    for seed, size in enumerate(_CHECK_BATCH_SIZES):
        example = sample_histories(model, batch_size or size, seed)
        examples.append(example)
    dynamic = None if batch_size else [{0: torch.export.Dim("batch_size")}] * 2
    encoder = copy_portable_encoder(model)
    table = encoder.item_table()
    # with each item's text projected: the projection itself branches on the shape of its input
    module = ScoringModule(encoder.make_inference_copy(table), table).eval()
    exported = torch.export.export(module, examples[0], dynamic_shapes=dynamic)
    tokens = json.dumps(model.tokens, ensure_ascii=False)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # as a path it would need its own suffix
            torch.export.save(exported, file, extra_files={ITEMS_FILE: tokens})
        with temporary.open("rb") as file:
            loaded = torch.export.load(file).module()
        for items, lengths in examples:
            check_scores(model, items, lengths, loaded(items, lengths))

    write_atomically(path, write)


def copy_portable_encoder(model: SavedModel) -> Encoder:
    """A copy on the CPU without gradients, which calls no kernel of this machine."""
    settings = model.encoder.settings.model_copy(update={"scan_backend": "torch"})
    encoder = Encoder.from_state(settings, model.max_length, model.encoder.state_dict())  # copies
    return encoder.cpu().eval().requires_grad_(False)


@torch.no_grad()
def check_scores(model: SavedModel, items: Tensor, lengths: Tensor, found: Tensor) -> None:
    """Compare scores (B, V) of histories (B, L) with the model's own.

    Raises:
        ValueError: they differ.
    """
    device = model.table.device
    items, lengths = items.to(device), lengths.to(device)
    x = model.encoder.last(items, lengths)
    expected = model.encoder.score_all_items(x, items, model.table).cpu()[:, 1:]
    found = found[:, 1:]
    if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
        worst = (found - expected).abs().max()
        raise UserError(f"export: the program differs from the model by {worst:.1e}")


def sample_histories(model: SavedModel, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random histories of random lengths; with seed 1 all of the greatest length."""
    random = torch.Generator().manual_seed(seed)
    items = torch.randint(1, len(model.tokens), (batch_size, model.max_length), generator=random)
    lengths = torch.randint(1, model.max_length + 1, (batch_size,), generator=random)
    if seed == 1:
        lengths.fill_(model.max_length)
    is_padding = torch.arange(model.max_length) >= lengths[:, None]
    items[is_padding] = 0
    return items, lengths
