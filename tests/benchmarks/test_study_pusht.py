"""LeRobot's policy among our contenders, in small."""

import numpy as np
import pytest

pytest.importorskip("lerobot.policies.diffusion.modeling_diffusion")
pytest.importorskip("gym_pusht")

from benchmarks.cloning import Demonstrations
from benchmarks.study_pusht.lerobot import (
    ENVIRONMENT,
    SAMPLERS,
    STATE,
    LeRobotTrainee,
    check_adapter,
)
from embodied.core.errors import EmbodiedError
from embodied.run.evaluate import Evaluator
from sim.family import EVALUATION_SEEDS, SimConfig
from sim.pusht import PushTDriver

TINY = {"down_dims": (8, 16), "diffusion_step_embed_dim": 8}


@pytest.fixture
def trainee(tmp_path):
    rng = np.random.default_rng(0)
    rows = np.arange(40)
    demonstrations = Demonstrations(
        {key: rng.uniform(0, 512, (40, n)).astype(np.float32) for key, n in widths().items()},
        rng.uniform(0, 512, (40, 2)).astype(np.float32),
        rows // 20 * 20,
        rows // 20 * 20 + 19,
    )
    (tmp_path / "checkpoints").mkdir()

    def make():
        return LeRobotTrainee(
            tmp_path,
            demonstrations,
            PushTDriver(SimConfig()).spec,
            TINY,
            budget_s=1e3,
            threads=1,
            seed=3,
        )

    return make


def widths():
    return {STATE: 2, ENVIRONMENT: 4}


def test_it_continues_from_what_it_kept(trainee):
    first = trainee()
    first.learn(0.2)
    again = trainee()
    assert again.step == first.step > 0 and again.seconds == first.seconds
    moments = [t._optimizer.state[next(t._policy.parameters())] for t in (first, again)]
    assert moments[0]["exp_avg_sq"].equal(moments[1]["exp_avg_sq"])
    for a, b in zip(first._policy.parameters(), again._policy.parameters(), strict=True):
        assert a.equal(b)
    again.learn(0.1)
    assert again.step > first.step


def test_its_learning_rate_follows_its_cosine_over_the_budget(trainee):
    made = trainee()
    made.step, made.seconds = 3000, 500.0  # half of the budget: 6000 steps in all
    factor = made._schedule()
    assert factor(250) == pytest.approx(0.5)
    assert factor(500 + 5500 // 2) == pytest.approx(0.5)
    assert factor(6000) == pytest.approx(0.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_adapter_acts_as_select_action_does(trainee, sampler):
    made = trainee()
    made.learn(0.05)
    acting = made.actor(sampler)
    assert check_adapter(acting, seed=EVALUATION_SEEDS + 5, ticks=10) < 1e-3


def test_a_wrong_adapter_is_noticed(trainee, monkeypatch):
    made = trainee()
    made.learn(0.05)
    acting = made.actor("ddim-10")
    own = acting.act
    monkeypatch.setattr(acting, "act", lambda *a, **k: (None, own(*a, **k)[1][:, ::-1]))
    with pytest.raises(EmbodiedError, match="differs from select_action"):
        check_adapter(acting, seed=EVALUATION_SEEDS + 5, ticks=10)


def test_it_rolls_out_like_ours(trainee):
    made = trainee()
    made.learn(0.05)
    evaluator = Evaluator("pusht", SimConfig(horizon=9), rows=2)
    results = evaluator.run(made.actor("ddim-10"), -1, [EVALUATION_SEEDS], fresh=False)
    evaluator.close()
    assert results[0].ticks == 9
