"""Real-time robots of a host's agent in a training run, one of them unplugged in the middle."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sizes import full_only

from embodied.buffer.read.replay import ReplayReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def rows(run, kind, name):
    file = run / kind / f"{name}.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def until(condition, timeout_s, text):
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, text()
        time.sleep(0.2)
    return found


@full_only
def test_a_run_goes_on_without_an_unplugged_arm_and_takes_it_back(host, tmp_path):
    host.virtual_arm(seed=3)
    simulated = [
        override
        for name in ("sim1", "sim2")
        for override in (
            f"+robot@robots.{name}=simulated",
            f"robots.{name}.driver.task=so101/reach",
        )
    ]
    host.arm_agent("real", *simulated)
    for name in ("real", "sim1", "sim2"):
        host.wait("ready", "degraded", name=name, timeout_s=60)
    run = tmp_path / "run"
    command = [
        str(Path(sys.executable).parent / "embodied"),
        "train",
        "task=so101/reach",
        "actors.count=3",
        "actors.devices=arm",
        "demonstrations.episodes=6",
        "learner.steps=1000000",
        "learner.minutes=2",
        "learner.samples_per_insert=null",
        "evaluation.episodes=0",
        "evaluation.final_episodes=4",
        "evaluation.rows=1",
        "evaluation.videos=0",
        f"run.dir={run}",
    ]
    train = subprocess.Popen(command, stdout=host.log, stderr=host.log)
    host.processes.append(train)

    def holders():
        return {row.id: row.holder for row in host.pool.devices() if row.holder}

    def episodes(actor):
        return len(rows(run, "metrics", actor))

    def counts():
        return [episodes(f"actor{k}") for k in range(3)]

    held = until(lambda: h if len(h := holders()) == 3 else None, 90, host.text)
    assert set(held) == {"real", "sim1", "sim2"} and len(set(held.values())) == 3
    on_real = held["real"].rsplit("/", 1)[1]
    until(lambda: episodes(on_real) >= 2 and min(counts()) >= 1, 120, host.text)
    host.arm.unplug()
    host.wait("lost", name="real")
    before = sum(counts())
    until(lambda: sum(counts()) >= before + 5, 120, host.text)
    assert "real" not in holders(), "a lost arm is leased to nobody"
    assert any(row["event"] == "device lost" for row in rows(run, ".", "events"))
    host.arm.plug()
    finished: dict[str, int] = {}

    def two_episodes_with_the_same_holder():
        holder = holders().get("real", "").rsplit("/", 1)[-1]
        if holder not in finished:
            finished.clear()
        if holder:
            finished.setdefault(holder, episodes(holder))
        return holder and episodes(holder) >= finished[holder] + 2

    until(two_episodes_with_the_same_holder, 120, host.text)
    assert train.wait(timeout=280) == 0, host.text()
    assert rows(run, "metrics", "evaluation")[-1]["final"]
    assert not holders()
    alone = [
        command[0],
        "record",
        "device=real",
        "teleoperator=nobody",
        f"checkpoint={run}",
        "task=so101/reach",
        "episodes=2",
        f"output={tmp_path / 'alone'}",
    ]
    said = subprocess.run(alone, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 0 and "2 of 2 finished" in said.stdout, said.stdout + said.stderr
    reader = ReplayReader(tmp_path / "alone")
    reader.refresh()
    for episode in reader.closed_episodes():
        assert episode.interventions == 0 and episode.policy_versions[1] >= 0
