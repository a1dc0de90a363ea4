"""Unified video and action: its denoising head, trained alone, in the two places that it has."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from embodied.core.specs import ArraySpec, DeviceSpec
from policies.build import build_policy

STATE = "observation.state"
HORIZON, STEPS, TOKENS, SIZE, WIDTH = 4, 2, 3, 2, 8
M = torch.randn(SIZE, WIDTH, generator=torch.Generator().manual_seed(7)) / math.sqrt(WIDTH)
S2 = 0.09
"""A number pair is x = M z + N(0, S2), z ~ N(0, 1)."""


def build():
    """Chunks of 4 actions, 2 frames of 3 tokens; actions and tokens have two numbers."""
    size = TOKENS * SIZE
    device = DeviceSpec(
        {STATE: ArraySpec((size,))}, ArraySpec((SIZE,), low=(-1.0,), high=(1.0,)), 10.0
    )
    numbers = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}
    stats = {STATE: SimpleNamespace(**{key: [x] * size for key, x in numbers.items()})}
    config = {
        "horizon": HORIZON,
        "frames": STEPS,
        "token_size": SIZE,
        "n_action_steps": 1,
        "n_obs_steps": 1,
        "modes": ["video"],
        "sampler": "ddpm",
        "num_steps": 10,
        "timestep_spacing": "leading",
        "iterations": 2,
        "clip_sample": False,
        "width": WIDTH,
        "heads": 1,
        "head_width": 64,
        "head_depth": 2,
        "time_dim": 32,
    }
    return build_policy("uva", config, device, [STATE], stats, seed=0)


def drawn(rng, *shape):
    """z […, W] and x [..., P]."""
    z = torch.randn(*shape, WIDTH, generator=rng)
    return z, z @ M.T + math.sqrt(S2) * torch.randn(*shape, SIZE, generator=rng)


@pytest.fixture(scope="module")
def policy():
    """Both heads have the same weights, which learned from rows of one pair each."""
    made = build()
    head, rng, steps = made.video_head, torch.Generator().manual_seed(0), 800
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for _ in range(steps):
        z, x = drawn(rng, 256)
        time = made.form.draw_times(256, rng)
        noisy, target = made.form.noised(x, torch.randn(x.shape, generator=rng), time)
        loss = (head(noisy, time, z) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    made.network.head.load_state_dict(head.state_dict())
    return made


def sampled(policy):
    """Share of M z in the mean after all steps of DDPM, and variance, under the ideal head."""
    share, variance = 0.0, 1.0
    levels = torch.sigmoid(torch.tensor(policy.solver.log_snrs, dtype=torch.float64)).tolist()
    for a, b in pairwise([*levels, 1.0]):
        slope = math.sqrt(a) * S2 / (a * S2 + 1 - a)  # of E[x0 | x_t]
        sample = math.sqrt(b) * (1 - a / b) / (1 - a)
        rate = sample * slope + math.sqrt(a / b) * (1 - b) / (1 - a)
        share = rate * share + sample * (1 - slope * math.sqrt(a))
        variance = rate**2 * variance + (1 - b) / (1 - a) * (1 - a / b)
    return share, variance


def compare(policy, z_BQW, x_BQP):
    share, variance = sampled(policy)
    for place in range(z_BQW.shape[1]):
        fitted = torch.linalg.lstsq(z_BQW[:, place], x_BQP[:, place])
        off = x_BQP[:, place] - z_BQW[:, place] @ fitted.solution
        torch.testing.assert_close(fitted.solution, share * M.T, atol=0.05, rtol=0)
        assert off.var(dim=0).tolist() == pytest.approx([variance] * SIZE, rel=0.15)


def floor(policy):
    """Of the mean squared error, over all times."""
    alpha_bar_N = policy.form.schedule.alpha_bar_N
    return (alpha_bar_N * S2 / (alpha_bar_N * S2 + 1 - alpha_bar_N)).mean().item()


@pytest.mark.slow
def test_a_trained_head_samples_actions(policy):
    rng = torch.Generator().manual_seed(1)
    z_BHW, x_BHD = drawn(rng, 1500, HORIZON)
    start_BHD = torch.randn(x_BHD.shape, generator=rng)
    with torch.no_grad():
        compare(policy, z_BHW, policy.integrate(start_BHD, z_BHW.flatten(1), rng))
        z_BHW, x_BHD = drawn(rng, 20_000, HORIZON)
        error = policy.objective(x_BHD, z_BHW.flatten(1), rng).mean().item()
    assert 0.97 * floor(policy) < error < 1.05 * floor(policy)


@pytest.mark.slow
def test_a_trained_head_samples_tokens(policy, monkeypatch):
    rows = 1500
    z_BSLW, x_BSLP = drawn(torch.Generator().manual_seed(2), rows, STEPS, TOKENS)
    monkeypatch.setattr(policy.trunk, "forward", lambda *given: z_BSLW)
    seen = {STATE: np.zeros((rows, 1, TOKENS * SIZE), np.float32)}
    found = policy.infer(seen, want={"next_obs"}, seed=np.arange(rows))["next_obs"][STATE]
    compare(policy, z_BSLW.flatten(1, 2), found.view_as(x_BSLP).flatten(1, 2))
    batch = {
        **seen,
        "future." + STATE: x_BSLP.flatten(2).numpy(),
        "future_is_pad": np.zeros((rows, STEPS), bool),
        "action": np.zeros((rows, HORIZON, SIZE), np.float32),
        "action_is_pad": np.zeros((rows, HORIZON), bool),
    }
    with torch.no_grad():
        error = policy.loss(batch)[1]["next_loss"]
    assert 0.95 * floor(policy) < error < 1.07 * floor(policy)
