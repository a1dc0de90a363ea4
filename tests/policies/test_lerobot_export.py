"""What is read of an exported folder, without LeRobot: files that it wrote, as it writes them."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from lerobot_policies import DEVICE, FRONT, STATE

from embodied.core.config import options_of
from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.instructions import TASK
from embodied.core.specs import ArraySpec
from policies.lerobot.export import export_sha256, read_export, read_statistics
from policies.lerobot.normalizer import LeRobotNormalizer
from policies.specs import policy_spec

FEATURES = {
    STATE: {"type": "STATE", "shape": [3]},
    FRONT: {"type": "VISUAL", "shape": [3, 64, 64]},
    "action": {"type": "ACTION", "shape": [2]},
}
NORMS = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MIN_MAX"}
STATS = {
    f"{STATE}.mean": np.array([1, 2, 3], np.float32),
    f"{STATE}.std": np.array([2, 4, 0], np.float32),
    "action.min": np.array([-1, 3], np.float32),
    "action.max": np.array([3, 3], np.float32),
}


def step(name, **config):
    return {"registry_name": name, "config": config}


@pytest.fixture
def folder(tmp_path):
    """An exported ACT; each file may be changed before it is read."""
    shapes = {
        "input_features": {k: v for k, v in FEATURES.items() if k != "action"},
        "output_features": {"action": FEATURES["action"]},
    }
    act = {"type": "act", "n_obs_steps": 1, "chunk_size": 6, "n_action_steps": 3, **shapes}
    how = {"features": FEATURES, "norm_map": NORMS, "eps": 1e-8}
    files = {
        "config.json": act,
        "policy_preprocessor.json": {
            "name": "policy_preprocessor",
            "steps": [
                step("rename_observations_processor", rename_map={}),
                step("to_batch_processor"),
                step("device_processor", device="cuda", float_dtype=None),
                {**step("normalizer_processor", **how), "state_file": "before.safetensors"},
            ],
        },
        "policy_postprocessor.json": {
            "name": "policy_postprocessor",
            "steps": [
                {**step("unnormalizer_processor", **how), "state_file": "after.safetensors"},
                step("device_processor", device="cpu", float_dtype=None),
            ],
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for name in ("before", "after"):
        safetensors.numpy.save_file(STATS, tmp_path / f"{name}.safetensors")
    safetensors.numpy.save_file({"w": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def options(folder, **more):
    return options_of("policies", {"name": "lerobot", "path": str(folder), **more}, "policy")


def test_what_is_normalised_and_by_what(folder):
    export = read_export(folder)
    assert export.type == "act" and export.tokenizing is None
    assert export.normalization == {STATE: "MEAN_STD", "action": "MIN_MAX"}
    assert read_statistics(folder).keys() == STATS.keys()
    for key, value in read_statistics(folder).items():
        np.testing.assert_array_equal(value, STATS[key])


def test_the_spec_is_the_models_on_this_robot(folder):
    spec = policy_spec(DEVICE, DEVICE.observation, options(folder))
    assert list(spec.observation) == [STATE, FRONT] and spec.action == DEVICE.action
    assert (spec.n_obs_steps, spec.horizon, spec.n_action_steps) == (1, 6, 3)
    assert (
        policy_spec(DEVICE, [STATE, FRONT], options(folder, n_action_steps=6)).n_action_steps == 6
    )

    def diffusion(model):
        model.pop("chunk_size")
        model.update(type="diffusion", n_obs_steps=2, horizon=16, n_action_steps=8)

    change(folder / "config.json", diffusion)
    spec = policy_spec(DEVICE, DEVICE.observation, options(folder))
    assert (spec.n_obs_steps, spec.horizon, spec.n_action_steps) == (2, 15, 8)


def test_keys_of_another_robot_are_renamed(folder):
    change(
        folder / "policy_preprocessor.json",
        lambda c: c["steps"][0]["config"].update(rename_map={"observation.joints": STATE}),
    )
    joints = {
        "observation.joints": ArraySpec((3,)),
        "observation.images.top": DEVICE.observation[FRONT],
    }
    robot = type(DEVICE)(joints, DEVICE.action, 10.0)
    with pytest.raises(ConfigError, match=r"observation.images.front is not.*policy.rename"):
        policy_spec(robot, joints, options(folder))
    renamed = options(folder, rename={"observation.images.top": FRONT})
    assert list(policy_spec(robot, joints, renamed).observation) == list(joints)


@pytest.mark.parametrize(
    ("key", "array", "match"),
    [
        (STATE, ArraySpec((4,)), r"observation.state is float32 of shape \(4,\).*\(3,\)"),
        (FRONT, ArraySpec((3, 64, 64), "uint8"), r"front.*a picture of \(64, 64\)"),
        (FRONT, ArraySpec((32, 32, 3), "uint8"), r"front.*a picture of \(64, 64\)"),
    ],
)
def test_a_robot_that_does_not_fit_is_refused(folder, key, array, match):
    robot = type(DEVICE)({**DEVICE.observation, key: array}, DEVICE.action, 10.0)
    with pytest.raises(ConfigError, match=match):
        policy_spec(robot, robot.observation, options(folder))


def test_a_robot_of_other_actions_is_refused(folder):
    robot = type(DEVICE)(DEVICE.observation, ArraySpec((3,)), 10.0)
    with pytest.raises(ConfigError, match=r"action.*shape \(3,\)"):
        policy_spec(robot, robot.observation, options(folder))


def test_instructions_are_observed_if_they_are_tokenised(folder):
    change(
        folder / "policy_preprocessor.json",
        lambda c: c["steps"].insert(2, step("tokenizer_processor", max_length=48, truncation=True)),
    )
    with pytest.raises(ConfigError, match=r"nothing is downloaded.*policy\.backbone=None"):
        options(folder)
    words = folder / "words"
    words.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (words / name).write_text("{}")
    told = options(folder, backbone=str(words), task_bytes=40)
    assert policy_spec(DEVICE, DEVICE.observation, told).observation[TASK].shape == (40,)
    assert told.export.tokenizing.max_length == 48


def unknown_step(content):
    content["steps"].append({"class": "os.system", "config": {"command": "true"}})


def known_elsewhere(content):
    content["steps"].append(step("xvla_add_domain_id"))


def outside(content):
    content["steps"][3]["state_file"] = "../before.safetensors"


@pytest.mark.parametrize(
    ("file", "edit", "match"),
    [
        ("policy_preprocessor.json", unknown_step, "step 'os.system'.*none is imported"),
        ("policy_preprocessor.json", known_elsewhere, "step 'xvla_add_domain_id'"),
        ("policy_preprocessor.json", outside, "no name in the same folder"),
        ("config.json", lambda c: c.pop("type"), "not exported by LeRobot"),
        ("config.json", lambda c: c.update(use_peft=True), "PEFT adapter alone"),
        ("config.json", lambda c: c.update(type="sac"), "'sac' predicts no chunks"),
        ("config.json", lambda c: c.pop("chunk_size"), "chunk_size=None"),
        ("config.json", lambda c: c.update(input_features=3), "input_features"),
    ],
)
def test_exports_that_cannot_be_used_are_refused(folder, file, edit, match):
    change(folder / file, edit)
    with pytest.raises(ConfigError, match=match):
        policy_spec(DEVICE, DEVICE.observation, options(folder))
        read_statistics(folder)


def test_what_is_no_local_export_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"lerobot/smolvla_base.*nothing is downloaded"):
        options("lerobot/smolvla_base")
    (folder / "policy_postprocessor.json").unlink()
    with pytest.raises(ConfigError, match="migrate_policy_normalization"):
        options(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CorruptDataError, match="no JSON object"):
        options(folder)


def test_processors_that_disagree_are_refused(folder):
    other = {**STATS, "action.max": np.array([3, 4], np.float32)}
    safetensors.numpy.save_file(other, folder / "after.safetensors")
    with pytest.raises(ConfigError, match=r"action.max of policy_preprocessor"):
        read_statistics(folder)


def test_every_file_of_an_export_is_in_its_hash(folder):
    before = export_sha256(folder)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        path.write_bytes(data.replace(b"\0", b"\1", 1) if b"\0" in data else data + b" ")
        assert export_sha256(folder) != before, path.name
        path.write_bytes(data)
    assert export_sha256(folder) == before


def test_normalisation_has_its_closed_forms():
    statistics = {
        "x.mean": np.array([1, 2], np.float32),
        "x.std": np.array([2, 0], np.float32),
        "x.min": np.array([-1, 3], np.float32),
        "x.max": np.array([3, 3], np.float32),
        "x.q01": np.array([0, 0], np.float32),
        "x.q99": np.array([4, 8], np.float32),
    }
    x = torch.tensor([[3.0, 2.0], [-1.0, 3.0]])
    for how, wanted in (
        ("MEAN_STD", [[1, 0], [-1, 1e8]]),
        ("MIN_MAX", [[1, -2e8 - 1], [-1, -1]]),
        ("QUANTILES", [[0.5, -0.5], [-1.5, -0.25]]),
    ):
        normalizer = LeRobotNormalizer((2,), how, 1e-8)
        normalizer.set_exported("x", statistics)
        torch.testing.assert_close(normalizer.normalize(x), torch.tensor(wanted))
        torch.testing.assert_close(normalizer.unnormalize(normalizer.normalize(x)), x)
    with pytest.raises(ConfigError, match=r"x.q10 or x.q90.*statistics=data"):
        LeRobotNormalizer((2,), "QUANTILE10", 1e-8).set_exported("x", statistics)
    with pytest.raises(ConfigError, match="hold 2 values; 3 finite"):
        LeRobotNormalizer((3,), "MIN_MAX", 1e-8).set_exported("x", statistics)
