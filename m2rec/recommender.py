"""A trained run as a Python object: ranks items for any history, and takes in new items by their text.

It needs the run folder alone: no RecBole, no data set, and nothing in the folder is unpickled.

letter  meaning
B, L    histories, their padded length
V, T    items including padding, width of the text vectors in the model
T0      width of the text vectors in their file
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from m2rec.encoder import Encoder
from m2rec.files import CONFIG_FILE, ITEMS_FILE, WEIGHTS_FILE, write_tensors, write_text
from m2rec.settings import ModelSettings

_ENCODER = "encoder."


class Recommendation(NamedTuple):
    """An item and its score; only the order of scores means something."""

    item: str
    score: float


class Recommender:
    """Ranks the items that a model was trained on, and those that were added since.

    Args:
        encoder: the trained network.
        tokens: item tokens by internal id, that of padding first.
        max_length: longest history that the model has seen; of longer ones the end counts.
        config: the keys of the run.
        text_mean, text_basis: (T0,) and (T0, T), how raw text vectors become those of the model;
            None for a model without text.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokens: Sequence[str],
        max_length: int,
        config: dict[str, Any],
        text_mean: Tensor | None = None,
        text_basis: Tensor | None = None,
    ) -> None:
        self.encoder = encoder.eval()
        self.tokens = list(tokens)
        self.max_length = max_length
        self.config = config
        self._text_mean, self._text_basis = text_mean, text_basis
        self._ids = {token: i for i, token in enumerate(self.tokens) if i > 0}

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "Recommender":
        """The model of a run folder.

        Raises:
            ValueError: a file is missing, damaged, or of another model.
        """
        folder = Path(folder)
        config = _read(folder / CONFIG_FILE, yaml.safe_load, dict)
        tokens = _read(folder / ITEMS_FILE, json.loads, list)
        if config.get("model") != "M2Rec":
            raise ValueError(f"{folder / CONFIG_FILE}: model: {config.get('model')!r} is not M2Rec")
        try:
            weights = load_file(folder / WEIGHTS_FILE, device=device)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} can't be read ({error})") from None
        state = {k.removeprefix(_ENCODER): v for k, v in weights.items() if k.startswith(_ENCODER)}
        length = config["MAX_ITEM_LIST_LENGTH"]
        encoder = Encoder(ModelSettings.read(config), len(tokens), length, state.get("vectors")).to(device)
        try:
            encoder.load_state_dict(state)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{folder}: the weights don't fit config.yaml and items.json ({said})") from None
        return cls(encoder, tokens, length, config, weights.get("text_mean"), weights.get("text_basis"))

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads, added items included, into a folder that is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = {"text_mean": self._text_mean, "text_basis": self._text_basis}
        state = {_ENCODER + name: value for name, value in self.encoder.state_dict().items()}
        write_tensors(folder / WEIGHTS_FILE, state | {k: v for k, v in text.items() if v is not None})
        write_text(folder / ITEMS_FILE, json.dumps(self.tokens, ensure_ascii=False) + "\n")
        write_text(folder / CONFIG_FILE, yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))

    def recommend(
        self, history: Sequence[str], k: int = 10, exclude_seen: bool = True
    ) -> list[Recommendation]:
        """The best k items after a history, best first.

        Args:
            history: item tokens, oldest first; at least one.
            k: how many; fewer come where there are not so many.
            exclude_seen: leave the history's own items out.

        Raises:
            ValueError: the history is empty or holds a token that nobody knows.
        """
        (scores,) = self.scores([history])
        if exclude_seen:
            scores[self.to_ids(history)] = -torch.inf
        best = scores.topk(min(k, len(scores)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Recommendation(self.tokens[i], score) for i, score in pairs if score > -torch.inf]

    @torch.no_grad()
    def scores(self, histories: Sequence[Sequence[str]]) -> Tensor:
        """The score of every item after each history, (B, V); that of padding is -inf.

        Raises:
            ValueError: a history is empty or holds a token that nobody knows.
        """
        ids = [self.to_ids(history)[-self.max_length :] for history in histories]
        lengths = torch.tensor([len(row) for row in ids])
        items = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64)
        for row, own in zip(items, ids, strict=True):
            row[: len(own)] = torch.tensor(own)
        device = self.encoder.id_embedding.weight.device
        items, lengths = items.to(device), lengths.to(device)
        scores = self.encoder.scores(self.encoder.last(items, lengths), items)
        scores[:, 0] = -torch.inf
        return scores

    def to_ids(self, history: Sequence[str]) -> list[int]:
        if not history:
            raise ValueError("history: empty; give at least one item")
        unknown = [token for token in history if token not in self._ids]
        if unknown:
            raise ValueError(f"history: the model knows no item {unknown[0]!r}; add it with add_items")
        return [self._ids[token] for token in history]

    @torch.no_grad()
    def add_items(self, tokens: Sequence[str], vectors: Tensor) -> None:
        """Take in items that training has never met; their text is all that is known of them.

        They can be ranked and stand in histories. The ids of all others stay as they are.

        Args:
            tokens: new tokens.
            vectors: (n, T0), their text vectors from the language model that made those of the run.

        Raises:
            ValueError: the model has no text in its item table, a token is there already or twice,
                or the vectors don't fit.
        """
        old = self.encoder.vectors
        if old is None or self.encoder.table_text is None:
            raise ValueError(
                "add_items: this run has no text in its item table; train with text_vectors and "
                "text_in_table: true"
            )
        assert self._text_mean is not None and self._text_basis is not None
        there = set(self._ids)
        for token in tokens:
            if token in there:
                raise ValueError(f"add_items: {token!r} is there already")
            there.add(token)
        if vectors.shape != (len(tokens), len(self._text_mean)):
            raise ValueError(
                f"add_items: vectors of shape {tuple(vectors.shape)} for {len(tokens)} items; expected "
                f"({len(tokens)}, {len(self._text_mean)}), made as those of the run"
            )
        raw = vectors.to(old)
        useless = [t for t, v in zip(tokens, raw, strict=True) if not v.isfinite().all() or not v.any()]
        if useless:
            raise ValueError(f"add_items: {useless[0]!r} has no text vector: all zero, or not finite")
        embedding = self.encoder.id_embedding.weight
        unknown = torch.zeros(len(tokens), embedding.shape[1]).to(embedding)
        self.encoder.id_embedding = nn.Embedding.from_pretrained(
            torch.cat([embedding, unknown]), freeze=False, padding_idx=0
        )
        self.encoder.set_vectors(torch.cat([old, (raw - self._text_mean) @ self._text_basis]))
        self._ids |= {token: len(self.tokens) + i for i, token in enumerate(tokens)}
        self.tokens += tokens


def _read(path: Path, parse: Any, kind: type) -> Any:
    """A file's content.

    Raises:
        ValueError: it is missing, or holds something else.
    """
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds no {kind.__name__}")
    return content
