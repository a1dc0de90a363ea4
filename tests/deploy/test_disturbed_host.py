"""What happens on a robot's host beside the robot: buttons, full disks, locks, tools that hang."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tmpfs import script_in_tmpfs

from embodied.cli.main import main
from hal.pool.state import pool_path
from hal.remote import RemoteDevice

STOPPING_S = 0.25
INPUTS_S = 0.15
"""How often the watchdog looks at its inputs, and the servo process at the watchdog."""

NOISE_S = 0.5
"""What a busy machine may add."""


@pytest.fixture
def button(tmp_path):
    """A GPIO's value file."""
    file = tmp_path / "value"
    file.write_text("0\n")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("press", ["1\n", "unreadable", "gone"])
def test_a_pressed_input_stops_every_arm_until_a_person_clears_it(host, button, press):
    host.virtual_arm(seed=5)
    host.arm_agent("left", f"+robots.left.estop_inputs=[{button}]")
    host.wait("ready", "degraded")
    mover = host.mover()
    time.sleep(0.4)
    assert mover.poll() is None and host.health()[0] != "halted", "0 is not pressed"
    if press == "gone":
        button.unlink()
    else:
        button.write_bytes(b"\xff\xfe" if press == "unreadable" else press.encode())
    assert host.standstill_s() <= INPUTS_S + STOPPING_S + NOISE_S
    assert "emergency stop input" in host.wait("halted")
    assert mover.wait(timeout=15) != 0
    assert main(["estop", "--clear"]) == 0
    time.sleep(0.5)
    assert "emergency stop input" in host.wait("halted"), "it is still pressed"
    button.write_text("0\n")
    time.sleep(0.5)
    assert host.health()[0] == "halted", "letting go of the button clears nothing"
    host.agent_process.terminate()
    host.agent_process.wait(timeout=20)
    host.arm_agent("left", f"+robots.left.estop_inputs=[{button}]")
    assert "emergency stop input" in host.wait("halted")
    # Both the device's own halt and the host's: the one was told before the other was written.
    for arguments in ([], ["left"]):
        main(["estop", "--clear", *arguments])
    host.wait("ready", "degraded")
    host.mover()


FULL = """
import os, signal, sys, time
from pathlib import Path

state, folder, support = map(Path, sys.argv[1:])
sys.path.insert(0, str(support))
os.environ["EMBODIED_STATE"] = str(state)

import numpy as np
from embodied.cli.main import main
from host import Host

def fill():
    # All blocks, then all inodes: not even an empty file can be made.
    with open(state / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            pass
    try:
        for k in range(100_000):
            (state / f"ballast-{k}").touch()
    except OSError:
        pass

def free():
    for file in state.glob("ballast*"):
        file.unlink()

def until(true, what, timeout_s=30):
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, (what, host.text())
        time.sleep(0.02)

def servos():
    return host.children(host.agent_process, "hal.process.servo")

host = Host(folder)
button = folder / "value"
button.write_text("0")
try:
    arm = host.virtual_arm(seed=6)
    host.arm_agent("left", f"+robots.left.estop_inputs=[{button}]")
    host.wait("ready", "degraded")
    for stop in ("stall", "button"):
        host.mover()
        time.sleep(0.4)
        fill()
        servo = host.servo_pid()
        if stop == "stall":
            os.kill(servo, signal.SIGSTOP)
        else:
            button.write_text("1")
        print(stop, round(host.standstill_s(), 3), flush=True)
        if stop == "stall":
            until(lambda: servos() not in ([], [servo]), "new servo process")
        else:
            assert host.servo_pid() == servo, "it stopped the arm itself"
        latches = state / "latches"
        time.sleep(2.5)
        assert not list(latches.glob("*.halt")), "there is no room for it"
        place = arm.state().q_rad
        time.sleep(1.0)
        np.testing.assert_allclose(arm.state().q_rad, place, atol=0.03)
        assert host.agent_process.poll() is None
        free()
        name = "left" if stop == "stall" else "estop"
        until((latches / f"{name}.halt").exists, "latch once there is room")
        reason = host.wait("halted")
        assert ("stalled" if stop == "stall" else "emergency stop input") in reason, reason
        button.write_text("0")
        time.sleep(2.0)  # attempts to write the latch that are still on their way
        for arguments in ([], ["left"]):
            main(["estop", "--clear", *arguments])
        host.wait("ready", "degraded")
    print("ok", flush=True)
finally:
    host.close()
"""


@pytest.mark.slow
def test_a_full_disk_of_the_state_directory_hinders_no_stop(tmp_path):
    (tmp_path / "state").mkdir()
    support = Path(__file__).parents[1] / "support"
    command = script_in_tmpfs(FULL, tmp_path / "state", tmp_path, support, size="4m,nr_inodes=200")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.split() for line in done.stdout.splitlines()]
    stopped_s = {line[0]: float(line[1]) for line in said if line[0] in ("stall", "button")}
    assert said[-1] == ["ok"]
    assert stopped_s["stall"] <= STOPPING_S + NOISE_S
    assert stopped_s["button"] <= INPUTS_S + STOPPING_S + NOISE_S


@pytest.fixture
def hanging_nvidia_smi(tmp_path, monkeypatch):
    """One that never answers, first on the path."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho called >> {tmp_path}/called\nexec sleep 1000\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return tmp_path / "called"


@pytest.mark.slow
def test_neither_a_locked_pool_nor_a_hanging_nvidia_smi_stalls_the_robot(host, hanging_nvidia_smi):
    host.virtual_arm(seed=7)
    agent = host.arm_agent("left", "gpus=true")
    host.wait("ready", "degraded")
    mover = host.mover(ahead=40)
    [row] = host.pool.devices()
    embodied = str(Path(sys.executable).parent / "embodied")
    devices = subprocess.Popen(
        [embodied, "devices", "--json"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with RemoteDevice(row.address) as watched:
        first = watched.tick
        locked_s = []
        for _ in range(2):
            time.sleep(4.0)  # in which leases are renewed
            with sqlite3.connect(pool_path(), isolation_level=None, timeout=10) as other:
                other.execute("BEGIN EXCLUSIVE")
                since_s = time.monotonic()
                time.sleep(4.0)
                locked_s.append(time.monotonic() - since_s)
                other.execute("ROLLBACK")
            other.close()
        watched.advance(watched.tick + 1)
        frames = watched.frames(first)[:-1]
        spent = watched.tick - first
    assert min(locked_s) >= 4.0 and hanging_nvidia_smi.read_text().count("called") >= 2
    assert mover.poll() is None, "its lease stood all the time"
    assert host.pool.devices()[0].token == row.token and host.health()[0] != "lost"
    assert [frame.tick for frame in frames] == list(range(first, first + spent))
    assert not any(frame.held for frame in frames)
    assert np.ptp([frame.action for frame in frames], axis=0).max() > 0.5, "it moved"
    said, _ = devices.communicate(timeout=120)
    assert devices.returncode == 0, said
    rows = {found["id"]: found for found in json.loads(said)}
    assert "silent" in rows["gpu"]["reason"] and rows["left"]["holder"] == "mover"
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=20) == 0, "the tool does not keep it from ending"
