"""Losses against what they estimate."""

import math

import pytest
import torch
from torch.nn import functional as F

from m2rec.loss import bpr, cross_entropy, other_items, sampled_cross_entropy

S, D, V = 40, 8, 50


def made() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(S, D), torch.randint(1, V, (S,)), torch.randn(V, D)


def test_cross_entropy_leaves_padding_out():
    x, targets, table = made()
    table[0] = 100
    by_hand = -(x @ table[1:].T).log_softmax(1)[torch.arange(S), targets - 1].mean()
    assert torch.allclose(cross_entropy(x, targets, table), by_hand)


def test_sampled_estimates_the_whole():
    """With very many negatives the sampled partition sum comes near the whole one."""
    x, targets, table = made()
    whole = cross_entropy(x, targets, table)
    sampled = sampled_cross_entropy(x, targets, lambda ids: table[ids], V, 200_000)
    assert abs(float(whole - sampled)) < 0.02


def test_sampled_never_uses_the_target_as_negative():
    """With two items there is one other item, so the loss is that of two classes, corrected."""
    x, targets, table = torch.randn(S, D), torch.randint(1, 3, (S,)), torch.randn(3, D)
    n = 1000
    other = table[3 - targets]
    loss = sampled_cross_entropy(x, targets, lambda ids: table[ids], 3, n)
    assert torch.isfinite(loss)
    exact = F.softplus((x * (other - table[targets])).sum(-1)).mean()
    assert abs(float(loss - exact)) < 0.15


def test_bpr_by_hand():
    x, targets, table = made()
    negatives = other_items(targets, V)
    assert ((negatives >= 1) & (negatives < V) & (negatives != targets)).all()
    difference = (x * table[targets]).sum(1) - (x * table[negatives]).sum(1)
    expected = torch.log(1 + torch.exp(-difference)).mean()
    assert torch.allclose(bpr(x, targets, lambda ids: table[ids], negatives), expected, atol=1e-5)


def test_other_items_are_uniform_and_need_two_items():
    draws = other_items(torch.full((60_000,), 2), 5)
    counts = torch.bincount(draws, minlength=5)
    assert counts[0] == counts[2] == 0
    assert all(abs(int(counts[i]) - 20_000) < 5 * math.sqrt(20_000) for i in (1, 3, 4))
    with pytest.raises(ValueError, match="loss_type: BPR needs two items"):
        other_items(torch.tensor([1]), 2)
