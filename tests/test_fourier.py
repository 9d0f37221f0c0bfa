"""Frequency branch: what passes, what is stopped, and who sees whom."""

import math

import pytest
import torch
from torch import Tensor

from m2rec.nn.branch import ItemBatch
from m2rec.nn.filters import CausalFilter, LowPassFilter


def one_mode(damping: float, period: float, cosine: float, sine: float = 0.0) -> CausalFilter:
    """A filter of one channel and one mode with the given values."""
    made = CausalFilter(1, 1, 50).double()
    with torch.no_grad():
        made.log_damping.fill_(math.log(damping))
        made.frequency.fill_(2 * math.pi / period)
        made.cosine.fill_(cosine)
        made.sine.fill_(sine)
    return made


def wave(period: float, length: int = 400) -> Tensor:
    """(1, length, 1), a sinusoid."""
    return torch.sin(2 * math.pi / period * torch.arange(length).double())[None, :, None]


def of_lengths(lengths: Tensor) -> ItemBatch:
    """Histories of these lengths, whatever their items."""
    return ItemBatch(torch.zeros(len(lengths), 0), lengths)


def test_initial_periods_are_log_spaced_from_2_to_the_longest():
    made = CausalFilter(3, 4, 54)
    periods = 2 * math.pi / made.frequency
    assert torch.allclose(periods, torch.tensor([2.0, 6.0, 18.0, 54.0]).expand(3, 4), rtol=1e-4)
    assert (made.log_damping.exp() > 0).all()


@pytest.mark.parametrize("length", [1, 2, 63, 200])
def test_equals_its_convolution_and_its_recurrence(length: int):
    made, x = CausalFilter(4, 5, 50).double(), torch.randn(3, length, 4).double()
    kernel = made.kernel(length)
    by_sum = torch.stack([(kernel[:, : t + 1].flip(1).T * x[:, : t + 1]).sum(1) for t in range(length)], 1)
    pole = torch.polar(torch.exp(-made.log_damping.exp()), made.frequency)
    h, steps = torch.zeros(3, 4, 5, dtype=torch.complex128), []
    for t in range(length):
        h = pole * h + x[:, t, :, None]
        steps.append((torch.complex(made.cosine, -made.sine) * h).real.sum(-1))
    assert torch.allclose(made(x), by_sum)
    assert torch.allclose(made(x), torch.stack(steps, 1))
    assert torch.allclose(made.advance(x, None)[1], h)


@pytest.mark.parametrize("cuts", [[1] * 20, [7, 13], [20]])
def test_advancing_in_pieces_equals_the_whole(cuts: list[int]):
    made, x = CausalFilter(4, 5, 50).double(), torch.randn(3, 20, 4).double()
    state, pieces = None, []
    for piece in x.split(cuts, dim=1):
        y, state = made.advance(piece, state)
        pieces.append(y)
    assert torch.allclose(torch.cat(pieces, 1), made(x))


def test_passes_its_own_frequency_and_stops_another():
    made = one_mode(damping=0.02, period=10, cosine=0.04)
    settled = slice(200, 400)
    own = made(wave(10))[:, settled].std() / wave(10)[:, settled].std()
    other = made(wave(3))[:, settled].std() / wave(3)[:, settled].std()
    assert 0.8 < own < 1.2
    assert other < 0.1


def test_an_all_pass_is_the_identity():
    made, x = one_mode(damping=1e4, period=7, cosine=1.0), torch.randn(2, 30, 1).double()
    assert torch.allclose(made(x), x)


def test_output_varies_as_the_input_does_at_the_start():
    x = torch.randn(8, 200, 64)
    assert 0.5 < CausalFilter(64, 16, 50)(x).std() < 2


def test_the_future_does_not_reach_the_past():
    made, x = CausalFilter(4, 5, 50), torch.randn(2, 20, 4)
    changed = x.clone()
    changed[:, 12:] += 1
    assert torch.allclose(made(x)[:, :12], made(changed)[:, :12], atol=1e-5)
    assert not torch.allclose(made(x)[:, 12:], made(changed)[:, 12:], atol=1e-3)


def test_low_pass_equals_the_fft_of_each_history():
    lengths = torch.tensor([1, 2, 7, 30])
    x = torch.randn(4, 30, 3)
    y = LowPassFilter(0.4, 30)(x, of_lengths(lengths))
    for row, n in enumerate(lengths.tolist()):
        spectrum = torch.fft.rfft(x[row, :n], dim=0)
        keep = math.ceil(0.4 * (n // 2 + 1))
        spectrum[keep:] = 0
        assert torch.allclose(y[row, :n], torch.fft.irfft(spectrum, n=n, dim=0), atol=1e-5)
        assert (y[row, n:] == 0).all()


def test_low_pass_passes_slow_and_stops_fast_waves():
    slow, fast, lengths = wave(50, 100).float(), wave(4, 100).float(), torch.tensor([100])
    made = LowPassFilter(0.3, 100)
    assert torch.allclose(made(slow, of_lengths(lengths)), slow, atol=1e-5)
    assert made(fast, of_lengths(lengths)).abs().max() < 1e-4


def test_low_pass_with_full_cutoff_is_the_identity():
    x, lengths = torch.randn(3, 20, 2), torch.tensor([20, 11, 4])
    y = LowPassFilter(1.0, 20)(x, of_lengths(lengths))
    for row, n in enumerate(lengths.tolist()):
        assert torch.allclose(y[row, :n], x[row, :n], atol=1e-5)


def test_low_pass_is_not_causal():
    """The reason why it is refused with dense rows."""
    made, x, batch = LowPassFilter(0.5, 20), torch.randn(1, 20, 2), of_lengths(torch.tensor([20]))
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.allclose(made(x, batch)[:, 0], made(changed, batch)[:, 0], atol=1e-4)
