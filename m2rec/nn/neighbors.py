"""Item neighbours: what is counted in the histories and read from the texts, added to the network's scores.

    score(j) += w_transitions sum_k 0.7^k log(1 + n(s_k, j))     s_0 is the last item, up to s_4
              + w_text        sum_k 0.5^k cos(t(s_k), t(j))

n(i, j) counts how often j came after i in training (`m2rec.data.transitions`), t are the model's text
vectors. Each item keeps its nearest so many items; all others are at 0. Nothing here is trained: after
training the two weights are chosen on the validation targets (`m2rec.training.neighbor_weights`). A network
sees each fact about a rare item once or twice, and learns it badly; here it is looked up.

letter  meaning
B, L    histories, their padded length (right-padded with item 0)
V, T    items including padding, width of the text vectors
M       neighbours that each item keeps
K       items at the end of a history that count
R       neighbours of a history's end, K * M of each kind
"""

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N_RECENT = 5  # K
_MIN_WIDTH = 64  # of M; with 50 and with all of them Toys came to the same
_TABLE_ENTRIES = 2**20  # of fewer items more neighbours count: ml-1m lost by 64 what it won by 300 and by all
_BLOCK_SCORES = 2**24  # similarities that are held at a time


def choose_width(n_items: int) -> int:
    """M for V items: a table has about a million places, and each item 64 at least."""
    return max(_MIN_WIDTH, _TABLE_ENTRIES // n_items)


def select_recent(items: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The last items of right-padded histories, last first, and 0, 1, ...: (B, K) and (K,); padding is 0."""
    ages = torch.arange(min(N_RECENT, items.shape[1]), device=items.device)
    position = lengths[:, None] - 1 - ages
    return items.gather(1, position.clamp(min=0)).masked_fill(position < 0, 0), ages


class NeighborTable(nn.Module):
    """The neighbours of each item by one measure.

    Args:
        n_items: V.
        width: M.
    """

    ids: Tensor
    """(V, M) int32, 0 where an item has fewer neighbours."""
    strengths: Tensor
    """(V, M), 0 where an item has fewer neighbours."""
    weight: Tensor
    """(), what the strengths are multiplied with."""

    def __init__(self, n_items: int, width: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.zeros(n_items, width, dtype=torch.int32))
        self.register_buffer("strengths", torch.zeros(n_items, width))
        self.register_buffer("weight", torch.ones(()))

    @classmethod
    def build(cls, ids: Tensor, strengths: Tensor) -> "NeighborTable":
        """From ids and strengths (V, M)."""
        table = cls(0, 0)
        table.ids, table.strengths = ids.int(), strengths.float()
        return table.to(strengths.device)

    def find_scores(self, recent: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        """The neighbours of the last items and what they add to scores, before the weight.

        Args:
            recent: (B, K), last first; padding has no neighbours.
            decay: (K,), the weight of each.

        Returns:
            ids and scores (B, K * M); an id that occurs twice adds twice, padding's adds 0.
        """
        added = self.strengths[recent] * decay[:, None]
        return self.ids[recent].flatten(1).long(), added.flatten(1)


class Neighbors(nn.ModuleDict):
    """The tables by kind, with which scores are corrected."""

    decays: ClassVar[dict[str, float]] = {"transitions": 0.7, "text": 0.5}
    """By kind, what an item of the history counts, relative to the item after it."""

    def find_scores_by_kind(self, items: Tensor, lengths: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """items (B, L), lengths (B,) -> by kind `NeighborTable.find_scores`."""
        recent, ages = select_recent(items, lengths)
        found = {}
        for kind, module in self.items():
            table = cast(NeighborTable, module)
            found[kind] = table.find_scores(recent, self.decays[kind] ** ages.to(table.strengths.dtype))
        return found

    def find_scores(self, items: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Which scores change, and by how much.

        Args:
            items: (B, L).
            lengths: (B,).

        Returns:
            ids and what is added (B, R); an id that occurs twice adds twice, padding's adds 0.
        """
        ids, added = [], []
        for kind, (kind_ids, scores) in self.find_scores_by_kind(items, lengths).items():
            ids.append(kind_ids)
            added.append(scores * cast(NeighborTable, self[kind]).weight)
        return torch.cat(ids, 1), torch.cat(added, 1)

    def add_to_all_scores(self, scores: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        """Add to scores (B, V) in place, after histories (B, L) of these lengths (B,)."""
        ids, added = self.find_scores(items, lengths)
        return scores.scatter_add_(1, ids, added.to(scores.dtype))

    def add_to_item_scores(self, scores: Tensor, wanted: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        """As `add_to_all_scores` for one item per history: scores, wanted (B,) -> (B,)."""
        ids, added = self.find_scores(items, lengths)
        return scores + (added * (ids == wanted[:, None])).sum(1).to(scores.dtype)

    def with_more_items(self, vectors: Tensor | None) -> "Neighbors":
        """With new items at the end, which have neighbours by text alone, and are some of old items.

        Args:
            vectors: (V', T), the text vectors of the old items and of the new ones.
        """
        longer = Neighbors()
        for kind, module in self.items():
            table = cast(NeighborTable, module)
            n_new = 0 if vectors is None else len(vectors) - len(table.ids)
            ids, strengths = (F.pad(t, (0, 0, 0, n_new)) for t in (table.ids, table.strengths))
            if kind == "text" and n_new:
                assert vectors is not None
                ids, strengths = _insert_similar_items(ids, strengths, vectors, n_new)
            longer[kind] = NeighborTable.build(ids, strengths)
            longer[kind].weight = table.weight
        return longer


def load_neighbors(state: Mapping[str, Tensor], prefix: str = "neighbors.") -> Neighbors | None:
    """Neighbours of the shapes that a network's weights have; None if they have none.

    Args:
        state: by name; `Encoder.load_state_dict` fills the values in.
        prefix: of the names.
    """
    neighbors = Neighbors()
    for kind in Neighbors.decays:
        ids = state.get(f"{prefix}{kind}.ids")
        if ids is not None:
            neighbors[kind] = NeighborTable(*ids.shape)
    return neighbors if len(neighbors) else None


@torch.no_grad()
def find_similar_items(vectors: Tensor, width: int = _MIN_WIDTH) -> NeighborTable:
    """The items with the greatest cosine of the text vectors, by item; those at most 0 are left out.

    Args:
        vectors: (V, T), zero for an item without text.
        width: M.
    """
    unit = F.normalize(vectors, dim=1)
    return NeighborTable.build(*_find_nearest(unit, torch.arange(len(unit), device=unit.device), width))


def _find_nearest(unit: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The nearest items of some (n,): ids and cosines (n, M), 0 for the rest; unit (V, T) has length 1."""
    ids, strengths = [], []
    for block in rows.split(max(1, _BLOCK_SCORES // len(unit))):
        cosines = unit[block] @ unit.T
        cosines.scatter_(1, block[:, None], 0)
        best = cosines.topk(min(width, len(unit)))
        strengths.append(best.values.clamp_(min=0))
        ids.append(best.indices.masked_fill(strengths[-1] == 0, 0).int())
    return torch.cat(ids), torch.cat(strengths)


def _insert_similar_items(
    ids: Tensor, strengths: Tensor, vectors: Tensor, n_new: int
) -> tuple[Tensor, Tensor]:
    """Rows of n_new items at the end, which also take their places among the neighbours of old items."""
    width, n_old = ids.shape[1], len(ids) - n_new
    unit = F.normalize(vectors.to(strengths), dim=1)
    new_ids = torch.arange(n_old, len(unit), device=ids.device)
    for rows in torch.arange(n_old, device=ids.device).split(max(1, _BLOCK_SCORES // n_new)):
        new = (unit[rows] @ unit[n_old:].T).clamp_(min=0).topk(min(width, n_new))
        is_near = new.values[:, 0] > strengths[rows, -1]  # than the weakest neighbour
        rows = rows[is_near]
        # stable, so that an old neighbour stays before a new one of equal strength
        merged = torch.cat([strengths[rows], new.values[is_near]], 1).sort(
            dim=1, descending=True, stable=True
        )
        merged_ids = torch.cat([ids[rows], new_ids[new.indices[is_near]].int()], 1)
        ids[rows] = merged_ids.gather(1, merged.indices[:, :width])
        strengths[rows] = merged.values[:, :width]
    own_ids, own_strengths = _find_nearest(unit, new_ids, width)
    ids[n_old:, : own_ids.shape[1]] = own_ids
    strengths[n_old:, : own_ids.shape[1]] = own_strengths
    return ids.masked_fill(strengths == 0, 0), strengths
