"""Runs that begin with a policy of LeRobot's, and with updates of what such a run has learned."""

import contextlib

import numpy as np
import pytest
import torch
from lerobot_policies import FRONT, STATE, export, features
from served import ServerProcess

from embodied.cli.main import main
from embodied.core.errors import ConfigError
from embodied.core.instructions import TASK, encode_instruction
from embodied.core.rundir import RunDir
from embodied.run.build import stored_policy
from embodied.run.config import load_train
from embodied.weights.store import WeightStore
from policies.checkpoint import load_policy, save_policy
from policies.compose.build import compose
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


def test_an_export_is_improved_by_a_critic_composed_and_served(exported, tmp_path):
    critic = "algorithm.critic_observations=[observation.state,observation.environment_state]"
    phases = ("algorithm.cloning_steps=4", "algorithm.offline_steps=4", "learner.steps=14")
    small = ("algorithm.critic.width=16", "algorithm.critic.members=2", critic)
    chosen = ("algorithm.improvement.proposals=2", "algorithm.improvement.kept=2")
    acting = ("actors.count=1", "actors.ticks_per_round=20", "learner.steps_per_round=2")
    run = RunDir(tmp_path / "run")
    learning = ("algorithm=parl", *phases, *small, *chosen, *acting, "sim.horizon=40")
    assert main(["train", *FAST, *options(exported), *learning, f"run.dir={run.path}"]) == 0
    rows = run.read("metrics", "learner")
    assert any(row["version"] >= 1 for row in run.read("metrics", "actor0")), rows
    store = WeightStore(run.weights)
    first, last = (store.load(version)[0] for version in (1, store.latest_version()))
    name = next(key for key in first if "action_out_proj" in key)
    assert not np.array_equal(first[name], last[name])
    improved = load_policy(run.path / "policy")
    assert improved.name == "improved"

    learned = improved.policy
    rng = np.random.default_rng(0)
    obs = {
        STATE: rng.uniform(-1, 1, (2, 1, 2)).astype(np.float32),
        "observation.images.top": rng.integers(0, 256, (2, 1, 32, 32, 3), np.uint8),
        TASK: np.tile(encode_instruction("push", learned.spec.observation[TASK].size), (2, 1, 1)),
    }
    seed = np.arange(2)
    pool = compose({"a": learned, "b": learned}, {"name": "pooled", "proposals": 2})
    save_policy(tmp_path / "pool", pool)
    wanted = pool.act(pool.init(2), obs, seed=seed)[1]
    found = load_policy(tmp_path / "pool").act(None, obs, seed=seed)[1]
    np.testing.assert_allclose(found, wanted, atol=1e-5)

    server = ServerProcess(tmp_path, tmp_path / "pool")
    try:
        with contextlib.closing(server.connect(patience_s=60)) as remote:
            served = remote.act(remote.init(2), obs, seed=seed)[1]
        np.testing.assert_allclose(served, wanted, atol=1e-4)
    finally:
        server.close()


def test_an_export_is_checked_with_the_configuration(exported):
    with pytest.raises(ConfigError, match=r"observation\.images\.front is not"):
        load_train([*FAST, *options(exported)[:2]])
    with pytest.raises(ConfigError, match=r"add policy\.path=VALUE"):
        load_train([*FAST, "policy=lerobot"])
    with pytest.raises(ConfigError, match=r"policy\.base=.*no policy's folder"):
        load_train([*FAST, "policy=lora", f"policy.base={exported.parent / 'nothing'}"])
