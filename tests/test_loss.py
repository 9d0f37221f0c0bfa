"""Losses against what they estimate."""

import math

import pytest
import torch
from torch.nn import functional as F

from m2rec.nn.losses import (
    NegativeSampler,
    bpr,
    cross_entropy,
    cross_entropy_ref,
    draw_other_items,
    gbce,
    sampled_cross_entropy,
)
from m2rec.nn.repeat_bias import RepeatBias

S, D, V = 40, 8, 50


def made() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(S, D), torch.randint(1, V, (S,)), torch.randn(V, D)


def seen(positions: int, bias: torch.Tensor, n_items: int = V, length: int = 9) -> RepeatBias:
    """Histories in which positions lie anywhere, with items that occur twice."""
    items = torch.randint(1, min(n_items, 12), (4, length))
    return RepeatBias(items, torch.randint(4, (positions,)), torch.randint(length, (positions,)), bias)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("n_items", [2, V, 300_000])
def test_cross_entropy_in_chunks_equals_the_whole(n_items: int, repeated: bool):
    """Value and gradients; with 300,000 items and 1 MiB a chunk is a single position."""
    x, table, bias = torch.randn(7, D).double(), torch.randn(n_items, D).double(), torch.tensor(0.7).double()
    targets = torch.randint(1, n_items, (7,))
    random = torch.get_rng_state()
    results = []
    for function, options in ((cross_entropy_ref, {}), (cross_entropy, {"memory": 1})):
        leaves = [value.clone().requires_grad_() for value in (x, table, bias)][: 3 if repeated else 2]
        torch.set_rng_state(random)
        repeats = seen(7, leaves[2], n_items) if repeated else None
        loss = function(leaves[0], targets, leaves[1], repeats, **options) * 3
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for whole, chunked in zip(*results, strict=True):
        assert torch.allclose(whole, chunked, atol=1e-12)


def test_cross_entropy_holds_no_more_scores_than_asked(monkeypatch: pytest.MonkeyPatch):
    """The largest product made inside stays within `memory` MiB."""
    sizes: list[int] = []
    original = torch.softmax

    def spy(scores: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        sizes.append(scores.numel() * scores.element_size())
        assert kwargs["out"] is scores  # no second copy
        return original(scores, *args, **kwargs)

    monkeypatch.setattr(torch, "softmax", spy)
    cross_entropy(
        torch.randn(5_000, D), torch.ones(5_000, dtype=torch.int64), torch.randn(1_000, D), memory=1
    )
    assert len(sizes) == 20 and max(sizes) <= 2**20


def test_cross_entropy_of_scores_far_apart():
    """A target whose probability is zero in float32 has a finite loss, and the whole gradient."""
    x, table = torch.tensor([[300.0]]), torch.tensor([[0.0], [1.0], [-1.0], [0.5]])
    x.requires_grad_()
    loss = cross_entropy(x, torch.tensor([2]), table)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.item() == 600 and gradient.item() == 2


def test_cross_entropy_leaves_padding_out():
    x, targets, table = made()
    table[0] = 100
    by_hand = -(x @ table[1:].T).log_softmax(1)[torch.arange(S), targets - 1].mean()
    assert torch.allclose(cross_entropy(x, targets, table), by_hand)


@pytest.mark.parametrize("groups", [1, 3, S])
@pytest.mark.parametrize("counts", [None, torch.arange(V) % 7])
@pytest.mark.parametrize("bias", [None, -4.0, 2.0])
def test_sampled_estimates_the_whole(counts: torch.Tensor | None, groups: int, bias: float | None):
    """With very many negatives the sampled partition sum comes near the whole one, however drawn."""
    x, targets, table = made()
    repeats = None if bias is None else seen(S, torch.tensor(bias))
    whole = cross_entropy(x, targets, table, repeats)
    negatives = NegativeSampler(V, counts)(groups, 200_000 // groups)
    sampled = sampled_cross_entropy(x, targets, lambda ids: table[ids], *negatives, repeats)
    assert abs(float(whole - sampled)) < 0.03


def test_sampled_never_uses_the_target_as_negative():
    """With two items there is one other item, so the loss is that of two classes, corrected."""
    x, targets, table = torch.randn(S, D), torch.randint(1, 3, (S,)), torch.randn(3, D)
    other = table[3 - targets]
    loss = sampled_cross_entropy(x, targets, lambda ids: table[ids], *NegativeSampler(3)(1, 1000))
    exact = F.softplus((x * (other - table[targets])).sum(-1)).mean()
    assert abs(float(loss - exact)) < 0.15


def test_losses_stay_finite_when_every_negative_is_the_target():
    x = torch.randn(S, D, requires_grad=True)
    table, targets, ids = (
        torch.randn(3, D),
        torch.ones(S, dtype=torch.int64),
        torch.ones(1, 4, dtype=torch.int64),
    )
    losses = [
        sampled_cross_entropy(x, targets, lambda i: table[i], ids, torch.zeros(1, 4)),
        gbce(x, targets, lambda i: table[i], ids, 3, 0.75),
    ]
    for loss in losses:
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


def test_negatives_are_drawn_as_often_as_they_say():
    counts = torch.tensor([100, 0, 3, 9, 0])  # padding's count does not matter
    sampler, n = NegativeSampler(5, counts), 40_000
    ids, log_probability = sampler(n)
    assert torch.equal(sampler.log_probability[ids], log_probability)
    drawn = torch.bincount(ids, minlength=5)
    expected = n * torch.tensor([0, 1, 4, 10, 1]) / 16
    assert drawn[0] == 0
    assert ((drawn - expected).abs() < 5 * expected.sqrt() + 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_negatives_do_not_hang_on_the_type_of_the_model(dtype: torch.dtype):
    """Those that a draw of float64 between the shares of the items gives, in a model cast whole too."""
    counts = torch.randint(0, 5_000, (2_000,))
    weights = counts[1:].double() + 1
    shares = weights.cumsum(0) / weights.sum()
    random = torch.get_rng_state()
    ids, _ = NegativeSampler(2_000, counts).to(dtype)(300, 1_000)
    torch.set_rng_state(random)
    draw = torch.rand(300, 1_000, dtype=torch.float64)
    assert torch.equal(ids, torch.searchsorted(shares, draw, right=True) + 1)


@pytest.mark.parametrize("bias", [0.0, -2.0])
def test_gbce_by_hand(bias: float):
    x, targets, table = made()
    repeats = seen(S, torch.tensor(bias))
    raised = torch.zeros(S, V)
    raised[repeats.find_seen_pairs(0, S)] = bias
    negatives = torch.tensor([[1, 2, 3], [4, 5, 6]])
    t, alpha = 0.5, 3 / (V - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)  # equation 13
    total = 0.0
    for i, (row, target) in enumerate(zip(x, targets, strict=True)):
        scores = table @ row + raised[i]
        total += float(-torch.log(torch.sigmoid(scores[target]) ** beta))
        for j in negatives[i // (S // 2)]:
            total -= float(torch.log(1 - torch.sigmoid(scores[j]))) if j != target else 0.0
    loss = gbce(x, targets, lambda ids: table[ids], negatives, V, t, repeats)
    assert float(loss) == pytest.approx(total / (S * 4), rel=1e-4)


def test_bpr_by_hand():
    x, targets, table = made()
    negatives = draw_other_items(targets, V)
    assert ((negatives >= 1) & (negatives < V) & (negatives != targets)).all()
    difference = (x * table[targets]).sum(1) - (x * table[negatives]).sum(1)
    expected = torch.log(1 + torch.exp(-difference)).mean()
    assert torch.allclose(bpr(x, targets, lambda ids: table[ids], negatives), expected, atol=1e-5)

    repeats = seen(S, torch.tensor(3.0))
    raised = torch.zeros(S, V)
    raised[repeats.find_seen_pairs(0, S)] = 3.0
    difference += raised[torch.arange(S), targets] - raised[torch.arange(S), negatives]
    expected = torch.log(1 + torch.exp(-difference)).mean()
    assert torch.allclose(bpr(x, targets, lambda ids: table[ids], negatives, repeats), expected, atol=1e-5)


def test_other_items_are_uniform_and_need_two_items():
    draws = draw_other_items(torch.full((60_000,), 2), 5)
    counts = torch.bincount(draws, minlength=5)
    assert counts[0] == counts[2] == 0
    assert all(abs(int(counts[i]) - 20_000) < 5 * math.sqrt(20_000) for i in (1, 3, 4))
    with pytest.raises(ValueError, match="loss_type: BPR needs at least two items"):
        draw_other_items(torch.tensor([1]), 2)


def test_second_derivatives_are_refused_and_the_reference_has_them():
    """Such as a gradient penalty takes; the chunked form would hand on a constant without a word."""
    x, targets, table = made()
    x.requires_grad_()
    loss = cross_entropy(x, targets, table)
    with pytest.raises(
        ValueError, match=r"^cross_entropy has no second derivative .*; use cross_entropy_ref"
    ):
        torch.autograd.grad(loss, x, create_graph=True)
    (first,) = torch.autograd.grad(cross_entropy_ref(x, targets, table), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.abs().max() > 0
