"""What unified video and action promises as a policy and as a world model."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from embodied.core.errors import ConfigError, SpecError
from embodied.core.protocols import WorldModel
from embodied.core.specs import ArraySpec, DeviceSpec
from policies.acting import InferenceConfig
from policies.build import build_policy
from policies.inference.policy import ActingPolicy
from policies.world.frames import Frames, count_hidden, draw_hidden, reveals

STATE = "observation.state"
SMALL = {
    "width": 16,
    "heads": 2,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "head_width": 16,
    "head_depth": 1,
    "time_dim": 16,
}


def device(size=7):
    return DeviceSpec(
        {STATE: ArraySpec((size,)), "observation.goal": ArraySpec((2,))},
        ArraySpec((2,), low=(-1.0,), high=(1.0,)),
        10.0,
    )


def build(make, *, size=7, seed=5, **options):
    """Chunks of 6 actions, 3 frames; 4 tokens of a 7-vector and one of the goal."""
    spec = device(size)
    config = {"horizon": 6, "n_action_steps": 3, "frames": 3, **SMALL, **options}
    stats = {STATE: make.stats(size), "observation.goal": make.stats(2)}
    return make.awaken(build_policy("uva", config, spec, spec.observation, stats, seed=0), seed)


def batch_of(policy, rows, seed=0):
    rng = np.random.default_rng(seed)
    frames, horizon = policy.config.frames, policy.spec.horizon
    found = {
        "action": rng.uniform(-1, 1, (rows, horizon, policy.spec.action.size)),
        "action_is_pad": np.zeros((rows, horizon), bool),
        "future_is_pad": np.zeros((rows, frames), bool),
    }
    for key, array in policy.spec.observation.items():
        found[key] = rng.normal(size=(rows, policy.spec.n_obs_steps, *array.shape))
        found["future." + key] = rng.normal(size=(rows, frames, *array.shape))
    return {k: x.astype(np.float32) if x.dtype == float else x for k, x in found.items()}


def observed(policy, batch):
    return {key: batch[key] for key in policy.spec.observation}


def later(policy, batch):
    return {key: batch["future." + key] for key in policy.next.keys}


def z_of(policy, batch):
    """Z of a training batch whose modes, masks and noise are the same each time."""
    found = []
    handle = policy.trunk.register_forward_hook(lambda m, given, z: found.append(z.detach()))
    policy.seed_training(3)
    policy.loss(batch)
    handle.remove()
    return found[0]


def changed(batch, prefix):
    return {key: x + np.float32(0.1) if key.startswith(prefix) else x for key, x in batch.items()}


@pytest.mark.parametrize(
    ("mode", "matters"),
    [
        ("video", {"observation", "future"}),
        ("forward", {"observation", "future", "action"}),
        ("policy", {"observation"}),
        ("inverse", {"future"}),
        ("joint", {"observation", "future"}),
    ],
)
def test_a_mode_knows_what_it_is_given_and_nothing_else(make, mode, matters, monkeypatch):
    monkeypatch.setattr("policies.world.frames.count_hidden", lambda tokens, rng: tokens - 1)
    policy = build(make, modes=[mode])
    batch = batch_of(policy, 4)
    plain = z_of(policy, batch)
    for part, prefix in (
        ("observation", "observation."),
        ("future", "future.o"),
        ("action", ("action",)),
    ):
        other = dict(batch)
        for key, x in batch.items():
            if key.startswith(prefix) and x.dtype == np.float32:
                other[key] = x + np.float32(0.1)
        assert torch.equal(z_of(policy, other), plain) == (part not in matters), part


def test_history_is_told_to_the_inverse_mode_if_it_is_to_be(make):
    policy = build(make, modes=["inverse"], inverse_history=True)
    batch = batch_of(policy, 4)
    assert not torch.equal(z_of(policy, changed(batch, "observation.")), z_of(policy, batch))


def test_the_same_tokens_of_every_frame_are_hidden_and_as_many_as_the_ratio_says():
    rng = torch.Generator().manual_seed(0)
    counts = [count_hidden(256, rng) for _ in range(4000)]
    assert min(counts) >= math.ceil(0.7 * 256) and max(counts) == 256
    assert np.mean(counts) == pytest.approx(256 * 0.8670 + 0.5, abs=5 * 256 * 0.08 / 4000**0.5)
    hidden = draw_hidden(50, 256, torch.Generator().manual_seed(1))
    count = count_hidden(256, torch.Generator().manual_seed(1))
    assert hidden.sum(1).unique().numel() == 1 and hidden.float().mean(0).std() > 0
    assert not torch.equal(hidden[0], hidden[1]) and 0.69 < hidden.float().mean() <= 1
    assert 180 <= count <= 256


def test_only_hidden_tokens_are_learned_in_all_frames_alike(make):
    policy = build(make, modes=["video"], width=32)
    hidden = []
    handle = policy.trunk.register_forward_pre_hook(lambda m, given: hidden.append(given[3]))
    tokens, frames = policy.frames.tokens, policy.config.frames
    assert (tokens, policy.frames.size) == (5, 2)
    for seed in range(20):
        policy.seed_training(seed)
        batch = batch_of(policy, 3)
        clean = []
        read = policy._read_batch

        def leaf(source, read=read, clean=clean):
            seen, later_BSLP, unseen_B = read(source)
            clean.append(later_BSLP.requires_grad_())
            return seen, later_BSLP, unseen_B

        policy._read_batch = leaf
        shown = []
        trunk = policy.trunk.forward

        def blind(seen, recalled, later_BSLP, *rest, trunk=trunk, shown=shown):
            shown.append(later_BSLP)
            return trunk(seen, recalled, later_BSLP.detach(), *rest)

        policy.trunk.forward = blind
        policy.loss(batch)[0].backward()
        policy.trunk.forward, policy._read_batch = trunk, read
        grad = clean[0].grad
        mask = hidden[-1][:, None, :, None].expand_as(grad)
        assert (grad[~mask] == 0).all()
        assert (grad[mask & policy.frames.counts_LP] != 0).all()
        if not hidden[-1].all():
            break
    handle.remove()
    assert not hidden[-1].all() and grad.shape[1] == frames


@pytest.mark.parametrize("mode", ["video", "forward", "policy", "inverse", "joint"])
def test_a_mode_teaches_its_heads_alone(make, mode):
    policy = build(make, modes=[mode])
    loss, metrics = policy.loss(batch_of(policy, 4))
    loss.backward()
    acts, sees = mode in ("policy", "inverse", "joint"), mode in ("video", "forward", "joint")
    for module, taught in (
        (policy.network, acts),
        (policy.reader, acts),
        (policy.video_head, sees),
    ):
        assert any((p.grad != 0).any() for p in module.parameters()) == taught
    assert set(metrics) == {"loss"} | ({"action_loss"} if acts else set()) | (
        {"next_loss"} if sees else set()
    )


def test_what_a_row_lacks_has_no_influence(make):
    policy = build(make, drawn="row")
    batch = batch_of(policy, 64)
    batch["action_is_pad"][:20] = True
    batch["action_is_pad"][20:30, 4:] = True
    batch["future_is_pad"][40:, 2] = True

    def losses(batch):
        policy.seed_training(1)
        return policy.loss(batch)[1]

    plain = losses(batch)
    for value in (7.0, np.nan):
        other = {key: x.copy() for key, x in batch.items()}
        other["action"][:20] = other["action"][20:30, 4:] = value
        other["future." + STATE][40:] = value
        assert losses(other) == plain
    batch["future_is_pad"][:] = True
    batch["action_is_pad"][:] = False
    assert (
        policy._draw_modes(
            torch.ones(64, dtype=torch.bool),
            torch.zeros(64, 6, dtype=torch.bool),
            torch.Generator(),
        )
        == ["policy"] * 64
    )
    batch["action_is_pad"][:] = True
    assert losses(batch)["loss"] == 0


def test_one_mode_is_drawn_for_a_batch_evenly(make):
    policy = build(make)
    rng, no = torch.Generator().manual_seed(0), torch.zeros(8, dtype=torch.bool)
    drawn = [policy._draw_modes(no, no[:, None], rng) for _ in range(500)]
    assert all(len(set(modes)) == 1 and len(modes) == 8 for modes in drawn)
    firsts = [modes[0] for modes in drawn]
    assert all(70 < firsts.count(mode) < 130 for mode in policy.config.modes)


@pytest.mark.parametrize(
    "options", [{}, {"iterations": 3}, {"sampler": "ddpm", "form": "diffusion"}]
)
@pytest.mark.parametrize("head", ["steps", "joint"])
def test_modes_depend_on_what_they_are_given(make, head, options):
    policy = build(make, action_head=head, **options)
    assert isinstance(policy, WorldModel)
    batch, seeds = batch_of(policy, 3), np.array([4, 9, 2])
    obs, seen_later = observed(policy, batch), later(policy, batch)
    chunk = policy.infer(obs, want={"actions"}, seed=seeds)["actions"]
    acted = policy.act(None, obs, seed=seeds)[1]
    np.testing.assert_allclose(chunk, acted, atol=1e-5)
    known = policy.infer(obs, next_obs=seen_later, want={"actions"}, seed=seeds)["actions"]
    ahead = policy.infer(obs, want={"next_obs"}, seed=seeds)["next_obs"]
    forward = policy.infer(obs, actions=acted, want={"next_obs"}, seed=seeds)["next_obs"]
    joint = policy.infer(obs, want={"actions", "next_obs"}, seed=seeds)
    assert known.shape == joint["actions"].shape == chunk.shape and (known != chunk).any()
    for found in (ahead, forward, joint["next_obs"]):
        assert {key: x.shape for key, x in found.items()} == {
            key: x.shape for key, x in seen_later.items()
        }
    assert (forward[STATE] != ahead[STATE]).any()
    alone = policy.infer(
        {key: x[1:2] for key, x in obs.items()},
        actions=acted[1:2],
        want={"next_obs"},
        seed=seeds[1:2],
    )["next_obs"]
    for key, x in alone.items():
        torch.testing.assert_close(x[0], forward[key][1], atol=1e-4, rtol=1e-4)


def test_deciding_samples_nothing_of_what_will_be_seen(make):
    policy = build(make)
    policy.video_head.forward = None
    batch = batch_of(policy, 2)
    policy.act(None, observed(policy, batch), seed=np.arange(2))
    policy.sample(observed(policy, batch), 2, seed=0)
    acting = ActingPolicy(policy, InferenceConfig(dtype="bfloat16", warm_up=False))
    found = acting.act(acting.init(2), observed(policy, batch), seed=np.arange(2))[1]
    np.testing.assert_allclose(
        found, policy.act(None, observed(policy, batch), seed=np.arange(2))[1], atol=0.1
    )


def test_tokens_are_revealed_by_the_cosine_and_each_once(make):
    assert reveals(256, 1) == [256]
    assert reveals(256, 8)[:3] == [256 - 251, 251 - 236, 236 - 212]
    for tokens, passes in ((5, 3), (5, 5), (5, 9), (1, 8), (256, 8)):
        found = reveals(tokens, passes)
        assert sum(found) == tokens and min(found) >= 1 and len(found) == min(tokens, passes)
    policy = build(make, iterations=3)
    shown = []
    policy.trunk.register_forward_pre_hook(lambda m, given: shown.append(given[3].clone()))
    batch = batch_of(policy, 6)
    policy.infer(observed(policy, batch), want={"next_obs"}, seed=np.arange(6))
    hidden = [mask.sum(1).unique().tolist() for mask in shown]
    assert hidden == [[5], [4], [2]]
    assert all((after <= before).all() for before, after in pairwise(shown))
    assert len({tuple(row.tolist()) for row in shown[1]}) > 1


def test_frames_are_cut_into_tokens_and_put_together_again():
    frames = Frames([(7, 2), (2, 2), (12, 3)])
    assert (frames.tokens, frames.size) == (4 + 1 + 4, 3)
    assert frames.counts_LP.sum() == 21
    x_BN = torch.arange(2 * 3 * 21.0).view(2, 63)
    grid = frames.grid(x_BN)
    assert torch.equal(frames.flat(grid), x_BN)
    assert grid[0, 1, 0].tolist() == [7, 8, 0] and grid[0, 0, 3].tolist() == [6, 0, 0]
    assert grid[0, 2, 4].tolist() == [25, 26, 0] and (grid[..., ~frames.counts_LP] == 0).all()


def test_what_is_read_but_not_predicted_comes_before_the_tokens(make):
    policy = build(make, predicts=["observation.goal"])
    assert policy.frames.tokens == 1 and policy.trunk.rest.in_features == 2 * 7
    batch = batch_of(policy, 3)
    batch = {key: x for key, x in batch.items() if key != "future." + STATE}
    obs = observed(policy, batch)
    found = policy.infer(obs, want={"next_obs"}, seed=np.arange(3))["next_obs"]
    assert {key: x.shape for key, x in found.items()} == {"observation.goal": (3, 3, 2)}
    other = {**obs, STATE: obs[STATE] + 1}
    assert not torch.equal(policy.encode(obs), policy.encode(other))
    policy.loss(batch)[0].backward()
    assert policy.config.future == (2, 4, 6)


@pytest.mark.parametrize("temperature", [1.0, 0.95])
def test_the_ancestral_sampler_follows_its_affine_recursion(make, temperature):
    """Under the ideal head for N(M, S) the sampled mean and variance are known; the temperature
    scales the noise of the steps, not that at the start."""
    mean, variance, steps = 0.3, 0.04, 100
    policy = build(
        make, sampler="ddpm", temperature=temperature, num_steps=steps, clip_sample=False
    ).double()
    table = policy.form.schedule.alpha_bar_N.double()

    def head(x, time, cond):
        a = table[(time * 100).round().long()][:, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * variance + 1 - a)

    policy.network.forward = head
    expected_mean, expected = 0.0, 1.0
    levels = [*table.flip(0).tolist(), 1.0]
    for a, b in pairwise(levels):
        slope = math.sqrt(a) * variance / (a * variance + 1 - a)  # of E[x0 | x_t]
        sample = math.sqrt(b) * (1 - a / b) / (1 - a)
        keep = math.sqrt(a / b) * (1 - b) / (1 - a)
        rate = sample * slope + keep
        offset = sample * mean * (1 - slope * math.sqrt(a))
        expected_mean = rate * expected_mean + offset
        spread = temperature**2 * (1 - b) / (1 - a) * (1 - a / b)
        expected = rate**2 * expected + spread
    rng = torch.Generator().manual_seed(0)
    start = torch.randn((3000, 6, 2), generator=rng, dtype=torch.float64)
    cond = torch.zeros(3000, 1, dtype=torch.float64)
    found = policy.integrate(start, cond, rng)
    assert found.mean().item() == pytest.approx(expected_mean, abs=0.005)
    assert found.var().item() == pytest.approx(expected, rel=0.03)
    assert expected_mean == pytest.approx(mean, abs=0.001)
    assert expected == pytest.approx({1.0: 0.03436, 0.95: 0.03101}[temperature], rel=1e-3)


def test_questions_and_options_that_make_no_sense_are_refused(make):
    policy = build(make)
    batch = batch_of(policy, 2)
    obs, seed = observed(policy, batch), np.arange(2)
    for options, match in (
        ({"want": set()}, "want actions, next_obs or both"),
        ({"want": {"actions"}, "actions": batch["action"]}, r"given are \['actions'\]"),
        ({"want": {"actions"}, "next_obs": {}}, "'observation.state' is missing"),
        ({"want": {"next_obs"}, "actions": batch["action"][:, :5]}, r"shape \(2, 5, 2\)"),
    ):
        with pytest.raises(SpecError, match=match):
            policy.infer(obs, seed=seed, **options)
    with pytest.raises(SpecError, match="unknown observation key 'a'"):
        policy.infer({**obs, "a": obs[STATE]}, want={"actions"}, seed=seed)
    batch["future." + STATE][:] = np.inf
    with pytest.raises(SpecError, match="not finite"):
        policy.loss(batch)
    for options, match in (
        ({"frames": 4}, "multiple of frames"),
        ({"modes": []}, "modes"),
        ({"modes": ["video", "video"]}, "twice"),
        ({"modes": ["vide"]}, "modes"),
        ({"temperature": 0.95}, "only sampler: ddpm"),
        ({"sampler": "ddpm", "form": "flow"}, "form: flow is none"),
        ({"heads": 3}, "multiple of heads"),
        ({"modes": ["policy"], "inverse_history": True}, "about the mode inverse"),
    ):
        with pytest.raises(ConfigError, match=match):
            build(make, **options)
