"""The state of a live user: its size is constant, and an event takes constant time.

letter  meaning
B, D    users, model width
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from m2rec.errors import UserError
from m2rec.nn.encoder import Encoder
from m2rec.nn.inference.encoder import PreparedEncoder
from m2rec.nn.layer import LayerState
from m2rec.nn.neighbors import N_RECENT
from m2rec.nn.states import map_tensors, name_tensors, split_users
from m2rec.serving.saved_model import SavedModel

_CHUNK_SIZE = 256  # items of a history that are encoded at a time
_MODEL_KEY, _SEEN_KEY, _VECTOR_KEY, _TOKENS_KEY = "model", "seen", "vector", "tokens"
_RECENT_KEY = "recent"  # which sessions of earlier versions lack
_DIGEST_BYTES = hashlib.sha256().digest_size


class SessionState:
    """The state after a history: of all layers, the last vector, which items it held, and the last ones.

    Args:
        states: after the last event, of one user; None before the first event.
        vector: (1, D), compared with the item table; None before the first event.
        seen: internal ids of the items of the history.
        recent: those of the last items, in their order; None for the last ones of `seen`.
    """

    def __init__(
        self,
        states: list[LayerState] | None = None,
        vector: Tensor | None = None,
        seen: Iterable[int] = (),
        recent: Sequence[int] | None = None,
    ) -> None:
        self.states, self.vector = states, vector
        self.seen = dict.fromkeys(seen)
        self.recent = list(self.seen if recent is None else recent)[-N_RECENT:]

    def update_state(self, states: list[LayerState], vector: Tensor, items: Sequence[int]) -> None:
        """Replace the state by the one after these new events."""
        self.states, self.vector = states, vector
        self.seen.update(dict.fromkeys(items))
        self.recent = [*self.recent, *items[-N_RECENT:]][-N_RECENT:]


def check_is_recurrent(encoder: Encoder) -> None:
    """Check that the network can be updated event by event.

    Raises:
        ValueError: a branch needs the whole history at once.
    """
    encoder.require_recurrence()


@torch.no_grad()
def advance_session(encoder: Encoder | PreparedEncoder, items: Sequence[int], memory: SessionState) -> None:
    """Update the state by some items, in pieces, so that a history of millions needs little memory.

    Raises:
        ValueError: a branch needs the whole history at once.
    """
    states, vector = memory.states, memory.vector
    device = encoder.device
    for start in range(0, len(items), _CHUNK_SIZE):
        piece = torch.tensor(items[start : start + _CHUNK_SIZE], device=device)
        if states is not None and len(piece) == 1:
            vector, states = encoder.step(piece, states)
        else:
            x, states = encoder.advance(piece[None], states)
            vector = x[:, -1]
    if states is not None and vector is not None:
        (state,) = split_users(states, 1)
        memory.update_state(state, vector.clone(), items)


@torch.no_grad()
def advance_session_batch(
    encoder: Encoder | PreparedEncoder, memories: Sequence[SessionState], items: Sequence[int]
) -> None:
    """Update many users by one event each, in one pass.

    Args:
        encoder: the network.
        memories: one per user, each a different one.
        items: each one's next item.
    """
    ids = torch.tensor(items, device=encoder.device)
    fresh, advanced, before = [], [], []
    for row, memory in enumerate(memories):
        if memory.states is None:
            fresh.append(row)
        else:
            advanced.append(row)
            before.append(memory.states)
    if fresh:
        x, states = encoder.advance(ids[fresh, None])
        _update_users(memories, fresh, states, x[:, 0], items)
    if len(memories) == len(advanced) == 1:
        x, states = encoder.step(ids, before[0])
        memories[0].update_state(states, x, items)  # new tensors, nobody else's
    elif advanced:
        x, states = encoder.step(ids[advanced], map_tensors(_concatenate, *before))
        _update_users(memories, advanced, states, x, items)


def _concatenate(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def _update_users(
    memories: Sequence[SessionState],
    rows: Sequence[int],
    states: list[LayerState],
    x: Tensor,
    items: Sequence[int],
) -> None:
    """Give each user in `rows` its part of a batch's states and vectors x (B, D)."""
    parts = zip(rows, split_users(states, len(rows)), split_users(x, len(rows)), strict=True)
    for row, state, vector in parts:
        memories[row].update_state(state, vector, [items[row]])


def serialize_state(memory: SessionState, model: SavedModel) -> bytes:
    """A state as bytes, with a checksum, the model's fingerprint and a hash of the seen items' tokens."""
    tensors = {
        _MODEL_KEY: _to_bytes_tensor(model.fingerprint),
        _TOKENS_KEY: _to_bytes_tensor(_hash_tokens(memory.seen, model.tokens)),
        _SEEN_KEY: torch.tensor(list(memory.seen), dtype=torch.int32),
        _RECENT_KEY: torch.tensor([*memory.recent, *[0] * N_RECENT][:N_RECENT], dtype=torch.int32),
    }
    if memory.states is not None and memory.vector is not None:
        tensors |= _name_state_tensors(memory.states, memory.vector)
    for name, tensor in tensors.items():
        tensors[name] = tensor.detach().cpu().contiguous()
    content = save(tensors)
    return hashlib.sha256(content).digest() + content


def deserialize_state(data: bytes, model: SavedModel) -> SessionState:
    """The state that `serialize_state` wrote, on the model's device.

    Raises:
        ValueError: the data is damaged, not a saved session, or of another model.
    """
    tensors = _read_session_tensors(bytes(data))
    made_by = tensors.pop(_MODEL_KEY).numpy().tobytes()
    tokens_hash = tensors.pop(_TOKENS_KEY).numpy().tobytes()
    seen = tensors.pop(_SEEN_KEY)
    items = seen.tolist()
    recent = [item for item in tensors.pop(_RECENT_KEY, seen).tolist() if item]
    if made_by != model.fingerprint:
        raise UserError("session: it was saved with another model; start it again from the history")
    is_known = (seen > 0) & (seen < len(model.tokens))
    is_whole = bool(is_known.all()) and set(recent) <= set(items)
    if not is_whole or tokens_hash != _hash_tokens(items, model.tokens):
        raise UserError("session: it has items that this model does not have; add them first")
    if not tensors:
        return SessionState()
    like = SessionState()
    advance_session(model.inference_encoder, [1], like)
    assert like.states is not None and like.vector is not None
    expected = _name_state_tensors(like.states, like.vector)
    if _describe_tensors(tensors) != _describe_tensors(expected):
        raise UserError("session: the data is not a saved session of this model")
    stored = iter([tensors[name].to(model.table.device) for name in expected])

    def read_next(example: Tensor) -> Tensor:
        tensor = next(stored)
        return torch.view_as_complex(tensor) if example.is_complex() else tensor

    vector = next(stored)
    return SessionState(map_tensors(read_next, like.states), vector, items, recent)


def _read_session_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a saved session by name, the three that are always there among them."""
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise UserError("session: the data is damaged, or is not a saved session")
    try:
        tensors = load(content)
        types = [tensors[key].dtype for key in (_MODEL_KEY, _TOKENS_KEY, _SEEN_KEY)]
        if types != [torch.uint8, torch.uint8, torch.int32] or tensors[_SEEN_KEY].dim() != 1:
            raise KeyError(_SEEN_KEY)
        recent = tensors.get(_RECENT_KEY)
        if recent is not None and (recent.dtype, recent.dim()) != (torch.int32, 1):
            raise KeyError(_RECENT_KEY)
    except (SafetensorError, KeyError) as error:
        raise UserError(f"session: the data is not a saved session ({error})") from None
    return tensors


def _hash_tokens(items: Iterable[int], tokens: Sequence[str]) -> bytes:
    """A hash of items' tokens: where different items were added, the same id is another item."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(tokens[item].encode("utf-8", "surrogatepass") + b"\0")
    return digest.digest()


def _to_bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _name_state_tensors(states: list[LayerState], vector: Tensor) -> dict[str, Tensor]:
    """All tensors of a state by name, the vector first; complex numbers as two real ones."""
    named = {_VECTOR_KEY: vector}
    for name, tensor in name_tensors(states).items():
        named[name] = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return named


def _describe_tensors(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
