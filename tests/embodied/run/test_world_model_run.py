"""A run whose policy predicts what is seen after its actions."""

import contextlib

import numpy as np
import pytest
from served import Padded, ServerProcess, observations

from embodied.cli.main import main
from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from embodied.run.build import stored_policy, window_spec
from embodied.run.config import load_train
from embodied.weights.store import WeightStore

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
        "+policy.latents.patch=2",
        "+policy.latents.shrink=4",
        "observations=[observation.state, 'observation.images.*']",
        "algorithm=bc",
        "learner.precision=bfloat16",
    ]
    assert main(["train", *SMALL, *eyes, f"run.dir={tmp_path / 'run'}"]) == 0
    policy, _, _ = stored_policy(tmp_path / "run")
    assert policy.next.groups == ((1, 2), (9, 12))


def test_a_run_draws_its_modes(tmp_path):
    own = [x for x in SMALL if x != "policy=uwm" and "next_after" not in x and "depth" not in x]
    own = ["policy=uva", *own, "+policy.head_width=16", f"run.dir={tmp_path / 'run'}"]
    assert window_spec(load_train(own)).future == (2, 4, 6, 8)
    assert main(["train", *own]) == 0
    (row,) = RunDir(tmp_path / "run").read("metrics", "learner")
    assert {"loss", "action_loss", "next_loss"} <= row.keys()
    policy, _, _ = stored_policy(tmp_path / "run")
    assert policy.name == "uva" and policy.frames.tokens > 1


@pytest.mark.parametrize("name", ["uwm", "uva"])
def test_a_world_model_is_improved_by_a_critic_and_served(name, tmp_path):
    uwm = ("policy.next_after", "+policy.depth", "policy=")
    own = [x for x in SMALL if not x.startswith(uwm)]
    own += ["policy=uwm", "+policy.depth=1"] if name == "uwm" else ["policy=uva"]
    phases = ("algorithm.cloning_steps=20", "algorithm.offline_steps=20", "learner.steps=80")
    critic = ("algorithm.critic.width=16", "algorithm.critic.members=2")
    chosen = ("algorithm.improvement.proposals=2", "algorithm.improvement.kept=2")
    acting = ("actors.count=1", "actors.ticks_per_round=20", "learner.steps_per_round=10")
    learning = ("algorithm=parl", *phases, *critic, *chosen, *acting, "learner.publish_every=10")
    run = RunDir(tmp_path / "run")
    assert main(["train", *own, *learning, f"run.dir={run.path}"]) == 0
    assert any(row["version"] >= 1 for row in run.read("metrics", "actor0"))
    assert "policy_loss" in run.read("metrics", "learner")[-1]
    store = WeightStore(run.weights)
    first, last = (store.load(version)[0] for version in (1, store.latest_version()))
    assert any(not np.array_equal(first[key], last[key]) for key in first if "policy." in key)

    improved, _, _ = stored_policy(run.path)
    assert (improved.name, improved.policy.name) == ("improved", name)
    obs, seed = observations(3, 0), np.arange(3)
    wanted = Padded(improved).act(improved.init(3), obs, seed=seed)[1]
    server = ServerProcess(tmp_path, run.path)
    try:
        with contextlib.closing(server.connect(patience_s=60)) as remote:
            served = remote.act(remote.init(3), obs, seed=seed)[1]
    finally:
        server.close()
    np.testing.assert_allclose(served, wanted, atol=1e-5)
