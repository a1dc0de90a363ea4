import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch

from embodied.core.config import component
from embodied.core.errors import ConfigError
from embodied.core.specs import ArraySpec
from policies.build import build_policy


def test_typed_resolves_and_checks():
    cls, config = component("networks", {"name": "mlp", "width": 64}, "policy")
    assert cls.__name__ == "ResidualMLP" and config == cls.Config(width=64)
    for mapping, match in (
        ({"width": 64}, "name is missing"),
        ({"name": 3}, "name is missing"),
        ("mlp", "name is missing"),
        ({"name": "mpl"}, "unknown network 'mpl'.*Did you mean 'mlp'"),
        ({"name": "mlp", "widht": 64}, "policy.widht'.*Did you mean 'policy.width'"),
        ({"name": "mlp", "width": "64"}, r"`int`, got `str`.*policy\.width"),
        ({"name": "mlp", "width": 1}, "width"),
    ):
        with pytest.raises(ConfigError, match=match):
            component("networks", mapping, "policy")
    with pytest.raises(ConfigError, match="num_train_steps=50"):
        component(
            "policies", {"name": "diffusion", "num_train_steps": 50, "num_steps": 60}, "policy"
        )


def test_initial_weights_depend_on_the_seed_alone(make):
    torch.manual_seed(1)
    first = make.policy(seed=4).state_dict()
    torch.manual_seed(2)
    again, other = make.policy(seed=4).state_dict(), make.policy(seed=5).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_what_a_policy_cannot_use_is_refused(make):
    device, stats = make.device(), make.all_stats()
    images = msgspec.structs.replace(
        device, observation={"observation.images.front": ArraySpec((3, 8, 8), "uint8")}
    )
    loose = msgspec.structs.replace(device, action=ArraySpec((2,)))
    square = msgspec.structs.replace(device, action=ArraySpec((2, 2), low=(-1.0,), high=(1.0,)))
    for args, match in (
        ((device, ["observation.stat"], stats), "'observation.stat'.*'observation.state'"),
        ((device, [], stats), "at least one"),
        (
            (device, ["observation.state"], {"action": stats["action"]}),
            "statistics key 'observation.state'",
        ),
        ((images, ["observation.images.front"], stats), r"front.*uint8 \[height"),
        ((loose, ["observation.state"], stats), "no finite bounds"),
        ((square, ["observation.state"], stats), "one axis"),
    ):
        with pytest.raises(ConfigError, match=match):
            build_policy("flow", {}, *args, seed=0)
    with pytest.raises(ConfigError, match=r"policy.network.widht'.*'policy.network.width'"):
        build_policy(
            "flow",
            {"network": {"name": "mlp", "widht": 3}},
            device,
            ["observation.state"],
            stats,
            seed=0,
        )


def test_unbounded_actions_can_be_normalised_from_data(make):
    device = msgspec.structs.replace(make.device(), action=ArraySpec((2,)))
    policy = make.policy(device=device, action_normalization="limits")
    chunk = policy.act(None, make.obs(2), seed=np.arange(2))[1]
    # A fresh flow returns its noise, scaled by the data's range of ±2.
    assert np.isfinite(chunk).all() and np.abs(chunk).max() > 1


@pytest.mark.slow
def test_flow_does_not_load_diffusers():
    code = "import policies.flow, sys; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
