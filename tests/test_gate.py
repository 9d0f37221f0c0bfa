"""The merge of branches."""

import torch

from m2rec.nn.gate import MeanGate, SoftmaxGate

B, L, K, D = 2, 5, 3, 4


def test_weights_sum_to_one_and_merge():
    gate, branches = SoftmaxGate(K, D), torch.randn(B, L, K, D)
    torch.nn.init.normal_(gate.logits.weight)
    merged, weights = gate(branches, torch.ones(B, L, K, dtype=torch.bool))
    assert torch.allclose(weights.sum(2), torch.ones(B, L, D))
    assert torch.allclose(merged, sum(weights[:, :, k] * branches[:, :, k] for k in range(K)), atol=1e-6)
    assert weights.std() > 0.01


def test_starts_as_the_mean():
    branches, available = torch.randn(B, L, K, D), torch.ones(B, L, K, dtype=torch.bool)
    by_gate, by_mean = SoftmaxGate(K, D)(branches, available)[0], MeanGate()(branches, available)[0]
    assert torch.allclose(by_gate, branches.mean(2), atol=1e-6)
    assert torch.allclose(by_mean, branches.mean(2), atol=1e-6)


def test_a_branch_that_has_nothing_to_say_gets_no_weight():
    branches, available = torch.randn(B, L, K, D), torch.ones(B, L, K, dtype=torch.bool)
    available[0, 2, 1] = False
    for gate in (SoftmaxGate(K, D), MeanGate()):
        merged, weights = gate(branches, available)
        assert (weights[0, 2, 1] == 0).all()
        assert torch.allclose(merged[0, 2], (branches[0, 2, 0] + branches[0, 2, 2]) / 2, atol=1e-6)
        assert torch.isfinite(merged).all()


def test_the_merged_branches_keep_their_type():
    branches = torch.randn(B, L, K, D, dtype=torch.bfloat16)
    for gate in (SoftmaxGate(K, D).bfloat16(), MeanGate()):
        assert gate(branches)[0].dtype == torch.bfloat16


def test_weights_keep_float32_under_autocast():
    gate, branches = SoftmaxGate(K, D), torch.randn(B, L, K, D)
    torch.nn.init.normal_(gate.logits.weight)
    with torch.autocast("cpu", torch.bfloat16):
        _, weights = gate(branches)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.sum(2), torch.ones(B, L, D), atol=1e-6)
