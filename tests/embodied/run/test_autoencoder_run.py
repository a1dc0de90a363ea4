"""Runs that train an autoencoder of pictures, and a world model on its latents."""

import pytest

from embodied.cli.main import main
from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from embodied.run.build import stored_policy, window_spec
from embodied.run.config import load_train

SEEING = ["task=pointmass", "sim.cameras=[top]", "sim.image_size=24"]
FAST = [
    *SEEING,
    "run.mode=lockstep",
    "actors.speed=0",
    "actors.count=1",
    "demonstrations.episodes=3",
    "learner.batch_size=8",
    "learner.steps=50",
    "learner.steps_per_round=50",
    "evaluation=none",
    "buffer.segment_mib=1",
]
TINY = ["policy=vae", "policy.channels=[8,8]", "policy.latent_channels=2"]


def test_it_reads_the_pictures_of_one_tick_and_is_never_evaluated():
    config = load_train([*SEEING, "policy=vae"])
    spec = window_spec(config)
    assert spec.observation_keys == ("observation.images.top",) and spec.future == ()
    assert (config.evaluation.episodes, config.evaluation.final_episodes) == (0, 0)
    for wrong in ("algorithm=bc", "evaluation.final_episodes=1"):
        with pytest.raises(ConfigError, match="commands no robot: it needs algorithm=reconstr"):
            load_train([*SEEING, "policy=vae", wrong])
    with pytest.raises(ConfigError, match="choose algorithm=bc, or policy=vae"):
        load_train([*SEEING, "algorithm=reconstruction"])
    with pytest.raises(ConfigError, match="name cameras"):
        load_train(["task=pointmass", "policy=vae"])


@pytest.mark.slow
def test_a_world_model_predicts_what_a_run_has_learned_to_see(tmp_path):
    vae, world, out = (tmp_path / name for name in ("vae", "world", "out"))
    assert main(["train", *FAST, *TINY, f"run.dir={vae}"]) == 0
    run = RunDir(vae)
    (row,) = run.read("metrics", "learner")
    assert {"loss", "psnr", "kl", "scale"} <= row.keys()
    (held_out,) = run.read("metrics", "reconstruction")
    assert held_out["key"] == "observation.images.top" and 5 < held_out["psnr_db"] < 100
    assert "data:image/png" in run.report.read_text() and not run.read("metrics", "evaluation")
    assert main(["eval", f"checkpoint={vae}", "episodes=1", "videos=0"]) != 0
    options = [
        "policy=uwm",
        "policy.horizon=4",
        "policy.n_action_steps=4",
        "policy.images.crop=1.0",
        "policy/images=vit",
        "+policy.images.encoder={patch: 6, width: 16, depth: 1, heads: 2, features: 16}",
        "policy/latents=vae",
        f"policy.latents.path={vae}",
        "policy.latents.patch=2",
        "+policy.width=16",
        "+policy.depth=1",
        "+policy.heads=2",
        "algorithm=bc",
    ]
    assert main(["train", *FAST, *options, f"run.dir={world}"]) == 0
    policy, _, _ = stored_policy(world)
    assert policy.next.groups[-1] == (9, 8)
    assert main(["imagine", f"checkpoint={world}", f"output={out}", "episodes=1", "stride=8"]) == 0
    assert list(out.glob("*.png")) and (out / "index.html").exists()
    vae.rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"policy\.latents\.path=.* is no policy's folder"):
        stored_policy(world)
