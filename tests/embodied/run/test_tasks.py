"""Several tasks in one run: whose robots do what, who demonstrates it, and who is told what."""

import msgspec
import numpy as np
import pytest

from embodied.buffer.read.replay import EpisodeInfo
from embodied.cli.main import main
from embodied.cli.report import write_report
from embodied.core.errors import ConfigError, EmbodiedError
from embodied.core.rundir import RunDir
from embodied.run.build import demonstrations_wanted, films_of
from embodied.run.config import load_train
from embodied.run.demonstrating import Demonstrations, demonstrations_of, recall
from embodied.run.evaluate import summarise_tasks
from embodied.run.rollout import Result, Rollout, Start
from hal.group import make_group
from sim import family
from sim.family import SimConfig, SimTask
from sim.pointmass import PointMassExpert
from tests.embodied.run.test_rollout import Told

TWO = "task=[metaworld/drawer-open,metaworld/drawer-close]"
FEW = [
    *(TWO, "sim.horizon=100", "run.mode=lockstep", "algorithm=filtered_bc", "actors.count=1"),
    *("actors.rows=2", "actors.speed=0", "actors.ticks_per_round=100", "learner.batch_size=16"),
    *("demonstrations.episodes=1", "learner.steps=20", "learner.steps_per_round=10"),
    *("policy.n_obs_steps=1", "policy.horizon=8", "policy.n_action_steps=8"),
    *("policy.language={name: words}", "+policy.network.width=32", "+policy.network.depth=1"),
    *("learner.publish_every=10", "evaluation.episodes=0", "evaluation.final_episodes=1"),
    *("evaluation.rows=1", "evaluation.videos=0"),
]


def test_robots_take_the_tasks_in_turn_and_share_their_demonstrations():
    config = load_train([TWO, "actors.count=2", "actors.rows=3", "demonstrations.episodes=5"])
    assert demonstrations_wanted(config) == 10
    first, second = (demonstrations_of(config, actor) for actor in range(2))
    assert first[0] is first[2] is not first[1] and second[0] is second[2] is not second[1]
    for shared, wanted in ((first[0], 3), (first[1], 3), (second[0], 2), (second[1], 2)):
        rows = [row for row in range(9) if shared.begin(row)]
        assert len(rows) == wanted and shared.owed
        for row in rows:
            shared.left(row)
            shared.note(success=True, ticks=10 + row)
        assert not shared.owed and not shared.begin(0) and shared.longest_ticks == 9 + wanted


def test_others_demonstrations_say_how_long_one_takes_and_are_not_counted():
    mine = Demonstrations("pointmass", 2)

    def episode(stream, ticks, task="pointmass", success=True, interventions=None):
        rows = np.arange(ticks)
        whole = ticks if interventions is None else interventions
        return EpisodeInfo(stream, 0, task, 0, rows, ticks, True, success, whole, (0, 0))

    recall({"me": mine}, [episode("me", 20), episode("other", 30)])
    assert mine.owed and mine.longest_ticks == 30
    recall({"me": mine}, [episode("a", 40, "pusht"), episode("a", 50, success=False)])
    recall({"me": mine}, [episode("a", 60, interventions=59)])
    assert mine.owed and mine.longest_ticks == 30


def test_demonstrations_that_are_not_to_be_had_end_the_run():
    demonstrations = Demonstrations("metaworld/assembly", 2)
    for _ in range(9):
        demonstrations.note(success=False, ticks=5)
    with pytest.raises(EmbodiedError, match="'metaworld/assembly' succeeded in 0 of 10 attempts"):
        demonstrations.note(success=False, ticks=5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=[pointmass,pusht]"], "robots of 'pointmass' and 'pusht' differ"),
        (["task=[pointmass,pointmass]"], r"\[pointmass, pointmass\].*each once"),
        (["task=[]"], "one task or more"),
        (["task=[metaworld/drawer-open,metaworld/draw-close]"], "metaworld/drawer-close"),
        ([TWO, "actors.count=3", "actors.rows=1"], "actors.count=3 .* cannot share 2 tasks"),
        ([TWO, "actors.devices=so101"], "leases robots for one task, and the run has 2"),
    ],
)
def test_tasks_that_one_run_cannot_have_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_train(overrides)


def test_every_row_is_told_and_recorded_as_its_own_task():
    tasks = [SimTask("left", "go left", 40), SimTask("right", "go right", 20)]
    starts = [[Start(1)], [Start(2)]]
    steps = [[], []]
    rollout = Rollout(
        make_group(lambda row: family.make_device("pointmass", SimConfig(), row=row), 2),
        tasks,
        next_start=lambda row: starts[row].pop() if starts[row] else None,
        experts=[PointMassExpert(), PointMassExpert()],
        on_step=lambda row, step: steps[row].append(step),
    )
    policy = Told(20)
    policy.gain = 0.0
    rollout.set_policy(policy, 1)
    results = [result for _ in range(45) for result in rollout.tick()]
    assert [(r.task, r.ticks) for r in results] == [("right", 20), ("left", 40)]
    assert [{step.task for step in own} for own in steps] == [{"left"}, {"right"}]
    both = policy.seen[0]["task"]
    assert [bytes(row[0]).rstrip(b"\0") for row in both] == [b"go left", b"go right"]
    alone = policy.seen[-1]["task"]
    assert alone.shape == (1, 2, 20) and np.array_equal(alone[0], both[0])


def result(task, success):
    return Result(0, task, 0, success, 10, 0.0, {"reward": 1.0}, 0, 1, False, False)


def test_summaries_and_films_of_several_tasks_name_them(tmp_path):
    both = summarise_tasks([result("a", True), result("b", False), result("b", True)])
    assert both["success_rate"] == pytest.approx(2 / 3)
    assert {name: part["successes"] for name, part in both["tasks"].items()} == {"a": 1, "b": 1}
    assert "tasks" not in summarise_tasks([result("a", True)])
    films = films_of(("m/a", "m/b"), range(1), tmp_path)
    assert [path.name for own in films.values() for path in own.values()] == [
        "m-a-seed0.mp4",
        "m-b-seed0.mp4",
    ]
    assert films_of(("m/a",), [3], tmp_path)["m/a"][3].name == "seed3.mp4"


@pytest.mark.slow
def test_one_policy_learns_acts_in_and_is_evaluated_on_two_tasks(tmp_path, capsys):
    run = RunDir(tmp_path / "run")
    assert main(["train", *FEW, f"run.dir={run.path}"]) == 0
    more = ("learner.steps=40", "run.resume=true")
    assert main(["train", *FEW, f"run.dir={run.path}", *more]) == 0
    rows = run.read("metrics", "actor0")
    names = {"metaworld/drawer-open", "metaworld/drawer-close"}
    demonstrated = [row["task"] for row in rows if row["demonstration"] and row["success"]]
    assert sorted(demonstrated) == sorted(names)
    assert {row["task"] for row in rows if not row["demonstration"]} == names
    last = run.read("metrics", "evaluation")[-1]
    assert {*last["tasks"]} == names and last["episodes"] == 2
    write_report(run)
    page = run.report.read_text()
    assert "By task" in page and all(f"<th>{name}</th>" in page for name in names)
    capsys.readouterr()
    assert main(["eval", "--json", f"checkpoint={run.path}", "episodes=1", "rows=1"]) == 0
    shown = msgspec.json.decode(capsys.readouterr().out)
    assert {n: p["successes"] for n, p in shown["tasks"].items()} == {
        n: p["successes"] for n, p in last["tasks"].items()
    }
