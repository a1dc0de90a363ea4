"""Contenders of the study of improvement can be run, and what it prints of them."""

import numpy as np
import pytest
import torch

from benchmarks.study_improvement.__main__ import report, said
from benchmarks.study_improvement.cells import CONTENDERS, SIMILAR
from benchmarks.study_improvement.judging import IN_A_ROW, Judged, MeanOfSamples, selected_version
from embodied.core.rundir import RunDir
from embodied.run.config import load_train


@pytest.mark.parametrize("name", [n for n, c in CONTENDERS.items() if not c.averaged])
def test_every_contender_is_a_run_that_can_be(name):
    contender = CONTENDERS[name]
    config = load_train(["task=pointmass", *SIMILAR, *contender.overrides])
    assert config.run.mode == "lockstep" and config.evaluation.final_episodes == 0
    phases = [config.algorithm.get(f"{phase}_steps", 0) for phase in ("cloning", "offline")]
    assert contender.before == sum(phases) or not contender.acts


def judged(successes, ticks):
    return Judged(successes, ticks, steps=100, demonstrated=50.0, version=7)


def test_the_report_pairs_the_same_states_of_the_same_seeds(capsys):
    found = {
        ("door", "PA-RL"): [judged([True, True], [10, 20]), judged([True, False], [30, 40])],
        ("door", "clone"): [judged([False, False], [50, 50]), judged([True, False], [50, 50])],
    }
    report(found, ["door"], ["PA-RL", "clone"])
    printed = capsys.readouterr().out
    assert "| door | 50 | 75.0 % (30–95), 25; [2, 1] | 25.0 % (5–70), 50; [0, 1] |" in printed
    assert "PA-RL − clone: +50.0 points (95 % +0.0 to +100.0)" in printed
    assert said(found["door", "PA-RL"]).startswith("75.0 %")
    report({**found, ("door", "clone"): []}, ["door"], ["PA-RL", "clone"])
    printed = capsys.readouterr().out
    assert "25; [2, 1] | – |" in printed and "PA-RL − clone" not in printed


@pytest.mark.parametrize(
    "good, expected",
    [((100, 160), 6), ((0, 40), 1), ((150, 200), 8), ((0, 0), 8), ((40, 45), 3)],
)
def test_weights_are_selected_by_the_episodes_that_went_best(tmp_path, good, expected):
    """25 episodes to a version; among all that are best the last."""
    run = RunDir(tmp_path)
    run.acquire()
    run.metrics("actor0", {"demonstration": True, "success": True, "version": -1})
    for episode in range(200):
        row = {"demonstration": False, "success": good[0] <= episode < good[1]}
        run.metrics("actor0", {**row, "version": 1 + episode // 25})
    run.release()
    assert IN_A_ROW == 40 and selected_version(run) == expected


def test_the_mean_of_samples_has_no_noise_of_the_other_rows():
    class Drawing:
        spec = None

        def sample(self, obs, n, *, seed):
            rng = np.random.default_rng(seed % 2**32)
            return torch.from_numpy(rng.normal(obs["x"][0, 0], 1.0, (1, n, 2, 1)))

    policy = MeanOfSamples(Drawing(), 4000)
    obs = {"x": np.array([[1.0], [-1.0]])}
    both = policy.act(None, obs, seed=np.array([3, 4]))[1]
    alone = policy.act(None, {"x": obs["x"][1:]}, seed=np.array([4]))[1]
    np.testing.assert_allclose(both[:, :, 0], [[1, 1], [-1, -1]], atol=0.1)
    assert np.array_equal(both[1:], alone)
