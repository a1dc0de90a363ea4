"""Unified video and action, trained where the answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest
from scalar_system import S2, STATE, A, B, K, W, system, train

from embodied.core.specs import ArraySpec, DeviceSpec
from policies.build import build_policy

SMALL = {"width": 32, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "time_dim": 32}


def scalar(horizon=1, name="uva", **options):
    """A policy of one number seen and done, whose normalisers are identities."""
    device = DeviceSpec({STATE: ArraySpec((1,))}, ArraySpec((1,), low=(-1.0,), high=(1.0,)), 10.0)
    stats = {STATE: SimpleNamespace(mean=[0.0], std=[1.0], min=[-1.0], max=[1.0])}
    config = {"n_obs_steps": 1, "horizon": horizon, "n_action_steps": 1}
    if name == "uva":
        config |= {"frames": 1, "form": "flow", "head_width": 64, "head_depth": 2, **SMALL}
    return build_policy(name, config | options, device, [STATE], stats, seed=0)


def wide(rows, seed):
    """Windows of the scalar system at o ~ N(0, 1)."""
    return system(rows, seed, np.random.default_rng([seed, 1]).standard_normal(rows))


def signs(rows, seed):
    """Chunks all of +1 or all of −1, by a coin, whatever is seen."""
    coin = np.random.default_rng(seed).choice([-1.0, 1.0], (rows, 1, 1)).astype(np.float32)
    seen = np.zeros((rows, 1, 1), np.float32)
    return {
        STATE: seen,
        "action": np.repeat(coin, 16, axis=1),
        "action_is_pad": np.zeros((rows, 16), bool),
        "future." + STATE: seen,
        "future_is_pad": np.zeros((rows, 1), bool),
    }


CHUNKS = {
    "uva, steps": ("uva", {"modes": ["policy"], "action_head": "steps"}, 250),
    "uva, joint": ("uva", {"modes": ["policy"], "action_head": "joint"}, 250),
    "uwm": ("uwm", {"form": "flow", "width": 32, "depth": 1, "time_dim": 32}, 500),
    "diffusion": ("diffusion", {"network": {"name": "mlp", "width": 128, "depth": 2}}, 1000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHUNKS)
def test_given_z_the_published_head_knows_nothing_of_other_actions(name):
    """Its signs are independent, so that all agree in one chunk of 2¹⁵; those of the joint head and
    of the policies that denoise chunks as wholes agree."""
    kind, options, steps = CHUNKS[name]
    policy = train(scalar(16, kind, **options), lambda step: signs(64, step), steps)
    chunks_BHD = policy.sample({STATE: np.zeros((1, 1, 1), np.float32)}, 400, seed=0)[0]
    assert (chunks_BHD.abs() > 0.5).float().mean() > 0.9
    positive_B = (chunks_BHD > 0).float().mean(dim=(1, 2))
    assert positive_B.mean().item() == pytest.approx(0.5, abs=0.15)
    agree = ((positive_B == 0) | (positive_B == 1)).float().mean().item()
    assert agree < 0.02 if name == "uva, steps" else agree > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True])
def test_the_inverse_mode_knows_what_it_is_told(told):
    """E[a | o′] = (K (A + B K) + B S2) / ((A + B K)² + B² S2 + W) o′, as published, or
    E[a | o, o′] if it is told what was observed; the policy's mean is K o."""
    policy = scalar(
        modes=["policy", "inverse"],
        drawn="row",
        inverse_history=told,
        clip_sample=False,
    )
    train(policy, lambda step: wide(256, step), 400)
    rows = 1000
    obs = {STATE: np.ones((rows, 1, 1), np.float32)}
    later = {STATE: np.full((rows, 1, 1), 0.8, np.float32)}
    seed, total = np.arange(rows), A + B * K
    acted = policy.act(None, obs, seed=seed)[1].mean()
    found = policy.infer(obs, next_obs=later, want={"actions"}, seed=seed)["actions"].mean()
    assert acted == pytest.approx(K, abs=0.06)
    if told:
        wanted = K + B * S2 / (B * B * S2 + W) * (0.8 - total)
    else:
        wanted = 0.8 * (K * total + B * S2) / (total**2 + B * B * S2 + W)
    assert found.item() == pytest.approx(wanted, abs=0.06)
