"""The unified world model on a scalar system whose every conditional is known.

a ~ N(K o, s²), o′ = A o + B a + N(0, w), at o = 1.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from embodied.core.errors import ConfigError, SpecError
from embodied.core.protocols import WorldModel
from embodied.core.specs import ArraySpec, DeviceSpec
from policies import noise
from policies.acting import InferenceConfig, RtcConfig, WarmStartConfig
from policies.build import build_policy
from policies.compose.build import compose
from policies.inference.policy import ActingPolicy

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


def caught(policy):
    """What the network's `both` is given from now on."""
    seen, both = [], policy.network.both

    def record(*given):
        seen.append(given)
        return both(*given)

    policy.network.both = record
    return seen


@pytest.mark.parametrize("form", ["diffusion", "flow"])
def test_what_a_row_lacks_is_pure_noise_at_the_last_time_and_has_no_influence(make, form):
    policy = make.awaken(make.policy("uwm", form=form))
    batch = make.batch(8)
    batch["action_is_pad"][:3] = True
    batch["action_is_pad"][3, 2:] = True
    batch["future_is_pad"][5:] = True

    def both_losses(batch):
        policy.seed_training(3)
        return policy.loss(batch)[1]

    given = caught(policy)
    plain = both_losses(batch)
    chunk, time, later, next_time, _ = given[-1]
    last = policy.form.last
    assert (time[:3] == last).all() and (time[3:] != last).all()
    assert (next_time[5:] == last).all() and (next_time[:5] != last).all()
    for value in (7.0, np.nan):
        other = {**batch, "action": batch["action"].copy()}
        other["action"][:3] = value
        for key in ("future.observation.state", "future.observation.goal"):
            other[key] = batch[key].copy()
            other[key][5:] = value
        assert both_losses(other) == plain
        assert torch.equal(given[-1][0], chunk) and torch.equal(given[-1][2], later)
    other = {**batch, "action": batch["action"].copy()}
    other["action"][4] += 0.1
    assert both_losses(other)["action_loss"] != plain["action_loss"]
    batch["action_is_pad"][:] = batch["future_is_pad"][:] = True
    assert both_losses(batch) == {"loss": 0.0, "action_loss": 0.0, "next_loss": 0.0}


def test_action_free_rows_count_if_they_are_to(make):
    """A fresh network's error of the noise is the noise's square."""
    batch = make.batch(4000)
    batch["action_is_pad"][:] = True
    policy = make.policy("uwm", action_free="unmasked")
    assert policy.loss(batch)[1]["action_loss"] == pytest.approx(1, abs=0.03)


def test_the_weight_of_the_next_observation(make):
    batch = make.batch(4)
    _, metrics = make.policy("uwm", next_weight=0.25).loss(batch)
    assert metrics["loss"] == pytest.approx(metrics["action_loss"] + 0.25 * metrics["next_loss"])


@pytest.mark.parametrize("form", ["diffusion", "flow"])
def test_modes_depend_on_what_they_are_given(make, form):
    policy = make.awaken(make.policy("uwm", form=form))
    assert isinstance(policy, WorldModel)
    obs, seeds = make.obs(3), np.array([4, 9, 2])
    batch = make.batch(3)
    later = {key: batch["future." + key] for key in obs}
    chunk = policy.infer(obs, want={"actions"}, seed=seeds)["actions"]
    acted = policy.act(None, obs, seed=seeds)[1]
    np.testing.assert_allclose(chunk, acted, atol=1e-5)
    known = policy.infer(obs, next_obs=later, want={"actions"}, seed=seeds)["actions"]
    ahead = policy.infer(obs, want={"next_obs"}, seed=seeds)["next_obs"]
    forward = policy.infer(obs, actions=acted, want={"next_obs"}, seed=seeds)["next_obs"]
    joint = policy.infer(obs, want={"actions", "next_obs"}, seed=seeds)
    for found in (known, joint["actions"]):
        assert found.shape == chunk.shape and (found != chunk).any()
    for found in (ahead, forward, joint["next_obs"]):
        assert {key: x.shape for key, x in found.items()} == {
            "observation.state": (3, 1, 3),
            "observation.goal": (3, 1, 2),
        }
    assert (forward["observation.state"] != ahead["observation.state"]).any()
    one = {key: x[1:2] for key, x in obs.items()}
    alone = policy.infer(one, actions=acted[1:2], want={"next_obs"}, seed=seeds[1:2])["next_obs"]
    for key, x in alone.items():
        torch.testing.assert_close(x[0], forward[key][1], atol=1e-5, rtol=1e-5)


def test_next_observations_come_back_in_their_units(make):
    """A network that knows them gives them back: ε̂ = (x_t − √ᾱ o′) / √(1−ᾱ)."""
    policy = make.policy("uwm", clip_sample=False)
    wanted = {"observation.state": [[[0.3, -1.0, 1.6]]], "observation.goal": [[[-0.2, 0.9]]]}
    clean_N = torch.tensor([0.3, -1.0, 1.6, -0.2, 0.9]) / 2  # the data lie between −2 and 2

    def both(chunk, time, later, next_time, seen):
        alpha_bar = policy.form.schedule.alpha_bar_N[(next_time * N).round().long()][:, None]
        return chunk, (later - alpha_bar.sqrt() * clean_N) / (1 - alpha_bar).sqrt()

    policy.network.both = both
    found = policy.infer(make.obs(1), want={"next_obs"}, seed=np.array([0]))["next_obs"]
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], torch.tensor(value), atol=2e-3, rtol=0)


def test_questions_that_make_no_sense_are_refused(make):
    policy, obs, seed = make.policy("uwm"), make.obs(2), np.arange(2)
    chunk = np.zeros((2, 6, 2), np.float32)
    later = {key: make.batch(2)["future." + key] for key in obs}
    for options, match in (
        ({"want": set()}, "want actions, next_obs or both"),
        ({"want": {"video"}}, "video"),
        ({"want": {"actions"}, "actions": chunk}, r"given are \['actions'\]"),
        ({"want": {"next_obs"}, "actions": chunk[:, :5]}, r"actions has shape \(2, 5, 2\)"),
        ({"want": {"next_obs"}, "actions": chunk + np.nan}, "actions holds values .* not finite"),
        ({"want": {"actions"}, "next_obs": {}}, "'observation.state' is missing"),
        ({"want": {"actions"}, "next_obs": {**later, "a": chunk}}, "unknown key of next_obs 'a'"),
    ):
        with pytest.raises(SpecError, match=match):
            policy.infer(obs, seed=seed, **options)
    batch = make.batch(2)
    with pytest.raises(SpecError, match=r"'future_is_pad' is missing"):
        policy.loss({key: x for key, x in batch.items() if key != "future_is_pad"})
    batch["future.observation.goal"][:] = np.inf
    with pytest.raises(SpecError, match="not finite"):
        policy.loss(batch)


def test_a_decision_keeps_a_draw_of_its_own_in_the_place_of_the_next_observation(make):
    policy = make.awaken(make.policy("uwm"))
    size, told = policy.next.size, []
    network = policy.network.forward

    def record(x_BHD, time_B, cond_BC):
        told.append(cond_BC)
        return network(x_BHD, time_B, cond_BC)

    policy.network.forward = record
    policy.act(None, make.obs(3), seed=np.array([5, 7, 5]))
    assert len(told) == 10 and all(torch.equal(cond, told[0]) for cond in told)
    assert (told[0][:, -size - 1] == policy.form.last).all()
    draws = told[0][:, -size:]
    assert torch.equal(draws, noise.further_noise([5, 7, 5], size))
    assert not torch.equal(draws[0], draws[1])
    policy.sample(make.obs(2), 3, seed=0)
    assert len({tuple(row.tolist()) for row in told[-1][:, -size:]}) == 6
    assert torch.equal(policy.encode(make.obs(2)), policy.encode(make.obs(2)))


def test_a_composition_draws_for_its_members(make):
    pair = {"world": make.policy("uwm"), "plain": make.policy("diffusion")}
    for member in pair.values():
        make.awaken(member)
    alone = compose(pair, {"name": "mix", "weights": [1.0, 0.0]})
    obs, seed = make.obs(2), np.array([3, 8])
    acted = pair["world"].act(None, obs, seed=seed)[1]
    np.testing.assert_array_equal(alone.act(None, obs, seed=seed)[1], acted)
    mixed = compose(pair, {"name": "mix", "weights": [0.5, 0.5]})
    again = mixed.act(None, {key: x[:1] for key, x in obs.items()}, seed=seed[:1])[1]
    np.testing.assert_allclose(again[0], mixed.act(None, obs, seed=seed)[1][0], atol=1e-5)
    loss, metrics = mixed.loss(make.batch(4))
    assert loss.isfinite() and "world/next_loss" in metrics


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_needs_no_chunk_is_prepared(make, dtype):
    policy = make.awaken(make.policy("uwm"))
    obs, seed = make.obs(2), np.array([3, 8])
    acting = ActingPolicy(policy, InferenceConfig(dtype=dtype, warm_up=False))
    tolerance = 1e-5 if dtype == "float32" else 0.1
    found = acting.act(acting.init(2), obs, seed=seed)[1]
    np.testing.assert_allclose(found, policy.act(None, obs, seed=seed)[1], atol=tolerance)


@pytest.mark.parametrize("mode", ["full", "identity"])
def test_chunks_go_on_from_committed_actions(make, mode):
    policy = make.awaken(make.policy("uwm"))
    policy.rtc, policy.warm_start = RtcConfig(mode=mode), WarmStartConfig(fraction=0.5)
    obs, seed = make.obs(2), np.array([3, 8])
    carry, _ = policy.act(None, obs, seed=seed)
    prefix = np.full((2, 2, 2), 0.4, np.float32)
    _, chunk = policy.act(carry, obs, prefix=prefix, seed=seed)
    np.testing.assert_array_equal(chunk[:, :2], prefix)
    _, free = policy.act(carry, obs, seed=seed)
    assert (chunk[:, 2:4] != free[:, 2:4]).any()


@pytest.mark.parametrize(
    ("options", "future"),
    [
        ({}, (6,)),
        ({"next_after": "executed"}, (3,)),
        ({"next_obs_steps": 2}, (6, 7)),
        ({"next_after": "executed", "next_obs_steps": 3}, (3, 4, 5)),
    ],
)
def test_says_which_later_observations_it_learns_from(make, options, future):
    policy = make.policy("uwm", predicts=["observation.goal"], **options)
    config = policy.config
    assert config.future == future
    assert config.future_keys(policy.spec.observation) == ("observation.goal",)
    assert policy.next.groups == ((len(future), 2),)
    found = policy.infer(make.obs(2), want={"next_obs"}, seed=np.arange(2))["next_obs"]
    assert {key: x.shape for key, x in found.items()} == {"observation.goal": (2, len(future), 2)}


def test_contradicting_options_are_refused(make):
    for options, match in (
        ({"observation_normalization": "gaussian"}, "clip_sample"),
        ({"form": "flow", "marginal_step": 90}, "form: flow has none"),
        ({"form": "flow", "action_free": "unmasked"}, "form: flow does not predict"),
        ({"marginal_step": 100}, "less than num_train_steps=100"),
        ({"num_steps": 101}, "num_train_steps=100"),
        ({"predicts": ["observation.stat"]}, "Did you mean 'observation.state'"),
    ):
        with pytest.raises(ConfigError, match=match):
            make.policy("uwm", **options)


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
