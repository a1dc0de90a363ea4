"""What asynchrony gains and costs: the arithmetic, and a smoke test."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.asynchrony import utilisation
from benchmarks.asynchrony.proportions import (
    PROPORTIONS,
    TICK_HZ,
    TICKS,
    Repetition,
    plan,
    table,
)
from benchmarks.asynchrony.session import LOG_STEPS, Rows, spent
from benchmarks.asynchrony.utilisation import Window
from embodied.core.rundir import RunDir


@pytest.mark.parametrize("name", PROPORTIONS)
@pytest.mark.parametrize("step_s", [0.001, 0.01, 0.2])
def test_robot_and_gradient_steps_are_in_the_proportion(name, step_s):
    rows, speed = plan(PROPORTIONS[name], step_s)
    episode_s, train_s = TICKS / TICK_HZ / speed, rows * LOG_STEPS * step_s
    wanted = PROPORTIONS[name].train / PROPORTIONS[name].generate
    assert train_s / episode_s == pytest.approx(wanted)
    assert step_s == 0.2 or 2 < episode_s < 5


def test_users_figures_hold_together():
    known = [found for found in PROPORTIONS.values() if found.speedup is not None]
    assert len(known) == 2
    for proportion in known:
        both = proportion.generate + proportion.train
        generated, trained = proportion.speedup or (0.0, 0.0)
        # Its synchronous times are generation, training and what little is between them.
        assert 0.98 <= proportion.generate * generated / both < 1.2
        assert 0.98 <= proportion.train * trained / both < 1.2


def test_ratios_are_of_the_same_repetition():
    found = [
        Repetition(3.0, 1.0, 3.3, 1.0, 0.1),
        Repetition(6.0, 2.0, 6.0, 2.2, 0.2),
        Repetition(3.0, 1.0, 3.0, 1.2, 0.1),
    ]
    rows = {(row.case, row.contender): row for row in table(PROPORTIONS["equal"], 2, found)}
    assert rows["generation", "together"].ratio == pytest.approx(1.0)
    assert rows["training", "together"].ratio == pytest.approx(1.1)
    assert rows["training", "together"].good and rows["training", "alone"].good is None
    assert rows["generation", "in turns"].value == pytest.approx(4.0)
    assert rows["training", "in turns"].ratio == pytest.approx(8 / 2.2)
    late = [Repetition(3.0, 1.0, 3.6, 1.2, 0.1)]
    assert [row.good for row in table(PROPORTIONS["equal"], 2, late) if row.target] == [False] * 2


def test_a_step_s_time_is_told_apart(tmp_path):
    run = RunDir(tmp_path)
    (tmp_path / "timings").mkdir()
    run.timings("learner", {"data_share": 0.02, "publish_share": 0.01})
    alone = [Window(0.010, 0.009, 0.0005, 0.1), Window(0.020, 0.018, 0.001, 0.1)]
    beside = [Window(0.0125, 0.010, 0.001, 0.3), Window(0.025, 0.020, 0.002, 0.3)]
    rows = {(row.case, row.contender): row for row in utilisation.table(alone, beside, run)}
    kept = rows["learner in the run", "beside actors"]
    assert kept.ratio == pytest.approx(0.8) and kept.good is False
    assert "waits for data 2.0 %, publishes 1.0 %" in kept.note
    longer = [rows["a step is longer", part].value for part in ("on a core", "ready, no core free")]
    assert longer == pytest.approx([10.0, 5.0])
    assert rows["a step is longer", "asleep"].value == pytest.approx(10.0)


def test_rows_are_counted_as_they_come_and_work_as_it_is_done(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    assert rows.look() == 0
    with (tmp_path / "rows.jsonl").open("w") as file:
        for text, count in (("{}\n{}\n{", 2), ("}", 2), ("\n", 3)):
            file.write(text)
            file.flush()
            assert rows.look() == count
    before = spent([os.getpid()])
    while (spent([os.getpid()]) - before).cpu_s < 0.02:
        pass


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_asynchrony(tmp_path):
    command = [sys.executable, "-m", "benchmarks.asynchrony", "--quick"]
    only = ["--only", "equal,utilisation", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(
        [*command, *only],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {
        (row["case"], row["contender"]): row
        for part in ("equal", "utilisation")
        for row in found[part]["rows"]
    }
    for stage in ("generation", "training"):
        alone, together = rows[stage, "alone"]["value"], rows[stage, "together"]["value"]
        assert 0 < together < rows[stage, "in turns"]["value"] and alone > 0
    assert 0.2 < rows["learner in the run", "beside actors"]["ratio"] < 2
    assert rows["bare step", "alone"]["value"] > 0
    assert "| utilisation | bare step | beside MuJoCo, all the time |" in done.stdout
