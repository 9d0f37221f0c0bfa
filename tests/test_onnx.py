"""The exported graphs, run by onnxruntime where neither this package nor PyTorch is."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from m2rec.nn.gate import SoftmaxGate
from m2rec.serving import onnx_export
from m2rec.serving.recommender import Recommender
from tests.test_session import TOKENS, L, events, recommender

# they are not imported here: each process of the tests would do so, and one needs them
pytestmark = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnxscript") is None, reason="needs m2rec[onnx]"
)

CODE = """
import json, sys
sys.modules["m2rec"] = sys.modules["torch"] = None
import numpy as np, onnxruntime

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}

def read_ids(graph):
    tokens = json.loads(graph.get_modelmeta().custom_metadata_map["tokens"])
    return {token: i for i, token in enumerate(tokens)}

def score(graph, histories):
    ids, lengths = read_ids(graph), np.array([len(history) for history in histories])
    items = np.zeros((len(histories), max(lengths)), np.int64)
    for row, history in zip(items, histories):
        row[: len(history)] = [ids[token] for token in history]
    (scores,) = graph.run(None, {"items": items, "lengths": lengths})
    return scores[:, 1:].tolist()

def follow(graph, histories):
    ids, found = read_ids(graph), []
    state = {i.name: np.zeros((len(histories), *i.shape[1:]), TYPES[i.type]) for i in graph.get_inputs()[1:]}
    for tokens in zip(*histories):
        scores, *after = graph.run(None, {"items": np.array([ids[token] for token in tokens]), **state})
        state = dict(zip(state, after))
        found.append(scores[:, 1:].tolist())
    return found

given = json.loads(sys.argv[2])
function = {"score": score, "follow": follow}[sys.argv[1]]
print(json.dumps([function(onnxruntime.InferenceSession("model.onnx"), batch) for batch in given]))
"""

# two layers once: an export takes as long as there are layers
KINDS: list[dict[str, object]] = [
    {"neighbors": True},
    {
        "mixer": "mamba", "filter": "residual", "gate": "mean", "text_in_table": False, "neighbors": True,
        "n_layers": 1,
    },
]  # fmt: skip
BARE = {"text_in_sequence": False, "text_in_table": False, "repeat_bias": False, "n_layers": 1}
HISTORY_KINDS = [*KINDS, {"mixer": "attention", "filter": "low_pass", **BARE}]
LIVE_KINDS = [*KINDS, {"filter": "none", **BARE}]


def make_recommender(seed: int = 0, whole_history: bool = False, **settings: object) -> Recommender:
    """As `recommender`, with a gate that is not the mean, and items without text."""
    model = recommender(seed, whole_history, **settings).model
    vectors = model.encoder.vectors.clone()
    vectors[::3] = 0
    model.encoder.set_text_vectors(vectors)
    for layer in model.encoder.layers:
        if isinstance(layer.gate, SoftmaxGate):
            nn.init.normal_(layer.gate.logits.weight, std=0.5)
    return Recommender(replace(model, table=model.encoder.item_table().detach()), whole_history)


def run_elsewhere(folder: Path, function: str, batches: list[list[list[str]]]) -> list[torch.Tensor]:
    command = [sys.executable, "-c", CODE, function, json.dumps(batches)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [torch.tensor(found) for found in json.loads(done.stdout)]


@pytest.mark.parametrize("settings", HISTORY_KINDS, ids=str)
def test_it_scores_as_the_model(tmp_path: Path, settings: Mapping[str, object]):
    """Batches and lengths that were not traced, down to one history of one item."""
    model = make_recommender(**settings)
    model.export(tmp_path / "model.onnx")
    lengths = ([1], [1, 5, L, 7], [L] * 9, [2, 1, 3])
    batches = [[events(n, seed=n + k) for k, n in enumerate(some)] for some in lengths]
    for histories, found in zip(batches, run_elsewhere(tmp_path, "score", batches), strict=True):
        torch.testing.assert_close(found, model.scores(histories)[:, 1:], rtol=1e-4, atol=1e-4)
    content = (tmp_path / "model.onnx").read_bytes()
    assert str(Path(onnx_export.__file__).parent).encode() not in content  # no folders of this machine


@pytest.fixture(scope="module", params=LIVE_KINDS, ids=str)
def live(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recommender, Path]:
    """A model, and the folder with its graph for live users."""
    model, folder = make_recommender(whole_history=True, **request.param), tmp_path_factory.mktemp("live")
    model.export(folder / "model.onnx", live=True)
    return model, folder


def test_live_users_equal_whole_histories(live: tuple[Recommender, Path]):
    """After every event, beyond the longest history in training, for one user and for some."""
    (model, folder), n = live, 2 * L
    batches = [[events(n, seed=0)], [events(n, seed=seed) for seed in (1, 2, 3)]]
    for histories, found in zip(batches, run_elsewhere(folder, "follow", batches), strict=True):
        for length in range(1, n + 1):
            expected = model.scores([history[:length] for history in histories])[:, 1:]
            torch.testing.assert_close(found[length - 1], expected, rtol=1e-4, atol=1e-4)


def test_a_graph_that_differs_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A graph with other scores."""
    make_graph = onnx_export._make_history_graph

    class Other(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, items: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.module(items, lengths) + 1

    monkeypatch.setattr(
        onnx_export, "_make_history_graph", lambda *given: make_graph(given[0], Other(given[1]))
    )
    with pytest.raises(ValueError, match=r"export: the program differs from the model by \d"):
        recommender(whole_history=False, mixer="attention", filter="none", n_layers=1).export(
            tmp_path / "model.onnx"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("key", "value"), [("mixer", "attention"), ("filter", "low_pass")])
def test_a_part_that_needs_the_whole_history(tmp_path: Path, key: str, value: str):
    model = recommender(whole_history=False, **{key: value})
    with pytest.raises(ValueError, match=f"{key}: '{value}' needs the whole history at once"):
        model.export(tmp_path / "model.onnx", live=True)
    assert not list(tmp_path.iterdir())


def test_the_suffix_decides(tmp_path: Path):
    model = recommender()
    with pytest.raises(ValueError, match=r"export: the name 'model\.bin' ends in neither \.onnx nor \.pt2"):
        model.export(tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"live: a program has no form for live users; give model\.onnx"):
        model.export(tmp_path / "model.pt2", live=True)
    assert not list(tmp_path.iterdir())


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_export, "_PACKAGES", ("onnx", "not_there"))
    with pytest.raises(ValueError, match=r"^export: not_there is not installed; run: pip install onnx not_"):
        recommender().export(tmp_path / "model.onnx")


@pytest.mark.parametrize("live", LIVE_KINDS[:1], ids=str, indirect=True)
def test_the_model_says_what_it_holds(live: tuple[Recommender, Path]):
    import onnxruntime

    graph = onnxruntime.InferenceSession(live[1] / "model.onnx")
    metadata = graph.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["tokens"]) == TOKENS and metadata["max_length"] == str(L)
    inputs, outputs = ([node.name for node in nodes] for nodes in (graph.get_inputs(), graph.get_outputs()))
    assert inputs[:4] == ["items", "0.mixer0", "0.mixer1", "0.filter"] and inputs[-2:] == ["seen", "recent"]
    assert outputs == ["scores", *(f"next.{name}" for name in inputs[1:])]
