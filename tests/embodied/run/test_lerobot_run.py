"""Runs that begin with a policy of LeRobot's, and with updates of what such a run has learned."""

import numpy as np
import pytest
import torch
from lerobot_policies import FRONT, STATE, export, features

from embodied.cli.main import main
from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from embodied.run.build import stored_policy
from embodied.run.config import load_train
from policies.lora.policy import merged

pytestmark = pytest.mark.slow

FAST = [
    "task=pointmass",
    "sim.cameras=[top]",
    "sim.image_size=32",
    "algorithm=bc",
    "run.mode=lockstep",
    "demonstrations.episodes=4",
    "learner.batch_size=8",
    "learner.steps=20",
    "learner.steps_per_round=10",
    "learner.publish_every=10",
    "learner.checkpoint_every=10",
    "learner.learning_rate=0.003",
    "learner.ema_decay=0.5",
    "evaluation.episodes=0",
    "evaluation.final_episodes=1",
    "evaluation.rows=1",
    "evaluation.videos=0",
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A SmolVLA that reads the point mass's state, its picture under another name, and words."""
    from lerobot.configs.types import FeatureType, PolicyFeature

    folder = tmp_path_factory.mktemp("exported") / "policy"
    inputs = features(FRONT)["input_features"]
    state = PolicyFeature(FeatureType.STATE, (2,))
    export(folder, "smolvla", input_features={STATE: state, **inputs})
    return folder


def options(exported):
    return [
        "policy=lerobot",
        f"policy.path={exported}",
        f"policy.rename={{observation.images.top: {FRONT}}}",
        "policy.statistics=data",
    ]


def test_a_run_goes_on_from_an_export_and_another_adapts_what_it_learned(exported, tmp_path):
    assert main(["train", *FAST, *options(exported), f"run.dir={tmp_path / 'whole'}"]) == 0
    losses = [row["loss"] for row in RunDir(tmp_path / "whole").read("metrics", "learner")]
    assert np.isfinite(losses).all()
    whole, _, _ = stored_policy(tmp_path / "whole")
    assert list(whole.spec.observation) == [STATE, "observation.images.top", "task"]
    assert not torch.equal(whole.normalizers["observation/state"].scale, torch.ones(2))

    lora = ["policy=lora", f"policy.base={tmp_path / 'whole'}", "policy.rank=2"]
    assert main(["train", *FAST, *lora, f"run.dir={tmp_path / 'adapted'}"]) == 0
    adapted, _, _ = stored_policy(tmp_path / "adapted")
    before, after = (dict(p.state_dict()) for p in (whole, merged(adapted)))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(".weight") for name in changed)
    assert main(["eval", f"checkpoint={tmp_path / 'adapted'}", "episodes=1", "videos=0"]) == 0


def test_an_export_is_checked_with_the_configuration(exported):
    with pytest.raises(ConfigError, match=r"observation\.images\.front is not"):
        load_train([*FAST, *options(exported)[:2]])
    with pytest.raises(ConfigError, match=r"add policy\.path=VALUE"):
        load_train([*FAST, "policy=lerobot"])
    with pytest.raises(ConfigError, match=r"policy\.base=.*no policy's folder"):
        load_train([*FAST, "policy=lora", f"policy.base={exported.parent / 'nothing'}"])
