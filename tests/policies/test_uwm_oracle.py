"""The unified world model under the ideal network of a system whose every conditional is known."""

import numpy as np
import pytest
import torch
from scalar_system import (
    CELLS,
    COVARIANCE,
    MEAN,
    MODES,
    SAMPLED,
    STATE,
    N,
    ideal,
    losses_at,
    moments,
    scalar,
    system,
)

from policies import noise

EXACT = {
    "policy": (-0.4, 0.09),
    "next": (0.7, 0.0325),
    "forward": (1.0, 0.01),
    "inverse": (-0.26154, 0.027692),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("steps", "marginal_step"), [(10, 90), (100, None)])
def test_each_mode_follows_its_recursion(mode, steps, marginal_step):
    policy = ideal(num_steps=steps, marginal_step=marginal_step)
    assert moments(policy, mode) == pytest.approx(SAMPLED[steps][mode], abs=1.1e-5)


def test_where_pure_noise_is_fed_at_the_last_step_the_mean_is_exact():
    policies = [ideal(num_steps=N, marginal_step=step) for step in (None, 90)]
    errors = [abs(moments(policy, "next")[0] - EXACT["next"][0]) for policy in policies]
    assert errors[0] < 1e-4 < 2e-4 < errors[1]


def test_the_joint_mode_samples_the_joint_law():
    found = ideal(num_steps=N).infer(
        {STATE: np.ones((4000, 1, 1), np.float32)},
        want={"actions", "next_obs"},
        seed=np.arange(4000),
    )
    pairs_B2 = torch.cat([found["actions"][:, 0], found["next_obs"][STATE][:, 0]], dim=1)
    torch.testing.assert_close(pairs_B2.mean(0).double(), MEAN, atol=0.015, rtol=0)
    torch.testing.assert_close(torch.cov(pairs_B2.T).double(), COVARIANCE, atol=0.006, rtol=0.05)


def test_the_loss_of_the_ideal_network_is_the_floor():
    """The floor is the mean over all pairs of times of the diagonal of I − R^½ (…)⁻¹ R^½."""
    policy = ideal()
    policy.seed_training(0)
    metrics = policy.loss(system(200_000))[1]
    assert metrics["action_loss"] == pytest.approx(0.20941, abs=0.003)
    assert metrics["next_loss"] == pytest.approx(0.12958, abs=0.003)
    assert metrics["loss"] == pytest.approx(0.33899, abs=0.005)


@pytest.mark.parametrize("cell", CELLS)
def test_at_any_two_times_the_ideal_network_has_its_floor(cell):
    policy = ideal()
    floor = policy.network.floor(torch.tensor([cell]))[0]
    assert floor.tolist() == pytest.approx(CELLS[cell], abs=6e-6)
    found = losses_at(policy, cell, system(200_000))
    assert found == pytest.approx(CELLS[cell], rel=0.02, abs=1e-7)


def test_the_objective_given_the_next_observation_has_its_own_floor():
    policy, rows = ideal(), 100_000
    batch = system(rows)
    seen, later, a = (
        torch.from_numpy(batch[k]).double() for k in (STATE, "future." + STATE, "action")
    )
    rng = torch.Generator().manual_seed(0)
    t = torch.arange(N)
    for time, told in ((0.99, torch.randn(later.shape, generator=rng)), (0.0, later)):
        cond_BC = torch.cat([seen[:, 0], torch.full((rows, 1), time), told[:, 0]], dim=1)
        t_N2 = torch.stack([t, torch.full_like(t, round(time * N))], dim=1)
        gain_N22, _ = policy.network.gain(t_N2)
        rest_N = (1 - policy.network.alpha_bar_N).sqrt()
        floor = (1 - gain_N22[:, 0, 0] * rest_N).mean().item()
        assert policy.objective(a, cond_BC, rng).mean().item() == pytest.approx(floor, abs=0.006)


def test_what_is_open_has_no_say_in_a_decision_and_what_is_known_has():
    """Noise says nothing at the last time, something before it, and at the first it is known."""
    rows = 64
    start_BHD = noise.start_noise(list(range(rows)), 1, 1).double()

    def moved(step):
        policy = ideal(marginal_step=step)
        seen_BC = policy.encode({STATE: np.ones((rows, 1, 1), np.float32)})
        seeds = [list(range(first, first + rows)) for first in (1000, 2000)]
        drawn = [policy.drawn(seen_BC, source) for source in seeds]
        assert not torch.equal(*drawn)
        first, second = (policy.integrate(start_BHD, cond_BC, None) for cond_BC in drawn)
        return (first - second).abs().mean().item()

    assert moved(None) < 1e-4 < 5e-3 < moved(90) < 0.05 and moved(0) > 1


@pytest.mark.parametrize("form", ["diffusion", "flow"])
def test_both_heads_begin_at_zero(form):
    policy = scalar(form=form)
    rng = torch.Generator().manual_seed(0)
    x, later, seen = (torch.randn(5, 1, generator=rng) for _ in range(3))
    time, next_time = torch.rand(2, 5, generator=rng)
    for out in policy.network.both(x[:, None], time, later, next_time, seen):
        assert (out == 0).all()
    if form == "diffusion":
        loss, metrics = policy.loss(system(20_000))
        assert loss.item() == pytest.approx(2, abs=0.04)
        assert metrics["action_loss"] == pytest.approx(1, abs=0.03)
