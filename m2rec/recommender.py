"""A trained run as a Python object: ranks items for any history, follows users live, takes in new items.

It needs the run folder alone: no RecBole, no data set, and nothing in the folder is unpickled.

letter  meaning
B, V    histories, items including padding
T0      width of the text vectors in their file
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice, tee
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec import export, history_files, questions, session, text_vectors, trained
from m2rec.history_files import Ranked
from m2rec.item_index import ItemIndex
from m2rec.questions import Remarks
from m2rec.ranking import Adjustments, best_among, best_items
from m2rec.session import Memory
from m2rec.trained import Trained

# histories that are ranked together
_BATCH = 1024

# positions that go through the network together: on a CPU what its caches hold
_POSITIONS = {"cpu": 2**13}
_POSITIONS_ELSEWHERE = 2**18


class Recommendation(NamedTuple):
    """An item, its score, of which only the order means something, and its title, empty where unknown."""

    item: str
    score: float
    title: str = ""


class Explanation(NamedTuple):
    """How far the model trusted each branch at one event of a history."""

    item: str
    title: str
    weights: dict[str, float]
    """By branch, the gate's weight, mean over layers and channels; they add up to 1."""
    by_layer: list[dict[str, float]]
    """The same for each layer."""


class _Choice(NamedTuple):
    """Which items may be recommended."""

    pool: Tensor | None
    """Ascending ids of the candidates; None for all items."""
    excluded: Tensor | None
    """Ids of the others; None for none."""


class Recommender:
    """Ranks the items that a model was trained on, and those that were added since.

    An item is named by its token, a text. A token that nobody knows is an error, or with
    `skip_unknown` is left out with a warning.

    Args:
        model: a trained model.
        whole_history: whether all of a history counts, or of one that is longer than those in
            training (`MAX_ITEM_LIST_LENGTH`) the end alone.
    """

    def __init__(self, model: Trained, whole_history: bool = False) -> None:
        if whole_history:
            session.check(model.encoder)
        self._model, self.whole_history = model, whole_history
        self._index: ItemIndex | None = None

    @classmethod
    def load(
        cls, folder: str | Path, device: str | torch.device = "cpu", whole_history: bool = False
    ) -> "Recommender":
        """The model of a run folder, or of one that `save` wrote.

        Raises:
            ValueError: a file is missing, damaged, or of another model; the device is not there; or
                whole_history for a model with a part that never sees more than in training.
        """
        return cls(trained.read(Path(folder), questions.checked_device(device)), whole_history)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Item tokens by internal id, that of padding first."""
        return self._model.tokens

    @property
    def titles(self) -> dict[str, str]:
        """Titles by item token, of those that have one."""
        return dict(self._model.titles)

    @property
    def config(self) -> Mapping[str, Any]:
        """The keys of the run."""
        return self._model.config

    @property
    def text_source(self) -> Mapping[str, Any]:
        """What made the run's text vectors."""
        return self._model.text_source

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads, added items included, into a folder that is made if need be.

        Raises:
            ValueError: it is the folder of a run, whose metrics are of other weights.
        """
        trained.write(self._model, Path(folder))

    def recommend(
        self,
        history: Iterable[str],
        k: int = 10,
        exclude_seen: bool = True,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        skip_unknown: bool = False,
    ) -> list[Recommendation]:
        """The best k items after a history, best first.

        After an empty history they are the items that training met most often, with how often as
        their score, and the log says so.

        Args:
            history: item tokens, oldest first.
            k: how many; fewer come where there are not so many.
            exclude_seen: leave the history's own items out.
            candidates: choose from these items only; from all by default.
            exclude: leave these out too; a token that nobody knows does no harm here.
            skip_unknown: leave out what nobody knows in history and candidates.

        Raises:
            ValueError: a token that nobody knows; k is less than 1.
        """
        (found,) = self.recommend_batch([history], k, exclude_seen, candidates, exclude, skip_unknown)
        return found

    def recommend_batch(
        self,
        histories: Iterable[Iterable[str]],
        k: int = 10,
        exclude_seen: bool = True,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        skip_unknown: bool = False,
    ) -> Iterator[list[Recommendation]]:
        """As `recommend` for each of any number of histories, in their order.

        Histories are taken as they are needed, some hundred at a time, so there may be millions.
        """
        k, remarks = questions.checked_k(k), Remarks()
        model, skipped = self._model, remarks if skip_unknown else None
        choice = self._choice(candidates, exclude, skipped)
        ids = (questions.to_ids(model.ids, questions.listed(history), skipped) for history in histories)
        return self._in_batches(model, ids, k, exclude_seen, choice, remarks)

    def recommend_file(
        self,
        histories: str | Path,
        output: str | Path,
        k: int = 10,
        exclude_seen: bool = True,
        skip_unknown: bool = False,
        progress: bool = False,
    ) -> int:
        """As `recommend` for each history of a file, of any size, into a Parquet file.

        Args:
            histories: FILE.parquet or a CSV file with the columns `user` and `history`, see
                `m2rec.history_files.read_histories`.
            output: written with the columns `user`, `items` and `scores`, whole or not at all.
            k, exclude_seen, skip_unknown: as in `recommend`.
            progress: show a bar on the terminal.

        Returns:
            How many histories there were.

        Raises:
            ValueError: the file can't be read, holds a token that nobody knows, or pyarrow is not
                installed; k is less than 1.
        """
        k, remarks = questions.checked_k(k), Remarks()
        model, path = self._model, Path(histories)
        skipped = remarks if skip_unknown else None

        def read() -> Iterator[tuple[str, list[int]]]:
            for user, tokens in history_files.read_histories(path, progress):
                try:
                    yield user, questions.to_ids(model.ids, tokens, skipped)
                except ValueError as error:
                    raise ValueError(f"{path}, user {user!r}: {error}") from None

        users, rows = tee(read())
        ids = (own for _, own in rows)
        found = self._in_batches(model, ids, k, exclude_seen, _Choice(None, None), remarks)
        ranked = (
            Ranked(user, [item.item for item in items], [item.score for item in items])
            for (user, _), items in zip(users, found, strict=True)
        )
        return history_files.write_ranked(Path(output), ranked)

    @torch.no_grad()
    def scores(self, histories: Iterable[Iterable[str]]) -> Tensor:
        """The score of every item after each history, (B, V); that of padding is -inf.

        Raises:
            ValueError: a history is empty or holds a token that nobody knows.
        """
        model = self._model
        ids = [questions.to_ids(model.ids, questions.listed(history)) for history in histories]
        if not all(ids):
            raise ValueError("history: empty; give at least one item")
        if not ids:
            return torch.empty(0, len(model.table), device=model.table.device)
        raised = [set(self._counted(row)) for row in ids]
        scores = F.linear(self._vectors(model, ids), model.table)
        places = self._adjustments(model, raised, [[0]] * len(ids))
        places.apply(scores, places.items, 0)
        return scores

    def to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Internal ids, places in `scores`.

        Raises:
            ValueError: a token that nobody knows.
        """
        return questions.to_ids(self._model.ids, questions.listed(tokens))

    def similar_items(self, token: str, k: int = 10) -> list[Recommendation]:
        """The items whose rows of the item table point most nearly the same way; the score is the cosine.

        Raises:
            ValueError: nobody knows the token; k is less than 1.
        """
        k, model = questions.checked_k(k), self._model
        (item,) = questions.to_ids(model.ids, [token])
        cosines = F.cosine_similarity(model.table, model.table[item], dim=1)
        cosines[[0, item]] = -torch.inf
        best = cosines.topk(min(k, len(cosines)))
        return _named(model, best.values.tolist(), best.indices.tolist())

    @torch.no_grad()
    def explain(self, history: Iterable[str]) -> list[Explanation]:
        """For each event of a history, the gate's weights of the branches.

        Of a history that is longer than those in training the end is explained, unless
        `whole_history`.

        Raises:
            ValueError: the history is empty or holds a token that nobody knows.
        """
        model = self._model
        ids = self._counted(questions.to_ids(model.ids, questions.listed(history)))
        if not ids:
            raise ValueError("history: empty; give at least one item")
        items = torch.tensor([ids], device=model.table.device)
        _, weights = model.ready.encode(items, torch.tensor([len(ids)], device=items.device))
        branches = model.ready.branches
        means = torch.stack([layer[0].mean(-1) for layer in weights], dim=1).tolist()  # (L, layers, K)
        explained = []
        for item, layers in zip(ids, means, strict=True):
            by_layer = [dict(zip(branches, layer, strict=True)) for layer in layers]
            mean = {name: sum(layer[name] for layer in by_layer) / len(by_layer) for name in branches}
            token = model.tokens[item]
            explained.append(Explanation(token, model.titles.get(token, ""), mean, by_layer))
        return explained

    def session(self, history: Iterable[str] = (), skip_unknown: bool = False) -> "Session":
        """A user who is followed live: every event costs the same, however long the history.

        All of the history counts, as with `whole_history`.

        Raises:
            ValueError: a token that nobody knows, or a model with a part that needs the whole
                history at once (`mixer: attention`, `filter: low_pass`).
        """
        session.check(self._model.encoder)
        memory, remarks = Memory(), Remarks()
        ids = questions.to_ids(self._model.ids, questions.listed(history), remarks if skip_unknown else None)
        remarks.say()
        session.remember(self._model.ready, ids, memory)
        return Session(self, memory)

    def restore_session(self, data: bytes) -> "Session":
        """A session from what `Session.to_bytes` made.

        Raises:
            ValueError: the data is damaged, or of another model.
        """
        return Session(self, session.from_bytes(data, self._model))

    def add_events(self, sessions: Sequence["Session"], tokens: Sequence[str]) -> None:
        """One event for each of many users in one pass, much cheaper than one by one.

        Args:
            sessions: different ones of this recommender.
            tokens: the next item of each.

        Raises:
            ValueError: a token that nobody knows, or a session that comes twice or is another
                recommender's; then nothing has changed.
        """
        items = questions.to_ids(self._model.ids, questions.listed(tokens))
        if len(items) != len(sessions):
            raise ValueError(f"add_events: {len(sessions)} sessions, but {len(items)} tokens")
        memories = self._memories(sessions)
        session.remember_together(self._model.ready, memories, items)

    def recommend_sessions(
        self,
        sessions: Sequence["Session"],
        k: int = 10,
        exclude_seen: bool = True,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
    ) -> list[list[Recommendation]]:
        """As `recommend` for each of many live users, in one pass."""
        k, model, remarks = questions.checked_k(k), self._model, Remarks()
        choice = self._choice(candidates, exclude, None)
        memories = self._memories(sessions)
        going = [memory for memory in memories if memory.vector is not None]
        seen: list[Collection[int]] = [memory.seen for memory in going]
        vectors = [memory.vector for memory in going if memory.vector is not None]
        best = []
        if vectors:
            best = self._best(model, torch.cat(vectors), seen, seen, k, exclude_seen, choice)
        known = [memory.vector is not None for memory in memories]
        ranked = self._with_popular(model, known, best, k, choice, remarks)
        remarks.say()
        return ranked

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
        model = trained.with_items(self._model, questions.listed(tokens), vectors, titles or {})
        if self._index is not None:
            self._index = self._index.extended(model.table)
        self._model = model

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
        trained.check_takes_items(self._model)
        tokens, vectors, made_by = text_vectors.read(Path(path))
        text_vectors.check_made_alike(Path(path), made_by, self.text_source)
        known = set(self.tokens)
        rows = [row for row, token in enumerate(tokens) if token not in known and vectors[row].any()]
        new = [tokens[row] for row in rows]
        self.add_items(new, vectors[rows], titles)
        return new

    def use_index(self, probes: int = 0) -> None:
        """Rank by an index from now on, for catalogues so large that scoring all items takes too long.

        Only the lists of items nearest to a history are
        looked at, so some of the best are missed; `recall` says how many are found. What the index
        can't answer is still ranked exactly: candidates, and histories so long, or so much to leave
        out, that little would be saved. `save` does not keep it.

        Args:
            probes: lists that are looked at for each history, of about 4 sqrt(V), but at most V / 39;
                0 for one in 16.

        Raises:
            ValueError: faiss is not installed, or probes is not a whole number from 0.
        """
        if type(probes) is not int or probes < 0:
            raise ValueError(f"probes: {probes!r} is not a whole number from 0")
        if self._index is None:
            self._index = ItemIndex(self._model.table)
        self._index.set_probes(probes)

    def recall(self, histories: Iterable[Iterable[str]], k: int = 10) -> float:
        """The share of each history's best k items that are found with the index, mean over the histories.

        What is ranked exactly in spite of the index counts as found; empty histories don't count.

        Raises:
            ValueError: there is no index (`use_index`), or no history; see also `recommend`.
        """
        if self._index is None:
            raise ValueError("recall: there is no index; call use_index first")
        exact = Recommender(self._model, self.whole_history)
        asked = [history for history in map(questions.listed, histories) if history]
        pairs = zip(self.recommend_batch(asked, k), exact.recommend_batch(asked, k), strict=True)
        found = [({i.item for i in ours}, {i.item for i in best}) for ours, best in pairs if best]
        if not found:
            raise ValueError("recall: no history that anything can be recommended after; give one at least")
        return sum(len(ours & best) / len(best) for ours, best in found) / len(found)

    def export(self, path: str | Path, batch_size: int = 1) -> None:
        """Write a torch.export program that PyTorch runs without this package, and compare it.

        Args:
            path: such as `m2rec.pt2`; `torch.export.load(path).module()(items, lengths)` runs it, see
                `m2rec.export.export`.
            batch_size: histories that it takes at a time.

        Raises:
            ValueError: batch_size is less than 1, or the program differs from the model.
        """
        export.export(self._model, Path(path), batch_size)

    def _in_batches(
        self,
        model: Trained,
        ids: Iterator[list[int]],
        k: int,
        exclude_seen: bool,
        choice: _Choice,
        remarks: Remarks,
    ) -> Iterator[list[Recommendation]]:
        """By history, some hundred at a time; the log has its remarks at the end."""
        try:
            while part := list(islice(ids, _BATCH)):
                yield from self._ranked(model, part, k, exclude_seen, choice, remarks)
        finally:
            remarks.say()

    def _ranked(
        self,
        model: Trained,
        ids: list[list[int]],
        k: int,
        exclude_seen: bool,
        choice: _Choice,
        remarks: Remarks,
    ) -> list[list[Recommendation]]:
        """By history."""
        known = [row for row in ids if row]
        seen: list[Collection[int]] = [set(row) for row in known]
        counted: list[Collection[int]] = [set(self._counted(row)) for row in known]
        best = []
        if known:
            best = self._best(model, self._vectors(model, known), counted, seen, k, exclude_seen, choice)
        return self._with_popular(model, [bool(row) for row in ids], best, k, choice, remarks)

    @torch.no_grad()
    def _best(
        self,
        model: Trained,
        vectors: Tensor,
        counted: Sequence[Collection[int]],
        seen: Sequence[Collection[int]],
        k: int,
        exclude_seen: bool,
        choice: _Choice,
    ) -> list[list[Recommendation]]:
        """The best items for vectors (B, D) of histories that hold these items."""
        hidden = seen if exclude_seen else [()] * len(seen)
        best: dict[int, list[Recommendation]] = {}

        def keep(rows: Sequence[int], found: tuple[Tensor, Tensor]) -> None:
            for row, scores, items in zip(rows, *(part.tolist() for part in found), strict=True):
                best[row] = _named(model, scores, items)

        def adjustments(rows: Sequence[int]) -> Adjustments:
            return self._adjustments(model, [counted[row] for row in rows], [hidden[row] for row in rows])

        left_out = 0 if choice.excluded is None else len(choice.excluded)
        index = self._index if choice.pool is None and model is self._model else None
        needs = [k + left_out + len(items) for items in seen]
        for rows, near in index.find_enough(vectors, needs) if index is not None else ():
            own = [torch.tensor([*counted[row]], dtype=torch.int64) for row in rows]
            pools = torch.cat([near, nn.utils.rnn.pad_sequence(own, batch_first=True)], dim=1)
            pools = pools.to(model.table.device)
            keep(rows, best_among(vectors[rows], model.table, k, adjustments(rows), pools, choice.excluded))
        if rest := [row for row in range(len(seen)) if row not in best]:
            keep(rest, best_items(vectors[rest], model.table, k, adjustments(rest), *choice))
        return [best[row] for row in range(len(seen))]

    def _adjustments(
        self, model: Trained, counted: Sequence[Collection[int]], hidden: Sequence[Collection[int]]
    ) -> Adjustments:
        bias = model.ready.repeat_bias
        return Adjustments(counted, hidden, 0.0 if bias is None else bias.item(), model.table.device)

    @torch.no_grad()
    def _vectors(self, model: Trained, ids: list[list[int]]) -> Tensor:
        """The vectors (B, D) of histories that hold at least one item each."""
        ids = [self._counted(row) for row in ids]
        vectors = model.table.new_empty(len(ids), model.table.shape[1])
        long = [row for row, own in enumerate(ids) if len(own) > model.max_length]
        for row in long:  # in pieces, however long
            memory = Memory()
            session.remember(model.ready, ids[row], memory)
            assert memory.vector is not None
            vectors[row] = memory.vector[0]
        device = model.table.device
        at_once = _POSITIONS.get(device.type, _POSITIONS_ELSEWHERE)
        for short in _of_similar_length(
            [len(row) if len(row) <= model.max_length else 0 for row in ids], at_once
        ):
            lengths = torch.tensor([len(ids[row]) for row in short])
            own = [torch.tensor(ids[row]) for row in short]
            items = nn.utils.rnn.pad_sequence(own, batch_first=True)
            vectors[short] = model.ready.last(items.to(device), lengths.to(device))
        return vectors

    def _counted(self, ids: list[int]) -> list[int]:
        """The part of a history that the model is shown."""
        return ids if self.whole_history else ids[-self._model.max_length :]

    def _with_popular(
        self,
        model: Trained,
        known: list[bool],
        best: list[list[Recommendation]],
        k: int,
        choice: _Choice,
        remarks: Remarks,
    ) -> list[list[Recommendation]]:
        """`best` for who is known, and what is popular for who is not."""
        if all(known):
            return best
        remarks.empty += known.count(False)
        popular, ranked = self._popular(model, k, choice), iter(best)
        return [next(ranked) if is_known else list(popular) for is_known in known]

    def _popular(self, model: Trained, k: int, choice: _Choice) -> list[Recommendation]:
        """What training met most often, the lower id first where two were met as often."""
        if not model.counts:
            raise ValueError("history: empty, and this run does not say what is popular; give an item")
        order = model.popular
        if choice.pool is not None:
            order = order[torch.isin(order, choice.pool.cpu())]
        if choice.excluded is not None:
            order = order[~torch.isin(order, choice.excluded.cpu())]
        best = order[:k].tolist()
        return _named(model, [float(model.counts[item]) for item in best], best)

    def _choice(
        self, candidates: Iterable[str] | None, exclude: Iterable[str] | None, remarks: Remarks | None
    ) -> _Choice:
        model, pool, excluded = self._model, None, None
        if candidates is not None:
            ids = sorted(
                set(questions.to_ids(model.ids, questions.listed(candidates), remarks, "candidates"))
            )
            pool = torch.tensor(ids, dtype=torch.int64, device=model.table.device)
        if exclude is not None:
            known = {
                model.ids[token]
                for token in questions.listed(exclude)
                if questions.is_known(model.ids, token)
            }
            excluded = torch.tensor(sorted(known), dtype=torch.int64, device=model.table.device)
        return _Choice(pool, excluded)

    def _memories(self, sessions: Sequence["Session"]) -> list[Memory]:
        if len({id(one) for one in sessions}) < len(sessions):
            raise ValueError("sessions: one comes twice")
        if any(one.recommender is not self for one in sessions):
            raise ValueError("sessions: one is of another recommender")
        return [one._memory for one in sessions]


class Session:
    """One user, followed live; made by `Recommender.session`.

    It remembers a state of constant size and which items there were, not their order.
    """

    def __init__(self, recommender: Recommender, memory: Memory) -> None:
        self.recommender, self._memory = recommender, memory

    @property
    def seen(self) -> list[str]:
        """The different items of the history, in the order of their first event."""
        return [self.recommender.tokens[item] for item in self._memory.seen]

    def add(self, token: str) -> None:
        """The user's next event.

        Raises:
            ValueError: a token that nobody knows.
        """
        model = self.recommender._model
        session.remember(model.ready, questions.to_ids(model.ids, [token]), self._memory)

    def recommend(
        self,
        k: int = 10,
        exclude_seen: bool = True,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
    ) -> list[Recommendation]:
        """As `Recommender.recommend` after all events so far."""
        (found,) = self.recommender.recommend_sessions([self], k, exclude_seen, candidates, exclude)
        return found

    def to_bytes(self) -> bytes:
        """To be kept anywhere, and brought back by `Recommender.restore_session`; nothing is pickled."""
        return session.to_bytes(self._memory, self.recommender._model)


def _of_similar_length(lengths: Sequence[int], at_once: int) -> Iterator[list[int]]:
    """Places of rows of similar length, at most `at_once` positions with padding; none of length 0."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[row] > at_once:
            yield group
            group = []
        if lengths[row]:
            group.append(row)
    if group:
        yield group


def _named(model: Trained, scores: Sequence[float], items: Sequence[int]) -> list[Recommendation]:
    pairs = [(model.tokens[i], score) for score, i in zip(scores, items, strict=True) if score > -torch.inf]
    return [Recommendation(token, score, model.titles.get(token, "")) for token, score in pairs]
