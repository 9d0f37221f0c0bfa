"""What a contributor's branch gets from one file and its line in `BRANCHES`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.nn import branches
from m2rec.nn.branch import Branch, ItemBatch
from m2rec.nn.encoder import Encoder
from m2rec.settings import ModelSettings
from m2rec.training.configuration import build_config
from m2rec.training.run import run_experiment
from tests.conftest import small
from tests.test_encoder import SMALL, L, T, V, histories
from tests.test_session import assert_same, events, recommender

WINDOW = 5


class RecentMean(Branch):
    """The mean of the last five items, times a weight per channel."""

    name = "recent mean"

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(hidden_size))

    def forward(self, x: Tensor, batch: ItemBatch | None = None) -> Tensor:
        y, _ = self.advance(x, None, batch)
        return y

    def advance(self, x: Tensor, state: Tensor | None, batch: ItemBatch | None) -> tuple[Tensor, Tensor]:
        before = x.new_zeros(len(x), WINDOW - 1, x.shape[2]) if state is None else state
        inputs = torch.cat([before, x], dim=1)
        means = F.avg_pool1d(inputs.mT, WINDOW, stride=1).mT
        return means * self.scale, inputs[:, -(WINDOW - 1) :]


class WholeMean(RecentMean):
    """As `RecentMean`, without a way to continue a history."""

    name = "whole mean"
    advance = Branch.advance

    def forward(self, x: Tensor, batch: ItemBatch | None = None) -> Tensor:
        return x * self.scale


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(branches.BRANCHES, "recent", lambda settings, *_: RecentMean(settings.hidden_size))


@pytest.fixture
def encoder() -> Encoder:
    made = Encoder(ModelSettings(**SMALL), V, L, torch.randn(V, T)).eval()
    for layer in made.layers:
        nn.init.normal_(layer.gate.logits.weight, std=0.2)
    return made


def test_it_is_trained_under_its_own_key(encoder: Encoder):
    assert encoder.branches == ["temporal", "frequency", "semantic", "recent mean"]
    items, lengths = histories(L, 9)
    encoder(items, lengths).square().sum().backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters() if ".recent." in name}
    assert list(gradients) == ["layers.0.recent.scale", "layers.1.recent.scale"]
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_only_the_branch_without_an_input_is_masked(encoder: Encoder):
    vectors = torch.randn(V, T)
    vectors[5] = 0
    encoder.set_text_vectors(vectors)
    _, (weights, *_) = encoder.encode_with_gate_weights(torch.tensor([[3, 5]]), torch.tensor([2]))
    missing = dict(zip(encoder.branches, (weights[0, 1] == 0).all(-1).tolist(), strict=True))
    assert missing == {"temporal": False, "frequency": False, "semantic": True, "recent mean": False}


def test_the_last_position_equals_the_whole_pass(encoder: Encoder):
    items, lengths = histories(1, L, 7, 2)
    whole = encoder(items, lengths)[torch.arange(4), lengths - 1]
    torch.testing.assert_close(encoder.last(items, lengths), whole)


def test_live_users_equal_the_whole_pass_and_can_be_saved():
    model, history = recommender(), events(30)
    live, others = model.session(history[:2]), model.session(history[:7])
    for token in history[2:20]:
        live.add(token)
    live = model.restore_session(live.to_bytes())
    for token in history[20:]:
        model.add_events([live, others], [token, token])
    assert_same(live.recommend(V), model.recommend(history, k=V))
    assert_same(others.recommend(V), model.recommend([*history[:7], *history[20:]], k=V))


def test_it_is_explained_and_exported(tmp_path: Path):
    model = recommender(whole_history=False)
    (explained,) = model.explain(["i1"])
    assert explained.weights["recent mean"] == pytest.approx(1 / 4)
    model.export(tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    items = F.pad(torch.tensor([[1, 2, 3]]), (0, model.model.max_length - 3))
    expected = model.scores([["i1", "i2", "i3"]])
    torch.testing.assert_close(program(items, torch.tensor([3]))[:, 1:], expected[:, 1:])


def test_the_report_names_it(toy: Path, tmp_path: Path):
    config = build_config(small(toy, text_vectors="none", epochs=1, report=True, runs_dir=str(tmp_path)))
    folder = run_experiment(config).folder
    page = (folder / "report.html").read_text()
    assert "recent mean" in page


def test_a_branch_that_cannot_be_continued_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(branches.BRANCHES, "recent", lambda settings, *_: WholeMean(settings.hidden_size))
    model = recommender(whole_history=False)
    with pytest.raises(ValueError, match=r"^whole mean needs the whole history"):
        model.session(["i1"])
