"""Value heads: histograms have the right width and mean, and values outside are noticed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.core.config import component
from embodied.core.errors import ConfigError
from policies.critics.configs import HLGaussConfig
from policies.critics.heads import HLGauss

RANGES = [(-100.0, 0.0), (0.0, 1.0), (-3.0, 5.0)]


def hl_gauss(low=-100.0, high=0.0, **options):
    return HLGauss(HLGaussConfig(low=low, high=high, **options))


def moments(head, target):
    p = head.histogram(torch.as_tensor(target, dtype=torch.float32)).double()
    centres = head.centres_K.double()
    mean = (p * centres).sum(-1)
    return mean, (p * (centres - mean[..., None]).square()).sum(-1)


@pytest.mark.parametrize(("low", "high"), RANGES)
@given(share=st.floats(0.0, 1.0), sigma=st.sampled_from([0.75, 1.0, 2.0]))
@settings(max_examples=40, deadline=None)
def test_a_histogram_has_the_targets_mean_and_the_gaussians_variance(low, high, share, sigma):
    head = hl_gauss(low, high, sigma=sigma)
    margin = 6 * sigma * head.width
    target = low + margin + share * (high - low - 2 * margin)
    mean, variance = moments(head, target)
    assert abs(mean - target) < 1e-4 * (high - low)
    # Sheppard's correction: what lies in a bin counts as if it lay in its centre.
    assert variance / head.width**2 == pytest.approx(sigma**2 + 1 / 12, rel=5e-3)


@pytest.mark.parametrize(("low", "high"), RANGES)
@given(share=st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_values_come_back_three_bins_from_the_ends(low, high, share):
    head = hl_gauss(low, high)
    target = torch.tensor(low + 3 * head.width + share * (high - low - 6 * head.width))
    found = head.value(head.histogram(target).clamp(min=1e-30).log())
    assert abs(found - target) < 1e-4 * (high - low)


def test_the_ends_are_drawn_inward_by_what_is_known():
    """Sum p·centre − y at y = 0 is −.539; with √2 times the spread it would be −.711."""
    mean, _ = moments(hl_gauss(), 0.0)
    assert float(mean) == pytest.approx(-0.539, abs=1e-3)
    wide, _ = moments(hl_gauss(sigma=0.75 * math.sqrt(2)), 0.0)
    assert float(wide) == pytest.approx(-0.711, abs=1e-3)


def test_histograms_sum_to_one_and_rise_with_the_target():
    head = hl_gauss()
    target = torch.linspace(-101, 1, 2041)
    p = head.histogram(target)
    torch.testing.assert_close(p.sum(-1), torch.ones(2041))
    assert (p >= 0).all()
    mean, _ = moments(head, target)
    inside = (target > -100) & (target < 0)
    assert (mean.diff() >= -1e-9).all() and (mean[inside].diff() > 0).all()


def test_the_loss_is_least_at_the_targets_histogram():
    head = hl_gauss(-2.0, 2.0, bins=16)
    target = torch.tensor([-0.7, 0.2, 1.1])
    logits = torch.zeros(3, 16, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(logits, target).sum().backward()
        optimizer.step()
    torch.testing.assert_close(head.value(logits), target, atol=0.02, rtol=0)
    p = head.histogram(target)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
    torch.testing.assert_close(head.loss(logits, target), entropy, atol=1e-2, rtol=0)


@pytest.mark.parametrize("data", [{"name": "scalar"}, {"name": "hl_gauss", "low": -1, "high": 1}])
def test_one_target_serves_all_members(data):
    cls, options = component("value_heads", data, "critic.head")
    head = cls(options)
    logits = torch.randn(5, 4, 3, head.outputs, generator=torch.Generator().manual_seed(0))
    target = torch.linspace(-0.9, 0.9, 12).view(4, 3)
    loss = head.loss(logits, target)
    assert loss.shape == head.value(logits).shape == (5, 4, 3)
    for member in range(5):
        torch.testing.assert_close(head.loss(logits[member], target), loss[member])


def test_a_scalar_is_its_output():
    cls, options = component("value_heads", {"name": "scalar"}, "critic.head")
    logits, target = torch.tensor([[2.0], [-1.0]]), torch.tensor([5.0, -1.0])
    assert cls(options).value(logits).tolist() == [2.0, -1.0]
    assert cls(options).loss(logits, target).tolist() == [9.0, 0.0]
    assert cls(options).outside(target) == 0


def test_a_wrong_range_is_seen():
    head = hl_gauss()
    assert head.outside(torch.tensor([-100.0, -50.0, 0.0])) == 0
    assert head.outside(torch.tensor([-101.0, -50.0, 0.1, 3.0])) == 0.75
    torch.testing.assert_close(
        head.histogram(torch.tensor([-1e6, 7.0])), head.histogram(torch.tensor([-100.0, 0.0]))
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low": 1.0, "high": 0.0}, "low is 1.0 and high 0.0"),
        ({"low": 0.0, "high": math.inf}, "must be finite"),
        ({"low": 0.0}, "required field `high`"),
        ({"low": 0.0, "high": 1.0, "bins": 1}, "critic.head.bins"),
        ({"low": 0.0, "high": 1.0, "sigmas": 1}, "Did you mean 'critic.head.sigma'"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        component("value_heads", {"name": "hl_gauss", **options}, "critic.head")
