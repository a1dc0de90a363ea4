"""The process engine on the point mass: kills, interruption, full disk, wrong data."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sizes import full_only
from tmpfs import in_tmpfs

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.episodes import Step
from embodied.core.rundir import RunDir
from embodied.run.config import load_train
from embodied.weights.store import WeightStore

pytestmark = pytest.mark.timeout(600)

SMALL = [
    "task=pointmass",
    "actors.speed=10",
    "demonstrations.episodes=4",
    "policy.n_obs_steps=1",
    "policy.horizon=8",
    "policy.n_action_steps=4",
    "+policy.network.width=64",
    "+policy.network.depth=1",
    "learner.batch_size=64",
    "learner.publish_every=100",
    "learner.checkpoint_every=200",
    "learner.warmup_steps=10",
    "evaluation.episodes=4",
    "evaluation.final_episodes=8",
    "evaluation.every_steps=500",
    "evaluation.rows=4",
    "evaluation.videos=1",
    "buffer.segment_mib=1",
]


def start(path, *extra, wrapper=()):
    command = [sys.executable, "-m", "embodied.cli.main", "train", *SMALL, f"run.dir={path}"]
    return subprocess.Popen(
        [*wrapper, *command, *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, timeout_s=180.0):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"{condition.__name__} did not come true in {timeout_s} s")


def finish(process, timeout_s=300.0):
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def role_pids(run):
    return {e["role"]: e["pid"] for e in run.events() if e["event"] == "role started"}


def recorded(run):
    reader = ReplayReader(run.buffer)
    reader.refresh()
    assert not reader.damaged
    return reader


def acted(number, length=20):
    """A successful episode of a policy on the point mass."""
    rng = np.random.default_rng(number)
    numbers = rng.uniform(-1, 1, (length + 1, 3, 2)).astype(np.float32)
    return [
        Step(
            "robot",
            number,
            index,
            {"observation.state": numbers[index, 0], "observation.environment_state": place},
            numbers[index, 2],
            task="pointmass",
            success=index == length - 1,
            terminated=index == length - 1,
            final=index == length,
        )
        for index, place in enumerate(numbers[:, 1])
    ]


def assert_whole(run):
    """Every closed episode has each of its steps once and its last observation."""
    for episode in recorded(run).closed_episodes():
        assert (episode.rows >= 0).all() and len(set(episode.rows.tolist())) == len(episode.rows)
        assert episode.final_row >= 0


@pytest.mark.slow
def test_every_role_may_be_killed_and_the_run_still_ends_well(tmp_path):
    run = RunDir(tmp_path / "run")
    process = start(run.path, "learner.steps=3000", "evaluation.every_steps=1500")

    def learning():
        rows = run.read("metrics", "learner")
        return rows and rows[-1]["step"] >= 300

    try:
        wait_for(learning)
        for role in ("buffer", "actor0", "learner", "evaluator"):
            before = role_pids(run)[role]
            os.kill(before, signal.SIGKILL)

            def restarted(role=role, before=before):
                return role_pids(run)[role] != before

            wait_for(restarted)
        status, output = finish(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, output
    ended = [e["role"] for e in run.events() if e["event"] == "role ended"]
    assert sorted(ended) == ["actor0", "buffer", "evaluator", "learner"]
    last = run.read("metrics", "evaluation")[-1]
    assert last["final"] and last["step"] == 3000 and last["episodes"] == 8
    steps = [row["step"] for row in run.read("metrics", "learner")]
    assert steps[-1] == 3000
    resumed = [b for a, b in itertools.pairwise(steps) if b <= a]
    assert all(step >= 250 for step in resumed), "the learner began again instead of resuming"
    assert_whole(run)
    demonstrations = [
        e for e in recorded(run).closed_episodes() if e.interventions == len(e.rows) and e.success
    ]
    assert len(demonstrations) >= 4
    assert run.report.exists()


@pytest.mark.slow
def test_new_weights_reach_actors_while_they_act(tmp_path):
    run = RunDir(tmp_path / "run")
    process = start(run.path, "learner.steps=1000000")

    def actors_took_three():
        return len({e.policy_versions[1] for e in recorded(run).closed_episodes()} - {-1}) >= 3

    def weight_ages():
        return [a for row in run.read("timings", "actor0") for a in row.get("weight_age_s", [])]

    try:
        wait_for(lambda: run.read("metrics", "learner"))
        wait_for(actors_took_three)
        wait_for(weight_ages)
        pids, cores = role_pids(run), sorted(os.sched_getaffinity(0))
        assert os.sched_getaffinity(pids["learner"]) == {*cores}
        for role in ("actor0", "evaluator"):
            assert os.sched_getaffinity(pids[role]) == {*cores[: max(1, len(cores) - 1)]}
            assert os.getpriority(os.PRIO_PROCESS, pids[role]) == min(19, os.nice(0) + 5)
        process.send_signal(signal.SIGINT)
        status, output = finish(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert status == 130, output
    assert min(weight_ages()) >= 0


@pytest.mark.slow
def test_interrupting_keeps_everything_and_resuming_goes_on(tmp_path):
    run = RunDir(tmp_path / "run")
    small = ("actors.count=1", "evaluation.final_episodes=2")
    process = start(run.path, "learner.steps=100000", *small)

    def learning():
        rows = run.read("metrics", "learner")
        return rows and rows[-1]["step"] >= 400

    wait_for(learning)
    process.send_signal(signal.SIGINT)
    status, output = finish(process)
    assert status == 130
    assert "Traceback" not in output and "run.resume=true" in output
    assert not run.in_use()
    step = run.read("metrics", "learner")[-1]["step"]
    steps_recorded = recorded(run).num_steps
    assert_whole(run)
    more = ("run.resume=true", f"learner.steps={step + 300}", *small)
    status, output = finish(start(run.path, *more))
    assert status == 0, output
    steps = [row["step"] for row in run.read("metrics", "learner")]
    assert steps[-1] >= step + 250 and steps == sorted(steps)
    assert recorded(run).num_steps > steps_recorded
    manifest = WeightStore(run.weights).manifest(WeightStore(run.weights).latest_version())
    assert manifest.metadata["step"] == step + 300


@full_only
@pytest.mark.slow
def test_a_role_that_is_asked_to_end_from_outside_is_restarted_too(tmp_path):
    run = RunDir(tmp_path / "run")
    process = start(run.path, "learner.steps=3000", "evaluation.every_steps=100000")

    def learning():
        rows = run.read("metrics", "learner")
        return rows and rows[-1]["step"] >= 300

    wait_for(learning)
    os.kill(role_pids(run)["learner"], signal.SIGTERM)
    status, output = finish(process)
    assert status == 0, output
    assert run.read("metrics", "evaluation")[-1]["step"] == 3000


@full_only
@pytest.mark.slow
def test_a_finished_run_goes_on_with_a_larger_budget(tmp_path):
    run = RunDir(tmp_path / "run")
    assert finish(start(run.path, "learner.steps=300"))[0] == 0
    status, output = finish(start(run.path, "learner.steps=900", "run.resume=true"))
    assert status == 0, output
    rows = run.read("metrics", "evaluation")
    assert [row["step"] for row in rows if row["final"]] == [300, 900]


@full_only
@pytest.mark.slow
def test_without_opengl_everything_but_films_works(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disable")
    run = RunDir(tmp_path / "run")
    overrides = ["task=metaworld/reach", "learner.steps=100", "sim.horizon=60", "actors.speed=0"]
    status, output = finish(start(run.path, *overrides))
    assert status == 0, output
    assert any(e["event"] == "no films" and "apt-get" in e["error"] for e in run.events())
    assert run.read("metrics", "evaluation")[-1]["final"]


@pytest.mark.slow
def test_roles_end_when_the_supervisor_is_killed(tmp_path):
    run = RunDir(tmp_path / "run")
    process = start(run.path, "learner.steps=100000")

    def started():
        return len(role_pids(run)) == 5

    wait_for(started)
    process.kill()
    process.wait()

    def gone():
        return not any(Path(f"/proc/{pid}").exists() for pid in role_pids(run).values())

    wait_for(gone)


@pytest.mark.slow
def test_what_a_policy_did_is_learned_from_without_any_demonstration(tmp_path):
    source = tmp_path / "earlier"
    with LocalBuffer(source) as buffer:
        for number in range(3):
            for step in acted(number):
                buffer.add(step)
    recorded = f"demonstrations.dataset={{name: recorded, path: {source}}}"
    few = ("demonstrations.source=dataset", "demonstrations.episodes=null", recorded)
    few += ("learner.steps=40", "evaluation.episodes=0", "evaluation.final_episodes=0")
    cloning = (*few, "algorithm=filtered_bc", "algorithm.online=false")
    code, output = finish(start(tmp_path / "run", *cloning))
    assert code == 0, output
    assert WeightStore(RunDir(tmp_path / "run").weights).latest_version()
    code, output = finish(start(tmp_path / "none", *few, "algorithm=bc"))
    said = " ".join(output.split())
    assert code == 2 and "of 3 episodes the algorithm selects no step" in said


def test_a_run_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    run = RunDir(tmp_path / "run")
    run.acquire()
    status, output = finish(start(run.path))
    run.release()
    assert status == 2 and str(os.getpid()) in output and "in use" in output


@pytest.mark.slow
def test_a_full_disk_ends_in_one_paragraph(tmp_path):
    process = start(tmp_path / "run", "learner.steps=100000", wrapper=in_tmpfs(tmp_path, size="3m"))
    status, output = finish(process)
    assert status == 2, output
    assert "Traceback" not in output
    assert re.search(r"no\s+space\s+left", output) and re.search(r"intact", output)


@pytest.mark.slow
def test_a_damaged_checkpoint_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    run = RunDir(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.write_config(load_train([*SMALL, f"run.dir={run.path}"]))
    for name in ("learner.safetensors", "learner-previous.safetensors"):
        (run.checkpoints / name).write_bytes(b"not a checkpoint at all")
    status, output = finish(start(run.path, "run.resume=true"))
    assert status == 2 and "Traceback" not in output
    assert f"learner failed: learner: CorruptDataError: {run.checkpoints}/learner.safet" in output
    assert "Remove it to continue from learner-previous.safetensors." in output


@pytest.mark.slow
def test_a_missing_package_ends_the_run_with_its_name(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('none here', name='torch')")
    paths = (str(tmp_path), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    run = RunDir(tmp_path / "run")
    status, output = finish(start(run.path))
    assert status == 2 and "Traceback" not in output
    assert "the package 'torch' is not installed" in " ".join(output.split())
