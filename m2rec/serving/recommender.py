"""A trained run as a Python object: ranks items for any history, follows users live, takes in new items.

It needs the run folder alone: no RecBole, no data set, and nothing in the folder is unpickled.

letter  meaning
B, V    histories, items including padding
T0      width of the text vectors in their file
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import tee
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.errors import UserError
from m2rec.serving import arguments, batch_files, export, saved_model, session
from m2rec.serving.arguments import InputWarnings
from m2rec.serving.batch_files import UserRecommendations
from m2rec.serving.item_index import ItemIndex
from m2rec.serving.ranker import CandidateSet, HistoryItems, Ranker, Recommendation
from m2rec.serving.saved_model import SavedModel
from m2rec.serving.session import SessionState
from m2rec.text import vector_file

__all__ = ["Explanation", "Recommendation", "Recommender", "Session"]


class Explanation(NamedTuple):
    """How far the model trusted each branch at one event of a history."""

    item: str
    title: str
    weights: dict[str, float]
    """By branch, the gate's weight, mean over layers and channels; they add up to 1."""
    by_layer: list[dict[str, float]]
    """The same for each layer."""


class Recommender:
    """Ranks the items that a model was trained on, and those that were added since.

    An item is named by its token, a text. A token that nobody knows is an error, or with
    `skip_unknown` is left out with a warning.

    Args:
        model: a trained model.
        whole_history: whether all of a history counts, or of one that is longer than those in
            training (`MAX_ITEM_LIST_LENGTH`) the end alone.
    """

    def __init__(self, model: SavedModel, whole_history: bool = False) -> None:
        if whole_history:
            session.check_is_recurrent(model.encoder)
        self._ranker = Ranker(model, whole_history)

    @classmethod
    def load(
        cls, folder: str | Path, device: str | torch.device = "cpu", whole_history: bool = False
    ) -> "Recommender":
        """The model of a run folder, or of one that `save` wrote.

        Raises:
            ValueError: a file is missing, damaged, or of another model; the device is not there; or
                whole_history for a model with a part that never sees more than in training.
        """
        return cls(saved_model.read_saved_model(Path(folder), arguments.parse_device(device)), whole_history)

    @property
    def _model(self) -> SavedModel:
        return self._ranker.model

    @property
    def whole_history(self) -> bool:
        """Whether all of a history counts."""
        return self._ranker.whole_history

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
        saved_model.write_saved_model(self._model, Path(folder))

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
            ValueError: a token that nobody knows; k is less than 1; an empty history, and the run does
                not say what is popular.
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

        Histories are taken as they are needed, about a thousand at a time, so there may be millions.
        """
        k, remarks = arguments.parse_k(k), InputWarnings()
        ranker, skipped = self._ranker, remarks if skip_unknown else None
        choice = self._build_candidate_set(candidates, exclude, skipped)
        known = ranker.model.ids
        ids = (
            arguments.tokens_to_ids(known, arguments.to_token_list(history), skipped) for history in histories
        )
        return ranker.rank_in_batches(ids, k, exclude_seen, choice, remarks)

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
                `m2rec.serving.batch_files.read_histories`.
            output: written with the columns `user`, `items` and `scores`, whole or not at all.
            k, exclude_seen, skip_unknown: as in `recommend`.
            progress: show a bar on the terminal.

        Returns:
            How many histories there were.

        Raises:
            ValueError: the file can't be read, holds a token that nobody knows, or pyarrow is not
                installed; k is less than 1.
        """
        path = Path(histories)
        rows = batch_files.read_history_file(path, progress)
        return self.recommend_users(rows, output, k, exclude_seen, skip_unknown, str(path))

    def recommend_users(
        self,
        histories: Iterable[tuple[str, Iterable[str]]],
        output: str | Path,
        k: int = 10,
        exclude_seen: bool = True,
        skip_unknown: bool = False,
        source: str = "histories",
    ) -> int:
        """As `recommend_file`, for users and their histories from Python, of which there may be millions.

        Args:
            histories: a user's name and item tokens, oldest first.
            output, k, exclude_seen, skip_unknown: as in `recommend_file`.
            source: where they come from, for errors.

        Returns:
            How many histories there were.

        Raises:
            ValueError: a token that nobody knows, or pyarrow is not installed; k is less than 1.
        """
        k, remarks = arguments.parse_k(k), InputWarnings()
        ranker, skipped = self._ranker, remarks if skip_unknown else None

        def read() -> Iterator[tuple[str, list[int]]]:
            for user, tokens in histories:
                try:
                    yield (
                        user,
                        arguments.tokens_to_ids(ranker.model.ids, arguments.to_token_list(tokens), skipped),
                    )
                except ValueError as error:
                    raise UserError(f"{source}, user {user!r}: {error}") from None

        users, rows = tee(read())
        ids = (own for _, own in rows)
        found = ranker.rank_in_batches(ids, k, exclude_seen, CandidateSet(), remarks)
        ranked = (
            UserRecommendations(user, [item.item for item in items], [item.score for item in items])
            for (user, _), items in zip(users, found, strict=True)
        )
        return batch_files.write_recommendations(Path(output), ranked)

    @torch.no_grad()
    def scores(self, histories: Iterable[Iterable[str]]) -> Tensor:
        """The score of every item after each history, (B, V); that of padding is -inf.

        Raises:
            ValueError: a history is empty or holds a token that nobody knows.
        """
        model = self._model
        ids = [arguments.tokens_to_ids(model.ids, arguments.to_token_list(history)) for history in histories]
        if not all(ids):
            raise UserError("history: empty; give at least one item")
        if not ids:
            return torch.empty(0, len(model.table), device=model.table.device)
        with self._ranker.limit_threads(sum(map(len, ids)), len(ids)):
            scores = F.linear(self._ranker.encode_histories(ids), model.table)
            counted = [set(self._ranker.truncate_history(row)) for row in ids]
            places = self._ranker.build_adjustments(counted, hidden=[[0]] * len(ids))
            places.apply(scores, places.items, 0)
        return scores

    def to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Internal ids, places in `scores`.

        Raises:
            ValueError: a token that nobody knows.
        """
        return arguments.tokens_to_ids(self._model.ids, arguments.to_token_list(tokens))

    def similar_items(self, token: str, k: int = 10) -> list[Recommendation]:
        """The items whose rows of the item table point most nearly the same way; the score is the cosine.

        Raises:
            ValueError: nobody knows the token; k is less than 1.
        """
        k, model = arguments.parse_k(k), self._model
        (item,) = arguments.tokens_to_ids(model.ids, [token])
        with self._ranker.limit_threads(0, 1):
            cosines = F.cosine_similarity(model.table, model.table[item], dim=1)
            cosines[[0, item]] = -torch.inf
            best = cosines.topk(min(k, len(cosines)))
        return self._ranker.build_recommendations(best.values.tolist(), best.indices.tolist())

    @torch.no_grad()
    def explain(self, history: Iterable[str]) -> list[Explanation]:
        """For each event of a history, the gate's weights of the branches.

        Of a history that is longer than those in training the end is explained, unless
        `whole_history`.

        Raises:
            ValueError: the history is empty or holds a token that nobody knows.
        """
        model = self._model
        ids = self._ranker.truncate_history(
            arguments.tokens_to_ids(model.ids, arguments.to_token_list(history))
        )
        if not ids:
            raise UserError("history: empty; give at least one item")
        items = torch.tensor([ids], device=model.table.device)
        with self._ranker.limit_threads(len(ids), 0):
            _, weights = model.inference_encoder.encode_with_gate_weights(
                items, torch.tensor([len(ids)], device=items.device)
            )
        branches = model.inference_encoder.branches
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
        session.check_is_recurrent(self._model.encoder)
        memory, remarks = SessionState(), InputWarnings()
        ids = arguments.tokens_to_ids(
            self._model.ids, arguments.to_token_list(history), remarks if skip_unknown else None
        )
        remarks.log_warnings()
        self._append_events(ids, memory)
        return Session(self, memory)

    def restore_session(self, data: bytes) -> "Session":
        """A session from what `Session.to_bytes` made.

        Raises:
            ValueError: the data is damaged, or of another model.
        """
        return Session(self, session.deserialize_state(data, self._model))

    def add_events(self, sessions: Sequence["Session"], tokens: Sequence[str]) -> None:
        """One event for each of many users in one pass, much cheaper than one by one.

        Args:
            sessions: different ones of this recommender.
            tokens: the next item of each.

        Raises:
            ValueError: a token that nobody knows, or a session that comes twice or is another
                recommender's; then nothing has changed.
        """
        items = arguments.tokens_to_ids(self._model.ids, arguments.to_token_list(tokens))
        if len(items) != len(sessions):
            raise UserError(f"add_events: {len(sessions)} sessions, but {len(items)} tokens")
        memories = self._unwrap_sessions(sessions)
        with self._ranker.limit_threads(len(items), 0):
            session.advance_session_batch(self._model.inference_encoder, memories, items)

    def recommend_sessions(
        self,
        sessions: Sequence["Session"],
        k: int = 10,
        exclude_seen: bool = True,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
    ) -> list[list[Recommendation]]:
        """As `recommend` for each of many live users, in one pass."""
        k, ranker, remarks = arguments.parse_k(k), self._ranker, InputWarnings()
        choice = self._build_candidate_set(candidates, exclude, None)
        memories = self._unwrap_sessions(sessions)
        going = [memory for memory in memories if memory.vector is not None]
        seen = [HistoryItems(memory.seen, memory.seen) for memory in going]
        vectors = [memory.vector for memory in going if memory.vector is not None]
        best = []
        if vectors:
            with ranker.limit_threads(0, len(vectors)):
                best = ranker.rank_vectors(torch.cat(vectors), seen, k, exclude_seen, choice)
        known = [memory.vector is not None for memory in memories]
        ranked = ranker.add_popular_fallback(known, best, k, choice, remarks)
        remarks.log_warnings()
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
        model = saved_model.extend_catalogue(
            self._model, arguments.to_token_list(tokens), vectors, titles or {}
        )
        index = self._ranker.index
        if index is not None:
            index = index.extended(model.table)
        self._ranker = replace(self._ranker, model=model, index=index)

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
        saved_model.check_accepts_new_items(self._model)
        tokens, vectors, made_by = vector_file.read_text_vectors(Path(path))
        vector_file.check_same_text_encoder(Path(path), made_by, self.text_source)
        known = set(self.tokens)
        rows = [row for row, token in enumerate(tokens) if token not in known and vectors[row].any()]
        new = [tokens[row] for row in rows]
        self.add_items(new, vectors[rows], titles)
        return new

    def use_index(self, probes: int = 0) -> None:
        """Rank by an index from now on, for catalogues so large that scoring all items takes too long.

        Only the lists of items nearest to a history are looked at, so some of the best are missed;
        `recall` says how many are found. What the index can't answer is still ranked exactly:
        candidates, and histories so long, or so much to leave out, that little would be saved.
        A `recommend_batch` that is under way goes on as it began. `save` does not keep the index.

        Args:
            probes: lists that are looked at for each history, of about 4 sqrt(V), but at most V / 39;
                0 for one in 16.

        Raises:
            ValueError: faiss is not installed, or probes is not a whole number from 0.
        """
        if type(probes) is not int or probes < 0:
            raise UserError(f"probes: {probes!r} is not a whole number from 0")
        table, index = self._model.table, self._ranker.index
        index = ItemIndex(table) if index is None else index.extended(table)
        index.set_probes(probes)
        self._ranker = replace(self._ranker, index=index)

    def recall(self, histories: Iterable[Iterable[str]], k: int = 10) -> float:
        """The share of each history's best k items that are found with the index, mean over the histories.

        What is ranked exactly in spite of the index counts as found; empty histories don't count.

        Raises:
            ValueError: there is no index (`use_index`), or no history; see also `recommend`.
        """
        if self._ranker.index is None:
            raise UserError("recall: there is no index; call use_index first")
        exact = Recommender(self._model, self.whole_history)
        asked = [history for history in map(arguments.to_token_list, histories) if history]
        pairs = zip(self.recommend_batch(asked, k), exact.recommend_batch(asked, k), strict=True)
        found = [({i.item for i in ours}, {i.item for i in best}) for ours, best in pairs if best]
        if not found:
            raise UserError("recall: no history that anything can be recommended after; give one at least")
        return sum(len(ours & best) / len(best) for ours, best in found) / len(found)

    def export(self, path: str | Path, batch_size: int | None = 1) -> None:
        """Write a torch.export program that PyTorch runs without this package, and compare it.

        Args:
            path: such as `m2rec.pt2`; `torch.export.load(path).module()(items, lengths)` runs it, see
                `m2rec.serving.export.export`.
            batch_size: histories that it takes at a time; None for any number.

        Raises:
            ValueError: batch_size is less than 1, or the program differs from the model.
        """
        export.export_program(self._model, Path(path), batch_size)

    def _build_candidate_set(
        self, candidates: Iterable[str] | None, exclude: Iterable[str] | None, remarks: InputWarnings | None
    ) -> CandidateSet:
        model, pool, excluded = self._model, None, None
        if candidates is not None:
            ids = sorted(
                set(
                    arguments.tokens_to_ids(
                        model.ids, arguments.to_token_list(candidates), remarks, "candidates"
                    )
                )
            )
            pool = torch.tensor(ids, dtype=torch.int64, device=model.table.device)
        if exclude is not None:
            known = {
                model.ids[token]
                for token in arguments.to_token_list(exclude)
                if arguments.is_known_token(model.ids, token)
            }
            excluded = torch.tensor(sorted(known), dtype=torch.int64, device=model.table.device)
        return CandidateSet(pool, excluded)

    def _append_events(self, items: list[int], memory: SessionState) -> None:
        """Take some events of one user in."""
        with self._ranker.limit_threads(len(items), 0):
            session.advance_session(self._model.inference_encoder, items, memory)

    def _unwrap_sessions(self, sessions: Sequence["Session"]) -> list[SessionState]:
        if len({id(one) for one in sessions}) < len(sessions):
            raise UserError("sessions: one comes twice")
        if any(one.recommender is not self for one in sessions):
            raise UserError("sessions: one is of another recommender")
        return [one._state for one in sessions]


class Session:
    """One user, followed live; made by `Recommender.session`.

    It remembers a state of constant size, and the different items in the order of their first event.
    """

    def __init__(self, recommender: Recommender, memory: SessionState) -> None:
        self.recommender, self._state = recommender, memory

    @property
    def seen(self) -> list[str]:
        """The different items of the history, in the order of their first event."""
        return [self.recommender.tokens[item] for item in self._state.seen]

    def add(self, token: str) -> None:
        """The user's next event.

        Raises:
            ValueError: a token that nobody knows.
        """
        self.recommender._append_events(self.recommender.to_ids([token]), self._state)

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
        return session.serialize_state(self._state, self.recommender._model)
