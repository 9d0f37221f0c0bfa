"""The whole network without RecBole: causality, padding, branches, gradients."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from m2rec.nn.batching import group_rows_by_length
from m2rec.nn.branch import ItemBatch
from m2rec.nn.encoder import Encoder
from m2rec.nn.filters import CausalFilter, LowPassFilter
from m2rec.nn.mamba import Mamba, Mamba2
from m2rec.nn.states import name_tensors
from m2rec.nn.text_projection import TextProjection
from m2rec.settings import ModelSettings

V, T, L = 30, 6, 12
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "inner_size": 24,
    "head_dim": 8,
    "d_state": 4,
    "filter_modes": 3,
    "dropout_prob": 0.0,
}


def vectors() -> Tensor:
    """(V, T) text vectors; padding and item 5 have none."""
    made = torch.randn(V, T, generator=torch.Generator().manual_seed(7))
    made[[0, 5]] = 0
    return made / made.norm(dim=1).mean()


def encoder(text: bool = True, **settings: Any) -> Encoder:
    made = Encoder(ModelSettings(**{**SMALL, **settings}), V, L, vectors() if text else None)
    for layer in made.layers:
        if hasattr(layer.gate, "logits"):
            torch.nn.init.normal_(layer.gate.logits.weight, std=0.2)
    return made.eval()


def histories(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random right-padded histories."""
    items = torch.randint(1, V, (len(lengths), L))
    for row, n in enumerate(lengths):
        items[row, n:] = 0
    return items, torch.tensor(lengths)


every_form = pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="full"),
        pytest.param({"mixer": "mamba"}, id="mamba"),
        pytest.param({"mixer": "attention"}, id="attention"),
        pytest.param({"gate": "mean", "text": False}, id="mean-no-text"),
        pytest.param({"filter": "none", "text_in_table": False}, id="no-filter"),
        pytest.param({"filter": "residual"}, id="residual"),
        pytest.param({"filter": "low_pass"}, id="low-pass"),
    ],
)


@every_form
def test_padding_does_not_matter(settings: dict[str, Any]):
    made, (items, lengths) = encoder(**settings), histories(1, 5, L, 8)
    garbage = items.clone()
    for row, n in enumerate(lengths.tolist()):
        garbage[row, n:] = torch.randint(1, V, (L - n,))
    assert torch.allclose(made.last(items, lengths), made.last(garbage, lengths), atol=1e-6)
    assert torch.allclose(made.last(items[1:2, :5], lengths[1:2]), made.last(items, lengths)[1:2], atol=1e-5)


@every_form
def test_each_row_alone_equals_the_row_in_the_batch(settings: dict[str, Any]):
    made, (items, lengths) = encoder(**settings), histories(3, L, 7)
    together = made.last(items, lengths)
    for row in range(3):
        alone = made.last(items[row : row + 1], lengths[row : row + 1])
        assert torch.allclose(alone[0], together[row], atol=1e-5)


@every_form
def test_the_last_positions_alone_equal_those_of_the_whole_pass(settings: dict[str, Any]):
    made, (items, lengths) = encoder(**settings).double(), histories(1, L, 7, 2)
    whole = made(items, lengths)[torch.arange(4), lengths - 1]
    torch.testing.assert_close(made.last(items, lengths), whole)


def test_autocast_does_not_reach_the_filter_of_the_last_position():
    made, x, lengths = CausalFilter(16, 3, L), torch.randn(3, L, 16), torch.tensor([1, L, 7])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        last = made.last(x, ItemBatch(torch.zeros(3, L), lengths))
        whole = made(x)[torch.arange(3), lengths - 1]
    torch.testing.assert_close(last, whole)


@every_form
def test_text_projected_once_changes_nothing(settings: dict[str, Any]):
    made, (items, lengths) = encoder(**settings).double(), histories(3, L, 7)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    twin = made.make_inference_copy(made.item_table())
    torch.testing.assert_close(twin(items, lengths), made(items, lengths))
    torch.testing.assert_close(twin.item_table(), made.item_table())
    assert twin.layers[0].norm.weight is made.layers[0].norm.weight
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "attention"])
def test_the_future_does_not_reach_the_past(mixer: str):
    made, (items, lengths) = encoder(mixer=mixer), histories(L, L)
    changed = items.clone()
    changed[:, 8:] = changed[:, 8:] % (V - 1) + 1
    before, after = made(items, lengths), made(changed, lengths)
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-5)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


@every_form
def test_every_parameter_gets_a_gradient(settings: dict[str, Any]):
    made, (items, lengths) = encoder(**settings), histories(L, 9)
    (made.score_all_items(made.last(items, lengths), items) * torch.randn(2, V)).sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("branch", ["mixer", "filter", "text"])
def test_each_branch_changes_the_scores(branch: str):
    made, (items, lengths) = encoder(), histories(L, 9)
    before = made.score_all_items(made.last(items, lengths), items)
    for layer in made.layers:
        for parameter in getattr(layer, branch).parameters():
            parameter.data *= 1.5
    assert not torch.allclose(before, made.score_all_items(made.last(items, lengths), items), atol=1e-4)


@pytest.mark.parametrize("position", range(L))
def test_every_item_of_the_history_changes_the_scores(position: int):
    made, (items, lengths) = encoder(), histories(L)
    changed = items.clone()
    changed[0, position] = changed[0, position] % (V - 1) + 1
    assert not torch.allclose(made.last(items, lengths), made.last(changed, lengths), atol=1e-6)


ADVANCE = [{}, {"mixer": "mamba"}, {"filter": "residual"}, {"filter": "none", "text": False}]


@pytest.mark.parametrize("settings", ADVANCE)
@pytest.mark.parametrize("cuts", [[1] * L, [5, 1, 6], [2, 10]])
def test_piece_by_piece_equals_the_whole(settings: dict[str, Any], cuts: list[int]):
    """Padding only touches states that nobody reads again."""
    made, (items, lengths) = encoder(**settings), histories(L, 5, 1)
    whole, states, pieces = made(items, lengths), None, []
    for piece in items.split(cuts, dim=1):
        x, states = made.advance(piece, states)
        pieces.append(x)
    stepped = torch.cat(pieces, 1)
    for row, n in enumerate(lengths.tolist()):
        assert torch.allclose(stepped[row, :n], whole[row, :n], atol=1e-5)


@pytest.mark.parametrize("settings", ADVANCE)
def test_steps_after_pieces_equal_the_whole(settings: dict[str, Any]):
    made, items = encoder(**settings), torch.randint(1, V, (3, L))
    _, states = made.advance(items[:, :3])
    for item in items[:, 3:].T:
        x, states = made.step(item, states)
    assert torch.allclose(x, made.last(items, torch.full((3,), L)), atol=1e-5)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_a_thousand_steps_do_not_drift(mixer: str):
    made, items = encoder(mixer=mixer, n_layers=1), torch.randint(1, V, (1, 1000))
    _, states = made.advance(items[:, :1])
    for item in items[0, 1:]:
        x, states = made.step(item[None], states)
    assert torch.allclose(x, made(items, torch.tensor([1000]))[:, -1], atol=1e-5)


def test_the_state_does_not_grow():
    made, (items, _) = encoder(), histories(L, L)
    sizes = []
    for n in (1, 2, L):
        _, states = made.advance(items[:, :n])
        sizes.append([tensor.shape for tensor in name_tensors(states).values()])
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize(("key", "value"), [("filter", "low_pass"), ("mixer", "attention")])
def test_what_needs_the_whole_history_cannot_go_on_from_a_state(key: str, value: str):
    with pytest.raises(ValueError, match=f"{key}: '{value}' needs the whole history at once"):
        encoder(**{key: value}).advance(torch.tensor([[1]]))


def test_text_switches():
    assert encoder(text=False).table_text is None
    only_table = encoder(text_in_sequence=False)
    assert only_table.table_text is not None and only_table.layers[0].text is None
    assert only_table.branches == ["temporal", "frequency"]
    only_sequence = encoder(text_in_table=False)
    assert only_sequence.table_text is None and only_sequence.layers[0].text is not None
    assert encoder().branches == ["temporal", "frequency", "semantic"]


def test_an_item_without_text_gets_no_semantic_weight():
    made = encoder()
    items = torch.tensor([[3, 5, 4]])
    _, weights = made.encode_with_gate_weights(items, torch.tensor([3]))
    for w in weights:  # (B, L, K, D), semantic last
        assert (w[0, 1, 2] == 0).all() and (w[0, [0, 2], 2] > 0).all()
        assert torch.allclose(w.sum(2), torch.ones(()))


def test_loaded_text_vectors_say_which_items_have_text():
    made, other = encoder(), encoder()
    other.vectors.zero_()
    other.available[:, -1] = False
    other.load_state_dict(made.state_dict())
    items, lengths = histories(5, 3)
    assert torch.equal(other(items, lengths), made(items, lengths))


def test_item_rows_and_table_agree_and_padding_is_zero():
    made = encoder()
    ids = torch.tensor([[0, 5], [29, 3]])
    assert torch.allclose(made.embed_items(ids), made.item_table()[ids], atol=1e-7)
    assert (made.item_table()[0] == 0).all()
    projection = TextProjection(T, 16, 1.0)
    many = torch.randint(0, V, (4, V))  # more lookups than items: the other way round inside
    assert torch.allclose(
        projection.project_items(many, vectors()), projection.project_vectors(vectors())[many], atol=1e-6
    )


def test_initial_step_sizes_survive_unless_asked_otherwise():
    def steps(init: str) -> Tensor:
        made = encoder(mixer="mamba", init=init)
        return torch.nn.functional.softplus(made.layers[0].mixer.dt_proj.bias)

    assert steps("standard").max() <= 0.1001
    assert torch.allclose(steps("mamba4rec"), torch.tensor(0.6931), atol=1e-4)


def test_mamba4rec_written_out():
    """Text, filter and gate off: item embedding -> Mamba -> feed-forward, as in arXiv 2403.03900."""
    made = encoder(text=False, filter="none", gate="mean", mixer="mamba", init="mamba4rec")
    items, lengths = histories(L, 7)
    x = made.norm(made.id_embedding(items))
    for layer in made.layers:
        x = layer.norm(layer.mixer(x) + x)
        forward = layer.feed_forward
        x = forward.norm(forward.down(torch.nn.functional.gelu(forward.up(x))) + x)
    expected = x[torch.arange(2), lengths - 1] @ made.id_embedding.weight.T
    assert torch.allclose(made.score_all_items(made.last(items, lengths), items), expected, atol=1e-5)
    names = {name.split(".")[2] for name in made.state_dict() if name.startswith("layers.")}
    assert names == {"mixer", "norm", "feed_forward"}


def test_rows_of_similar_length_go_together():
    """Every row is in one group, whose width is enough for it and no wider than its longest."""
    lengths = torch.tensor([1, 8, 9, 50, 3, 16, 17, 40])
    groups = list(group_rows_by_length(lengths, 50))
    assert [(rows.tolist(), longest) for rows, longest in groups] == [
        ([0, 1, 4], 8),
        ([2, 5], 16),
        ([6], 17),
        ([3, 7], 50),
    ]
    assert [longest for _, longest in group_rows_by_length(torch.tensor([5, 5]), 5)] == [5]


@every_form
def test_grouping_by_length_changes_nothing(settings: dict[str, Any]):
    """Vectors, targets and gradients are those of the whole padded batch."""
    made = encoder(**settings).double()
    items, lengths = histories(12, 1, 9, 8, 2, 10)
    targets = torch.randint(1, V, items.shape) * (items > 0)
    whole = made(items, lengths)
    assert len(list(group_rows_by_length(lengths, L))) == 2
    torch.testing.assert_close(made.last(items, lengths), whole[torch.arange(6), lengths - 1])

    weight = torch.randn(V, whole.shape[-1], dtype=whole.dtype)
    x, rows, times = made.encode_target_positions(items, lengths, targets)
    wanted, at = targets[rows, times], targets > 0
    parameters = [p for name, p in made.named_parameters() if name != "repeat_bias"]
    padded = torch.autograd.grad((whole[at] * weight[targets[at]]).sum(), parameters)
    grouped = torch.autograd.grad((x * weight[wanted]).sum(), parameters)
    torch.testing.assert_close(grouped, padded)


def test_id_dropout_leaves_items_their_text():
    """In training about that share of the items with text loses its id embedding, none without text."""
    vectors = torch.randn(V, 5)
    vectors[[0, 3]] = 0
    made = Encoder(ModelSettings(**SMALL, id_dropout=0.5), V, L, vectors)
    ids = torch.arange(1, V).repeat(400, 1)
    whole, text = made.eval().embed_items(ids), made.table_text.project_items(ids, vectors)
    assert torch.equal(made.item_table()[1:], made.embed_items(ids[0]))
    for rows in (made.train().embed_items(ids), torch.stack([made.item_table()[1:] for _ in range(400)])):
        alone = torch.isclose(rows, text, atol=1e-6).all(-1)
        assert torch.allclose(rows[~alone], whole[~alone], atol=1e-6)
        share = alone.float().mean(0)
        assert share[2] == 0 and (share[torch.arange(V - 1) != 2] - 0.5).abs().max() < 0.15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_form
def test_a_model_of_any_type_answers_alike(settings: dict[str, Any], dtype: torch.dtype):
    """Cast whole, live users included: near to float64, and all ways in give the type that was asked for."""
    made, (items, lengths) = encoder(**settings).double(), histories(9, 9)
    expected = made.last(items, lengths)
    scale = expected.abs().max()
    made, tolerance = made.to(dtype), 40 * torch.finfo(dtype).eps
    answers = [made.last(items, lengths), made(items, lengths)[:, 8]]
    if isinstance(made.layers[0].mixer, Mamba | Mamba2) and not isinstance(
        made.layers[0].filter, LowPassFilter
    ):
        _, states = made.advance(items[:, :3])
        x, states = made.advance(items[:, 3:8], states)
        answers.append(made.step(items[:, 8], states)[0])
    for x in answers:
        assert x.dtype == dtype
        assert (x.double() - expected).abs().max() < tolerance * scale


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_shapes_on_the_meta_device(mixer: str):
    """Which knows no autocast and holds no numbers."""
    made = encoder(mixer=mixer).to("meta")
    items, lengths = torch.ones(2, 7, dtype=torch.int64, device="meta"), torch.ones(2, device="meta").long()
    assert made(items, lengths).shape == (2, 7, 16)
    assert made.encode_last_positions(items, lengths).shape == (2, 16)
    _, states = made.advance(items)
    assert made.step(items[:, 0], states)[0].shape == (2, 16)


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_rows_of_similar_length_on_any_device(device: str):
    """As far as a tensor without numbers goes: the lengths meet their boundaries on one device."""
    with FakeTensorMode():
        lengths = torch.ones(3, dtype=torch.int64, device=device)
        with pytest.raises(DynamicOutputShapeException, match="unique"):  # where the numbers begin to matter
            list(group_rows_by_length(lengths, 12))


@every_form
def test_copies_keep_how_parameters_are_trained(settings: dict[str, Any]):
    made = encoder(**settings)

    def marks(model: Encoder) -> dict[str, dict[str, Any]]:
        return {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}

    marked = {name.split(".")[-1] for name, own in marks(made).items() if own}
    assert "repeat_bias" in marked and ("A_log" in marked or settings.get("mixer") == "attention")
    assert marks(copy.deepcopy(made)) == marks(made)
    assert marks(pickle.loads(pickle.dumps(made))) == marks(made)
    assert marks(copy.deepcopy(made.double())) == marks(made)
