"""A run whose policy predicts what is seen after its actions."""

import pytest

from embodied.cli.main import main
from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from embodied.run.build import stored_policy, window_spec
from embodied.run.config import load_train

SMALL = [
    "task=pointmass",
    "policy=uwm",
    "policy.horizon=8",
    "policy.n_action_steps=4",
    "policy.next_after=executed",
    "+policy.width=16",
    "+policy.depth=1",
    "+policy.heads=2",
    "run.mode=lockstep",
    "actors.speed=0",
    "demonstrations.episodes=3",
    "learner.batch_size=32",
    "learner.steps=50",
    "learner.steps_per_round=50",
    "evaluation.episodes=0",
    "evaluation.final_episodes=2",
    "evaluation.videos=0",
    "buffer.segment_mib=1",
]


def test_windows_hold_the_later_observations_that_are_predicted():
    spec = window_spec(load_train(SMALL))
    assert spec.future == (4,) and spec.future_keys == spec.observation_keys
    spec = window_spec(load_train([*SMALL, "policy.predicts=[observation.state]"]))
    assert spec.future_keys == ("observation.state",)
    assert window_spec(load_train(["task=pointmass"])).future == ()
    with pytest.raises(ConfigError, match=r"policy\.predicts 'observation\.stat'"):
        load_train([*SMALL, "policy.predicts=[observation.stat]"])


def test_a_run_learns_both_and_acts(tmp_path):
    assert main(["train", *SMALL, f"run.dir={tmp_path / 'run'}"]) == 0
    run = RunDir(tmp_path / "run")
    (row,) = run.read("metrics", "learner")
    assert row["loss"] == pytest.approx(row["action_loss"] + row["next_loss"])
    assert run.read("metrics", "evaluation")[-1]["episodes"] == 2
    policy, _, _ = stored_policy(run.path)
    assert policy.name == "uwm" and policy.config.future == (4,)


def test_a_run_predicts_pictures(tmp_path):
    eyes = [
        "sim.cameras=[top]",
        "sim.image_size=24",
        "policy/images=vit",
        "policy.images.crop=1.0",
        "+policy.images.encoder={patch: 6, width: 16, depth: 1, heads: 2, features: 16}",
        "+policy.latents.patch=4",
        "+policy.latents.shrink=2",
        "observations=[observation.state, 'observation.images.*']",
        "algorithm=bc",
        "learner.precision=bfloat16",
    ]
    assert main(["train", *SMALL, *eyes, f"run.dir={tmp_path / 'run'}"]) == 0
    policy, _, _ = stored_policy(tmp_path / "run")
    assert policy.next.groups == ((1, 2), (9, 48))


def test_a_run_draws_its_modes(tmp_path):
    own = [x for x in SMALL if x != "policy=uwm" and "next_after" not in x and "depth" not in x]
    own = ["policy=uva", *own, "+policy.head_width=16", f"run.dir={tmp_path / 'run'}"]
    assert window_spec(load_train(own)).future == (2, 4, 6, 8)
    assert main(["train", *own]) == 0
    (row,) = RunDir(tmp_path / "run").read("metrics", "learner")
    assert {"loss", "action_loss", "next_loss"} <= row.keys()
    policy, _, _ = stored_policy(tmp_path / "run")
    assert policy.name == "uva" and policy.frames.tokens > 1
