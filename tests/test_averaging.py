"""The moving average of the weights."""

import pytest
import torch

from m2rec.training.ema import WeightEMA


def filled(model: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def test_the_average_by_hand():
    """With 2 steps to look back each step moves it half of the way, as the start moves it more."""
    model = torch.nn.Linear(2, 2)
    filled(model, 1.0)
    average = WeightEMA(model, 2)
    filled(model, 3.0)
    average.update()  # 9 / 10 of the way
    assert average.averages["weight"].unique().tolist() == pytest.approx([2.8])
    for _ in range(20):
        average.update()
    filled(model, 5.0)
    average.update()
    assert average.averages["bias"].unique().tolist() == pytest.approx([4.0], abs=1e-5)


def test_in_place_and_back():
    model = torch.nn.Linear(2, 2)
    filled(model, 1.0)
    average = WeightEMA(model, 100)
    filled(model, 2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(RuntimeError, match="on purpose"), average.average_parameters():
        assert model.weight.unique().item() == 1.0
        raise RuntimeError("on purpose")
    assert model.weight.unique().item() == 2.0 and average.averages["weight"].unique().item() == 1.0
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert model.weight.unique().item() == 1.0  # the optimizer still moves the model's own


def test_one_step_is_no_average():
    model = torch.nn.Linear(2, 2)
    average = WeightEMA(model, 1)
    for value in (3.0, 7.0):
        filled(model, value)
        average.update()
        assert average.averages["weight"].unique().item() == value


def test_going_on():
    model = torch.nn.Linear(2, 2)
    average = WeightEMA(model, 10)
    average.load({"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, 7)
    assert average.n_updates == 7 and average.averages["weight"].unique().item() == 1.0
    with pytest.raises(ValueError, match="the averages are of another model"):
        average.load({"weight": torch.ones(3, 2), "bias": torch.zeros(2)}, 7)
