"""Stacked critics are what single ones would be, one after the other."""

import msgspec
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from embodied.core.errors import ConfigError, SpecError
from embodied.core.instructions import TASK, encode_instruction
from embodied.core.protocols import Critic
from embodied.core.specs import ArraySpec, PolicySpec
from policies.build import build_critic

HISTOGRAM = {"name": "hl_gauss", "low": -10.0, "high": 0.0, "bins": 16}
SIZES = {"horizon": 4, "members": 3, "width": 16, "depth": 3}


@pytest.fixture
def spec(make):
    device = make.device()
    return PolicySpec(device.observation, device.action, 2, 6, 3)


@pytest.fixture(params=[{"name": "scalar"}, HISTOGRAM], ids=lambda head: head["name"])
def critic(request, make, spec):
    return make.awaken(make.critic(spec, **SIZES, head=request.param))


def actions(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def alone(critic, member, x):
    """One member's outputs for inputs [N, C + h·D], layer by layer."""

    def linear(layer, x):
        return F.linear(x, layer.weight_EIO[member].T, layer.bias_E1O[member, 0])

    network = critic.network
    for layer, norm in zip([network.inlet, *network.layers], network.norms, strict=True):
        weight, bias = norm.scale_E1W[member, 0], norm.shift_E1W[member, 0]
        x = F.silu(F.layer_norm(linear(layer, x), weight.shape, weight, bias))
    return linear(network.outlet, x)


def test_outputs_and_gradients_equal_a_loop_over_members(critic, make):
    critic.double()
    obs, chunks = make.obs(5), actions(5, 7, 6, 2).double()
    target = -5 * torch.rand(5, 7, generator=torch.Generator().manual_seed(1)).double()
    stacked = critic.logits(critic.encode(obs), chunks)
    assert stacked.shape == (3, 5, 7, critic.head.outputs)

    cond = critic.encode(obs)[:, None].expand(-1, 7, -1)
    inputs = torch.cat([cond, chunks[:, :, :4].flatten(2)], dim=2).flatten(0, 1)
    looped = torch.stack([alone(critic, m, inputs).unflatten(0, (5, 7)) for m in range(3)])
    torch.testing.assert_close(stacked, looped)

    parameters = list(critic.network.parameters())
    found = torch.autograd.grad(critic.head.loss(stacked, target).sum(), parameters)
    expected = torch.autograd.grad(critic.head.loss(looped, target).sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_members_begin_different_and_near_the_low_end(make, spec):
    critic = make.critic(spec, **SIZES, head=HISTOGRAM)
    values = critic.values(critic.encode(make.obs(5)), actions(5, 7, 6, 2))
    low, width = critic.head.config.low, critic.head.width
    twentieth = low + (critic.head.config.high - low) / 20
    assert (values - twentieth).abs().max() < width
    assert values.std(dim=0).min() > 0
    again = make.critic(spec, **SIZES, head=HISTOGRAM)
    assert torch.equal(values, again.values(again.encode(make.obs(5)), actions(5, 7, 6, 2)))


def test_q_is_the_members_mean_whoever_else_is_judged(critic, make):
    assert isinstance(critic, Critic)
    obs, chunks = make.obs(4), actions(4, 6, 6, 2)
    q = critic.q(obs, chunks)
    assert q.shape == (4, 6)
    values = critic.values(critic.encode(obs), chunks)
    torch.testing.assert_close(q, values.sum(0) / 3)
    for k in range(6):  # each with an encoding of its own
        torch.testing.assert_close(critic.q(obs, chunks[:, k : k + 1])[:, 0], q[:, k])
    row = {key: value[1:2] for key, value in obs.items()}
    torch.testing.assert_close(critic.q(row, chunks[1:2])[0], q[1])


def test_the_first_steps_of_a_chunk_are_judged_and_no_others(critic, make):
    obs, chunks = make.obs(4), actions(4, 6, 6, 2)
    q = critic.q(obs, chunks)
    later, first = chunks.clone(), chunks.clone()
    later[:, :, 4:] = actions(4, 6, 2, 2, seed=1)
    first[:, :, 3] = -first[:, :, 3]
    assert torch.equal(critic.q(obs, later), q)
    assert torch.equal(critic.q(obs, chunks[:, :, :4]), q)
    assert (critic.q(obs, first) != q).all()


def test_actions_are_in_device_units(make, spec):
    """The same networks for a robot with other bounds: they see the same share of them."""
    wide = msgspec.structs.replace(spec, action=make.device(low=-3.0, high=5.0).action)
    narrow = make.awaken(make.critic(spec, **SIZES))
    other = make.awaken(make.critic(wide, **SIZES))
    chunks = actions(4, 6, 6, 2)
    torch.testing.assert_close(other.q(make.obs(4), 4 * chunks + 1), narrow.q(make.obs(4), chunks))


def test_statistics_normalise_observations(make, spec):
    critic = make.critic(spec, **SIZES, observation_normalization="gaussian")
    assert critic.normalized_keys == ("observation.state", "observation.goal")
    stats = make.all_stats()
    stats["observation.state"].mean = [3.0] * 3
    critic.set_statistics(stats)
    obs = make.obs(2)
    state = critic.encode(obs)[:, :6]
    torch.testing.assert_close(state, torch.from_numpy(obs["observation.state"] - 3).flatten(1))
    with pytest.raises(ConfigError, match=r"unknown statistics key 'observation\.goal'"):
        critic.set_statistics({"observation.state": stats["observation.state"]})


def seeing(make, spec):
    """A critic that reads pictures and an instruction, and three rows of observations."""
    spec = msgspec.structs.replace(
        spec,
        observation={
            "observation.state": ArraySpec((3,)),
            "observation.images.left": ArraySpec((12, 12, 3), "uint8"),
            TASK: ArraySpec((24,), "uint8"),
        },
    )
    vit = {"name": "vit", "patch": 5, "width": 16, "depth": 1, "heads": 2, "features": 6}
    text = {"name": "ngrams", "max_bytes": 24, "buckets": 64, "width": 8, "features": 5}
    critic = make.awaken(
        make.critic(spec, **SIZES, head=HISTOGRAM, images={"encoder": vit}, language=text)
    )
    rng = np.random.default_rng(0)
    obs = {
        "observation.state": rng.normal(size=(3, 2, 3)).astype(np.float32),
        "observation.images.left": rng.integers(0, 256, (3, 2, 12, 12, 3), np.uint8),
        TASK: np.tile(encode_instruction("open the drawer", 24), (3, 2, 1)),
        "reward": rng.normal(size=3),
    }
    return critic, obs


@pytest.mark.parametrize("head", [HISTOGRAM, {"name": "scalar"}])
def test_values_that_are_near_each_other_stay_apart_in_bfloat16(make, spec, head):
    critic = make.awaken(make.critic(spec, **SIZES, head=head))
    with torch.no_grad():
        critic.network.outlet.bias_E1O.add_(-60.0 if head["name"] == "scalar" else 0.0)
        asked = torch.zeros(1, critic.encoder.dim), actions(1, 64, 6, 2)
        exact = critic.values(*asked)
        with torch.autocast("cpu", torch.bfloat16):
            found = critic.values(*asked)
    assert found.dtype == torch.float32
    for member, wanted in zip(found[:, 0], exact[:, 0], strict=True):
        assert len(member.unique()) > 50
        assert np.corrcoef(member.numpy(), wanted.numpy())[0, 1] > 0.95


@pytest.mark.parametrize("bfloat16", [False, True])
def test_pictures_and_instructions_are_encoded_once_and_learned_from(make, spec, bfloat16):
    critic, obs = seeing(make, spec)
    calls = []
    critic.encoder.register_forward_hook(lambda *_: calls.append(1))
    target = torch.tensor([-8.0, -5.0, -2.0])[:, None].expand(-1, 4)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            cond = critic.encode(obs, torch.Generator().manual_seed(step % 3))
            logits = critic.logits(cond, actions(3, 4, 6, 2))
            loss = critic.head.loss(logits, target).mean()
        loss.backward()
        if step == 0:
            for key, parameter in critic.named_parameters():
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
        optimizer.step()
        losses.append(loss.item())
    assert len(calls) == 30 and losses[-1] < 0.8 * losses[0]
    other = obs | {TASK: np.tile(encode_instruction("close it", 24), (3, 2, 1))}
    assert (critic.q(other, actions(3, 4, 6, 2)) != critic.q(obs, actions(3, 4, 6, 2))).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"horizon": 7}, r"critic\.horizon is 7; the policy's chunks have 6"),
        ({"members": 0}, r"critic\.members"),
        ({"head": {"name": "hlgauss"}}, "unknown value_head 'hlgauss'. Did you mean 'hl_gauss'"),
        ({"head": {}}, r"critic\.head: name is missing"),
        ({"wdith": 3}, r"Did you mean 'critic\.width'"),
        ({"language": {"name": "ngrams"}}, r"critic\.language is .* and the critic's"),
    ],
)
def test_bad_options_are_refused(make, spec, options, words):
    with pytest.raises(ConfigError, match=words):
        make.critic(spec, **{**SIZES, **options})


def test_missing_options_and_loose_actions_are_refused(make, spec):
    with pytest.raises(ConfigError, match="required field `head`"):
        build_critic({"horizon": 2}, spec, make.all_stats(), seed=0)
    loose = msgspec.structs.replace(spec, action=ArraySpec((2,), low=(-1.0,)))
    with pytest.raises(ConfigError, match=r"bounds \(-1.0,\) and None; a critic needs a finite"):
        make.critic(loose)


@pytest.mark.parametrize("shape", [(4, 6, 3, 2), (4, 6, 6, 3), (3, 6, 6, 2), (4, 6, 2)])
def test_chunks_of_another_shape_are_refused(make, spec, shape):
    critic = make.critic(spec, **SIZES)
    with pytest.raises(SpecError, match=r"\[4, n, 4 or more, 2\] is right"):
        critic.q(make.obs(4), torch.zeros(shape))
    with pytest.raises(SpecError, match=r"'observation\.goal' is missing"):
        critic.encode({"observation.state": make.obs(4)["observation.state"]})


def test_a_value_is_the_critics_networks_without_actions(critic, make):
    obs, value = make.obs(5), critic.make_value(seed=3)
    torch.testing.assert_close(
        value.logits(obs), torch.stack([alone(value, m, critic.encode(obs)) for m in range(3)])
    )
    start = value.head.value(value.head.start())
    torch.testing.assert_close(value.values(obs), start.expand(3, 5), rtol=0, atol=0.3)
    again, other = critic.make_value(seed=3), critic.make_value(seed=4)
    assert torch.equal(value.logits(obs), again.logits(obs))
    assert not torch.equal(value.logits(obs), other.logits(obs))
    own = {id(parameter) for parameter in critic.parameters()}
    assert not own & {id(parameter) for parameter in value.parameters()}


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_value_learns_from_pictures_and_instructions(make, spec, bfloat16):
    critic, obs = seeing(make, spec)
    value = make.awaken(critic.make_value(seed=0))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = value.logits(obs, torch.Generator().manual_seed(0))
        loss = value.head.loss(logits, torch.tensor([-8.0, -5.0, -2.0])).mean()
    loss.backward()
    for key, parameter in value.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
    assert all(parameter.grad is None for parameter in critic.parameters())
