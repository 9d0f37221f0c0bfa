"""Dropout on a CPU: shares, independence, gradients, seeds, and where PyTorch's own runs."""

import math

import pytest
import torch

from m2rec.nn.dropout import Dropout

N = 400_003  # not a multiple of four


def draw_kept(p: float, n: int = N) -> torch.Tensor:
    """Which of n ones a fresh mask keeps."""
    return Dropout(p)(torch.ones(n)) != 0


@pytest.mark.parametrize("p", [0.001, 0.2, 0.4, 0.5, 0.9])
def test_the_share_that_is_kept_and_its_scale(p: float):
    y = Dropout(p)(torch.ones(N))
    kept = y[y != 0]
    assert abs(len(kept) / N - (1 - p)) < 5 * math.sqrt(p * (1 - p) / N) + 1 / 65_536
    assert kept.unique().numel() == 1 and float(kept[0]) == pytest.approx(1 / (1 - p), rel=1e-4)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 64, 256])
def test_neighbours_are_independent(distance: int):
    """Within one draw of 64 bits and across draws: both kept as often as independent ones are."""
    kept = draw_kept(0.4)
    both = (kept[distance:] & kept[:-distance]).double().mean()
    assert abs(float(both) - 0.36) < 5 * math.sqrt(0.36 * 0.64 / N) + 1e-4


def test_each_place_within_a_draw_is_kept_as_often():
    """Also the one with the sign of the 64 bits, at a share where a missing bit would show."""
    for p in (0.25, 0.75):
        shares = draw_kept(p)[: N // 4 * 4].view(-1, 4).double().mean(0)
        assert (shares - (1 - p)).abs().max() < 5 * math.sqrt(p * (1 - p) / (N // 4)) + 1e-4


def test_the_gradient_has_the_mask():
    x = torch.randn(3, 5, 7, requires_grad=True)
    y = Dropout(0.4)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient * x, y)
    assert 0 < (gradient == 0).sum() < x.numel()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (5, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_shape_and_type(shape: tuple[int, ...], dtype: torch.dtype):
    y = Dropout(0.5)(torch.ones(shape, dtype=dtype))
    assert y.shape == shape and y.dtype == dtype
    assert ((y == 0) | (y == 2)).all()


def test_a_transposed_input():
    """The mask does not hang on how x lies in memory."""
    x = torch.randn(4, 6)
    results = []
    for given in (x, x.T.contiguous().T):
        torch.manual_seed(1)
        results.append(Dropout(0.3)(given))
    assert torch.equal(*results)


def test_the_same_seed_gives_the_same_masks():
    torch.manual_seed(5)
    first, second = draw_kept(0.4), draw_kept(0.4)
    torch.manual_seed(5)
    assert torch.equal(draw_kept(0.4), first) and not torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(draw_kept(0.4), first)


def test_nothing_is_dropped_outside_training():
    x = torch.randn(5)
    assert torch.equal(Dropout(0.4).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()


def test_compiled_code_draws_the_same_masks():
    compiled = torch.compile(Dropout(0.4), backend="aot_eager", fullgraph=True)
    x = torch.randn(50)
    torch.manual_seed(1)
    y = compiled(x)
    torch.manual_seed(1)
    assert torch.equal(y, Dropout(0.4)(x))
    torch.library.opcheck(torch.ops.m2rec.draw_mask, (x, 9), test_utils=("test_schema", "test_faketensor"))
