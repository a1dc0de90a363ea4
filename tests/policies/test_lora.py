"""Low-rank adaptation. Importing peft takes long, hence mostly slow."""

import copy

import numpy as np
import pytest
import torch
from actor_critics import LEARNER, assert_goes_on
from lerobot_policies import DEVICE, FRONT, STATE, export, features
from weights import Pair

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.registry import config_type
from embodied.core.specs import ArraySpec, DeviceSpec
from embodied.learn.learner import Learner, PolicyFormat
from policies.acting import InferenceConfig
from policies.build import build_policy
from policies.checkpoint import load_policy, policy_from_state, policy_state, save_policy
from policies.inference.policy import ActingPolicy
from policies.lora.config import LoRAConfig
from policies.lora.policy import merged
from policies.specs import policy_spec

slow = pytest.mark.slow
RANK, ALPHA = 4, 16.0


def step(policy, batch, count=3):
    form = PolicyFormat((), lambda _: policy, policy_state, policy_from_state)
    learner = Learner(policy, form, LEARNER, seed=1)
    for _ in range(count):
        learner.update(batch)
    return learner


def build(make, **options):
    config = {"base": str(make.folder / "base"), "rank": RANK, **options}
    return build_policy("lora", config, make.device(), make.device().observation, {}, seed=0)


@pytest.fixture
def base(make):
    policy = make.awaken(make.policy())
    save_policy(make.folder / "base", policy)
    return policy


@slow
def test_it_begins_as_its_base(make, base):
    policy, obs = build(make), make.obs(3)
    np.testing.assert_array_equal(
        policy.act(None, obs, seed=np.arange(3))[1], base.act(None, obs, seed=np.arange(3))[1]
    )
    assert torch.equal(policy.sample(obs, 2, seed=0), base.sample(obs, 2, seed=0))


@slow
def test_a_step_moves_the_updates_alone(make, base):
    policy = build(make)
    before = {n: v.clone() for n, v in [*policy.named_parameters(), *policy.named_buffers()]}
    step(policy, make.batch(16))
    after = dict([*policy.named_parameters(), *policy.named_buffers()])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".lora_" in name}


@slow
def test_nothing_but_the_updates_travels(make, base, tmp_path):
    policy = build(make)
    learner = step(policy, make.batch(16))
    config, arrays = learner.weights()
    linear = [m for m in base.modules() if type(m) is torch.nn.Linear]
    numbers = sum(RANK * (m.in_features + m.out_features) for m in linear)
    assert sum(a.nbytes for a in arrays.values()) == 4 * numbers
    assert all(".lora_" in name for name in arrays)
    assert learner.ema.parameters().keys() == arrays.keys()
    pair = Pair(tmp_path / "pair", precision="float32")
    pair.learner.publish(arrays, config, {"step": 3})
    assert pair.sync() is not None
    robots = policy_from_state(config, pair.acting()[1])
    for name, value in robots.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), arrays[name])
    learner.save(tmp_path / "learner.safetensors", {})
    kept = (tmp_path / "learner.safetensors").stat().st_size
    assert kept < 4 * 4 * numbers + 20_000  # updates, averages and two moments


@slow
def test_merging_has_its_closed_form_and_needs_no_base(make, base, tmp_path):
    policy, obs, seeds = make.awaken(build(make, alpha=ALPHA)), make.obs(3), np.arange(3)
    whole = merged(policy)
    assert type(whole) is type(base) and whole.state_dict().keys() == base.state_dict().keys()
    state = policy.state_dict()
    for name, module in base.named_modules():
        if type(module) is torch.nn.Linear:
            a, b = (state[f"base.{name}.lora_{k}.default.weight"] for k in "AB")
            torch.testing.assert_close(
                whole.get_submodule(name).weight, module.weight + ALPHA / RANK * b @ a
            )
    expected = policy.act(None, obs, seed=seeds)[1]
    assert np.abs(expected - base.act(None, obs, seed=seeds)[1]).max() > 1e-3
    save_policy(tmp_path / "whole", whole)
    (make.folder / "base").rename(make.folder / "gone")
    twin = load_policy(tmp_path / "whole")
    np.testing.assert_allclose(twin.act(None, obs, seed=seeds)[1], expected, atol=1e-4)


@slow
@pytest.mark.parametrize("network", ["mlp", "unet1d", "dit"])
def test_what_acts_is_merged_and_follows_new_weights(make, network):
    policy = make.awaken(make.policy("lora", network=network))
    acting = ActingPolicy(policy, InferenceConfig(warm_up=False))
    layers = acting._acting.base.network._body.modules()
    assert not any(hasattr(layer, "lora_A") for layer in layers)
    assert any(hasattr(layer, "lora_A") for layer in policy.modules())
    obs, seeds = make.obs(3), np.arange(3)
    for _ in range(2):
        expected = policy.act(None, obs, seed=seeds)[1]
        np.testing.assert_allclose(acting.act(None, obs, seed=seeds)[1], expected, atol=1e-4)
        make.awaken(policy, seed=7)
        acting.refresh()
    assert np.abs(policy.act(None, obs, seed=seeds)[1] - expected).max() > 1e-3


@slow
def test_a_base_that_changed_or_is_gone_is_noticed(make, base, tmp_path):
    policy = build(make)
    save_policy(tmp_path / "kept", policy)
    assert load_policy(tmp_path / "kept").config == policy.config
    with torch.no_grad():
        base.network.outlet.bias.add_(1.0)
    save_policy(make.folder / "base", base)
    with pytest.raises(CorruptDataError, match=r"another policy than these updates are for"):
        load_policy(tmp_path / "kept")
    (make.folder / "base").rename(make.folder / "gone")
    with pytest.raises(ConfigError, match=r"policy\.base=.*is no policy's folder"):
        load_policy(tmp_path / "kept")


@slow
def test_targets_are_patterns_of_layers(make, base):
    names = {n for n in build(make, targets=["network.*"]).state_dict()}
    assert names and all(name.startswith("base.network.") for name in names)
    with pytest.raises(ConfigError, match=r"unknown linear layer in policy\.targets 'netw\.\*'"):
        build(make, targets=["network.*", "netw.*"])


@slow
def test_what_was_saved_goes_on_bit_for_bit(make, tmp_path):
    state = {"observation.state": ArraySpec((3,))}
    device = DeviceSpec(state, ArraySpec((2,), low=(-1.0,), high=(1.0,)), 10.0)
    sizes = {"n_obs_steps": 1, "horizon": 4, "n_action_steps": 2, "network": {"name": "mlp"}}
    base = build_policy("flow", sizes, device, state, make.all_stats(), seed=0)
    save_policy(make.folder / "base", base)

    def fresh(_):
        return build_policy("lora", {"base": str(make.folder / "base")}, device, state, {}, seed=0)

    form = PolicyFormat((), fresh, policy_state, policy_from_state)
    assert_goes_on(form, LEARNER, 4, tmp_path / "c.safetensors", count=8)


@slow
def test_a_policy_of_lerobots_is_adapted(tmp_path):
    folder = tmp_path / "vla"
    export(folder, "smolvla")
    stats = {
        key: type("Stats", (), {"mean": [0.5] * size, "std": [2.0] * size})
        for key, size in ((STATE, 3), ("action", 2))
    }
    lerobot = {"name": "lerobot", "path": str(folder), "statistics": "data"}
    config = {"base": lerobot, "rank": 2, "targets": ["model.*.lm_expert.*.[qv]_proj"]}
    policy = build_policy("lora", config, DEVICE, DEVICE.observation, stats, seed=0)
    rng = np.random.default_rng(0)
    batch = {
        STATE: rng.normal(size=(4, 1, 3)).astype(np.float32),
        FRONT: rng.integers(0, 256, (4, 1, 64, 64, 3)).astype(np.uint8),
        "task": np.zeros((4, 1, 256), np.uint8),
        "action": rng.uniform(-1, 1, (4, 6, 2)).astype(np.float32),
        "action_is_pad": np.zeros((4, 6), bool),
    }
    before = copy.deepcopy(dict(policy.named_parameters()))
    learner = step(policy, batch)
    changed = {n for n, p in policy.named_parameters() if not torch.equal(before[n], p)}
    assert changed and all(".lm_expert." in n and ".lora_" in n for n in changed)
    state, arrays = learner.weights()
    normalizers = {n for n in arrays if n.startswith("base.normalizers.")}
    assert len(normalizers) == 4 and all(".lora_" in n for n in arrays.keys() - normalizers)
    robots = policy_from_state(state, arrays)
    obs = {key: batch[key] for key in policy.spec.observation}
    expected = robots.act(None, obs, seed=np.arange(4))[1]
    np.testing.assert_allclose(
        merged(robots).act(None, obs, seed=np.arange(4))[1], expected, atol=1e-4
    )
    model = folder / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"\1")
    with pytest.raises(CorruptDataError, match="another policy than these updates"):
        policy_from_state(state, arrays)


@slow
def test_batch_normalisation_is_refused(tmp_path):
    folder = tmp_path / "diffusion"
    inputs = features(STATE, FRONT)["input_features"]
    export(folder, "diffusion", input_features=inputs, use_group_norm=False)
    with pytest.raises(ConfigError, match="batch normalisation"):
        config = {"base": {"name": "lerobot", "path": str(folder)}}
        build_policy("lora", config, DEVICE, DEVICE.observation, {}, seed=0)


def test_its_spec_is_the_bases_and_known_without_torch(make, base):
    config = LoRAConfig(base=str(make.folder / "base"))
    assert policy_spec(make.device(), make.device().observation, config) == base.spec
    assert config_type("policies", "lora") is LoRAConfig
    with pytest.raises(ConfigError, match=r"of policy\.base 'observation\.goal'"):
        policy_spec(make.device(), ["observation.state"], config)
    with pytest.raises(ConfigError, match=r"policy\.base commands .*; the robot takes"):
        policy_spec(make.device(low=-2.0), make.device().observation, config)
    with pytest.raises(ConfigError, match=r"is no policy's folder"):
        LoRAConfig(base=str(make.folder / "none"))
    with pytest.raises(ConfigError, match="is a folder, or"):
        LoRAConfig(base={"name": "flow"})
