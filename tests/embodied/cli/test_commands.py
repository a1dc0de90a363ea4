import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from embodied.buffer.read.replay import ReplayReader
from embodied.cli.main import main
from embodied.cli.report import control_figures, write_report
from embodied.core.rundir import RunDir
from embodied.run.config import load_train
from embodied.run.robots import SimulatedRobots


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_collecting_records_whole_episodes(tmp_path, capsys):
    output = tmp_path / "demonstrations"
    arguments = ["collect", "task=pointmass", "demonstrations.episodes=5", "rows=2"]
    assert main([*arguments, f"output={output}"]) == 0
    assert main([*arguments, f"output={output}"]) == 0
    reader = ReplayReader(output)
    reader.refresh()
    episodes = reader.closed_episodes()
    assert len(episodes) == 10 and all(e.success for e in episodes)
    assert len({e.seed for e in episodes}) == 10, "a second call repeats start states"
    assert "5 successful" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "task=pointmas"], "pointmass"),
        (["train", "polcy=flow"], "policy"),
        (["eval"], "checkpoint"),
        (["eval", "checkpoint=/nowhere"], "neither a policy folder nor a run"),
        (["eval", "checkpoint=/nowhere", "episodes=0"], "episodes must be at least 1"),
        (["report", "/nowhere"], "holds no run"),
        (["collect", "task=pusht"], "no scripted expert"),
        (["collect", "demonstrations.source=none"], "nothing to collect"),
    ],
)
def test_wrong_input_ends_in_one_paragraph(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    message = said(capsys)
    assert words in message and "Traceback" not in message


def test_the_device_table_lists_simulators_as_json(capsys):
    assert main(["devices", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["metaworld"]["health"] == "ready" and "50 tasks" in rows["metaworld"]["detail"]
    assert rows["pointmass"]["kind"] == "simulator"


def test_robots_of_a_running_actor_are_in_the_table(capsys):
    robots = SimulatedRobots(load_train(["task=pointmass"]), 0, 1.0, "mine/actor0")
    for running in (True, False):
        if running:
            robots.report()
        else:
            robots.close()
        assert main(["devices", "--json"]) == 0
        rows = [r for r in json.loads(capsys.readouterr().out) if r["kind"] == "pointmass"]
        found = [(row["id"], row["holder"], row["health"], row["tick_hz"]) for row in rows]
        wanted = [(f"pointmass:{os.getpid()}.0", "mine/actor0", "leased", 20.0)]
        assert found == (wanted if running else [])


def test_the_report_of_a_run_without_evaluation_says_so(tmp_path):
    run = RunDir(tmp_path)
    run.acquire()
    run.write_config(load_train(["task=pointmass"]))
    run.timings("actor0", {"steps_per_s": 40.0, "latency_ms": [1.0, 3.0], "weight_age_s": [2.0]})
    run.timings("learner", {"steps_per_s": 10.0, "cpu_share": 0.5, "step": 10})
    write_report(run)
    page = run.report.read_text()
    assert "No evaluation was finished" in page
    figures = dict(control_figures(run))
    assert figures["environment steps per second, all robots"] == "40"
    assert figures["policy latency p50 / p99"] == "2.0 / 3.0 ms"


def test_the_installed_command_ignores_folders_of_the_same_name(tmp_path):
    for name in ("hal", "sim", "policies", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a stranger')")
    command = Path(sys.executable).parent / "embodied"
    result = subprocess.run(
        [command, "devices", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


TORCH_FREE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "torchvision"):
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
import embodied.core.config, embodied.core.rundir, embodied.core.files, embodied.core.protocols
import embodied.comms.channels, embodied.buffer.serve.service, embodied.buffer.sample.samplers
import embodied.weights.store, hal, deploy.agent, embodied.learn.dagger, embodied.run.rollout
import embodied.cli.main, embodied.cli.agent, embodied.cli.estop, embodied.cli.teleop
import embodied.cli.record, embodied.cli.calibrate, embodied.run.record_session
import hal.process.servo, hal.process.watchdog, hal.remote, hal.discovery
from embodied.core import registry
for kind in ("drivers", "cameras", "teleoperators", "enumerators", "resets", "rewards"):
    for name in registry.names(kind):
        registry.resolve(kind, name)
from sim import family
for name in sys.argv[1:]:
    found, task = family.find(name)
    with family.make_device(name, family.SimConfig()) as device:
        device.advance(1)
"""


@pytest.mark.parametrize(
    "tasks",
    [
        ("pusht", "pointmass"),
        pytest.param(("metaworld/reach", "robosuite/Lift"), marks=pytest.mark.slow),
    ],
    ids=lambda tasks: tasks[0],
)
def test_devices_buffer_and_links_work_without_torch(tasks):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", TORCH_FREE, *tasks],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-2000:]
