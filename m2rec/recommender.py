"""A trained run as a Python object: ranks items for any history, and takes in new items by their text.

It needs the run folder alone: no RecBole, no data set, and nothing in the folder is unpickled.

letter  meaning
B, L    histories, their padded length
V, T    items including padding, width of the text vectors in the model
T0      width of the text vectors in their file
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from m2rec import text_vectors
from m2rec.encoder import Encoder
from m2rec.files import (
    CONFIG_FILE,
    ITEMS_FILE,
    METRICS_FILE,
    TEXT_FILE,
    TITLES_FILE,
    WEIGHTS_FILE,
    read_tensors,
    write_tensors,
    write_text,
)
from m2rec.settings import ModelSettings, RunSettings

_ENCODER = "encoder."


class Recommendation(NamedTuple):
    """An item, its score, of which only the order means something, and its title, empty where unknown."""

    item: str
    score: float
    title: str = ""


class _Model(NamedTuple):
    """What changes when items are added, changed all at once."""

    encoder: Encoder
    table: Tensor
    """(V, D), the item table."""
    tokens: tuple[str, ...]
    """Item tokens by internal id, that of padding first."""
    ids: dict[str, int]
    titles: dict[str, str]
    """By item token, of those that have one."""


class Recommender:
    """Ranks the items that a model was trained on, and those that were added since.

    Args:
        encoder: the trained network.
        tokens: item tokens by internal id, that of padding first.
        config: the keys of the run.
        text_mean, text_basis: (T0,) and (T0, T), how raw text vectors become those of the model;
            None for a model without text.
        titles: by item token, of those that have one.
        text_source: what made the run's text vectors.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokens: Sequence[str],
        config: dict[str, Any],
        text_mean: Tensor | None = None,
        text_basis: Tensor | None = None,
        titles: Mapping[str, str] | None = None,
        text_source: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.text_source = dict(text_source or {})
        self.max_length = RunSettings.read(config).MAX_ITEM_LIST_LENGTH
        self._text_mean, self._text_basis = text_mean, text_basis
        self._model = _made(encoder, tokens, titles or {})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Recommender":
        """The model of a run folder.

        Raises:
            ValueError: a file is missing, damaged, or of another model; the device is not there.
        """
        folder, device = Path(folder), _checked_device(device)
        config = _read(folder / CONFIG_FILE, yaml.safe_load, dict)
        tokens = _read(folder / ITEMS_FILE, json.loads, list)
        own = tokens[1:]  # an item may be called as padding is
        if not own or not all(isinstance(token, str) for token in tokens) or len(set(own)) < len(own):
            raise ValueError(f"{folder / ITEMS_FILE} is no list of different texts")
        weights, _ = read_tensors(folder / WEIGHTS_FILE, str(device))
        state = {k.removeprefix(_ENCODER): v for k, v in weights.items() if k.startswith(_ENCODER)}
        if "id_embedding.weight" not in state:
            raise ValueError(f"{folder}: model: {config.get('model')!r} is not made of M2Rec's parts")
        settings = replace(ModelSettings.read(config), scan_backend="auto")  # that of this machine
        length = RunSettings.read(config).MAX_ITEM_LIST_LENGTH
        encoder = Encoder(settings, len(tokens), length, state.get("vectors")).to(device)
        try:
            encoder.load_state_dict(state)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{folder}: the weights don't fit config.yaml and items.json ({said})") from None
        titles, source = (
            _read(path, json.loads, dict) if (path := folder / name).exists() else {}
            for name in (TITLES_FILE, TEXT_FILE)
        )
        if not all(isinstance(title, str) for title in titles.values()):
            raise ValueError(f"{folder / TITLES_FILE} holds titles that are no text")
        text = (weights.get("text_mean"), weights.get("text_basis"))
        return cls(encoder, tokens, config, *text, titles, source)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Item tokens by internal id, that of padding first."""
        return self._model.tokens

    @property
    def titles(self) -> dict[str, str]:
        """Titles by item token, of those that have one."""
        return dict(self._model.titles)

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads, added items included, into a folder that is made if need be.

        Raises:
            ValueError: it is the folder of a run, whose metrics are of other weights.
        """
        folder = Path(folder)
        if (folder / METRICS_FILE).exists():
            raise ValueError(f"save: {folder} is a run's own folder; give another")
        text = {"text_mean": self._text_mean, "text_basis": self._text_basis}
        state = {_ENCODER + name: value for name, value in self._model.encoder.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS_FILE, state | {k: v for k, v in text.items() if v is not None})
        write_text(folder / ITEMS_FILE, json.dumps(self.tokens, ensure_ascii=False) + "\n")
        write_text(folder / TEXT_FILE, json.dumps(self.text_source, ensure_ascii=False) + "\n")
        write_text(folder / TITLES_FILE, json.dumps(self._model.titles, ensure_ascii=False) + "\n")
        write_text(folder / CONFIG_FILE, yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))

    def recommend(
        self, history: Iterable[str], k: int = 10, exclude_seen: bool = True
    ) -> list[Recommendation]:
        """The best k items after a history, best first.

        Args:
            history: item tokens, oldest first; at least one.
            k: how many; fewer come where there are not so many.
            exclude_seen: leave the history's own items out.

        Raises:
            ValueError: the history is empty or holds a token that nobody knows; k is less than 1.
        """
        if type(k) is not int or k < 1:
            raise ValueError(f"k: expected a whole number from 1, got {k!r}")
        model, past = self._model, list(_listed(history))
        (scores,) = self._scores(model, [past])
        if exclude_seen:
            scores[_ids(model, past)] = -torch.inf
        best = scores.topk(min(k, len(scores)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found = [(model.tokens[i], score) for i, score in pairs if score > -torch.inf]
        return [Recommendation(token, score, model.titles.get(token, "")) for token, score in found]

    def scores(self, histories: Iterable[Iterable[str]]) -> Tensor:
        """The score of every item after each history, (B, V); that of padding is -inf.

        Of histories longer than the model was trained on the end counts.

        Raises:
            ValueError: a history is empty or holds a token that nobody knows.
        """
        return self._scores(self._model, [_listed(history) for history in histories])

    def to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Internal ids, places in `scores`.

        Raises:
            ValueError: a token that nobody knows.
        """
        return _ids(self._model, _listed(tokens))

    @torch.no_grad()
    def _scores(self, model: _Model, histories: list[list[str]]) -> Tensor:
        ids = [_ids(model, history)[-self.max_length :] for history in histories]
        if not all(ids):
            raise ValueError("history: empty; give at least one item")
        device = model.table.device
        if not ids:
            return torch.empty(0, len(model.table), device=device)
        lengths = torch.tensor([len(row) for row in ids])
        items = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64)
        for row, own in zip(items, ids, strict=True):
            row[: len(own)] = torch.tensor(own)
        items, lengths = items.to(device), lengths.to(device)
        scores = model.encoder.scores(model.encoder.last(items, lengths), items, model.table)
        scores[:, 0] = -torch.inf
        return scores

    @torch.no_grad()
    def add_items(self, tokens: Iterable[str], vectors: Any, titles: Mapping[str, str] | None = None) -> None:
        """Take in items that training has never met; their text is all that is known of them.

        They can be ranked and stand in histories. The ids of all others stay as they are. Where
        it fails nothing has changed.

        Args:
            tokens: new tokens.
            vectors: (n, T0) tensor or array, their text vectors from the language model that made
                those of the run.
            titles: by token, of those that have one.

        Raises:
            ValueError: the model has no text in its item table, a token is there already or twice,
                or the vectors don't fit.
        """
        self._check_text()
        model, new = self._model, _listed(tokens)
        old = model.encoder.vectors
        assert old is not None and self._text_mean is not None and self._text_basis is not None
        there = set(model.ids)
        for token in new:
            if not isinstance(token, str) or token in there:
                why = "is there already" if isinstance(token, str) else "is no text"
                raise ValueError(f"add_items: {token!r} {why}")
            there.add(token)
        named = {token: titles[token] for token in new if token in titles} if titles else {}
        for token, title in named.items():
            if not isinstance(title, str):
                raise ValueError(f"add_items: the title of {token!r} is {title!r}, which is no text")
        raw = torch.as_tensor(vectors).to(old)
        if raw.shape != (len(new), len(self._text_mean)):
            raise ValueError(
                f"add_items: vectors of shape {tuple(raw.shape)} for {len(new)} items; expected "
                f"({len(new)}, {len(self._text_mean)}), made as those of the run"
            )
        useless = [t for t, v in zip(new, raw, strict=True) if not v.isfinite().all() or not v.any()]
        if useless:
            raise ValueError(f"add_items: {useless[0]!r} has no text vector: all zero, or not finite")
        state = model.encoder.state_dict()
        embedding = state["id_embedding.weight"]
        unknown = torch.zeros(len(new), embedding.shape[1]).to(embedding)
        state["id_embedding.weight"] = torch.cat([embedding, unknown])
        state["vectors"] = torch.cat([old, (raw - self._text_mean) @ self._text_basis])
        settings, count = model.encoder.settings, len(model.tokens) + len(new)
        encoder = Encoder(settings, count, self.max_length, state["vectors"]).to(old.device)
        encoder.load_state_dict(state)
        self._model = _made(encoder, [*model.tokens, *new], {**model.titles, **named})

    def add_items_from(self, path: str | Path, titles: Mapping[str, str] | None = None) -> list[str]:
        """Take in the items of a text-vector file that are new; as `add_items`, and checked to fit.

        Args:
            path: made by `scripts/embed_items.py` with the language model of the run.
            titles: by token, of those that have one.

        Returns:
            The new tokens, none if all are known.

        Raises:
            ValueError: the file is unusable, or was not made as the run's; see also `add_items`.
        """
        self._check_text()
        tokens, vectors, made_by = text_vectors.read(Path(path))
        text_vectors.check_made_alike(Path(path), made_by, self.text_source)
        known = set(self.tokens)
        rows = [row for row, token in enumerate(tokens) if token not in known and vectors[row].any()]
        new = [tokens[row] for row in rows]
        self.add_items(new, vectors[rows], titles)
        return new

    def _check_text(self) -> None:
        """New items need text in the item table.

        Raises:
            ValueError: this run has none.
        """
        encoder = self._model.encoder
        if encoder.vectors is None or self._text_mean is None or self._text_basis is None:
            raise ValueError("add_items: this run has no text; train with text_vectors")
        if encoder.table_text is None:
            raise ValueError(
                "add_items: this run has no text in its item table; train with text_in_table: true"
            )


@torch.no_grad()
def _made(encoder: Encoder, tokens: Sequence[str], titles: Mapping[str, str]) -> _Model:
    encoder = encoder.eval()
    ids = {token: i for i, token in enumerate(tokens) if i > 0}
    return _Model(encoder, encoder.item_table(), tuple(tokens), ids, dict(titles))


def _listed(tokens: Iterable[str]) -> list[str]:
    """The tokens one by one; a single text would fall into its letters."""
    if isinstance(tokens, str):
        raise ValueError(f"expected a list of item tokens, got one text, {tokens!r}; write [{tokens!r}]")
    return list(tokens)


def _ids(model: _Model, tokens: list[str]) -> list[int]:
    for token in tokens:
        if not isinstance(token, str) or token not in model.ids:
            text = "" if isinstance(token, str) else "; tokens are texts"
            raise ValueError(f"history: the model knows no item {token!r}{text}")
    return [model.ids[token] for token in tokens]


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is none; cpu, cuda or cuda:0") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {device!r} is not supported; cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: there is no {found} here; take cpu")
    return found


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
