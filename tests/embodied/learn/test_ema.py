import numpy as np
import pytest
import torch

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.learn.ema import EMA


class One(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(1))


def set_to(model, value):
    with torch.no_grad():
        model.weight.fill_(value)


def test_average_has_its_closed_form():
    """Σ_k (1 − d_k) Π_{j>k} d_j θ_k with d_k = min(cap, 1 − (1 + k)^(−p))."""
    model = One()
    set_to(model, 99.0)
    ema = EMA(model, decay=0.8, power=0.75)
    values = np.random.default_rng(0).normal(size=30)
    decays = np.minimum(0.8, 1 - (1.0 + np.arange(30)) ** -0.75)
    for k, value in enumerate(values):
        assert ema.present_decay == pytest.approx(decays[k])
        set_to(model, value)
        ema.update(model)
    weights = (1 - decays) * np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)
    assert weights.sum() == pytest.approx(1)  # d_0 = 0: the initial 99 is forgotten
    torch.testing.assert_close(
        ema.parameters()["weight"], torch.full((3,), float(weights @ values), dtype=torch.float64)
    )


def test_resumes_where_it_was_saved():
    model = One()
    straight, resumed = EMA(model), EMA(model)
    for k in range(5):
        set_to(model, k)
        straight.update(model)
    parameters, updates = straight.parameters(), straight.updates
    resumed.load(parameters, updates)
    parameters["weight"].fill_(np.nan)  # a copy: changing it changes neither
    for k in range(5):
        set_to(model, k * k)
        straight.update(model)
        resumed.update(model)
    assert torch.equal(straight.parameters()["weight"], resumed.parameters()["weight"])


def test_averages_of_another_network_are_refused():
    ema = EMA(One())
    for parameters in (
        {},
        {"weight": torch.zeros(3, dtype=torch.float64), "bias": torch.zeros(1)},
        {"weight": torch.zeros(4, dtype=torch.float64)},
        {"weight": torch.zeros(3)},
    ):
        with pytest.raises(CorruptDataError, match=r"weight|bias"):
            ema.load(parameters, 3)
    assert ema.updates == 0
    for options in ({"decay": 1.0}, {"decay": -0.1}, {"power": -1.0}):
        with pytest.raises(ConfigError, match="decay"):
            EMA(One(), **options)
