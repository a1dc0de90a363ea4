"""Runs of policies with pictures and instructions on the point mass, in one process."""

import pytest
import torch

from embodied.cli.main import main
from embodied.core.errors import ConfigError, SpecError
from embodied.core.rundir import RunDir
from embodied.run.build import instruction, policy_format, stored_policy, window_spec
from embodied.run.config import load_train

SEEING = [
    "task=pointmass",
    "sim.cameras=[top]",
    "sim.image_size=24",
    "policy/images=vit",
    "policy.images.crop=1.0",
    "+policy.images.encoder={patch: 6, width: 16, depth: 1, heads: 2, features: 16}",
    "observations=[observation.state, 'observation.images.*']",
    "policy.language={name: ngrams}",
]
FAST = [
    "algorithm=bc",
    "run.mode=lockstep",
    "demonstrations.episodes=8",
    "policy.n_obs_steps=1",
    "policy.horizon=8",
    "policy.n_action_steps=4",
    "+policy.network.width=64",
    "+policy.network.depth=1",
    "learner.batch_size=32",
    "learner.steps=60",
    "learner.steps_per_round=30",
    "learner.publish_every=30",
    "learner.checkpoint_every=30",
    "learner.warmup_steps=10",
    "learner.learning_rate=0.003",
    "learner.ema_decay=0.9",
    "evaluation.episodes=0",
    "evaluation.final_episodes=2",
    "evaluation.rows=2",
    "evaluation.videos=0",
]


def losses(path, *extra):
    assert main(["train", *SEEING, *FAST, f"run.dir={path}", *extra]) == 0
    return [row["loss"] for row in RunDir(path).read("metrics", "learner")]


def test_a_policy_learns_from_pictures_and_acts_on_them(tmp_path):
    first = losses(tmp_path / "a", "learner.steps=100", "policy.images.brightness=0.1")
    assert first[-1] < 0.7 * first[0]
    policy, _, config = stored_policy(tmp_path / "a")
    keys = ["observation.state", "observation.images.top", "task"]
    assert list(policy.spec.observation) == keys and config is not None
    torch.testing.assert_close(
        policy.encoder.normalizer("observation.state").scale, torch.ones(2), atol=0.5, rtol=0
    )


def test_a_policy_learns_and_acts_towards_goals(tmp_path):
    goals = ["observations=[observation.state]", "policy.goals=[observation.state]"]
    goals += ["learner.steps=400", "learner.batch_size=64", "evaluation.final_episodes=8"]
    assert main(["train", "task=pointmass", *FAST, *goals, f"run.dir={tmp_path}/a"]) == 0
    assert RunDir(tmp_path / "a").read("metrics", "evaluation")[-1]["successes"] >= 2
    with pytest.raises(ConfigError, match=r"policy.goals 'observation.stat'"):
        load_train(["task=pointmass", "policy.goals=[observation.stat]"])


def test_augmented_runs_repeat_bit_for_bit(tmp_path):
    jitter = ["sim.image_size=30", "policy.images.crop=0.8", "policy.images.hue=0.2"]
    for name in ("a", "b"):
        losses(tmp_path / name, *jitter)
    runs = [RunDir(tmp_path / name) for name in ("a", "b")]
    first, again = ((run.path / "metrics/learner.jsonl").read_bytes() for run in runs)
    assert first == again
    weights = [stored_policy(run.path)[0].state_dict() for run in runs]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_configuration_says_what_the_policy_reads():
    config = load_train(SEEING)
    windows = window_spec(config)
    assert windows.observation_keys == ("observation.state", "observation.images.top")
    assert windows.task_bytes == 128
    assert policy_format(config).statistics == ("observation.state", "action")
    everything = load_train(["task=pointmass", "sim.cameras=[top]", "sim.image_size=64"])
    assert "observation.images.top" in window_spec(everything).observation_keys
    assert window_spec(load_train(["task=pointmass"])).observation_keys == (
        "observation.state",
        "observation.environment_state",
    )
    for extra, match in (
        ("observations=[observation.images.front]", "front'.*Did you mean.*top"),
        ("observations=['observation.depth.*']", "observation.depth"),
        ("sim.cameras=[front]", "pointmass has only 'top'"),
        ("+policy.language.max_bytes=9", "16 bytes.*reads 9"),
        ("policy.language.name=gram", "text_encoder 'gram'.*ngrams"),
        ("policy.images.encoder.name=vti", "encoder 'vti'.*vit"),
        ("policy.images.crop=2.0", "crop"),
    ):
        with pytest.raises((ConfigError, SpecError), match=match):
            load_train([*SEEING, extra])


def test_a_tasks_words_come_from_the_configuration_the_registry_or_its_name():
    config = load_train([*SEEING, "+instructions.pick-place=put it there"])
    assert instruction(config, "pointmass") == "move to the goal"
    assert instruction(config, "pick-place") == "put it there"
    assert instruction(config, "stack the cups") == "stack the cups"
