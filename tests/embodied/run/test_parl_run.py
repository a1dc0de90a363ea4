"""Policy-agnostic RL as a whole run on the point mass."""

import re

import numpy as np
import pytest

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.samplers import StepFlags
from embodied.cli.main import main
from embodied.core.rundir import RunDir
from embodied.learn.actor_critic import select_own_actions
from embodied.weights.store import WeightStore
from policies.checkpoint import load_policy

SMALL = [
    *("task=pointmass", "algorithm=parl", "run.mode=lockstep", "sim.horizon=60"),
    *("actors.count=1", "actors.ticks_per_round=60", "demonstrations.episodes=4"),
    *("policy.n_obs_steps=1", "policy.horizon=8", "policy.n_action_steps=4", "policy.num_steps=2"),
    *("+policy.network.width=32", "+policy.network.depth=1", "buffer.segment_mib=1"),
    *("algorithm.cloning_steps=60", "algorithm.offline_steps=40", "algorithm.critic.width=32"),
    *("algorithm.critic.members=2", "learner.batch_size=16", "learner.steps=200"),
    *("learner.steps_per_round=20", "learner.publish_every=20", "learner.checkpoint_every=20"),
    *("evaluation.episodes=2", "evaluation.final_episodes=2", "evaluation.every_steps=1000"),
    *("evaluation.rows=2", "evaluation.videos=0"),
]
OFFLINE_STEPS = 100


def train(path, *extra):
    return main(["train", *SMALL, f"run.dir={path}", *extra])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("parl") / "run"
    assert train(path) == 0
    return RunDir(path)


def test_the_policy_acts_once_its_critic_has_learned_and_batches_then_hold_what_it_did(finished):
    store = WeightStore(finished.weights)
    first = store.manifest(1).metadata["step"]
    assert OFFLINE_STEPS <= first < OFFLINE_STEPS + 20
    rows = finished.read("metrics", "learner")
    assert "critic_loss" not in rows[0] and "policy_loss" in rows[-1]
    before = [row["windows"] for row in rows if row["step"] <= OFFLINE_STEPS]
    after = [row["windows"] for row in rows if row["step"] > OFFLINE_STEPS]
    with ReplayReader(finished.buffer) as reader:
        reader.refresh()
        episodes = list(reader.finished())
    demonstrated = sum(
        len(e.rows) for e in episodes if e.interventions == len(e.rows) and e.success
    )
    acted = [e for e in episodes if not e.interventions]
    assert set(before) == {demonstrated} and acted
    assert demonstrated < max(after) <= demonstrated + sum(len(e.rows) for e in acted)
    assert all(e.policy_versions[0] >= 1 for e in acted)


def test_the_stored_policy_is_the_improved_one(finished):
    policy = load_policy(finished.path / "policy")
    assert policy.name == "improved"
    assert policy.critic.config.horizon == policy.spec.n_action_steps == 4


def test_of_an_earlier_run_all_is_learned_from_that_would_be_of_its_own(finished, tmp_path):
    earlier = ("+sampling.sources.earlier.path=" + str(finished.path), "learner.steps=60")
    offline = ("evaluation.final_episodes=0", "evaluation.episodes=0")
    assert train(tmp_path / "run", *earlier, *offline) == 0
    windows = [row["windows"] for row in RunDir(tmp_path / "run").read("metrics", "learner")]
    with ReplayReader(finished.buffer) as reader:
        reader.refresh()
        theirs = sum(
            len(e.rows) for e in reader.finished() if e.success or e.interventions < len(e.rows)
        )
    own = finished.read("metrics", "learner")[0]["windows"]
    assert windows[0] == own + theirs


def test_a_run_that_was_interrupted_goes_on_in_its_phase(finished, tmp_path):
    assert train(tmp_path / "run", "learner.steps=160", "evaluation.final_episodes=0") == 0
    assert train(tmp_path / "run", "run.resume=true") == 0
    rows = RunDir(tmp_path / "run").read("metrics", "learner")
    assert [row["step"] for row in rows] == [50, 100, 150, 200]
    assert rows[:3] == finished.read("metrics", "learner")[:3]
    assert {"q", "policy_loss"} <= rows[-1].keys()


def test_a_critic_may_read_what_the_policy_does_not(tmp_path):
    """Its policy does not see the goal, and acts without it where inference.critic=false."""
    blind = ["observations=[observation.state]", "algorithm.critic_observations=[observation.*]"]
    assert train(tmp_path / "run", *blind) == 0
    policy = load_policy(tmp_path / "run" / "policy")
    assert [*policy.policy.spec.observation] == ["observation.state"]
    goal = "observation.environment_state"
    assert goal in policy.critic.spec.observation and goal in policy.spec.observation
    wanted = ["episodes=1", "rows=1"]
    for critic in ("true", "false"):
        where = [f"checkpoint={tmp_path / 'run'}", f"inference.critic={critic}"]
        assert main(["eval", *where, *wanted, f"output={tmp_path / critic}"]) == 0


@pytest.mark.parametrize(
    "change, words",
    [
        ("algorithm.critic.head.low=-50", r"algorithm\.critic\.head goes from -50 to 5"),
        ("+algorithm.critic.horizon=3", r"algorithm\.critic\.horizon is policy\.n_action_steps"),
        ("algorithm.critic.wide=3", r"unknown key 'algorithm\.critic\.wide'"),
        ("algorithm.improvement.kept=40", r"improvement\.kept is 40"),
        ("+algorithm.critic.head.colour=3", r"unknown key 'algorithm\.critic\.head\.colour'"),
        ("algorithm.discount=1.0", r"algorithm\.discount"),
        (
            "algorithm.critic_observations=[observation.depth]",
            "observation key 'observation.depth'",
        ),
        ("+algorithm.critic.language.name=words", "policy is given none"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(tmp_path, capsys, change, words):
    assert train(tmp_path / "run", change) == 2
    error = capsys.readouterr().err
    assert re.search(words, " ".join(error.split())), error
    assert not (tmp_path / "run").exists()


def test_whole_demonstrations_are_no_actions_of_its_own():
    def flags(*interventions):
        zeros = np.zeros(len(interventions))
        return StepFlags(np.array(interventions), zeros, zeros, zeros, zeros)

    assert not select_own_actions(None, flags(True, True)).any()
    assert select_own_actions(None, flags(False, True, True)).all()
