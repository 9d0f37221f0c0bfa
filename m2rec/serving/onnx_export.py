"""A trained model as a graph that onnxruntime runs alone: without PyTorch and without this package.

The graph has plain operators only. Of those that opset 27 has for recurrences, LinearAttention was nine
times slower on a CPU than the products of matrices here, and CausalConvWithState as fast as Conv.

letter  meaning
B, L    histories, their padded length (right-padded with item 0)
V       items including padding
"""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec import __version__
from m2rec.errors import UserError, format_one_line
from m2rec.nn.encoder import Encoder
from m2rec.nn.layer import LayerState
from m2rec.nn.neighbors import N_RECENT
from m2rec.nn.onnx_forms import make_onnx_encoder
from m2rec.nn.states import map_tensors, name_tensors
from m2rec.serving.export import (
    ScoringModule,
    check_scores,
    copy_portable_encoder,
    mask_padding,
    sample_histories,
)
from m2rec.serving.saved_model import SavedModel
from m2rec.storage import write_atomically

TOKENS_KEY, MAX_LENGTH_KEY = "tokens", "max_length"
"""Metadata of a graph: the item tokens by internal id, as JSON; the greatest L."""

_SEEN, _RECENT = "seen", "recent"
_EXPORTER_LOGGERS = ("torch.onnx", "onnxscript")
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_MAX_BYTES = 2**31 - 1  # of a file in this format
_OPSET = 20
_TRACED_LENGTH = 7
# batch size and length of the histories that are compared; None for the greatest length
_CHECKED_SHAPES = ((1, 1), (5, 3), (2, None), (3, None))
_CHECKED_EVENTS, _CHECKED_USERS = 16, (1, 3)


class LiveModule(nn.Module):
    """One event of each of B users: what the history's state was before -> scores, and what it is after.

    Args:
        encoder: made by `make_onnx_encoder`.
        table: (V, D), the item table.
        states: the network's states of one user, for their structure; a tensor without values is none.
    """

    def __init__(self, encoder: Encoder, table: Tensor, states: list[LayerState]) -> None:
        super().__init__()
        self.encoder = encoder
        self.table: Tensor
        self.register_buffer("table", table)
        self.states = states

    def make_new_users(self, batch_size: int) -> dict[str, Tensor]:
        """The state before the first event, by name: all zeros, users first."""
        state = {}
        for name, tensor in name_tensors(self.states).items():
            if tensor.numel():
                state[name] = tensor.new_zeros(batch_size, *tensor.shape[1:])
        if self.encoder.repeat_bias is not None:
            state[_SEEN] = torch.zeros(batch_size, len(self.table), dtype=torch.bool)
        if self.encoder.neighbors is not None:
            state[_RECENT] = torch.zeros(batch_size, N_RECENT, dtype=torch.int64)
        return state

    def forward(self, items: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        """One event each.

        Args:
            items: (B,) int64, the events.
            state: before them, in the order of `make_new_users`.

        Returns:
            Scores (B, V), padding's -inf, and the state after them in the same order.
        """
        before = iter(state)

        def read_next(example: Tensor) -> Tensor:
            return next(before) if example.numel() else example.new_empty(items.shape[0], 0)

        x, states = self.encoder.step(items, map_tensors(read_next, self.states))
        examples = name_tensors(self.states)
        after = [tensor for name, tensor in name_tensors(states).items() if examples[name].numel()]
        scores = F.linear(x, self.table)
        if self.encoder.repeat_bias is not None:
            seen = next(before) | (torch.arange(len(self.table)) == items[:, None])
            after.append(seen)
            scores = scores + seen * self.encoder.repeat_bias
        if self.encoder.neighbors is not None:
            recent = torch.cat([next(before), items[:, None]], dim=1)[:, 1:]
            after.append(recent)
            lengths = torch.full_like(items, N_RECENT)
            scores = self.encoder.neighbors.add_to_all_scores(scores, recent, lengths)
        return mask_padding(scores), *after


def export_onnx(model: SavedModel, path: Path, live: bool = False) -> None:
    """Write an ONNX graph, run it with onnxruntime and compare it with the model.

    The graph of whole histories takes `items` (B, L) int64, internal ids, oldest first, padded with 0 at
    the end, and `lengths` (B,) int64, at least 1; L is at most the run's MAX_ITEM_LIST_LENGTH. It gives
    `scores` (B, V), padding's -inf.

    The live graph takes one event of each user, `items` (B,), and their states before it, one input for
    each part. It gives `scores` and the states after it, in the order of the inputs. The state of a new
    user is all zeros; it has one size however long the history, and all of the history counts.

    Raises:
        ValueError: a package is missing; a branch has no form in ONNX or, with `live`, needs the whole
            history at once; the graph has more than 2 GiB; or its scores differ from the model's.
    """
    _require_packages()
    if live:
        model.encoder.require_recurrence()
    encoder = copy_portable_encoder(model)
    portable = make_onnx_encoder(encoder, model.max_length)
    table = portable.own_embedding.weight
    if live:
        _, states = encoder.advance(torch.ones(1, 1, dtype=torch.int64))
        module = LiveModule(portable, table, map_tensors(_split_complex, states))
        content = _make_live_graph(model, module)
    else:
        content = _make_history_graph(model, ScoringModule(portable, table).eval())

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)
        session = _open_session(temporary)
        if live:
            _check_live_graph(model, module, session)
        else:
            _check_history_graph(model, session)

    write_atomically(path, write)


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"export: {missing[0]} is not installed; run: pip install {' '.join(_PACKAGES)}")


def _split_complex(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one with a last dimension of two; others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _make_history_graph(model: SavedModel, module: ScoringModule) -> bytes:
    items, lengths = sample_histories(model, 2, seed=0)
    length = min(_TRACED_LENGTH, model.max_length)
    batch = torch.export.Dim("batch")
    of_items: dict[int, Any] = {0: batch}
    if model.max_length > 1:
        of_items[1] = torch.export.Dim("length", max=model.max_length)
    inputs = (items[:, :length].clamp(min=1), lengths.clamp(max=length))
    return _make_graph(model, module, inputs, (of_items, {0: batch}), ["items", "lengths"], ["scores"])


def _make_live_graph(model: SavedModel, module: LiveModule) -> bytes:
    state = module.make_new_users(2)
    users = {0: torch.export.Dim("batch")}
    inputs = (torch.tensor([1, 1]), list(state.values()))
    outputs = ["scores", *(f"next.{name}" for name in state)]
    return _make_graph(model, module, inputs, (users, [users] * len(state)), ["items", *state], outputs)


def _make_graph(
    model: SavedModel,
    module: nn.Module,
    inputs: tuple[Any, ...],
    dynamic_shapes: Any,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> bytes:
    """The graph of a module as the bytes of its file."""
    try:
        with _silence_exporter():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                opset_version=_OPSET,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(
            f"export: a branch of the network has no form in ONNX; give a path that ends in .pt2 "
            f"({format_one_line(error)[:200]})"
        ) from None
    assert program is not None
    graph = program.model_proto
    for node in graph.graph.input:
        if not node.type.tensor_type.shape.dim[0].dim_param:
            raise UserError(
                f"export: a branch of the network fixes the batch size of {node.name}, as len(x) does; use "
                f"x.shape[0] there, or give a path that ends in .pt2"
            )
    if graph.ByteSize() > _MAX_BYTES:
        raise UserError(
            f"export: the graph has {graph.ByteSize():,} bytes and an .onnx file {_MAX_BYTES:,} at most; "
            f"give a path that ends in .pt2"
        )
    _remove_traces(graph)
    graph.producer_name, graph.producer_version = "m2rec", __version__
    metadata = {TOKENS_KEY: json.dumps(model.tokens), MAX_LENGTH_KEY: str(model.max_length)}
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=value)
    return bytes(graph.SerializeToString())


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """Without the exporter's own warnings, about packages that are not used and names that it changes."""
    loggers = [logging.getLogger(name) for name in _EXPORTER_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _remove_traces(graph: Any) -> None:
    """Remove where in the source each node comes from: it names folders of this machine."""
    for part in (graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def _open_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _check_history_graph(model: SavedModel, session: Any) -> None:
    """Compare the graph with the model, for shapes that it was not traced with."""
    for seed, (batch_size, wanted) in enumerate(_CHECKED_SHAPES):
        length = min(wanted or model.max_length, model.max_length)
        items, lengths = sample_histories(model, batch_size, seed)
        items, lengths = items[:, :length].contiguous(), lengths.clamp(max=length)
        (scores,) = session.run(None, {"items": items.numpy(), "lengths": lengths.numpy()})
        check_scores(model, items, lengths, torch.from_numpy(scores))


def _check_live_graph(model: SavedModel, module: LiveModule, session: Any) -> None:
    """Compare the graph with the model after each event of some users."""
    for batch_size in _CHECKED_USERS:
        state = {name: tensor.numpy() for name, tensor in module.make_new_users(batch_size).items()}
        items, _ = sample_histories(model, batch_size, seed=1)
        for n in range(1, min(_CHECKED_EVENTS, model.max_length) + 1):
            events = items[:, n - 1].contiguous().numpy()
            scores, *after = session.run(None, {"items": events, **state})
            state = dict(zip(state, after, strict=True))
            lengths = torch.full((batch_size,), n)
            check_scores(model, items[:, :n], lengths, torch.from_numpy(scores))
