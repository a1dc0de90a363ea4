"""The unified world model on a scalar system whose every conditional is known.

a ~ N(K o, s²), o′ = A o + B a + N(0, w), at o = 1.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from embodied.core.specs import ArraySpec, DeviceSpec
from policies import noise
from policies.build import build_policy

STATE = "observation.state"
A, B, K, S2, W = 0.9, 0.5, -0.4, 0.09, 0.01
N = 100


def scalar(**options):
    """A policy for chunks of one number, whose normalisers are identities."""
    device = DeviceSpec({STATE: ArraySpec((1,))}, ArraySpec((1,), low=(-1.0,), high=(1.0,)), 10.0)
    stats = {STATE: SimpleNamespace(mean=[0.0], std=[1.0], min=[-1.0], max=[1.0])}
    sizes = {"width": 32, "depth": 2, "heads": 2, "time_dim": 32, "registers": 2}
    config = {"n_obs_steps": 1, "horizon": 1, "n_action_steps": 1, **sizes, **options}
    return build_policy("uwm", config, device, [STATE], stats, seed=0)


def system(rows, seed=0, o=1.0, gain=K):
    """A batch of windows; o: what is observed, a number or one for each row."""
    rng = np.random.default_rng(seed)
    o = np.broadcast_to(np.asarray(o), (rows,))
    a = gain * o + math.sqrt(S2) * rng.standard_normal(rows)
    later = A * o + B * a + math.sqrt(W) * rng.standard_normal(rows)
    columns = {STATE: o, "action": a, "future." + STATE: later}
    batch = {key: x.astype(np.float32)[:, None, None] for key, x in columns.items()}
    nothing = np.zeros((rows, 1), bool)
    return batch | {"action_is_pad": nothing, "future_is_pad": nothing}


MEAN = torch.tensor([K, A + B * K], dtype=torch.float64)
COVARIANCE = torch.tensor([[S2, B * S2], [B * S2, B * B * S2 + W]], dtype=torch.float64)


class Ideal(nn.Module):
    """E[ε | x] = R^½ (D Σ Dᵀ + R)⁻¹ (x − D m), with the joint law of (a, o′) at o = 1."""

    def __init__(self, policy):
        super().__init__()
        self.alpha_bar_N = policy.form.schedule.alpha_bar_N.double()

    def gain(self, t_B2):
        alpha_bar_B2 = self.alpha_bar_N[t_B2]
        signal_B22, rest_B22 = (
            torch.diag_embed(x) for x in (alpha_bar_B2.sqrt(), 1 - alpha_bar_B2)
        )
        law_B22 = signal_B22 @ COVARIANCE @ signal_B22 + rest_B22
        return rest_B22.sqrt() @ torch.linalg.inv(law_B22), signal_B22

    def both(self, x_BHD, time_B, next_BN, next_time_B, seen_BC):
        x_B2 = torch.cat([x_BHD[:, 0], next_BN], dim=1).double()
        t_B2 = (torch.stack([time_B, next_time_B], dim=1) * N).round().long()
        gain_B22, signal_B22 = self.gain(t_B2)
        eps_B2 = (gain_B22 @ (x_B2 - (signal_B22 @ MEAN))[..., None])[..., 0]
        return eps_B2[:, None, :1], eps_B2[:, 1:]

    def forward(self, x_BHD, time_B, cond_BC):
        return self.both(x_BHD, time_B, cond_BC[:, 2:], cond_BC[:, 1], cond_BC[:, :1])[0]


def ideal(**options):
    policy = scalar(**{"timestep_spacing": "leading", "clip_sample": False} | options)
    policy.network = Ideal(policy)
    return policy.double()


MODES = {
    "policy": ({"actions"}, {}),
    "next": ({"next_obs"}, {}),
    "forward": ({"next_obs"}, {"actions": 0.2}),
    "inverse": ({"actions"}, {"next_obs": 0.8}),
}
SAMPLED = {
    10: {
        "policy": (-0.38686, 0.06042),
        "next": (0.68732, 0.01777),
        "forward": (0.98892, 0.00418),
        "inverse": (-0.25927, 0.01534),
    },
    100: {
        "policy": (-0.39994, 0.08582),
        "next": (0.69994, 0.03005),
        "forward": (0.99789, 0.00876),
        "inverse": (-0.26381, 0.02657),
    },
}
"""Mean and variance after so many steps of DDIM under the ideal network, by an affine recursion."""

EXACT = {
    "policy": (-0.4, 0.09),
    "next": (0.7, 0.0325),
    "forward": (1.0, 0.01),
    "inverse": (-0.26154, 0.027692),
}


def infer(policy, mode, seeds, o=1.0):
    """One number for each seed."""
    want, given = MODES[mode]
    full = {key: np.full((len(seeds), 1, 1), value, np.float32) for key, value in given.items()}
    if "next_obs" in full:
        full["next_obs"] = {STATE: full["next_obs"]}
    obs = {STATE: np.full((len(seeds), 1, 1), o, np.float32)}
    (found,) = policy.infer(obs, want=want, seed=seeds, **full).values()
    return (found[STATE] if isinstance(found, dict) else found).double().flatten()


def moments(policy, mode):
    """Mean and variance of what a mode samples; it is affine in the two numbers of noise."""
    seeds = list(range(20))
    draws = [noise.start_noise(seeds, 1, 1)[:, 0], noise.further_noise(seeds, 1)]
    inside = draws[0].abs()[:, 0] < 1.5  # beyond, actions may reach their bounds
    design = torch.cat([torch.ones(20, 1), *draws], dim=1).double()[inside]
    sampled = infer(policy, mode, np.array(seeds)[inside.numpy()])[:, None]
    fitted = torch.linalg.lstsq(design, sampled).solution
    torch.testing.assert_close(design @ fitted, sampled, atol=1e-6, rtol=0)
    mean, *slopes = fitted[:, 0].tolist()
    return mean, sum(slope**2 for slope in slopes)


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


def train(policy, batches, steps, rate=4e-3):
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for step in range(steps):
        loss, _ = policy.loss(batches(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy


@pytest.mark.slow
def test_a_trained_network_has_every_conditional():
    policy = scalar(timestep_spacing="leading", clip_sample=False)
    train(policy, lambda step: system(256, step), 1000)
    floors = ideal()
    for one in (policy, floors):
        one.seed_training(0)
    held_out = system(50_000, 10_000)
    with torch.no_grad():
        found, floor = (one.loss(held_out)[0].item() for one in (policy, floors))
    assert 0.995 * floor < found < 1.03 * floor
    seeds = np.arange(2000)
    for mode, (mean, variance) in SAMPLED[10].items():
        sampled = infer(policy, mode, seeds)
        assert sampled.mean().item() == pytest.approx(mean, abs=0.06), mode
        assert sampled.var().item() == pytest.approx(variance, abs=0.02), mode
    rng = torch.Generator().manual_seed(1)
    chunk, later = torch.randn(500, 1, 1, generator=rng), torch.randn(500, 1, generator=rng)
    middle, seen = torch.full((500,), 0.5), torch.ones(500, 1)

    def moved(next_time):
        times = middle, torch.full((500,), next_time)
        outs = [
            policy.network.both(chunk, times[0], sign * later, times[1], seen)[0]
            for sign in (1, -1)
        ]
        return (outs[0] - outs[1]).abs().mean().item()

    with torch.no_grad():
        assert moved(policy.form.last) < 0.05 and moved(0.0) > 0.3


@pytest.mark.slow
def test_a_network_that_has_it_left_out_has_every_conditional_too():
    policy = scalar(timestep_spacing="leading", clip_sample=False, left_out=0.3)
    train(policy, lambda step: system(256, step), 1000)
    for mode, (mean, variance) in SAMPLED[10].items():
        sampled = infer(policy, mode, np.arange(2000))
        assert sampled.mean().item() == pytest.approx(mean, abs=0.06), mode
        assert sampled.var().item() == pytest.approx(variance, abs=0.02), mode


@pytest.mark.slow
def test_rows_without_actions_teach_what_follows_but_not_what_to_do():
    """A quarter of the rows have no actions; there another controller acted, with the gain −K.

    At the last time of the actions are all these rows, and one in N of the others.
    """
    policy = scalar(timestep_spacing="leading", clip_sample=False, depth=1, width=64)

    def batches(step):
        own, other = system(192, step), system(64, step + 100_000, gain=-K)
        batch = {key: np.concatenate([own[key], other[key]]) for key in own}
        batch["action_is_pad"] = np.repeat([False, True], [192, 64])[:, None]
        return batch

    train(policy, batches, 1000, 6e-3)
    seeds = np.arange(2000)
    mixture = (A - B * K + 3 / N * (A + B * K)) / (1 + 3 / N)
    assert infer(policy, "next", seeds).mean().item() == pytest.approx(mixture, abs=0.06)
    for mode in ("policy", "forward", "inverse"):
        mean, variance = SAMPLED[10][mode]
        sampled = infer(policy, mode, seeds)
        assert sampled.mean().item() == pytest.approx(mean, abs=0.06), mode
        assert sampled.var().item() == pytest.approx(variance, abs=0.02), mode
