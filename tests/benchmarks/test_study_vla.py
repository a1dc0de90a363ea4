"""The study of a policy of six tasks can be run, and what it prints."""

import pytest

from benchmarks.study_vla import cells
from benchmarks.study_vla.__main__ import said, show
from benchmarks.study_vla.cells import (
    CLONING,
    HEADS,
    OFFLINE,
    PARL,
    POLICY,
    SIMILAR,
    TASKS,
    Cell,
    Judged,
)
from embodied.run.algorithm import critic_spec, make_algorithm
from embodied.run.build import device_spec, policy_spec
from embodied.run.config import load_train


@pytest.mark.parametrize("head", HEADS)
def test_both_heads_are_runs_of_all_tasks_that_read_pictures_and_words(head):
    config = load_train([*SIMILAR, *POLICY, *HEADS[head], *PARL])
    assert config.tasks == TASKS and config.actors.rows == len(TASKS) >= 6
    spec = policy_spec(config)
    assert {*spec.observation} == {"observation.state", "observation.images.corner2", "task"}
    judged = critic_spec(make_algorithm(config.algorithm), device_spec(config), spec)
    assert {*judged.observation} == {"observation.state", "observation.environment_state", "task"}
    assert config.sim.picture_ticks == spec.n_action_steps
    assert (
        config.algorithm["cloning_steps"] + config.algorithm["offline_steps"] == CLONING + OFFLINE
    )


def test_a_line_of_the_table_has_every_task_and_all_together(tmp_path, capsys):
    success = {task: [True, False] for task in TASKS} | {TASKS[0]: [True, True]}
    show(Cell(tmp_path, "flow", 1, 1.0, 10), "clone", Judged(success, 99.6, 0))
    cells = capsys.readouterr().out.strip("|\n").split(" | ")
    assert [cell.strip() for cell in cells[:4]] == ["flow", "clone", "0", "0"]
    assert cells[4] == said([True, True]) == "100 % (34–100)"
    assert cells[-2].startswith("58 %") and cells[-1].strip() == "100"


@pytest.mark.slow
def test_a_small_study_goes_through_its_stages(monkeypatch, tmp_path):
    two = ("metaworld/drawer-close", "metaworld/button-press-topdown")
    smaller = [
        *(f"task=[{','.join(two)}]", "sim.horizon=100", "actors.rows=2", "evaluation.rows=1"),
        *("learner.batch_size=8", "learner.steps_per_round=10", "actors.ticks_per_round=110"),
    ]
    phases = ["algorithm.cloning_steps=10", "algorithm.offline_steps=10"]
    for name, value in {
        "TASKS": two,
        "CLONING": 10,
        "OFFLINE": 10,
        "SIMILAR": [*SIMILAR, *smaller],
        "PARL": [*PARL, *phases],
    }.items():
        monkeypatch.setattr(cells, name, value)
    cell = Cell(tmp_path, "flow", 1, 0.0, 1)
    cell.train(0)
    clone = cell.judged("clone", range(1), alone=True)
    assert clone.acted == 0 and {task: len(own) for task, own in clone.success.items()} == {
        two[0]: 1,
        two[1]: 1,
    }
    cell.train(10)
    acted = cell.judged("online", range(1))
    assert acted.acted > 0 and cell.minutes > 0
    assert cell.judged("clone", range(1), alone=True) == clone
