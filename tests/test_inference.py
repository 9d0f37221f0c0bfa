"""The prepared network: equal to the plain one, whatever the lengths, forms and tables."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2rec.nn.encoder import Encoder
from m2rec.nn.inference.encoder import PreparedEncoder, can_prepare
from m2rec.nn.inference.gate import PreparedGate
from m2rec.nn.inference.mamba import PreparedMamba2
from m2rec.nn.live import LiveEncoder, prepare_encoder
from m2rec.nn.states import name_tensors
from m2rec.ops import ssd_last, ssd_ref
from m2rec.ops.ssd import split_into_chunks
from m2rec.ops.ssd_inference import ssd_by_head, ssd_last_by_head
from m2rec.settings import ModelSettings

V, T, LONGEST = 40, 6, 150
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "inner_size": 24,
    "head_dim": 8,
    "d_state": 4,
    "filter_modes": 3,
    "n_layers": 3,
}
LENGTHS = (1, 2, 3, 63, 64, 65, 127, 129, LONGEST)


def build_encoder(text: bool = True, longest: int = LONGEST, **settings: Any) -> Encoder:
    """A network in float64 whose every parameter matters; items 0 and 5 have no text."""
    vectors = torch.randn(V, T)
    vectors[[0, 5]] = 0
    made = Encoder(ModelSettings(**{**SMALL, **settings}), V, longest, vectors if text else None)
    for name, parameter in made.named_parameters():
        if parameter.dim() < 2 or "logits" in name:
            nn.init.normal_(parameter, std=0.3)
    return made.double().eval()


def draw_histories(*lengths: int) -> tuple[Tensor, Tensor]:
    """Right-padded histories."""
    items = torch.randint(1, V, (len(lengths), max(lengths)))
    for row, n in enumerate(lengths):
        items[row, n:] = 0
    return items, torch.tensor(lengths)


every_form = pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="full"),
        pytest.param({"n_layers": 1}, id="one-layer"),
        pytest.param({"text": False}, id="no-text"),
        pytest.param({"head_dim": 32, "d_conv": 1}, id="one-head-one-tap"),
        pytest.param({"mixer": "mamba"}, id="mamba"),
        pytest.param({"mixer": "attention"}, id="attention"),
        pytest.param({"gate": "mean"}, id="mean"),
        pytest.param({"gate": "mean", "filter": "none", "text": False}, id="mixer-alone"),
        pytest.param({"filter": "none", "text_in_table": False}, id="no-filter"),
        pytest.param({"filter": "residual"}, id="residual"),
        pytest.param({"filter": "low_pass"}, id="low-pass"),
    ],
)


@every_form
def test_the_prepared_network_equals_the_plain_one(settings: dict[str, Any]):
    made, (items, lengths) = build_encoder(**settings), draw_histories(*LENGTHS)
    prepared = PreparedEncoder(made, made.item_table())
    torch.testing.assert_close(prepared.last(items, lengths), made.last(items, lengths))
    for row, length in enumerate(LENGTHS):  # alone, a row is not padded to another row's length
        alone = prepared.last(items[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone, made.last(items[row : row + 1], lengths[row : row + 1]))


def test_padding_does_not_matter():
    made, (items, lengths) = build_encoder(), draw_histories(1, 5, 70, 100)
    prepared, garbage = PreparedEncoder(made, made.item_table()), items.clone()
    for row, n in enumerate(lengths.tolist()):
        garbage[row, n:] = torch.randint(1, V, (items.shape[1] - n,))
    torch.testing.assert_close(prepared.last(garbage, lengths), prepared.last(items, lengths))


@pytest.mark.parametrize(("width", "tables"), [(0, []), (16, []), (80, ["gate"]), (1000, ["mixer", "gate"])])
def test_tables_that_do_not_fit_change_nothing(
    width: int, tables: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("m2rec.nn.inference.encoder.TABLE_BYTES", V * 8 * width)
    made, (items, lengths) = build_encoder(), draw_histories(*LENGTHS)
    prepared = PreparedEncoder(made, made.item_table())
    mixer, gate = prepared.layers[0].branches[0], prepared.layers[0].gate
    assert isinstance(mixer, PreparedMamba2) and isinstance(gate, PreparedGate)
    held = {"mixer": mixer.mixed_table, "gate": gate.table}
    assert [name for name, table in held.items() if table is not None] == tables
    torch.testing.assert_close(prepared.last(items, lengths), made.last(items, lengths))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_any_logits_of_the_gate(scale: float):
    made, (items, lengths) = build_encoder(), draw_histories(*LENGTHS)
    for layer in made.layers:
        layer.gate.logits.weight.data *= scale
    prepared = PreparedEncoder(made, made.item_table())
    torch.testing.assert_close(prepared.last(items, lengths), made.last(items, lengths))


def test_in_float32_the_ten_best_items_are_the_same():
    made, (items, lengths) = build_encoder().float(), draw_histories(*LENGTHS)
    prepared = PreparedEncoder(made, made.item_table())
    with torch.no_grad():
        expected = made.score_all_items(made.last(items, lengths), items)
    found = prepared.score_all_items(items, lengths)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.topk(10).indices, expected.topk(10).indices)


def test_autocast_does_not_reach_the_prepared_network():
    made, (items, lengths) = build_encoder().float(), draw_histories(*LENGTHS)
    prepared = PreparedEncoder(made, made.item_table())
    expected = prepared.last(items, lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prepared.last(items, lengths), expected)


@pytest.mark.parametrize("users", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"text": False}, {"mixer": "mamba"}, {"gate": "mean"}])
def test_live_users_continue_as_in_the_plain_network(users: int, settings: dict[str, Any]):
    made, (items, lengths) = build_encoder(**settings), draw_histories(*[70] * users)
    prepared = LiveEncoder(made, made.item_table())
    items[:, 68] = 5  # has no text
    x, states = prepared.advance(items[:, :66])
    torch.testing.assert_close(x, made(items[:, :66], lengths - 4))
    expected, plain_states = made(items, lengths), states
    for t in range(66, 70):
        vector, states = prepared.step(items[:, t], states)
        torch.testing.assert_close(vector, expected[:, t])
        _, plain_states = made.step(items[:, t], plain_states)
        torch.testing.assert_close(name_tensors(states), name_tensors(plain_states))


@pytest.mark.filterwarnings("error")
def test_a_live_user_with_extreme_activations():
    made, (items, lengths) = build_encoder(), draw_histories(9)
    for layer in made.layers:
        layer.mixer.in_proj.weight.data *= 1e4
    prepared = LiveEncoder(made, made.item_table())
    _, states = prepared.advance(items[:, :8])
    vector, _ = prepared.step(items[:, 8], states)
    torch.testing.assert_close(vector, made(items, lengths)[:, 8])


def test_a_changed_weight_is_noticed():
    made = build_encoder()
    prepared = PreparedEncoder(made, made.item_table())
    assert prepared.is_current(made)
    with torch.no_grad():
        made.norm.bias += 1
    assert not prepared.is_current(made)


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_modified_modules_are_not_prepared():
    made = build_encoder()
    assert can_prepare(made)
    hook = made.layers[0].norm.register_forward_hook(lambda *_: None)
    assert not can_prepare(made)
    hook.remove()
    assert not can_prepare(build_encoder().bfloat16())
    made = made.float()
    torch.ao.quantization.quantize_dynamic(made, {nn.Linear}, dtype=torch.qint8, inplace=True)
    assert not can_prepare(made)
    assert isinstance(prepare_encoder(made, made.item_table()), Encoder)


def draw_scan(length: int, scale: float) -> tuple[Tensor, ...]:
    """x (3, L, 2, 5), dt (3, L, 2), A (2,), B and C (3, L, 4), in float64."""
    x, dt = torch.randn(3, length, 2, 5), torch.rand(3, length, 2) * scale
    A, B, C = -torch.rand(2), torch.randn(3, length, 4), torch.randn(3, length, 4)
    return tuple(t.double() for t in (x, dt, A, B, C))


scans = pytest.mark.parametrize(("length", "scale"), [(1, 1.0), (7, 0.1), (64, 1e3), (132, 1.0), (192, 1e-3)])


@scans
def test_ssd_by_head_is_the_recurrence(length: int, scale: float):
    x, dt, A, B, C = draw_scan(length, scale)
    D = torch.randn(2).double()
    mixed = torch.cat([x.flatten(2), B, C], dim=-1)  # so that every part is strided
    u, B_part, C_part = mixed.split([10, 4, 4], dim=-1)
    n_chunks, size = split_into_chunks(length)
    assert n_chunks * size == length
    y = ssd_by_head(u, dt, A, B_part, C_part, D)
    torch.testing.assert_close(y.permute(1, 2, 0, 3), ssd_ref(x, dt, A, B, C, D))


@scans
def test_ssd_last_by_head_is_the_last_position(length: int, scale: float):
    x, dt, A, B, C = draw_scan(length, scale)
    lengths = torch.tensor([1, length, (length + 1) // 2])
    query = C[torch.arange(3), lengths - 1]
    y = ssd_last_by_head(x.flatten(2), dt, A, B, query, lengths)
    torch.testing.assert_close(y, ssd_last(x, dt, A, B, C, lengths))
