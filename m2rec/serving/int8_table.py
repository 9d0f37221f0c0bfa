"""The item table in int8: a first pass over few bytes chooses items, which are then ranked exactly.

The first pass of one history reads the whole table, so that memory, not arithmetic, limits its speed.

letter  meaning
B, D    histories, model width
V       items including padding
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from m2rec.errors import UserError

# with more histories at a time, or fewer items, float32 is as fast
_MAX_HISTORIES, _MIN_ITEMS = 4, 2**15

_SPARE_ITEMS = 256  # items that the first pass finds beyond those that are needed


class Int8Table:
    """Finds items of high scores, as `ItemIndex` does, for a few histories at a time.

    Args:
        table: (V, D), the item table; row 0 is padding's.

    Raises:
        ValueError: the table is not on a CPU, or PyTorch lacks the product.
    """

    def __init__(self, table: Tensor) -> None:
        if table.is_cuda:
            raise UserError("precision: int8 is for a CPU; use float32")
        if not hasattr(torch, "_weight_int8pack_mm"):
            raise UserError(f"precision: PyTorch {torch.__version__} has no product with int8; use float32")
        rows = table[1:]
        scales = (rows.abs().amax(1) / 127).clamp_(min=torch.finfo(rows.dtype).tiny)  # a row may be 0
        self._rows = (rows / scales[:, None]).round_().to(torch.int8)
        self._scales = scales.bfloat16()

    def extended(self, table: Tensor) -> "Int8Table":
        """That of a table with more items."""
        return Int8Table(table)

    def search_by_need(self, x: Tensor, min_results: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """As `ItemIndex.search_by_need`: yields nothing where float32 is as fast."""
        n_results = _SPARE_ITEMS + max(min_results, default=0)
        n_items = len(self._rows)
        if not 0 < len(x) <= _MAX_HISTORIES or n_items < max(_MIN_ITEMS, 8 * n_results):
            return
        scores = torch._weight_int8pack_mm(x.bfloat16(), self._rows, self._scales)  # (B, V - 1)
        yield list(range(len(x))), 1 + scores.topk(n_results).indices
