"""Compositions as policies: checkpoints, losses, and what does not go together."""

import numpy as np
import pytest
from gaussians import HALF

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.specs import ArraySpec, DeviceSpec
from policies.checkpoint import load_policy, save_policy
from policies.compose.build import compose


@pytest.mark.parametrize("name", ["mix", "product", "cfg", "or", "and", "critic", "pooled"])
def test_checkpoints_hold_the_members(make, tmp_path, name):
    options = {
        "mix": {"weights": [0.3, 0.7]},
        "product": {"weights": [[0.3, 0.5], 1.5]},
        "cfg": {"weights": [2.0], "unconditional": "b"},
        "critic": {"critic": {"name": "medoid"}},
        "pooled": {"proposals": 3, "temperature": 0.5},
    }.get(name, {})
    policies = {
        "a": make.awaken(make.policy("flow")),
        "b": make.awaken(make.policy("diffusion"), 6),
    }
    solver = {"name": "ddpm", "num_steps": 8} if name in ("or", "and") else None
    composed = compose(policies, {"name": name, **options}, solver=solver)
    save_policy(tmp_path / "composed", composed)
    assert sorted(p.name for p in (tmp_path / "composed").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = load_policy(tmp_path / "composed")
    obs, seeds = make.obs(3), np.arange(3)
    assert loaded.spec == composed.spec and loaded.config == composed.config
    np.testing.assert_array_equal(
        loaded.act(None, obs, seed=seeds)[1], composed.act(None, obs, seed=seeds)[1]
    )
    model = tmp_path / "composed" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    with pytest.raises(CorruptDataError, match="hash"):
        load_policy(tmp_path / "composed")


def test_loss_is_the_sum_of_the_members(make):
    policies = {"a": make.policy("flow"), "b": make.policy("diffusion", horizon=4)}
    composed = compose(policies, {"name": "mix", "weights": [0.5, 0.5]})
    composed.seed_training(3)
    state = composed.training_rng_state()
    loss, metrics = composed.loss(make.batch(8))
    assert loss.item() == pytest.approx(metrics["a/loss"] + metrics["b/loss"])
    composed.set_training_rng_state(state)
    assert composed.loss(make.batch(8))[0].item() == loss.item()
    loss.backward()
    assert all(p.grad is not None for p in composed.parameters())


WRONG = [
    ({"name": "mix", "weights": [0.5, 0.6]}, r"'a': 0.5, 'b': 0.6.*sum to 1.1"),
    ({"name": "mix", "weights": [1.5, -0.5]}, r"weight of 'b' is -0.5"),
    ({"name": "mix", "weights": [1.0]}, r"has 1 values; it needs 2, for 'a', 'b'"),
    ({"name": "mix", "weights": [[0.5, 0.5], [0.5, 0.4]]}, r"sum to \[1.0, 0.9\]"),
    ({"name": "mix", "weights": [[0.5] * 3, 0.5]}, r"weight of 'a' has 3 values"),
    ({"name": "product", "weights": [float("nan"), 1.0]}, r"weight of 'a' is nan"),
    ({"name": "product", "weights": [0.0, 0.0]}, r"no member a weight"),
    ({"name": "cfg", "weights": [1.0], "unconditional": "c"}, r"'c', which is no member"),
    ({"name": "and"}, r"solver=\{name: ddpm\}"),
    ({"name": "or", "offsets": [1.0]}, r"offsets has 1 values"),
    ({"name": "mx", "weights": [1.0, 0.0]}, r"Did you mean 'mix'"),
    (
        {"name": "mix", "weights": [1, 0], "stages": [{"begin": 0.5, "weights": [1, 1]}]},
        r"sum to 2",
    ),
]


@pytest.mark.parametrize(("operator", "message"), WRONG)
def test_wrong_operators_are_refused(make, operator, message):
    policies = {"a": make.policy("diffusion"), "b": make.policy("flow")}
    with pytest.raises(ConfigError, match=message):
        compose(policies, operator)


def test_policies_that_do_not_go_together_are_refused(make):
    with pytest.raises(ConfigError, match=r"'a' and 'b' differ in low"):
        compose({"a": make.policy(), "b": make.policy(device=make.device(low=-2.0))}, HALF)
    with pytest.raises(ConfigError, match=r"'b'.*no denoiser.*pooled"):
        compose({"a": make.policy(), "b": make.policy("pooled")}, HALF)
    device = make.device()
    other = DeviceSpec(
        observation={**device.observation, "observation.state": ArraySpec((3,), unit="m")},
        action=device.action,
        tick_hz=10.0,
    )
    with pytest.raises(ConfigError, match=r"'a' and 'b' read 'observation.state' with other specs"):
        compose({"a": make.policy(), "b": make.policy(device=other)}, HALF)
    with pytest.raises(ConfigError, match="at least one"):
        compose({}, HALF)
