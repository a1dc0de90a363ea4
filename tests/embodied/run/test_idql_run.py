"""IDQL, and PA-RL with a calibrated critic, as whole runs on the point mass."""

from embodied.cli.main import main
from embodied.core.rundir import RunDir
from embodied.weights.store import WeightStore
from policies.checkpoint import load_policy

SMALL = [
    *("task=pointmass", "run.mode=lockstep", "sim.horizon=60"),
    *("actors.count=1", "actors.ticks_per_round=60", "demonstrations.episodes=4"),
    *("policy.n_obs_steps=1", "policy.horizon=8", "policy.n_action_steps=4", "policy.num_steps=2"),
    *("+policy.network.width=32", "+policy.network.depth=1", "buffer.segment_mib=1"),
    *("algorithm.cloning_steps=40", "algorithm.offline_steps=20", "algorithm.critic.width=32"),
    *("algorithm.critic.members=2", "learner.batch_size=16", "learner.steps=150"),
    *("learner.steps_per_round=20", "learner.publish_every=20", "learner.checkpoint_every=20"),
    *("evaluation.episodes=2", "evaluation.final_episodes=2", "evaluation.every_steps=1000"),
    *("evaluation.rows=2", "evaluation.videos=0"),
]


def train(path, *extra):
    return main(["train", *SMALL, f"run.dir={path}", *extra])


def test_a_cloned_policy_acts_by_its_critics_choice_and_goes_on_cloning(tmp_path):
    assert train(tmp_path / "run", "algorithm=idql", "algorithm.proposals=6") == 0
    run = RunDir(tmp_path / "run")
    assert 60 <= WeightStore(run.weights).manifest(1).metadata["step"] < 80
    rows = run.read("metrics", "learner")
    assert {"q", "v", "value_loss", "policy_loss"} <= rows[-1].keys()
    assert rows[-1]["windows"] > rows[0]["windows"]
    policy = load_policy(run.path / "policy")
    assert policy.name == "improved" and policy.policy.name == "flow"
    found = policy.config.improvement
    assert (found.proposals, found.kept, found.steps) == (6, 6, 0)
    assert found.temperature is None


def test_a_calibrated_critic_gets_returns_to_go(tmp_path):
    wanted = ["algorithm=parl", "algorithm.conservatism=0.01", "evaluation.final_episodes=0"]
    assert train(tmp_path / "run", *wanted, "learner.steps=100") == 0
    rows = RunDir(tmp_path / "run").read("metrics", "learner")
    assert "conservatism" in rows[-1] and "policy_loss" in rows[-1]
