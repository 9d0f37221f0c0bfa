"""A trained model as a program that PyTorch alone runs.

letter  meaning
B, L    histories, their padded length (right-padded with item 0)
V, D    items including padding, model width
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.errors import UserError
from m2rec.nn.encoder import Encoder
from m2rec.nn.repeat_bias import add_to_all_scores
from m2rec.run_folder import ITEMS_FILE
from m2rec.serving.saved_model import SavedModel
from m2rec.storage import write_atomically

_TOLERANCE = 1e-4
_CHECK_BATCH_SIZES = (
    3,
    1,
    2,
    5,
    8,
)  # of the batches that are compared, where any may come; the first is traced


class ScoringModule(nn.Module):
    """Histories -> the score of every item, without a step whose shape depends on the values.

    Args:
        encoder: a trained network.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        table = encoder.item_table()
        self.encoder = encoder.make_inference_copy(
            table
        )  # a text projection would choose by the shape of its input
        self.table: Tensor
        self.register_buffer("table", table)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """items: (B, L) int64, lengths: (B,) int64, at least 1 -> (B, V); that of padding is -inf."""
        x = self.encoder(items, lengths)
        last = (lengths - 1)[:, None, None].expand(-1, 1, x.shape[2])
        scores = F.linear(x.gather(1, last)[:, 0], self.table)
        scores = add_to_all_scores(scores, items, self.encoder.repeat_bias)
        padding = torch.arange(scores.shape[1], device=scores.device) == 0
        return scores.masked_fill(padding, -torch.inf)


@torch.no_grad()
def export_program(trained: SavedModel, path: Path, batch_size: int | None = 1) -> None:
    """Write a torch.export program, read it again and compare it with the model.

    `torch.export.load(path).module()(items, lengths)` runs it without this package: items
    (batch_size, L) int64, internal ids, oldest first, padded with 0 behind; lengths (batch_size,);
    L is the run's MAX_ITEM_LIST_LENGTH. With batch_size None the program takes any number of
    histories. The tokens by internal id are in its extra file items.json.

    Raises:
        ValueError: batch_size is less than 1, or the program does not do what the model does.
    """
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise UserError(f"batch_size: expected a whole number from 1, or None for any, got {batch_size!r}")
    examples = [
        _sample_histories(trained, batch_size or size, seed) for seed, size in enumerate(_CHECK_BATCH_SIZES)
    ]
    dynamic = None if batch_size else [{0: torch.export.Dim("batch_size")}] * 2
    program = ScoringModule(_copy_portable_encoder(trained)).eval()
    exported = torch.export.export(program, examples[0], dynamic_shapes=dynamic)
    tokens = json.dumps(trained.tokens, ensure_ascii=False)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # by name it would want its own suffix
            torch.export.save(exported, file, extra_files={ITEMS_FILE: tokens})
        with temporary.open("rb") as file:
            program = torch.export.load(file).module()
        for items, lengths in examples:
            found, expected = (
                program(items, lengths)[:, 1:],
                _compute_reference_scores(trained, items, lengths)[:, 1:],
            )
            if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
                worst = (found - expected).abs().max()
                raise UserError(f"export: the program differs from the model by {worst:.1e}")

    write_atomically(path, write)


def _copy_portable_encoder(trained: SavedModel) -> Encoder:
    """A copy on the CPU that knows no gradients and calls no kernel of this machine."""
    settings = replace(trained.encoder.settings, scan_backend="torch")
    encoder = Encoder(settings, len(trained.tokens), trained.max_length, trained.encoder.vectors)
    encoder.load_state_dict(trained.encoder.state_dict())  # copies
    return encoder.cpu().eval().requires_grad_(False)


def _compute_reference_scores(trained: SavedModel, items: Tensor, lengths: Tensor) -> Tensor:
    """The model's own, (B, V)."""
    device = trained.table.device
    items, lengths = items.to(device), lengths.to(device)
    x = trained.encoder.last(items, lengths)
    return trained.encoder.score_all_items(x, items, trained.table).cpu()


def _sample_histories(trained: SavedModel, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random histories of random lengths; the second seed's are as long as they can be."""
    random = torch.Generator().manual_seed(seed)
    shape = (batch_size, trained.max_length)
    items = torch.randint(1, len(trained.tokens), shape, generator=random)
    lengths = torch.randint(1, trained.max_length + 1, (batch_size,), generator=random)
    if seed == 1:
        lengths.fill_(trained.max_length)
    items[torch.arange(trained.max_length) >= lengths[:, None]] = 0
    return items, lengths
