"""The study of world models, in small, and what its windows show."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cloning import Demonstrations
from benchmarks.study_worlds.__main__ import report
from benchmarks.study_worlds.cells import Cell, Shown, Study, work_on
from benchmarks.study_worlds.contenders import CONTENDERS, PARTS, TASKS
from benchmarks.study_worlds.table import difference, said
from embodied.core.episodes import Step

KEY = "observation.state"
EPISODES = Path(__file__).parents[1] / "data" / "pusht_three_episodes.npz"


def demonstrations():
    def episode(number):
        return [
            Step(
                stream="s",
                episode=number,
                index=i,
                observation={KEY: np.array([10 * number + i], np.float32)},
                action=np.array([10 * number + i], np.float32),
                final=i == 6,
            )
            for i in range(7)
        ]

    return Demonstrations.of(map(episode, range(4)))


def shown(later, labelled_episodes=4):
    whole = demonstrations()
    return Shown.of_all(whole, later, whole.first < 6 * labelled_episodes)


@pytest.mark.parametrize(
    ("later", "values", "pads"),
    [
        ("future", [[3, 5], [15, 15]], [[0, 0], [0, 1]]),
        ("current", [[1, 1], [13, 13]], [[0, 0], [0, 0]]),
        ("none", None, [[1, 1], [1, 1]]),
    ],
)
def test_windows_show_what_comes_later_or_the_present_or_nothing(later, values, pads):
    at_B = np.array([1, 6 + 3])
    batch = shown(later).batch(
        at_B, [KEY], n_obs_steps=1, horizon=2, future=(2, 4), future_keys=[KEY]
    )
    assert batch["future_is_pad"].tolist() == pads
    if values is not None:
        assert batch["future." + KEY][..., 0].tolist() == values
    assert batch["action"][..., 0].tolist() == [[1, 2], [13, 14]]
    assert not batch["action_is_pad"].any()


def test_half_of_a_batch_has_labels_where_few_episodes_have_them():
    some = shown("future", labelled_episodes=1)
    at_B = some.draw(np.random.default_rng(0), 40)
    assert (some.labelled[at_B]).sum() == 20
    batch = some.batch(at_B, [KEY], n_obs_steps=1, horizon=2)
    assert batch["action_is_pad"].all(axis=1).tolist() == (~some.labelled[at_B]).tolist()
    assert set(at_B[20:]) <= set(range(6, 24))


def test_the_parts_compare_those_who_take_part():
    for part, one in PARTS.items():
        assert {name for pair in one.compared for name in pair} <= set(one.contenders), part
        assert set(one.tasks) <= set(TASKS), part
    assert set().union(*(one.contenders for one in PARTS.values())) == set(CONTENDERS)


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if task != "pusht"])
def test_the_other_tasks_are_runs_that_can_be(task):
    config = Cell(Study("runs/none", 1.0, 2), task, "uva", 1).config()
    assert config.learner.minutes == 1.0 and config.policy["width"] == 64
    assert ("shrink" in config.policy["latents"]) == (task == "pusht-pictures")


def test_differences_are_of_the_same_start_states_and_seeds():
    assert difference([[1.0, 0.0], [1.0, 0.0]], [[0.5, -0.5], [0.5, -0.5]]).startswith("+0.500 (95")
    assert said([[1.0, 0.0], [1.0, 1.0]]).endswith("[0.500, 1.000]")
    # Two seeds that agree are no more evidence than one.
    one, twice = [[0.0, 1.0, 1.0, 0.0]], [[0.0, 1.0, 1.0, 0.0]] * 2
    assert said(one).split("[")[0] == said(twice).split("[")[0]
    other = [[0.0, 0.0, 1.0, 0.0]]
    assert difference(one, other).split("[")[0] == difference(twice, other * 2).split("[")[0]


@pytest.mark.slow
def test_each_part_runs_and_is_not_done_twice(tmp_path):
    pytest.importorskip("gym_pusht")
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(EPISODES, data / TASKS["pusht"].file)
    study = Study(str(tmp_path / "study"), 1e-4, 2, horizon=8, data=str(data), held=1, proposals=2)
    names = {name for part in PARTS.values() for name in part.contenders}
    for name in sorted(names):
        assert "after" in work_on(Cell(study, "pusht", name, 1))
    lines = report(study, list(PARTS), ["pusht"], [1])
    printed = "\n".join(lines)
    for wanted in ("uwm − diffusion", "uwm, nothing shown", "tenth and free", "| simulator |"):
        assert wanted in printed
    assert "inverse − policy" in printed and "observation.environment_state, 16" in printed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    assert report(study, list(PARTS), ["pusht"], [1]) == lines
    work_on(Cell(study, "pusht", "uwm", 1))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
