"""What a training step looks up in its own tables equals what is computed anew, gradients included."""

from typing import Any

import pytest
import torch
from torch import Tensor

from m2rec.nn.encoder import Encoder
from m2rec.nn.losses import (
    LossInput,
    NegativeSampler,
    bpr,
    compute_loss,
    cross_entropy_ref,
    draw_negatives,
    gbce,
    sampled_cross_entropy,
)
from m2rec.nn.step_items import find_distinct_items
from m2rec.settings import ModelSettings
from tests.test_encoder import SMALL, L, T

LENGTHS = (12, 1, 9, 8, 2, 10)  # two groups; 42 items
FEW, MANY = 12, 500  # items: nearly all are in a step, and few are


def make_encoder(n_items: int, **settings: Any) -> Encoder:
    """In training, with text for all items but 5."""
    vectors = torch.randn(n_items, T)
    vectors[[0, 5]] = 0
    model_settings = ModelSettings(**{**SMALL, "n_negatives": 7, "negatives_shared": 20, **settings})
    return Encoder(model_settings, n_items, L, vectors).double().train()


def make_histories(n_items: int) -> tuple[Tensor, Tensor, Tensor]:
    """items (B, L), lengths (B,), targets (B, L)."""
    items, lengths = torch.randint(1, n_items, (len(LENGTHS), L)), torch.tensor(LENGTHS)
    items[torch.arange(L) >= lengths[:, None]] = 0
    items[0, :2] = 5  # without text, and twice
    return items, lengths, torch.randint(1, n_items, items.shape) * (items > 0)


def count_rows(encoder: Encoder) -> dict[str, list[int]]:
    """By projection of text: how many rows each call has, filled as the encoder runs."""
    counts: dict[str, list[int]] = {}
    for name, module in encoder.named_modules():
        if name == "table_text.linear" or name.endswith(".text.linear"):
            calls = counts[name] = []

            def record(_: object, given: tuple[Tensor], __: object, calls: list[int] = calls) -> None:
                calls.append(given[0].numel() // T)

            module.register_forward_hook(record)
    return counts


SPARSE = pytest.param(MANY, True, id="many-sparse")
CATALOGUES = [pytest.param(FEW, False, id="few"), pytest.param(MANY, False, id="many"), SPARSE]


def compute_gradients(loss: Tensor, parameters: list[Any]) -> list[Tensor]:
    """Dense gradients, whatever the encoder makes."""
    return [gradient.to_dense() for gradient in torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("way", ["dense", "last"])
@pytest.mark.parametrize(("n_items", "is_sparse"), CATALOGUES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixer": "mamba"},
        {"text_in_table": False},
        {"text_in_sequence": False},
        {"text_in_sequence": False, "text_in_table": False},
        {"id_dropout": 0.5},
    ],
    ids=lambda settings: "-".join(settings) or "defaults",
)
def test_vectors_and_gradients_equal_those_computed_anew(
    settings: dict[str, Any], n_items: int, is_sparse: bool, way: str
):
    encoder, (items, lengths, targets) = make_encoder(n_items, **settings), make_histories(n_items)
    parameters = [p for name, p in encoder.named_parameters() if name != "repeat_bias"]
    results = []
    for with_step in (True, False):
        torch.manual_seed(3)  # dropped IDs are drawn for the same appearances
        encoder.id_embedding.sparse = is_sparse and with_step
        step = encoder.prepare_step(items, [targets]) if with_step else None
        if way == "last":
            x = encoder.last(items, lengths, step)
        else:
            x, _, _ = encoder.encode_target_positions(items, lengths, targets, step)
        loss = (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum()
        loss = loss + encoder.embed_items(targets, step).square().sum()
        results.append([x, *compute_gradients(loss, parameters)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize(("n_items", "is_sparse"), CATALOGUES)
@pytest.mark.parametrize("id_dropout", [0.0, 0.5])
@pytest.mark.parametrize("loss_type", ["CE", "sampled", "gBCE", "BPR"])
def test_losses_and_gradients_equal_those_computed_anew(
    loss_type: str, id_dropout: float, n_items: int, is_sparse: bool
):
    encoder = make_encoder(n_items, loss_type=loss_type, id_dropout=id_dropout, repeat_bias=False)
    items, lengths, targets = make_histories(n_items)
    negatives = draw_negatives(encoder.settings, targets, NegativeSampler(n_items).double())
    results = []
    for with_step in (True, False):
        torch.manual_seed(3)
        encoder.id_embedding.sparse = is_sparse and with_step
        step = None
        if with_step:
            step = encoder.prepare_step(items, None if negatives is None else [targets, negatives.ids])
        x, rows, times = encoder.encode_target_positions(items, lengths, targets, step)
        wanted = targets[rows, times]
        chosen = negatives and negatives.select_positions(rows, times)
        if step is not None:
            loss = compute_loss(LossInput(encoder, step, x, wanted, None, chosen))
        elif chosen is None:
            loss = cross_entropy_ref(x, wanted, encoder.item_table())
        elif loss_type == "sampled":
            loss = sampled_cross_entropy(x, wanted, encoder.embed_items, *chosen)
        elif loss_type == "gBCE":
            loss = gbce(x, wanted, encoder.embed_items, chosen.ids, n_items, encoder.settings.gbce_t)
        else:
            loss = bpr(x, wanted, encoder.embed_items, chosen.ids)
        results.append([loss, *compute_gradients(loss, list(encoder.parameters()))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("loss_type", ["CE", "sampled", "BPR"])
@pytest.mark.parametrize("n_items", [FEW, MANY])
def test_each_text_is_projected_at_most_once(n_items: int, loss_type: str):
    """Over two groups of rows, two layers and the loss; the whole catalogue only where it is read."""
    encoder, (items, lengths, targets) = make_encoder(n_items, loss_type=loss_type), make_histories(n_items)
    counts = count_rows(encoder)
    negatives = draw_negatives(encoder.settings, targets, NegativeSampler(n_items).double())
    scored = None if negatives is None else [targets, negatives.ids]
    step = encoder.prepare_step(items, scored)
    x, rows, times = encoder.encode_target_positions(items, lengths, targets, step)
    chosen = negatives and negatives.select_positions(rows, times)
    compute_loss(LossInput(encoder, step, x, targets[rows, times], None, chosen)).backward()
    in_table = torch.cat([part.flatten() for part in (items, *(scored or [torch.arange(n_items)]))])
    expected = {"table_text.linear": [len(in_table.unique())]}
    for layer in range(2):
        expected[f"layers.{layer}.text.linear"] = [len(items.unique())]
    if n_items == FEW:
        expected = {name: [FEW] for name in expected}
    assert counts == expected


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("item", [1, 6])
def test_an_item_that_is_not_in_the_step_is_refused(is_sparse: bool, item: int):
    encoder, ids = make_encoder(MANY), torch.tensor([[3, 4]])
    encoder.id_embedding.sparse = is_sparse
    step = encoder.prepare_step(ids, [ids])
    with pytest.raises(IndexError):
        encoder.embed_items(torch.tensor([item]), step)


def test_a_sparse_gradient_has_the_rows_of_the_step_alone():
    encoder, (items, _, targets) = make_encoder(MANY), make_histories(MANY)
    encoder.id_embedding.sparse = True
    encoder.embed_items(targets, encoder.prepare_step(items, [targets])).sum().backward()
    gradient = encoder.id_embedding.weight.grad
    assert gradient is not None and gradient.is_sparse
    used = torch.cat([items.flatten(), targets.flatten()]).unique()
    assert gradient.coalesce().indices()[0].tolist() == used[used > 0].tolist()


def test_distinct_items():
    found = find_distinct_items([torch.tensor([[7, 3], [3, 0]]), torch.tensor([9])], 10)
    assert found.ids is not None and found.ids.tolist() == [0, 3, 7, 9]
    assert found.rows is not None and found.rows.tolist() == [0, -1, -1, 1, -1, -1, -1, 2, -1, 3]
    assert found.select(torch.arange(20.0).view(10, 2)).tolist() == [[0, 1], [6, 7], [14, 15], [18, 19]]
    most = find_distinct_items([torch.tensor([3, 1, 3, 3])], 4)
    assert most.ids is not None and most.ids.tolist() == [0, 1, 3]
    every = find_distinct_items([torch.tensor([3, 1, 2])], 4)
    assert every.ids is None and every.find_places(torch.tensor([3, 0])).tolist() == [3, 0]


def test_distinct_items_by_sorting():
    """Also where they are most of the items, or all."""
    found = find_distinct_items([torch.tensor([[7, 3], [3, 0]]), torch.tensor([9])], 10, by_sorting=True)
    assert found.ids is not None and found.ids.tolist() == [0, 3, 7, 9]
    assert found.find_places(torch.arange(11)).tolist() == [0, -1, -1, 1, -1, -1, -1, 2, -1, 3, -1]
    every = find_distinct_items([torch.tensor([3, 1, 2])], 4, by_sorting=True)
    assert every.ids is not None and every.ids.tolist() == [0, 1, 2, 3]


def test_autocast_does_not_reach_what_is_computed_once():
    """An item's gradient is a sum over its appearances, for which bfloat16 is too coarse."""
    encoder, (items, _, _) = make_encoder(MANY).float(), make_histories(MANY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = encoder.prepare_step(items)
    tensors = [step.table.rows, *step.layer_texts]
    assert {tensor.dtype for tensor in tensors if tensor is not None} == {torch.float32}
