"""RLPD as a whole run on the point mass."""

from embodied.cli.main import main
from embodied.core.rundir import RunDir
from embodied.weights.store import WeightStore
from policies.checkpoint import load_policy

SMALL = [
    *("task=pointmass", "policy=gaussian", "algorithm=rlpd", "run.mode=lockstep"),
    *("sim.horizon=60", "actors.count=1", "actors.ticks_per_round=60", "demonstrations.episodes=4"),
    *("policy.horizon=4", "policy.n_action_steps=4", "policy.width=32", "buffer.segment_mib=1"),
    *("algorithm.cloning_steps=60", "algorithm.offline_steps=40", "algorithm.critic.width=32"),
    *("algorithm.critic.members=2", "learner.batch_size=16", "learner.steps=200"),
    *("learner.steps_per_round=20", "learner.publish_every=20", "learner.checkpoint_every=20"),
    *("evaluation.episodes=2", "evaluation.final_episodes=2", "evaluation.every_steps=1000"),
    *("evaluation.rows=2", "evaluation.videos=0"),
]


def train(path, *extra):
    return main(["train", *SMALL, f"run.dir={path}", *extra])


def test_a_run_clones_then_acts_and_learns_from_what_it_did(tmp_path):
    assert train(tmp_path / "run") == 0
    run = RunDir(tmp_path / "run")
    assert 100 <= WeightStore(run.weights).manifest(1).metadata["step"] < 120
    rows = run.read("metrics", "learner")
    assert "critic_loss" not in rows[0] and {"q", "entropy", "temperature"} <= rows[-1].keys()
    assert rows[-1]["windows"] > rows[0]["windows"]
    policy = load_policy(run.path / "policy")
    assert policy.name == "improved" and policy.policy.name == "gaussian"
    assert policy.config.improvement.proposals == 1
    assert policy.critic.config.horizon == 4


def test_a_policy_without_a_density_is_refused_before_anything_starts(tmp_path, capsys):
    wanted = [each for each in SMALL if not each.startswith("policy")]
    assert main(["train", *wanted, "policy=act", f"run.dir={tmp_path / 'run'}"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "RLPD needs the density" in error and "policy=gaussian" in error
    assert not (tmp_path / "run").exists()
