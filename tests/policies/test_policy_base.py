import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embodied.core.errors import CorruptDataError, SpecError
from policies import noise
from policies.acting import RtcConfig
from policies.arrays import without_padding


def loss_of(policy, batch, seed=3):
    policy.seed_training(seed)
    return policy.loss(batch)[0]


@pytest.mark.parametrize("name", ["flow", "diffusion"])
def test_padded_targets_have_no_influence_and_no_gradient(make, name):
    policy = make.awaken(make.policy(name))
    batch = make.batch(8)
    pad = np.arange(6) >= np.array([6, 5, 4, 3, 2, 1, 0, 6])[:, None]
    pad[7, :2] = True
    batch["action_is_pad"] = pad
    plain = loss_of(policy, batch)
    for value in (123.0, np.nan, np.inf):
        other = {**batch, "action": np.where(pad[..., None], value, batch["action"])}
        assert loss_of(policy, other) == plain
    action = torch.from_numpy(batch["action"]).requires_grad_()
    loss_of(policy, {**batch, "action": action}).backward()
    assert action.grad is not None
    assert (action.grad[torch.from_numpy(pad)] == 0).all()
    assert (action.grad[torch.from_numpy(~pad)] != 0).all()


def test_the_loss_is_the_mean_over_valid_elements(make):
    """A fresh network outputs 0, so the error is the target's square: (x₁ − n)²."""
    policy, batch = make.policy(), make.batch(5)
    batch["action_is_pad"][:, 2:] = np.arange(5)[:, None] > 2
    policy.seed_training(11)
    noise_BHD = torch.randn(5, 6, 2, generator=torch.Generator().manual_seed(11)).numpy()
    valid = ~batch["action_is_pad"]
    expected = ((batch["action"] - noise_BHD) ** 2)[valid].mean()
    assert policy.loss(batch)[0].item() == pytest.approx(expected, rel=1e-6)
    batch["action_is_pad"][:] = True
    assert policy.loss(batch)[0].item() == 0.0


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_padding_is_filled_from_the_nearest_earlier_valid_step(rows):
    pad = torch.tensor(rows)
    action = torch.arange(pad.numel(), dtype=torch.float32).view(*pad.shape, 1)
    filled = without_padding(torch.where(pad[..., None], torch.nan, action), pad)
    for b, row in enumerate(rows):
        valid = [h for h in range(5) if not row[h]]
        for h in range(5):
            earlier = [k for k in valid if k <= h]
            source = (earlier[-1] if earlier else valid[0]) if valid else None
            assert filled[b, h, 0] == (action[b, source, 0] if source is not None else 0)


def test_row_noise_does_not_depend_on_the_batch(make):
    seeds = noise.check_seeds(np.array([5, -1, 2**62, 5]), 4)
    together = noise.start_noise(seeds, 6, 2)
    assert torch.equal(together[0], together[3])
    assert len({tuple(row.flatten().tolist()) for row in together}) == 3
    for row, seed in enumerate(seeds):
        assert torch.equal(noise.start_noise([seed], 6, 2)[0], together[row])
    many = noise.start_noise(list(range(500)), 16, 4).double()
    assert many.mean().item() == pytest.approx(0, abs=0.03)
    assert many.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["flow", "diffusion"])
def test_a_row_decides_alike_alone_and_in_company(make, name):
    policy = make.awaken(make.policy(name))
    obs, seeds = make.obs(5), np.array([4, 9, 1, 7, 2])
    _, together = policy.act(policy.init(5), obs, seed=seeds)
    order = [3, 1]
    _, fewer = policy.act(policy.init(2), {k: v[order] for k, v in obs.items()}, seed=seeds[order])
    np.testing.assert_allclose(fewer, together[order], atol=1e-5)
    _, again = policy.act(None, obs, seed=seeds)
    np.testing.assert_array_equal(again, together)
    _, other = policy.act(None, obs, seed=seeds + 1)
    assert (other != together).any()


def test_actions_are_float32_and_inside_float64_bounds(make):
    """0.1 has no float32 inside: rounding a bound outward would leave the spec's range."""
    device = make.device(low=-0.1, high=0.1)
    policy = make.awaken(make.policy(device=device))
    with torch.no_grad():
        list(policy.network.parameters())[-1].mul_(100)
    for chunk in (
        policy.act(None, make.obs(64), seed=np.arange(64))[1],
        policy.sample(make.obs(8), 8, seed=0).numpy(),
    ):
        assert chunk.dtype == np.float32
        assert (chunk.astype(np.float64) >= -0.1).all() and (chunk.astype(np.float64) <= 0.1).all()
        assert (np.abs(chunk) > 0.0999).any()


def test_a_prefix_heads_the_chunk_and_must_fit(make):
    policy, seed = make.policy(), np.array([0, 1])
    policy.rtc = RtcConfig(mode="copy")
    prefix = np.full((2, 1, policy.spec.action.size), 0.25, np.float32)
    _, free = policy.act(None, make.obs(2), seed=seed)
    _, chunk = policy.act(None, make.obs(2), prefix=prefix, seed=seed)
    np.testing.assert_array_equal(chunk[:, :1], prefix)
    np.testing.assert_array_equal(chunk[:, 1:], free[:, 1:])
    for wrong in (prefix[:1], prefix[:, :0], prefix[..., :1]):
        with pytest.raises(SpecError, match="prefix has shape"):
            policy.act(None, make.obs(2), prefix=wrong, seed=seed)
    with pytest.raises(SpecError, match=r"4 actions are committed.*at most 3"):
        policy.act(None, make.obs(2), prefix=prefix.repeat(4, axis=1), seed=seed)


def test_observations_that_do_not_fit_are_named(make):
    policy, good = make.policy(), make.obs(2)
    state = good["observation.state"]
    nan = state.copy()
    nan[1, 0, 2] = np.nan
    for obs, match in (
        ({**good, "observation.stat": state}, "'observation.stat'.*observation.state"),
        ({"observation.state": state}, "'observation.goal' is missing"),
        (
            {**good, "observation.state": state[:, :1]},
            r"observation.state.*\(2, 1, 3\).*\[B, 2, 3\]",
        ),
        (
            {**good, "observation.goal": good["observation.goal"][:1]},
            r"observation.goal.*\(1, 2, 2\).*\[2, 2, 2\]",
        ),
        ({**good, "observation.state": np.zeros((), np.float32)}, r"observation.state.*\(\)"),
        ({**good, "observation.state": nan}, "observation.state.*finite"),
    ):
        with pytest.raises(SpecError, match=match):
            policy.encode(obs)
    batch = make.batch(2)
    with pytest.raises(SpecError, match="'action_is_pad' is missing"):
        policy.loss({k: v for k, v in batch.items() if k != "action_is_pad"})
    with pytest.raises(SpecError, match=r"action has shape \(2, 5, 2\).*\[2, 6, 2\]"):
        policy.loss({**batch, "action": batch["action"][:, :5]})
    policy.loss({**batch, "reward": np.zeros(2), "observation.other": np.zeros(2)})
    for seed in (np.zeros(3, int), np.zeros(2), np.zeros((2, 1), int)):
        with pytest.raises(SpecError, match="seed"):
            policy.act(None, good, seed=seed)


def test_read_only_arrays_are_accepted(make):
    obs = make.obs(2)
    for value in obs.values():
        value.flags.writeable = False
    make.policy().act(None, obs, seed=np.arange(2))


def test_conditioning_is_the_normalised_history_in_the_specs_order(make):
    policy, obs = make.policy(), make.obs(3)
    cond = policy.encode(dict(reversed(obs.items()))).numpy()
    expected = np.concatenate([v.reshape(3, -1) / 2 for v in obs.values()], axis=1)
    np.testing.assert_allclose(cond, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["flow", "diffusion"])
def test_training_noise_resumes_bit_for_bit(make, name):
    policy, batch = make.awaken(make.policy(name)), make.batch(4)
    policy.loss(batch)
    state = policy.training_rng_state()
    assert state.dtype == torch.uint8
    torch.manual_seed(0)
    first = [policy.loss(batch)[0].item() for _ in range(3)]
    assert len(set(first)) == 3
    resumed = copy.deepcopy(policy)
    resumed.set_training_rng_state(torch.from_numpy(state.numpy().copy()))
    torch.manual_seed(1)
    assert [resumed.loss(batch)[0].item() for _ in range(3)] == first
    with pytest.raises(CorruptDataError, match="training noise"):
        policy.set_training_rng_state(state[:100])


def test_the_global_random_state_is_neither_read_nor_changed(make):
    before = torch.get_rng_state()
    policy = make.policy()
    policy.loss(make.batch(2))
    policy.sample(make.obs(2), 2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_of_a_row_differ_and_belong_to_their_row(make):
    policy = make.policy(device=make.device(low=-10.0, high=10.0))

    class Pull(torch.nn.Module):
        def forward(self, x, time, cond):
            return (cond[:, :1, None] - x) / (1 - time[:, None, None])

    policy.network = Pull()
    obs = make.obs(4)
    out = policy.sample(obs, 3, seed=0)
    expected = (torch.from_numpy(obs["observation.state"][:, 0, 0]) / 2 * 10).clamp(-10, 10)
    torch.testing.assert_close(
        out, expected[:, None, None, None].expand(4, 3, 6, 2), atol=1e-4, rtol=0
    )
    awake = make.awaken(make.policy())
    chunks = awake.sample(obs, 3, seed=0)
    assert (chunks[:, 0] != chunks[:, 1]).any()
    assert torch.equal(chunks, awake.sample(obs, 3, seed=0))


@pytest.mark.parametrize("name", ["flow", "diffusion"])
def test_learns_both_modes(make, name):
    """Actions are −.5 or +.5 at random, shifted by the observation: their mean never occurs."""
    policy = make.policy(
        name,
        device=make.device(action_dim=1),
        horizon=1,
        n_action_steps=1,
        network={"name": "mlp", "width": 64, "depth": 2},
    )

    def shift(obs):
        return 0.1 * obs["observation.goal"][:, -1, 0]

    rng = np.random.default_rng(0)
    steps = 500
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for _ in range(steps):
        obs = make.obs(256, int(rng.integers(1 << 30)))
        action = (shift(obs) + rng.choice([-0.5, 0.5], 256)).astype(np.float32)
        pad = np.zeros((256, 1), bool)
        loss, _ = policy.loss({**obs, "action": action[:, None, None], "action_is_pad": pad})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    obs = make.obs(64, 1)
    chunks = policy.sample(obs, 32, seed=0).numpy()[..., 0, 0] - shift(obs)[:, None]
    assert (np.abs(np.abs(chunks) - 0.5) < 0.2).mean() > 0.9
    assert 0.4 < (chunks > 0).mean() < 0.6
