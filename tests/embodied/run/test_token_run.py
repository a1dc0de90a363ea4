"""A policy that decides in tokens, improved by its critic, as a whole run on the point mass."""

import math

from embodied.cli.main import main
from embodied.core.rundir import RunDir
from policies.checkpoint import load_policy

SMALL = [
    *("task=pointmass", "policy=autoregressive", "algorithm=parl", "run.mode=lockstep"),
    *("sim.horizon=60", "actors.count=1", "actors.ticks_per_round=60", "demonstrations.episodes=4"),
    *("policy.n_obs_steps=1", "policy.horizon=4", "policy.n_action_steps=4"),
    *("policy.transformer.width=16", "policy.transformer.depth=1", "+policy.tokenizer.bins=33"),
    *("algorithm.cloning_steps=60", "algorithm.offline_steps=20", "algorithm.critic.width=32"),
    *("algorithm.critic.members=2", "algorithm.improvement.proposals=4"),
    *("algorithm.improvement.kept=2", "learner.batch_size=16", "learner.steps=120"),
    *("learner.steps_per_round=20", "learner.publish_every=20", "learner.checkpoint_every=20"),
    *("evaluation.episodes=2", "evaluation.final_episodes=2", "evaluation.every_steps=1000"),
    *("evaluation.rows=2", "evaluation.videos=0", "buffer.segment_mib=1"),
]


def test_a_run_clones_tokens_then_learns_what_its_critic_prefers(tmp_path):
    assert main(["train", *SMALL, f"run.dir={tmp_path / 'run'}"]) == 0
    run = RunDir(tmp_path / "run")
    rows = run.read("metrics", "learner")
    assert rows[0]["loss"] < math.log(33) - 0.05 and "critic_loss" not in rows[0]
    assert "policy_loss" in rows[-1]
    policy = load_policy(run.path / "policy")
    assert policy.name == "improved" and policy.policy.name == "autoregressive"
    assert policy.policy.tokenizer.vocabulary == 33
