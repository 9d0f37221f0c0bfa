"""One user's history as the model remembers it: of constant size, and an event costs constant time.

letter  meaning
B, D    users, model width
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from m2rec.errors import UserError
from m2rec.nn.encoder import Encoder
from m2rec.nn.layer import Layer, LayerState
from m2rec.serving.saved_model import SavedModel

_CHUNK_SIZE = 256  # items of a history that are encoded at a time
_MODEL_KEY, _SEEN_KEY, _VECTOR_KEY, _TOKENS_KEY = "model", "seen", "vector", "tokens"
_DIGEST_BYTES = hashlib.sha256().digest_size


class SessionState:
    """What is left of a history: the states of all layers, the last vector, and which items it held.

    Args:
        states: after the last event, of one user; None before the first event.
        vector: (1, D), what items are compared with; None before the first event.
        seen: internal ids of the items of the history.
    """

    def __init__(
        self,
        states: list[LayerState] | None = None,
        vector: Tensor | None = None,
        seen: Iterable[int] = (),
    ) -> None:
        self.states, self.vector = states, vector
        self.seen = dict.fromkeys(seen)

    def update_state(self, states: list[LayerState], vector: Tensor, items: Iterable[int]) -> None:
        """Take these new events in."""
        self.states, self.vector = states, vector
        self.seen.update(dict.fromkeys(items))


def check_is_recurrent(encoder: Encoder) -> None:
    """Whether the network can go on from a state.

    Raises:
        ValueError: it has a part that needs the whole history at once.
    """
    for layer in encoder.layers:
        cast(Layer, layer).require_recurrent_mixer()


@torch.no_grad()
def advance_session(encoder: Encoder, items: Sequence[int], memory: SessionState) -> None:
    """Take in some items, in pieces, so that even a history of millions needs little room.

    Raises:
        ValueError: the model has a part that needs the whole history at once.
    """
    states, vector = memory.states, memory.vector
    device = encoder.id_embedding.weight.device
    for start in range(0, len(items), _CHUNK_SIZE):
        piece = torch.tensor(items[start : start + _CHUNK_SIZE], device=device)
        if states is not None and len(piece) == 1:
            vector, states = encoder.step(piece, states)
        else:
            x, states = encoder.advance(piece[None], states)
            vector = x[:, -1]
    if states is not None and vector is not None:
        (own,) = _split_states(states, 1)
        memory.update_state(own, vector.clone(), items)


@torch.no_grad()
def advance_session_batch(encoder: Encoder, memories: Sequence[SessionState], items: Sequence[int]) -> None:
    """One event for each of many users, in one pass.

    Args:
        encoder: the network.
        memories: one per user, each a different one.
        items: each one's next item.
    """
    fresh = [row for row, memory in enumerate(memories) if memory.states is None]
    going = [row for row, memory in enumerate(memories) if memory.states is not None]
    for rows in (fresh, going):
        if not rows:
            continue
        ids = torch.tensor([items[row] for row in rows], device=encoder.id_embedding.weight.device)
        if rows is fresh:
            x, states = encoder.advance(ids[:, None])
            x = x[:, 0]
        else:
            x, states = encoder.step(ids, _concat_states([memories[row].states or [] for row in rows]))
        for place, (row, own) in enumerate(zip(rows, _split_states(states, len(rows)), strict=True)):
            memories[row].update_state(own, x[place : place + 1].clone(), [items[row]])


def serialize_state(memory: SessionState, model: SavedModel) -> bytes:
    """A memory as bytes, with a checksum, the fingerprint of its model and one of the seen items' tokens."""
    tensors = {
        _MODEL_KEY: torch.frombuffer(bytearray(model.fingerprint), dtype=torch.uint8),
        _TOKENS_KEY: torch.frombuffer(bytearray(_hash_tokens(memory.seen, model.tokens)), dtype=torch.uint8),
    }
    tensors[_SEEN_KEY] = torch.tensor(list(memory.seen), dtype=torch.int32)
    if memory.states is not None and memory.vector is not None:
        tensors[_VECTOR_KEY] = memory.vector
        tensors |= _flatten_states(memory.states)
    content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    return hashlib.sha256(content).digest() + content


def deserialize_state(data: bytes, model: SavedModel) -> SessionState:
    """What `serialize_state` made, on the model's device.

    Raises:
        ValueError: it is damaged, none, or of another model.
    """
    data = bytes(data)
    if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
        raise UserError("session: the data is damaged, or is no saved session")
    try:
        tensors = load(data[_DIGEST_BYTES:])
        made_by, names, seen = (tensors.pop(name) for name in (_MODEL_KEY, _TOKENS_KEY, _SEEN_KEY))
        if (seen.dtype, seen.dim()) != (torch.int32, 1) or {made_by.dtype, names.dtype} != {torch.uint8}:
            raise KeyError(_SEEN_KEY)
    except (SafetensorError, KeyError) as error:
        raise UserError(f"session: the data is no saved session ({error})") from None
    items = seen.tolist()
    if made_by.numpy().tobytes() != model.fingerprint:
        raise UserError("session: it was saved with another model; start it again from the history")
    known = all(0 < item < len(model.tokens) for item in items)
    if not known or names.numpy().tobytes() != _hash_tokens(items, model.tokens):
        raise UserError("session: it has items that this model does not have; add them first")
    if not tensors:
        return SessionState()
    like = SessionState()
    advance_session(model.inference_encoder, [1], like)
    assert like.states is not None and like.vector is not None
    expected = {_VECTOR_KEY: like.vector, **_flatten_states(like.states)}
    shapes, found = ({k: (t.shape, t.dtype) for k, t in ts.items()} for ts in (expected, tensors))
    if shapes != found:
        raise UserError("session: the data is no saved session of this model")
    tensors = {name: tensor.to(model.table.device) for name, tensor in tensors.items()}
    return SessionState(_unflatten_states(tensors, like.states), tensors[_VECTOR_KEY], items)


def _hash_tokens(items: Iterable[int], tokens: Sequence[str]) -> bytes:
    """A fingerprint of items' tokens: the same id can be another item's where others were added."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(tokens[item].encode("utf-8", "surrogatepass") + b"\0")
    return digest.digest()


def _concat_states(states: Sequence[list[LayerState]]) -> list[LayerState]:
    """States of users, one batch of them."""
    batch = []
    for layer in zip(*states, strict=True):
        mixer = tuple(torch.cat(parts) for parts in zip(*(state.mixer for state in layer), strict=True))
        memories = [state.filter for state in layer if state.filter is not None]
        batch.append(LayerState((mixer[0], mixer[1]), torch.cat(memories) if memories else None))
    return batch


def _split_states(states: list[LayerState], users: int) -> list[list[LayerState]]:
    """The reverse; copies, so that one user's state does not keep those of all in memory."""

    def own(tensor: Tensor, user: int) -> Tensor:
        return tensor[user : user + 1].clone()

    return [
        [
            LayerState(
                (own(state.mixer[0], user), own(state.mixer[1], user)),
                None if state.filter is None else own(state.filter, user),
            )
            for state in states
        ]
        for user in range(users)
    ]


def _flatten_states(states: Sequence[LayerState]) -> dict[str, Tensor]:
    """By layer and part; complex numbers as two."""
    found = {}
    for number, state in enumerate(states):
        parts = {"mixer0": state.mixer[0], "mixer1": state.mixer[1], "filter": state.filter}
        for name, tensor in parts.items():
            if tensor is not None:
                plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                found[f"{number}.{name}"] = plain
    return found


def _unflatten_states(tensors: dict[str, Tensor], like: Sequence[LayerState]) -> list[LayerState]:
    """The reverse of `_flatten_states`, for states as those of `like`."""
    states = []
    for number, state in enumerate(like):
        memory = tensors.get(f"{number}.filter")
        if state.filter is not None and state.filter.is_complex() and memory is not None:
            memory = torch.view_as_complex(memory)
        mixer = (tensors[f"{number}.mixer0"], tensors[f"{number}.mixer1"])
        states.append(LayerState(mixer, memory))
    return states
