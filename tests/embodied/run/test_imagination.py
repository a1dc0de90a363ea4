"""What a world model predicts of a run's recorded episodes."""

import json

import numpy as np
import pytest
import torch

from embodied.buffer.serve.sink import LocalBuffer
from embodied.cli.imagine_page import keep
from embodied.cli.main import main
from embodied.core import config as core_config
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError
from embodied.run.imagination.config import ImagineConfig
from embodied.run.imagination.errors import compared, squared_error
from embodied.run.imagination.imagine import Imagination, load
from policies.checkpoint import load_policy

STATE, GOAL = "observation.state", "observation.environment_state"
TINY = [
    "task=pointmass",
    "run.mode=lockstep",
    "actors.speed=0",
    "demonstrations.episodes=3",
    "learner.batch_size=32",
    "evaluation.episodes=0",
    "evaluation.final_episodes=0",
    "evaluation.videos=0",
    "buffer.segment_mib=1",
    "algorithm=bc",
]
WORLD = [
    *TINY,
    "policy=uwm",
    "policy.horizon=8",
    "policy.n_action_steps=4",
    "policy.next_after=executed",
    "policy.next_obs_steps=2",
    "+policy.width=32",
    "+policy.depth=1",
    "+policy.heads=2",
    "learner.steps=10",
    "learner.steps_per_round=10",
]
EYES = [
    "sim.cameras=[top]",
    "sim.image_size=24",
    "policy/images=vit",
    "policy.images.crop=0.5",
    "+policy.images.encoder={patch: 6, width: 16, depth: 1, heads: 2, features: 16}",
    "+policy.latents.patch=2",
    "observations=[observation.state,'observation.images.*']",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "run"
    assert main(["train", *WORLD, f"run.dir={path}"]) == 0
    return path


def options(run, *overrides):
    given = [f"checkpoint={run}", "output=unused", *overrides]
    return core_config.convert(core_config.compose("imagine", given), ImagineConfig)


def imagination(run, *overrides):
    return load(options(run, *overrides))


class PointMass:
    """The point mass itself: 5 cm a tick in units of the action. What it would do is to stay, as it
    does where no actions are given; given what is seen next, the mean action that leads there."""

    def __init__(self, spec, ticks):
        self.spec, self.predicted_ticks = spec, ticks
        self.predicted_keys = (STATE, GOAL)

    def infer(self, obs, *, actions=None, next_obs=None, want, seed):
        now = {key: torch.as_tensor(obs[key])[:, -1] for key in self.predicted_keys}
        shape = (len(seed), self.spec.horizon, 2)
        if want == {"next_obs"}:
            actions = torch.zeros(shape) if actions is None else actions
            moved = 0.05 * torch.as_tensor(actions).cumsum(dim=1)
            states = [now[STATE] + moved[:, tick - 1] for tick in self.predicted_ticks]
            goals = now[GOAL][:, None].repeat(1, len(states), 1)
            return {"next_obs": {STATE: torch.stack(states, dim=1), GOAL: goals}}
        if next_obs is None:
            return {"actions": torch.zeros(shape)}
        way = torch.as_tensor(next_obs[STATE])[:, -1] - now[STATE]
        return {"actions": (way / 0.05 / self.predicted_ticks[-1])[:, None].expand(shape)}


@pytest.mark.parametrize(
    ("ticks", "history"), [((4, 5), "predicted"), ((4,), "first prediction repeated")]
)
def test_an_exact_model_has_no_error(run, ticks, history):
    spec = imagination(run).model.spec
    found = Imagination(options(run, "start=1"), PointMass(spec, ticks), -1, str)
    episodes = found.execute()
    summary = found.summarise(episodes)
    rows = {(row["key"], row["ticks"]): row for row in summary["one_chunk"]}
    assert rows.keys() == {(key, tick) for key in (STATE, GOAL) for tick in ticks}
    for tick in ticks:
        row = rows[STATE, tick]
        assert row["forward_rmse"] < 1e-5 and row["explained"] == pytest.approx(1, abs=1e-6)
        moved = [
            np.square(
                e.recorded.observation[STATE][e.ticks + tick]
                - e.recorded.observation[STATE][e.ticks]
            ).mean()
            for e in episodes
        ]
        assert row["unchanged_rmse"] == pytest.approx(np.mean(moved) ** 0.5, rel=1e-5)
        assert row["interval"][1] < 0 and rows[GOAL, tick]["explained"] is None
    rolled = summary["open_loop"]
    assert (rolled["obstacle"], rolled["history"], rolled["start"]) == (None, history, 1)
    states = [row for row in rolled["errors"] if row["key"] == STATE]
    assert [row["ticks"] for row in states] == [ticks[-1] * (k + 1) for k in range(len(states))]
    assert len(states) > 1 and max(row["forward_rmse"] for row in states) < 1e-5
    for row in states:
        assert row["unchanged_rmse"] > 0.01
    inverse = summary["inverse"]
    assert inverse["steps"] == ticks[-1] and inverse["interval"][1] < 0
    assert inverse["inverse_rmse"] < 0.5 * inverse["policy_rmse"]


def test_the_command_keeps_errors_a_page_and_a_planner(run, tmp_path, capsys):
    out = tmp_path / "out"
    planner = f"planner={{scorer: {{name: goal, targets: {{{STATE}: {GOAL}}}}}, proposals: 4}}"
    capsys.readouterr()
    assert main(["imagine", "--json", f"checkpoint={run}", f"output={out}", planner]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((out / "imagination.json").read_text())
    assert len(summary["episodes"]) == summary["inverse"]["episodes"] == 3
    assert summary["units"] == {STATE: "m", GOAL: "m"}
    assert (out / "index.html").read_text().count("<svg") == 2 + 2 * 3
    planned = load_policy(out / "policy")
    assert planned.name == "planned" and planned.config.proposals == 4
    assert main(["imagine", f"checkpoint={out / 'policy'}", f"buffer={run}", f"output={out}"]) == 0
    assert "one chunk ahead" in capsys.readouterr().out


@pytest.mark.parametrize("held, override", [(True, "actions=true"), (False, "actions=false")])
def test_a_video_is_tracked_by_the_actions_that_lead_through_it(run, tmp_path, held, override):
    with LocalBuffer(tmp_path / "seen") as buffer:
        for index in range(31):
            at = np.array([-1 + index / 20, 0.25], np.float32)
            seen = {STATE: at, GOAL: np.zeros(2, np.float32)}
            action = np.full(5, 7, np.float32)
            buffer.add(Step("clip", 0, index, seen, action, held=held, final=index == 30))
    where = f"buffer={tmp_path / 'seen'}"
    if not held:
        with pytest.raises(ConfigError, match=r"the same robot, or actions=false"):
            imagination(run, where).execute()
    spec = imagination(run).model.spec
    out = f"output={tmp_path / 'out'}"
    found = Imagination(options(run, where, override, out), PointMass(spec, (1, 8)), -1, str)
    episodes = found.execute()
    summary = found.summarise(episodes)
    assert summary["without_actions"] == ["clip/0"] and summary["inverse"] is None
    np.testing.assert_allclose(0.05 * episodes[0].inverse[..., 0].sum(axis=1), 8 / 20, rtol=1e-4)
    summary, page = keep(found, episodes)
    kept = np.load(page.parent / "clip-0-actions.npz", allow_pickle=False)
    np.testing.assert_array_equal(kept["inverse"], episodes[0].inverse)
    assert "Without recorded actions" in page.read_text()


def test_another_policy_may_propose_and_a_critic_may_judge(run, tmp_path, capsys):
    flow, parl = tmp_path / "flow", tmp_path / "parl"
    chunks = ("policy.horizon=8", "policy.n_action_steps=4", "learner.steps=3")
    small = ("+policy.network.width=16", "+policy.network.depth=1", *chunks)
    assert main(["train", *TINY, *small, f"run.dir={flow}"]) == 0
    few = ("algorithm=parl", "algorithm.cloning_steps=1", "algorithm.offline_steps=1")
    assert main(["train", *TINY, *small, *few, f"run.dir={parl}"]) == 0
    out = tmp_path / "out"
    planner = f"planner={{policy: {flow}, critic: {parl}, scorer: {{name: critic}}, proposals: 3}}"
    assert main(["imagine", f"checkpoint={run}", f"output={out}", planner]) == 0
    made = load_policy(out / "policy")
    assert (made.policy.name, made.world.name) == ("flow", "uwm")
    critic = load_policy(parl / "policy").critic.state_dict()
    for key, value in made.scorer.critic.state_dict().items():
        assert torch.equal(value, critic[key]), key
    capsys.readouterr()
    wrong = f"planner={{critic: {flow}, scorer: {{name: critic}}}}"
    assert main(["imagine", f"checkpoint={run}", f"output={out}", wrong]) == 2
    assert "has no critic" in capsys.readouterr().err


def test_the_report_of_a_run_shows_what_its_world_model_predicts(run):
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "What it imagines of recorded episodes" in page
    assert "predictions of predictions" in page
    assert len(list((run / "imagined").glob("*-actions.npz"))) == 2


def test_predictions_are_those_of_the_windows(run):
    found = imagination(run, "stride=3", "batch_size=5", "episodes=1", f"keys=[{STATE}]", "start=2")
    (episode,) = found.execute()
    recorded, model = episode.recorded, found.model
    assert episode.ticks.tolist() == list(range(0, recorded.length - 4, 3))
    k = len(episode.ticks) - 1
    tick = int(episode.ticks[k])
    obs = {key: x[None, [tick - 1, tick]] for key, x in recorded.observation.items()}
    at = np.minimum(tick + np.arange(8), recorded.length - 1)
    seed = found._seeds(recorded, "window", episode.ticks[[k]])
    result = model.infer(obs, actions=recorded.action_TD[None, at], want={"next_obs"}, seed=seed)
    np.testing.assert_allclose(
        result["next_obs"][STATE][0].numpy(), episode.ahead[STATE][k], atol=1e-5
    )
    seen = {key: x[None, [tick + 4, tick + 5]] for key, x in recorded.observation.items()}
    result = model.infer(obs, next_obs=seen, want={"actions"}, seed=seed)
    np.testing.assert_allclose(result["actions"][0].numpy(), episode.inverse[k], atol=1e-5)
    assert episode.rolled_ticks[:2].tolist() == [7, 12]
    assert set(episode.rolled) == {STATE}


def test_errors_are_paired_by_episode():
    assert squared_error(np.float32([[1, 3]]), np.float32([[1, 1]])).tolist() == [2.0]
    pictures = np.zeros((1, 2, 2, 3), np.uint8)
    assert squared_error(pictures + np.uint8(255), pictures).tolist() == [1.0]
    found = compared([np.array([1.0, 3.0]), np.array([4.0])], [np.array([5.0])] * 2, ("a", "b"))
    assert (found["a_rmse"], found["b_rmse"]) == (3**0.5, 5**0.5)
    assert (found["difference"], found["explained"], found["windows"]) == (-2.0, 0.4, 3)
    assert found["interval"] == [-3.0, -1.0]
    assert compared([np.ones(2)], [np.zeros(2)], ("a", "b"))["interval"] is None


def test_pictures_are_shown_as_they_are_seen(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", *WORLD, *EYES, f"run.dir={run}"]) == 0
    assert main(["imagine", f"checkpoint={run}", f"output={out}", "episodes=1", "stride=8"]) == 0
    summary = json.loads((out / "imagination.json").read_text())
    camera = "observation.images.top"
    assert {row["key"] for row in summary["one_chunk"]} == {STATE, camera}
    assert summary["units"][camera] == "of the full range"
    assert "images.crop=1" in summary["open_loop"]["obstacle"]
    for suffix in ("png", "mp4"):
        (file,) = out.glob(f"*.{suffix}")
        assert file.name.endswith(f"-{camera}.{suffix}") and file.stat().st_size > 100


def test_what_cannot_be_imagined_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown predicted key in keys 'observation\.stat'"):
        imagination(run, "keys=[observation.stat]")
    with pytest.raises(ConfigError, match="unknown episode 'nobody/3'"):
        imagination(run, "episodes=[nobody/3]").execute()
    with pytest.raises(ConfigError, match="too short: the world model's predictions reach 905"):
        imagination(run, "start=900").execute()
    with pytest.raises(ConfigError, match="neither a buffer's folder nor a run's"):
        imagination(run, f"buffer={tmp_path}").execute()
    with pytest.raises(ConfigError, match="holds no finished episode of task 'pusht'"):
        imagination(run, "task=pusht").execute()
    flow = tmp_path / "flow"
    assert main(["train", *TINY, "learner.steps=1", f"run.dir={flow}"]) == 0
    with pytest.raises(ConfigError, match="is a FlowPolicy, which does not predict"):
        imagination(flow)
