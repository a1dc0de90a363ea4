"""What the unified world model promises as a policy and as a world model."""

import numpy as np
import pytest
import torch

from embodied.core.errors import ConfigError, SpecError
from embodied.core.protocols import WorldModel
from policies import noise
from policies.acting import InferenceConfig, RtcConfig, WarmStartConfig
from policies.compose.build import compose
from policies.inference.policy import ActingPolicy


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
        alpha_bar = policy.form.schedule.alpha_bar_N[(next_time * 100).round().long()][:, None]
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


@pytest.mark.parametrize("form", ["diffusion", "flow"])
def test_a_next_observation_that_is_left_out_has_no_tokens(make, form):
    policy = make.awaken(make.policy("uwm", form=form, left_out=0.5))
    registers = len(policy.network.registers_RW)
    lengths = []
    policy.network.blocks[0].register_forward_pre_hook(
        lambda block, inputs: lengths.append(inputs[0].shape[1])
    )
    times = []
    policy.network.embed_time.register_forward_pre_hook(lambda m, given: times.append(given[0]))
    obs, seed = make.obs(3), np.array([4, 9, 4])
    acted = policy.act(None, obs, seed=seed)[1]
    assert times and all((t == np.float32(policy.form.last)).all() for t in times[1::2])
    assert set(lengths) == {policy.spec.horizon + registers}
    chunk = policy.infer(obs, want={"actions"}, seed=seed)["actions"]
    np.testing.assert_allclose(chunk, acted, atol=1e-5)
    assert set(lengths) == {policy.spec.horizon + registers}
    later = {key: make.batch(3)["future." + key] for key in obs}
    known = policy.infer(obs, next_obs=later, want={"actions"}, seed=seed)["actions"]
    joint = policy.infer(obs, want={"actions", "next_obs"}, seed=seed)["actions"]
    for found in (known, joint):
        assert (found != chunk).any()
    assert policy.sample(obs, 2, seed=0).shape == (3, 2, policy.spec.horizon, 2)
    acting = ActingPolicy(policy, InferenceConfig(warm_up=False))
    again = acting.act(acting.init(3), obs, seed=seed)[1]
    np.testing.assert_allclose(again, acted, atol=1e-5)


def test_which_rows_are_left_out_in_training(make):
    policy = make.awaken(make.policy("uwm", left_out=0.25))
    batch = make.batch(400)
    batch["future_is_pad"][:40] = True
    batch["action_is_pad"][20:60] = True
    rows, network = [], policy.network.forward

    def record(x_BHD, time_B, cond_BC):
        rows.append(len(x_BHD))
        return network(x_BHD, time_B, cond_BC)

    def losses(batch):
        policy.seed_training(3)
        return policy.loss(batch)[1]

    policy.network.forward = record
    given = caught(policy)
    plain = losses(batch)
    among = len(given[-1][0])
    assert rows[-1] + among == 400
    # the 20 that lack it, and a quarter of the 340 that lack nothing; none of the 40 without chunk
    assert abs(rows[-1] - 20 - 85) < 30
    counted = []
    for row in range(60, 72):
        other = {**batch, "future.observation.goal": batch["future.observation.goal"].copy()}
        other["future.observation.goal"][row] += 0.1
        found = losses(other)
        counted.append(found["next_loss"] != plain["next_loss"])
        assert counted[-1] or found == plain
    assert 0 < sum(counted) < 12
    batch["future_is_pad"][:], batch["action_is_pad"][:] = True, False
    assert losses(batch)["next_loss"] == 0 < losses(batch)["action_loss"]


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
        ({"form": "flow", "num_train_steps": 50}, "form: flow has none"),
        ({"form": "flow", "timestep_spacing": "leading"}, "form: flow has none"),
        ({"predicts": ["observation.stat"]}, "Did you mean 'observation.state'"),
    ):
        with pytest.raises(ConfigError, match=match):
            make.policy("uwm", **options)
