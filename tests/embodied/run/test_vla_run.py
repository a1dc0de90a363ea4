"""Both heads of the vision-language-action policy as whole runs on the point mass."""

import pytest

from embodied.cli.main import main
from embodied.core.rundir import RunDir
from embodied.run.build import stored_policy

SMALL = [
    *("task=pointmass", "sim.cameras=[top]", "sim.image_size=24", "policy=vla", "algorithm=bc"),
    "observations=[observation.state, 'observation.images.*']",
    "+policy.images.encoder={patch: 6, width: 16, depth: 1, heads: 2, features: 16}",
    *("policy.images.crop=1.0", "policy.transformer.width=32", "policy.transformer.depth=2"),
    *("policy.horizon=8", "policy.n_action_steps=4", "run.mode=lockstep"),
    *("demonstrations.episodes=8", "learner.batch_size=16", "learner.steps=100"),
    *("learner.steps_per_round=50", "learner.publish_every=50", "learner.checkpoint_every=50"),
    *("learner.warmup_steps=10", "learner.learning_rate=0.003", "learner.ema_decay=0.9"),
    *("evaluation.episodes=0", "evaluation.final_episodes=2", "evaluation.rows=2"),
    "evaluation.videos=0",
]


@pytest.mark.parametrize("head", ["flow", "tokens"])
def test_learns_from_pictures_and_words_and_acts_on_them(tmp_path, head):
    options = [*SMALL, f"policy/head={head}", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", *options]) == 0
    losses = [row["loss"] for row in RunDir(tmp_path / "run").read("metrics", "learner")]
    assert losses[-1] < 0.8 * losses[0]
    policy, _, _ = stored_policy(tmp_path / "run")
    assert policy.name == {"flow": "vla", "tokens": "autoregressive"}[head]
    assert policy.encoder.token_sizes == [(1, 2), (16, 16), (16, 64)]
