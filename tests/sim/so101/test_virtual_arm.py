import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from opengl import needs_opengl

from embodied.core.errors import ConfigError, LinkError
from hal.drivers.so101_arm import JOINTS
from sim.so101.virtual import Faults, VirtualArm

scs = pytest.importorskip("scservo_sdk")


class Host:
    """The maker's SDK on a port."""

    def __init__(self, port):
        self.port = scs.PortHandler(port)
        assert self.port.openPort()
        self.packets = scs.PacketHandler(0)
        self.reader = scs.GroupSyncRead(self.port, self.packets, 56, 2)
        for number in range(1, 7):
            self.reader.addParam(number)

    def ping(self):
        return self.packets.ping(self.port, 1)

    def positions(self):
        assert self.reader.txRxPacket() == scs.COMM_SUCCESS
        return np.array([self.reader.getData(number, 56, 2) for number in range(1, 7)])

    def torque(self, on):
        for number in range(1, 7):
            assert self.packets.write1ByteTxRx(self.port, number, 40, on) == (0, 0)

    def move(self, goals):
        writer = scs.GroupSyncWrite(self.port, self.packets, 42, 2)
        for number, goal in enumerate(goals, 1):
            writer.addParam(number, [int(goal) & 0xFF, int(goal) >> 8])
        assert writer.txPacket() == scs.COMM_SUCCESS

    def close(self):
        self.port.closePort()


@pytest.fixture(scope="module")
def shared_arm(tmp_path_factory):
    with VirtualArm(tmp_path_factory.mktemp("arm"), seed=2) as arm:
        yield arm


@pytest.fixture
def arm(shared_arm):
    yield shared_arm
    shared_arm.faults(Faults())
    shared_arm.plug()
    shared_arm.power_off()
    shared_arm.power_on()


@pytest.fixture
def host(arm):
    host = Host(arm.port)
    yield host
    host.close()


def wait_for(condition, timeout_s=10.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "timed out"
        time.sleep(0.02)


def test_the_sdk_reads_and_moves_it(arm, host):
    assert host.ping() == (777, 0, 0)
    np.testing.assert_allclose(
        (host.positions() - 2047) * 2 * np.pi / 4096, arm.state().q_rad, atol=0.01
    )
    host.move(host.positions())
    arm.clear_peaks()
    host.torque(1)
    state = arm.state()
    assert state.powered.all()
    assert state.peaks.step_rad.max() < 0.02
    host.move([2047] * 6)
    wait_for(lambda: abs(arm.state().q_rad).max() < 0.03)
    np.testing.assert_allclose(host.positions(), 2047, atol=20)
    assert arm.state().peaks.step_rad.max() > 1.0
    assert arm.info.bad == 0


def test_its_calibration_is_that_of_its_registers(arm, host, tmp_path):
    arm.write_calibration(tmp_path / "calibration" / "arm.json")
    rows = json.loads((tmp_path / "calibration" / "arm.json").read_text())
    assert tuple(rows) == JOINTS
    for row in rows.values():
        offset, low, high = (
            host.packets.read2ByteTxRx(host.port, row["id"], address)[0] for address in (31, 9, 11)
        )
        assert (low, high) == (row["range_min"], row["range_max"])
        assert -(offset & 0x7FF) if offset & 0x800 else offset == row["homing_offset"]


def test_unplugged_handles_fail_and_a_new_port_comes_under_the_same_name(arm, host):
    arm.unplug()
    assert not os.path.lexists(arm.port)
    with pytest.raises(Exception, match=r"error|readiness"):
        host.ping()
    arm.unplug()
    assert arm.state().t_s > 0
    assert arm.info.plugged is False
    arm.plug()
    again = Host(arm.port)
    assert again.ping() == (777, 0, 0)
    again.close()


def test_a_lost_supply_silences_the_bus_and_resets_the_servos(arm, host):
    host.move(host.positions())
    host.torque(1)
    arm.power_off()
    assert host.ping()[1] != scs.COMM_SUCCESS
    assert not arm.state().powered.any()
    arm.power_on()
    assert host.ping() == (777, 0, 0)
    assert host.packets.read1ByteTxRx(host.port, 1, 40)[0] == 0


def test_lost_damaged_and_late_packets(arm, host):
    arm.faults(Faults(drop=1.0))
    assert host.ping()[1] == scs.COMM_RX_TIMEOUT
    arm.faults(Faults(corrupt=0.5))
    results = {host.ping()[1] for _ in range(12)}
    assert results - {scs.COMM_SUCCESS}
    arm.faults(Faults(late=1.0, late_s=0.2))
    assert host.ping()[1] == scs.COMM_RX_TIMEOUT
    arm.faults(Faults())
    time.sleep(0.25)
    host.port.ser.reset_input_buffer()
    assert host.ping() == (777, 0, 0)


def test_faults_of_one_servo(arm, host):
    arm.overload("elbow_flex")
    assert host.packets.ping(host.port, 3) == (777, 0, 32)
    arm.overload("elbow_flex", False)
    arm.overheat("gripper")
    assert host.packets.read1ByteTxRx(host.port, 6, 63)[::2] == (75, 4)
    arm.overheat("gripper", False)
    assert host.packets.ping(host.port, 6) == (777, 0, 0)
    with pytest.raises(ConfigError, match="elbow_flex"):
        arm.stall("elbow")
    with pytest.raises(ConfigError, match="leader"):
        arm.lead([0] * 6)
    with pytest.raises(ConfigError, match="cameras"):
        arm.camera_url("front")


def test_a_stalled_joint(arm, host):
    host.move(host.positions())
    host.torque(1)
    arm.stall("shoulder_pan")
    host.move([2600, *host.positions()[1:]])
    time.sleep(0.5)
    state = arm.state()
    assert abs(state.q_rad[0]) < 0.01
    assert state.load[0] == pytest.approx(1.0, abs=0.05)
    arm.stall("shoulder_pan", False)
    wait_for(lambda: arm.state().q_rad[0] > 0.8)


def test_a_leader_is_read_like_an_arm_and_goes_where_it_is_led(tmp_path):
    with VirtualArm(tmp_path, seed=4, leader=True) as leader:
        host = Host(leader.port)
        first = host.positions()
        wait_for(lambda: abs(host.positions() - first).max() > 20)
        leader.lead([0.2, -0.2, 0.2, -0.2, 0.2, 0.2])
        wait_for(lambda: abs(leader.state().q_rad[1] + 0.2) < 1e-6)
        signs = np.array([1, -1, 1, -1, 1, 1])
        np.testing.assert_allclose(host.positions(), 2047 + 130 * signs, atol=1)
        host.close()


def still(url, timeout_s=60.0):
    """A single picture; a busy machine draws none for as long as others want it."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return answer.read()
        except http.client.RemoteDisconnected:
            assert time.monotonic() < deadline_s, "no picture"


@needs_opengl
def test_cameras_show_the_arm_move(tmp_path):
    with VirtualArm(tmp_path, cameras=True) as arm:
        url = arm.camera_url("front")
        stills = []
        for _ in range(2):
            stills.append(still(url.replace("mjpg", "jpg")))
            host = Host(arm.port)
            host.torque(1)
            host.move([2047] * 6)
            wait_for(lambda: abs(arm.state().q_rad).max() < 0.05)
            host.close()
        assert all(still.startswith(b"\xff\xd8") for still in stills)
        assert stills[0] != stills[1]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url.replace("front", "top"), timeout=20)
        cv2 = pytest.importorskip("cv2")
        capture = cv2.VideoCapture(url)
        started_s = time.monotonic()
        pictures = [capture.read()[1] for _ in range(30)]
        capture.release()
        assert time.monotonic() - started_s < 60.0
        assert pictures[-1].shape == (480, 640, 3)
        blue, _, red = np.moveaxis(pictures[-1].astype(int), 2, 0)
        assert (red - blue > 100).mean() > 0.01


def test_what_cannot_start_says_why(tmp_path):
    (tmp_path / "so101").write_text("a file")
    with pytest.raises(LinkError, match="choose another path"):
        VirtualArm(tmp_path)
    assert (tmp_path / "so101").read_text() == "a file"


def test_it_dies_with_its_parent(tmp_path):
    code = (
        "import os, sys; from sim.so101.virtual import VirtualArm;"
        "print(VirtualArm(sys.argv[1]).pid, flush=True); os._exit(1)"
    )
    with tempfile.TemporaryDirectory(prefix="so101-") as private:
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path],
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": private},
        )
        pid = int(done.stdout)
        wait_for(lambda: not Path(f"/proc/{pid}/cmdline").exists())
    assert not os.path.lexists(tmp_path / "so101")
