"""A trained run as a Python object: ranks items for any history, follows users live, takes in new items.

It needs the run folder alone: no RecBole, no data set, and nothing in the folder is unpickled.

letter  meaning
B, V    histories, items including padding
T0      width of the text vectors in their file
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from m2rec import distributed
from m2rec.errors import UserError, format_count
from m2rec.run_folder import RunFolder
from m2rec.serving import batch_files, export, hub, onnx_export, part_files, saved_model, session
from m2rec.serving.arguments import (
    InputWarnings,
    parse_device,
    parse_whole_number,
    to_token_list,
    tokens_to_ids,
)
from m2rec.serving.explanation import Explanation, explain_history
from m2rec.serving.formatting import RankedEntries
from m2rec.serving.frames import Histories, build_frame, collect_histories
from m2rec.serving.hub_name import is_hub_name
from m2rec.serving.int8_table import Int8Table
from m2rec.serving.item_index import ItemIndex
from m2rec.serving.live_session import Session
from m2rec.serving.notebook import (
    ExplainedEvents,
    ExplainedItems,
    ItemReasons,
    RankedItems,
    format_html_summary,
    list_facts,
)
from m2rec.serving.ranker import Ranker, Ranking, Recommendation, measure_recall
from m2rec.serving.ranking_options import parse_ranking_options
from m2rec.serving.reasons import N_REASONS, ExplainedItem, Reasons, explain_ranking, find_reasons
from m2rec.serving.saved_model import SavedModel
from m2rec.serving.session import SessionState

__all__ = ["ExplainedItem", "Explanation", "Reasons", "Recommendation", "Recommender", "Session"]

PRECISIONS = ("float32", "int8")


class Recommender:
    """Ranks the items that a model was trained on, and those that were added since.

    An item is named by its token, a string. An unknown item token is an error, or with `skip_unknown`
    is skipped with a warning.

    Args:
        model: a trained model.
        whole_history: whether all of a history counts, or of one that is longer than those in
            training (`MAX_ITEM_LIST_LENGTH`) the end alone.
        precision: "int8" for a first pass over the item table in int8, where few histories are ranked
            at a time on a CPU; its best items are ranked exactly. "float32" to score all items exactly.
    """

    def __init__(self, model: SavedModel, whole_history: bool = False, precision: str = "float32") -> None:
        if whole_history:
            session.check_is_recurrent(model.encoder)
        if precision not in PRECISIONS:
            raise UserError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
        index = Int8Table(model.table) if precision == "int8" else None
        self._ranker = Ranker(model, whole_history, index)
        self.folder: Path | None = None
        """The folder that the model was loaded from."""
        self.histories: Histories = {}
        """The histories of users whom `recommend_frame` may name; `m2rec.fit` sets them."""

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        whole_history: bool = False,
        precision: str = "float32",
    ) -> "Recommender":
        """Load the model of a run folder, of a folder that `save` wrote, or of the Hugging Face hub.

        Args:
            folder: the folder; or the text `hub:owner/name` or `hub:owner/name@revision`, which is fetched
                into the cache of huggingface_hub.
            device, whole_history, precision: see the class.

        Raises:
            ValueError: a file is missing, damaged, or of another model; it can't be fetched; the device is
                not available; or whole_history for a model with a part that never sees more than in
                training; or an unknown precision, or int8 on a GPU.
        """
        parsed = parse_device(device)
        path = hub.fetch_saved_model(str(folder)) if is_hub_name(folder) else Path(folder)
        recommender = cls(saved_model.read_saved_model(path, parsed), whole_history, precision)
        recommender.folder = path
        return recommender

    def __repr__(self) -> str:
        return f"<Recommender: {self._name}, {format_count(len(self.tokens) - 1, 'item')}>"

    def _repr_html_(self) -> str:
        """A table for a notebook."""
        return format_html_summary(self._name, list_facts(self))

    @property
    def _name(self) -> str:
        return f"{self.config['model']} on {self.config['dataset']}"

    @property
    def model(self) -> SavedModel:
        """The trained model, with the items that were added."""
        return self._ranker.model

    @property
    def whole_history(self) -> bool:
        """Whether all of a history counts."""
        return self._ranker.whole_history

    @property
    def tokens(self) -> tuple[str, ...]:
        """Item tokens by internal id, padding's first."""
        return self.model.tokens

    @property
    def titles(self) -> dict[str, str]:
        """Titles by item token, of the items that have one."""
        return dict(self.model.titles)

    @property
    def config(self) -> Mapping[str, Any]:
        """The keys of the run."""
        return self.model.config

    @property
    def text_source(self) -> Mapping[str, Any]:
        """What made the run's text vectors."""
        return self.model.text_source

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads, added items included, into a folder; create it if need be.

        Raises:
            ValueError: it is the folder of a run, whose metrics are of other weights.
        """
        saved_model.write_saved_model(self.model, Path(folder))

    def push_to_hub(self, name: str, private: bool = False) -> str:
        """Push what `load` reads, added items included, and a model card to the Hugging Face hub.

        The card has the metrics of the run, if the model was loaded from a run. The files name no user, no
        history and no folder of this machine, but all item tokens and titles.

        Args:
            name: owner/name of a repository, which is created if need be; a second push is a new commit.
            private: whether others may not read the repository.

        Returns:
            The name with its commit, `hub:owner/name@commit`, for `load`.

        Raises:
            ValueError: huggingface_hub is not installed, no token is known that may write, or the repository
                holds something else, or is public though `private` is asked for.
        """
        run = None if self.folder is None else RunFolder(self.folder)
        return hub.push_saved_model(self.model, run if run and run.is_finished else None, name, private)

    @overload
    def recommend(
        self,
        history: Iterable[str],
        k: int = 10,
        exclude_seen: bool | None = None,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        skip_unknown: bool = False,
        explain: Literal[False] = False,
    ) -> Ranking: ...

    @overload
    def recommend(
        self,
        history: Iterable[str],
        k: int = 10,
        exclude_seen: bool | None = None,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        skip_unknown: bool = False,
        *,
        explain: Literal[True],
    ) -> list[ExplainedItem]: ...

    def recommend(
        self,
        history: Iterable[str],
        k: int = 10,
        exclude_seen: bool | None = None,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        skip_unknown: bool = False,
        explain: bool = False,
    ) -> Ranking | list[ExplainedItem]:
        """The best k items after a history, best first.

        After an empty history they are the items with the most occurrences in training, which are
        their scores; the log reports it.

        Args:
            history: item tokens, oldest first.
            k: how many; fewer are returned where there are fewer.
            exclude_seen: leave out the history's own items; None: as the run's key `exclude_seen` says.
            candidates: choose from these items only; from all by default.
            exclude: leave out these items too; unknown tokens are ignored.
            skip_unknown: skip unknown tokens in history and candidates.
            explain: give the reasons beside each item, as `explain_ranking` finds them.

        Raises:
            ValueError: an unknown item token; k is less than 1; an empty history, and the run has no
                item counts to fall back on.
        """
        history = to_token_list(history)
        (ranked,) = self.recommend_batch([history], k, exclude_seen, candidates, exclude, skip_unknown)
        return self.explain_ranking(history, ranked) if explain else ranked

    def recommend_batch(
        self,
        histories: Iterable[Iterable[str]],
        k: int = 10,
        exclude_seen: bool | None = None,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        skip_unknown: bool = False,
    ) -> Iterator[Ranking]:
        """As `recommend` for each of any number of histories, in their order.

        Histories are read as they are needed, about a thousand at a time, so there may be millions.
        """
        warnings = InputWarnings(skip_unknown)
        options = parse_ranking_options(self.model, k, exclude_seen, candidates, exclude, warnings)
        known = self.model.ids
        ids = (tokens_to_ids(known, history, warnings) for history in histories)
        return map(RankedItems, self._ranker.rank_in_batches(ids, options, warnings))

    def recommend_frame(
        self,
        users_or_histories: Any,
        k: int = 10,
        exclude_seen: bool | None = None,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        skip_unknown: bool = False,
        explain: bool = False,
        *,
        user: str = "user_id",
        item: str = "item_id",
        time: str | None = "timestamp",
    ) -> Any:
        """As `recommend` for many users, as a DataFrame with a row for each recommended item.

        Args:
            users_or_histories: a DataFrame of interactions, of pandas or polars; or a dict of histories by
                user; or a list of histories, whose users are 0, 1, ...; or a list of users in `histories`.
            k, exclude_seen, candidates, exclude, skip_unknown, explain: as in `recommend`.
            user, item, time: columns of a DataFrame, as for `m2rec.fit`.

        Returns:
            The columns `user`, `rank` (from 1), `item`, `score`, and if the model has titles `title`; with
            explain also `raised_by` and `nearest_by_text`, lists of item tokens, the strongest first. Of
            polars if a polars DataFrame was given, else of pandas. Ids from a DataFrame are text.

        Raises:
            ValueError: an unknown user; a DataFrame that can't be read; see also `recommend`.
        """
        from m2rec.data.frames import InteractionColumns  # loads pandas

        columns = InteractionColumns(user, item, time)
        histories = collect_histories(users_or_histories, self.histories, columns)
        ranked = self.recommend_batch(histories.values(), k, exclude_seen, candidates, exclude, skip_unknown)
        rankings: Iterable[RankedEntries] = ranked
        if explain:
            rankings = (self.explain_ranking(*pair) for pair in zip(histories.values(), ranked, strict=True))
        return build_frame(users_or_histories, histories, rankings, bool(self.model.titles), explain)

    def recommend_file(
        self,
        histories: str | Path,
        output: str | Path,
        k: int = 10,
        exclude_seen: bool | None = None,
        skip_unknown: bool = False,
        progress: bool = False,
    ) -> int:
        """As `recommend` for each history of a file, of any size, into a Parquet file.

        Args:
            histories: FILE.parquet or a CSV file with the columns `user` and `history`, see
                `m2rec.serving.batch_files.read_history_file`.
            output: written with the columns `user`, `items` and `scores`, whole or not at all. A folder,
                which exists or whose name ends with a slash, gets a file for every 100,000 histories: the
                same call goes on with those that are missing, and under torchrun each process writes some.
            k, exclude_seen, skip_unknown: as in `recommend`.
            progress: show a bar on the terminal.

        Returns:
            The number of histories.

        Raises:
            ValueError: the file can't be read, holds an unknown item token, or pyarrow is not
                installed; k is less than 1.
        """
        path = Path(histories)
        rows = batch_files.read_history_file(path, progress)
        if not part_files.names_folder(output):
            if distributed.read_launch()[1] > 1:
                raise UserError(f"output: several processes write a folder of parts; name it {output}/")
            return self.recommend_users(rows, output, k, exclude_seen, skip_unknown, str(path))
        k, exclude_seen, *_ = parse_ranking_options(self.model, k, exclude_seen)
        options: dict[str, Any] = {"k": k, "exclude_seen": exclude_seen, "skip_unknown": skip_unknown}
        is_exact = self._ranker.index is None
        job = part_files.describe_job(
            self.model.encoder, path, **options, whole_history=self.whole_history, is_exact=is_exact
        )
        rank = partial(self._rank_users, source=str(path), **options)
        return part_files.write_parts(Path(output), rows, rank, job)

    def recommend_users(
        self,
        histories: Iterable[tuple[str, Iterable[str]]],
        output: str | Path,
        k: int = 10,
        exclude_seen: bool | None = None,
        skip_unknown: bool = False,
        source: str = "histories",
    ) -> int:
        """As `recommend_file`, for users and their histories from Python, of which there may be millions.

        Args:
            histories: a user's name and item tokens, oldest first.
            output: as in `recommend_file`, but no folder.
            k, exclude_seen, skip_unknown: as in `recommend_file`.
            source: where they come from, for errors.

        Returns:
            The number of histories.

        Raises:
            ValueError: an unknown item token, or pyarrow is not installed; k is less than 1.
        """
        if part_files.names_folder(output):
            raise UserError(f"output: {output} is a folder, which needs a file of histories; name a file")
        rows = self._rank_users(histories, k, exclude_seen, skip_unknown, source)
        return batch_files.write_recommendations(Path(output), rows)

    def _rank_users(
        self,
        histories: Iterable[tuple[str, Iterable[str]]],
        k: int,
        exclude_seen: bool | None,
        skip_unknown: bool,
        source: str,
    ) -> Iterator[tuple[str, Ranking]]:
        """Users and their rankings, as `recommend_users` writes them."""
        options = parse_ranking_options(self.model, k, exclude_seen)
        return batch_files.rank_users(self._ranker, histories, options, skip_unknown, source)

    def scores(self, histories: Iterable[Iterable[str]]) -> Tensor:
        """The score of every item after each history, (B, V); padding's is -inf.

        Raises:
            ValueError: a history is empty or holds an unknown item token.
        """
        return self._ranker.score_items([self._to_known_ids(history) for history in histories])

    def to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Internal ids, columns of `scores`.

        Raises:
            ValueError: an unknown item token.
        """
        return tokens_to_ids(self.model.ids, tokens)

    def similar_items(self, token: str, k: int = 10) -> Ranking:
        """The items most similar to an item: the score is the cosine of their rows of the item table.

        Raises:
            ValueError: an unknown item token; k is less than 1.
        """
        k = parse_whole_number("k", k, 1)
        (item,) = self.to_ids([token])
        return RankedItems(self._ranker.rank_similar(item, k))

    def explain(self, history: Iterable[str]) -> list[Explanation]:
        """For each event of a history, the gate's weights of the branches.

        Of a history that is longer than those in training the end is explained, unless
        `whole_history`.

        Raises:
            ValueError: the history is empty or holds an unknown item token.
        """
        ids = self._to_known_ids(history)[-self._ranker.visible_length :]
        with self._ranker.limit_threads(len(ids), 0):
            return ExplainedEvents(explain_history(self.model, ids))

    def find_reasons(self, history: Iterable[str], items: Iterable[str], n: int = N_REASONS) -> list[Reasons]:
        """For each of some items, the items of the history that raise it most, and its nearest by text.

        By leave-one-out, which is exact and takes a pass for each item of the history, of the last 50 that
        are distinct. Of a long history the end counts, as for `explain`.

        Args:
            history: item tokens, oldest first.
            items: tokens of the items to explain.
            n: items of the history of each kind at most.

        Raises:
            ValueError: the history is empty or holds an unknown item token, or so do the items; n is less
                than 1.
        """
        n = parse_whole_number("n", n, 1)
        ids = self._to_known_ids(history)
        explained = tokens_to_ids(self.model.ids, items, argument="items")
        return ItemReasons(find_reasons(self._ranker, ids, explained, n))

    def explain_ranking(
        self, history: Iterable[str], ranking: Ranking, n: int = N_REASONS
    ) -> list[ExplainedItem]:
        """A ranking with its reasons: beside each item what `find_reasons` finds for it.

        After an empty history there are none.

        Args:
            history: item tokens, oldest first; unknown ones are skipped.
            ranking: the items to explain, which this model recommended after the history.
            n: items of the history of each kind at most, for one item.

        Raises:
            ValueError: an unknown item in the ranking; n is less than 1.
        """
        n, ranker = parse_whole_number("n", n, 1), self._ranker
        ids = tokens_to_ids(ranker.model.ids, history, InputWarnings(skip_unknown=True))
        return ExplainedItems(explain_ranking(ranker, ids, ranking, n))

    def session(self, history: Iterable[str] = (), skip_unknown: bool = False) -> Session:
        """A user who is followed live: every event costs the same, however long the history.

        All of the history counts, as with `whole_history`.

        Raises:
            ValueError: an unknown item token, or a model with a part that needs the whole
                history at once (`mixer: attention`, `filter: low_pass`).
        """
        session.check_is_recurrent(self.model.encoder)
        state, warnings = SessionState(), InputWarnings(skip_unknown)
        ids = tokens_to_ids(self.model.ids, history, warnings)
        warnings.log_warnings()
        with self._ranker.limit_threads(len(ids), 0):
            session.advance_session(self.model.inference_encoder, ids, state)
        return Session(self, state)

    def restore_session(self, data: bytes) -> Session:
        """A session from the bytes of `Session.to_bytes`.

        Raises:
            ValueError: the data is damaged, or of another model.
        """
        return Session(self, session.deserialize_state(data, self.model))

    def add_events(self, sessions: Sequence[Session], tokens: Sequence[str]) -> None:
        """One event for each of many users in one pass, much cheaper than one by one.

        Args:
            sessions: different sessions of this recommender.
            tokens: the next item of each.

        Raises:
            ValueError: an unknown item token, a duplicate session, or a session of another recommender;
                then nothing has changed.
        """
        items = self.to_ids(tokens)
        if len(items) != len(sessions):
            raise UserError(f"add_events: {len(sessions)} sessions, but {len(items)} tokens")
        states = self._list_states(sessions)
        with self._ranker.limit_threads(len(items), 0):
            session.advance_session_batch(self.model.inference_encoder, states, items)

    def recommend_sessions(
        self,
        sessions: Sequence[Session],
        k: int = 10,
        exclude_seen: bool | None = None,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        skip_unknown: bool = False,
    ) -> list[Ranking]:
        """As `recommend` for each of many live users, in one pass."""
        warnings = InputWarnings(skip_unknown)
        options = parse_ranking_options(self.model, k, exclude_seen, candidates, exclude, warnings)
        ranked = self._ranker.rank_sessions(self._list_states(sessions), options)
        warnings.log_warnings()
        return list(map(RankedItems, ranked))

    def add_items(self, tokens: Iterable[str], vectors: Any, titles: Mapping[str, str] | None = None) -> None:
        """Take in items that are unknown to training, by their text.

        They can be ranked and occur in histories. The ids of all other items stay. After an error
        nothing has changed.

        Args:
            tokens: new tokens.
            vectors: (n, T0) tensor or array, their text vectors from the language model that made
                the run's.
            titles: by token, of the items that have one.

        Raises:
            ValueError: the model has no text in its item table, a token is already in the catalogue or a
                duplicate, or the vectors don't fit.
        """
        model = saved_model.extend_catalogue(self.model, to_token_list(tokens), vectors, titles or {})
        self._ranker = self._ranker.with_more_items(model)

    def take_over(self, longer: "Recommender") -> None:
        """Take in the items that a copy of this one has taken in."""
        self._ranker = longer._ranker

    def add_items_from(self, path: str | Path, titles: Mapping[str, str] | None = None) -> list[str]:
        """As `add_items` for the new items of a text-vector file, which is checked to fit.

        Args:
            path: made by `scripts/embed_items.py` with the language model of the run.
            titles: by token, of the items that have one.

        Returns:
            The new tokens, none if all are known.

        Raises:
            ValueError: the file is unusable, or was not made as the run's; see also `add_items`.
        """
        tokens, vectors = saved_model.read_new_items(self.model, Path(path))
        self.add_items(tokens, vectors, titles)
        return tokens

    def use_index(self, probes: int = 0) -> None:
        """Rank by an index from now on, for catalogues so large that scoring all items takes too long.

        Only the lists of items nearest to a history are searched, so some of the best are missed;
        `recall` measures how many are found. What the index can't answer is still ranked exactly:
        candidates, and histories so long, or so much to exclude, that little would be saved.
        The index takes the place of `precision="int8"`.
        A `recommend_batch` that is under way ends as it began. `save` does not keep the index.

        Args:
            probes: lists that are searched for each history, of about 4 sqrt(V), but at most V / 39;
                0 for one in 16.

        Raises:
            ValueError: faiss is not installed, or probes is not a whole number from 0.
        """
        self._ranker = self._ranker.with_index(parse_whole_number("probes", probes, 0))

    def recall(self, histories: Iterable[Iterable[str]], k: int = 10) -> float:
        """The share of each history's best k items that the index finds, mean over the histories.

        What is ranked exactly in spite of the index counts as found; empty histories don't count.

        Raises:
            ValueError: there is no index (`use_index`), or no history; see also `recommend`.
        """
        if not isinstance(self._ranker.index, ItemIndex):
            raise UserError("recall: there is no index; call use_index first")
        exact = Recommender(self.model, self.whole_history)
        histories = [tokens for tokens in map(to_token_list, histories) if tokens]
        return measure_recall(self.recommend_batch(histories, k), exact.recommend_batch(histories, k))

    def export(self, path: str | Path, batch_size: int | None = 1, live: bool = False) -> None:
        """Write the model as one file that runs without this package, and compare it.

        Args:
            path: `NAME.onnx` for a graph that onnxruntime runs alone, see
                `m2rec.serving.onnx_export.export_onnx`; `NAME.pt2` for a torch.export program, see
                `m2rec.serving.export.export_program`.
            batch_size: of a program, histories per call; None for any number, as a graph takes.
            live: write the graph of one event of each live user, not the one of whole histories.

        Raises:
            ValueError: another suffix; batch_size is less than 1; `live` for a program, or for a model
                with a part that needs the whole history at once; a package is missing; or what was
                written differs from the model.
        """
        path = Path(path)
        if path.suffix == ".onnx":
            onnx_export.export_onnx(self.model, path, live)
        elif path.suffix != ".pt2":
            raise UserError(f"export: the name {path.name!r} ends in neither .onnx nor .pt2")
        elif live:
            raise UserError(f"export: live: a program has no form for live users; give {path.stem}.onnx")
        else:
            export.export_program(self.model, path, batch_size)

    def _to_known_ids(self, history: Iterable[str]) -> list[int]:
        ids = self.to_ids(history)
        if not ids:
            raise UserError("history: empty; give at least one item")
        return ids

    def _list_states(self, sessions: Sequence[Session]) -> list[SessionState]:
        if len(set(sessions)) < len(sessions):
            raise UserError("sessions: the same session is given twice")
        if any(one.recommender is not self for one in sessions):
            raise UserError("sessions: a session belongs to another recommender")
        return [one._state for one in sessions]
