"""A scalar system whose every conditional is known, and the network that knows them all.

a ~ N(K o, s²), o′ = A o + B a + N(0, w), at o = 1. Networks give (B, 1, 1) and (B, 1) numbers.
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from embodied.core.specs import ArraySpec, DeviceSpec
from policies import noise
from policies.build import build_policy
from policies.world.forms import DiffusionForm

STATE = "observation.state"
A, B, K, S2, W = 0.9, 0.5, -0.4, 0.09, 0.01
N = 100

MEAN = torch.tensor([K, A + B * K], dtype=torch.float64)
COVARIANCE = torch.tensor([[S2, B * S2], [B * S2, B * B * S2 + W]], dtype=torch.float64)

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

CELLS = {
    (50, 50): (0.07480, 0.02745),
    (50, 99): (0.07621, 7e-9),
    (50, 0): (0.02579, 0.97989),
    (99, 50): (2e-8, 0.02893),
}
"""Least mean squared errors of the action's and the next observation's noise, at two of N steps."""


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

    def floor(self, t_B2):
        """Mean squared errors [B, 2] at these steps: the diagonal of I − R^½ (D Σ Dᵀ + R)⁻¹ R^½."""
        gain_B22, _ = self.gain(t_B2)
        rest_B2 = (1 - self.alpha_bar_N[t_B2]).sqrt()
        return 1 - gain_B22.diagonal(dim1=1, dim2=2) * rest_B2

    def both(self, x_BHD, time_B, next_BN, next_time_B, seen_BC):
        x_B2 = torch.cat([x_BHD[:, 0], next_BN], dim=1).double()
        t_B2 = (torch.stack([time_B, next_time_B], dim=1) * len(self.alpha_bar_N)).round().long()
        gain_B22, signal_B22 = self.gain(t_B2)
        eps_B2 = (gain_B22 @ (x_B2 - (signal_B22 @ MEAN))[..., None])[..., 0]
        return eps_B2[:, None, :1], eps_B2[:, 1:]

    def forward(self, x_BHD, time_B, cond_BC):
        return self.both(x_BHD, time_B, cond_BC[:, 2:], cond_BC[:, 1], cond_BC[:, :1])[0]


def ideal(**options):
    policy = scalar(**{"timestep_spacing": "leading", "clip_sample": False} | options)
    policy.network = Ideal(policy)
    return policy.double()


class IdealMixture(nn.Module):
    """E[ε′ | x′] where actions are left open and o′ is of one of some Gaussians, alike in width."""

    def __init__(self, policy, means, weights):
        super().__init__()
        self.alpha_bar_N = policy.form.schedule.alpha_bar_N.double()
        self.means = torch.tensor(means, dtype=torch.float64)
        self.log_weights = torch.tensor(weights, dtype=torch.float64).log()

    def both(self, x_BHD, time_B, next_BN, next_time_B, seen_BC):
        t_B1 = (next_time_B * len(self.alpha_bar_N)).round().long()[:, None]
        alpha_bar_B1 = self.alpha_bar_N[t_B1]
        variance_B1 = alpha_bar_B1 * COVARIANCE[1, 1] + 1 - alpha_bar_B1
        off_BM = next_BN.double() - alpha_bar_B1.sqrt() * self.means
        share_BM = (self.log_weights - off_BM**2 / (2 * variance_B1)).softmax(dim=1)
        score_B1 = (share_BM * off_BM / variance_B1).sum(dim=1, keepdim=True)
        return x_BHD, (1 - alpha_bar_B1).sqrt() * score_B1


def mixture(means, weights, **options):
    policy = ideal(**options)
    policy.network = IdealMixture(policy, means, weights)
    return policy


class FixedTimes(DiffusionForm):
    """Learns at the given steps, one after the other, again and again."""

    def __init__(self, config, steps):
        super().__init__(config)
        self.steps = itertools.cycle(steps)

    def draw_times(self, batch, rng):
        return torch.full((batch,), next(self.steps) / len(self.schedule))


def losses_at(policy, cell, batch):
    """Of actions and of the next observation, at these two steps."""
    form, policy.form = policy.form, FixedTimes(policy.config, cell).to(policy.low_D)
    policy.seed_training(0)
    with torch.no_grad():
        metrics = policy.loss(batch)[1]
    policy.form = form
    return metrics["action_loss"], metrics["next_loss"]


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


def train(policy, batches, steps, rate=4e-3):
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    policy.seed_training(0)
    for step in range(steps):
        loss, _ = policy.loss(batches(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy
