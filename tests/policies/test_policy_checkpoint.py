import hashlib
import json
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.specs import ArraySpec
from policies import checkpoint
from policies.checkpoint import (
    load_arrays,
    load_policy,
    policy_from_state,
    policy_state,
    save_policy,
)
from policies.flow import FlowPolicy
from policies.folder import digest

TINY = {"name": "mlp", "width": 8, "depth": 1, "time_dim": 4}


@pytest.fixture
def policy(make):
    return make.awaken(make.policy(network=TINY, horizon=2, n_action_steps=1))


@pytest.fixture
def saved(policy, tmp_path):
    path = tmp_path / "final"
    save_policy(path, policy)
    return path


def reseal(path: Path, change) -> None:
    """Change a configuration and give it a right hash again."""
    content = json.loads((path / "config.json").read_text())
    content.pop("sha256")
    change(content)
    content["sha256"] = digest(content)
    (path / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["flow", "diffusion"])
@pytest.mark.parametrize("network", ["mlp", "unet1d"])
def test_round_trip_acts_bit_for_bit(make, tmp_path, name, network):
    policy = make.awaken(make.policy(name, network=network, n_obs_steps=2))
    save_policy(tmp_path / "a" / "final", policy)
    before = torch.get_rng_state()
    twin = load_policy(tmp_path / "a" / "final")
    assert torch.equal(torch.get_rng_state(), before)
    for seed in range(3):
        obs, seeds = make.obs(3, seed), np.arange(3) + seed
        np.testing.assert_array_equal(
            twin.act(None, obs, seed=seeds)[1], policy.act(None, obs, seed=seeds)[1]
        )
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["final"]


def test_normalisers_travel(make, policy, saved):
    assert load_policy(saved).encoder.normalizers[0].scale.tolist() == [2.0, 2.0, 2.0]


def test_saving_again_replaces(make, policy, saved):
    with torch.no_grad():
        policy.network.outlet.bias.fill_(0.25)
    save_policy(saved, policy)
    assert (load_policy(saved).network.outlet.bias == 0.25).all()
    assert [p.name for p in saved.parent.iterdir()] == ["final"]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_every_flipped_byte_is_noticed(saved, file):
    data = (saved / file).read_bytes()
    stride = max(1, len(data) // 150)
    for k in range(0, len(data), stride):
        for bit in (0x01, 0x80):
            damaged = bytearray(data)
            damaged[k] ^= bit
            (saved / file).write_bytes(damaged)
            with pytest.raises((CorruptDataError, ConfigError), match=r"final.*Restore"):
                load_policy(saved)
    (saved / file).write_bytes(data)
    load_policy(saved)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_every_truncation_and_extension_is_noticed(saved, file):
    data = (saved / file).read_bytes()
    cuts = [data[:k] for k in range(0, len(data), max(1, len(data) // 40))]
    for damaged in (*cuts, data + b"x", data + bytes(1 << 21), b"[" * 100_000):
        (saved / file).write_bytes(damaged)
        with pytest.raises(CorruptDataError, match=f"final.*{file}.*Restore"):
            load_policy(saved)
    (saved / file).unlink()
    with pytest.raises(CorruptDataError, match=f"{file} is missing"):
        load_policy(saved)


def test_files_of_two_checkpoints_do_not_mix(make, policy, saved, tmp_path):
    with torch.no_grad():
        policy.network.outlet.bias.fill_(0.25)
    save_policy(tmp_path / "other", policy)
    (tmp_path / "other" / "model.safetensors").rename(saved / "model.safetensors")
    with pytest.raises(CorruptDataError, match="does not match its hash"):
        load_policy(saved)


def test_configurations_that_lie_are_refused(saved):
    original = (saved / "config.json").read_bytes()
    for change, match in (
        (lambda c: c.update(policy="os:system"), "unknown policy 'os:system'"),
        (lambda c: c.update(policy=3), "name is missing"),
        (lambda c: c.update(policy="diffusion"), "num_steps|solver"),
        (lambda c: c.update(format=2), "format 1"),
        (lambda c: c.pop("spec"), "format 1"),
        (lambda c: c.update(spec=[]), "spec cannot be read"),
        (lambda c: c["spec"].update(horizon=10**12), "too many"),
        (lambda c: c["spec"].update(horizon=3), "the policy has"),
        (lambda c: c["spec"]["action"].update(shape=[0]), "spec cannot be read"),
        (lambda c: c.update(options=None), "no mapping"),
        (lambda c: c["options"].update(sover="heun"), "sover'.*policy.solver'"),
        (lambda c: c["options"]["network"].update(depth=2), "missing or not the policy's"),
        (lambda c: c["options"]["network"].update(name="builtins:eval"), "unknown network"),
    ):
        (saved / "config.json").write_bytes(original)
        reseal(saved, change)
        with pytest.raises((CorruptDataError, ConfigError), match=f"final.*({match}).*Restore"):
            load_policy(saved)


def test_a_giant_configuration_is_refused_without_its_memory(policy):
    config, arrays = policy_state(policy)
    config["options"]["network"] = {"name": "mlp", "width": 8192, "hidden": 32768, "depth": 64}
    started = time.perf_counter()
    with pytest.raises(CorruptDataError, match=r"the policy has|missing"):
        policy_from_state(config, arrays)
    assert time.perf_counter() - started < 2


def test_shapes_of_a_large_policy_with_pictures_are_known_at_once(policy):
    """Three cameras of 224 × 224 pixels, each with a ResNet-18 of its own: 35 M parameters."""
    config, arrays = policy_state(policy)
    camera = {"shape": [224, 224, 3], "dtype": "uint8"}
    config["spec"]["observation"] |= {f"observation.images.{n}": camera for n in range(3)}
    config["options"]["images"]["encoder"] = {"name": "resnet18"}
    started = time.perf_counter()
    expected = checkpoint._expected_arrays(lambda: checkpoint.construct(config))
    with pytest.raises(CorruptDataError, match="missing"):
        policy_from_state(config, arrays)
    assert time.perf_counter() - started < 2
    assert sum(np.prod(shape) for shape, _ in expected.values()) > 3 * 11_170_000


def test_arrays_must_be_exactly_the_policys(policy):
    config, arrays = policy_state(policy)
    key = "network.outlet.bias"
    nan = arrays[key].copy()
    nan[-1] = np.nan
    for change, match in (
        ({key: nan}, "not finite"),
        ({key: arrays[key].astype(np.float64)}, "float64"),
        ({key: arrays[key][:-1]}, r"\(3,\)"),
        ({"network.extra": arrays[key]}, "network.extra"),
        ({key: None}, key),
    ):
        damaged = {k: v for k, v in {**arrays, **change}.items() if v is not None}
        before = {k: v.clone() for k, v in policy.state_dict().items()}
        with pytest.raises(CorruptDataError, match=match):
            policy_from_state(config, damaged)
        with pytest.raises(CorruptDataError, match=match):
            load_arrays(policy, damaged)
        assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())


def test_state_is_a_copy_and_plain_json(make, policy):
    config, arrays = policy_state(policy)
    assert msgspec.json.decode(msgspec.json.encode(config)) == config
    arrays["network.outlet.bias"][:] = 7
    assert not (policy.network.outlet.bias == 7).any()
    load_arrays(policy, arrays)
    assert (policy.network.outlet.bias == 7).all()
    for array in arrays.values():
        array.flags.writeable = False
    twin = policy_from_state(config, arrays)
    with torch.no_grad():
        twin.network.outlet.bias.fill_(1)
    assert (arrays["network.outlet.bias"] == 7).all()


def test_infinite_bounds_survive(make, tmp_path):
    device = msgspec.structs.replace(
        make.device(), action=ArraySpec((2,), low=(-1.0, -np.inf), high=(np.inf, 2.0))
    )
    policy = make.policy(device=device, network=TINY, action_normalization="limits")
    save_policy(tmp_path / "final", policy)
    assert load_policy(tmp_path / "final").spec == policy.spec


def test_a_class_that_is_not_registered_cannot_be_saved(make, policy):
    class Homemade(FlowPolicy):
        pass

    with pytest.raises(ConfigError, match="Homemade is not the policy registered as 'flow'"):
        policy_state(Homemade(policy.spec, policy.config))


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CorruptDataError, match=r"nowhere.*config.json is missing"):
        load_policy(tmp_path / "nowhere")


def test_the_model_file_is_plain_safetensors(saved):
    data = (saved / "model.safetensors").read_bytes()
    config = json.loads((saved / "config.json").read_text())
    assert hashlib.sha256(data).hexdigest() == config["model_sha256"]
    assert config["policy"] == "flow" and config["spec"]["horizon"] == 2
