"""Measurements of links between sites: their arithmetic, and each of them in small."""

import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from benchmarks.links.cross_city import Episodes
from benchmarks.links.many_agents import slope
from benchmarks.links.timed_actor import STEP, extra_times
from embodied.core.rundir import RunDir


def measured(name, folder, *options):
    """The result of a measurement's smoke test."""
    command = [sys.executable, "-m", f"benchmarks.links.{name}", "--quick", *options]
    done = subprocess.run(
        [*command, "--output", str(folder / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode((folder / "out" / f"{name}.json").read_bytes())


def test_an_episode_counts_for_its_ticks_from_the_end_of_the_one_before(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    (tmp_path / "metrics").mkdir()
    now_s = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])
    episodes = Episodes(run, ticks=100)
    for end_s, ticks, expert in ((11.0, 100, 0), (13.0, 100, 0), (14.0, 50, 0), (20.0, 100, 7)):
        row = {"ticks": ticks, "interventions": expert, "version": 1}
        run.metrics("actor0", row)
        now_s[0] = end_s
        episodes.look()
        episodes.look()
    assert episodes.seconds == [2.0, 2.0] and episodes.acts()
    run.release()


def test_steps_are_around_an_update_or_elsewhere():
    steps = np.zeros(100, STEP)
    steps["end_s"], steps["own_ms"] = np.arange(100) / 10, 2.0
    steps["own_ms"][50], steps["swapped"][50], steps["poll_ms"][50] = 9.0, True, 6.5
    steps["own_ms"][3] = 50.0
    around, elsewhere, swapping, polls = extra_times(steps, [(4.0, 6.0)], begins_s=1.0)
    assert len(around) == 21 and around.max() == 7.0 and len(elsewhere) == 90 - 21
    assert not elsewhere.any() and swapping.tolist() == [7.0] and polls.tolist() == [6.5]


def test_a_slope_has_the_error_of_a_line_through_points():
    times_s = np.arange(0, 600, 30.0)
    line, error = slope(times_s, 5 + 2 * times_s / 60)
    assert line == pytest.approx(2) and error < 1e-9
    noise = np.random.default_rng(0).normal(0, 1, (400, len(times_s)))
    found = [slope(times_s, values) for values in noise]
    spread = np.std([line for line, _ in found])
    assert np.mean([error for _, error in found]) == pytest.approx(spread, rel=0.1)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(300)
def test_cross_city(tmp_path):
    found = measured("cross_city", tmp_path)
    local, central = found["windows"]
    assert len(local["episode_s"]) >= 2 and len(central["same_s"]) >= 2 and found["alone_s"]
    for window in (local, central):
        assert window["crossed"]["experience_mbit_s"] > 0 and window["crossed"]["rtt_ms"] > 30
    assert central["crossed"]["asked_mbit_s"] > 0 == local["crossed"]["asked_mbit_s"]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(300)
def test_weight_sync(tmp_path):
    found = measured("weight_sync", tmp_path)["sizes"]["10 MB"]
    one = found["profiles"]["cross-city"]
    pairs = zip(one["arrival_s"], one["acting_s"], strict=True)
    assert len(one["acting_s"]) == 3 and all(0 < a < b for a, b in pairs)
    assert 1e4 < one["update_bytes"] < found["bytes"] / 2
    assert found["pause"]["swapping_ms"]["count"] == 3
    assert found["pause"]["around_ms"]["count"] > 50
    assert len(found["step_time"]["publish_ms"]) == 2


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(300)
def test_many_agents(tmp_path):
    found = measured("many_agents", tmp_path)
    for phase in ("paced", "saturated"):
        assert len(found[phase]["steps"]) == 3 and min(found[phase]["steps"].values()) > 0
        assert found[phase]["connected"]
    assert set(found["growth"]) == {"gateway", "learner", "buffer", "loader"}
