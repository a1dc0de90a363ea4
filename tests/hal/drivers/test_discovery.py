import os
import time

import pytest

from hal.drivers import discovery


@pytest.fixture
def only_named_ports(monkeypatch):
    """Look at no port of this machine but those that the test names."""
    monkeypatch.setattr(discovery, "_PATTERNS", ())
    monkeypatch.delenv(discovery.PORTS_VARIABLE, raising=False)
    return lambda *ports: monkeypatch.setenv(discovery.PORTS_VARIABLE, ":".join(map(str, ports)))


def test_nothing_there_is_nothing_found(only_named_ports, tmp_path):
    start_s = time.monotonic()
    assert discovery.serial_robots() == []
    assert discovery._v4l2(tmp_path, tmp_path / "video4linux") == []
    assert all({"id", "kind"} <= row.keys() for row in discovery.cameras())
    assert time.monotonic() - start_s < 2.0


def test_finds_an_arm_once_whatever_its_port_is_called(only_named_ports, arm, tmp_path):
    (tmp_path / "alias").symlink_to(arm.port)
    only_named_ports(arm.port, tmp_path / "alias")
    assert discovery.serial_robots() == [
        {
            "id": f"so101:{arm.port}",
            "kind": "robot (SO-101)",
            "detail": "servos 1, 2, 3, 4, 5, 6, 12.0 V",
        }
    ]


def test_other_servos_are_listed_as_a_bus(only_named_ports, arm, bus):
    bus.write(6, 55, 1, 0)
    bus.sync_write(5, 1, {6: 8})
    bus.close()
    only_named_ports(arm.port)
    (row,) = discovery.serial_robots()
    assert row["kind"] == "robot (Feetech bus)"
    assert row["detail"] == "servos 1, 2, 3, 4, 5, 8, 12.0 V, STS3215"


def test_a_busy_port_is_listed_and_left_alone(only_named_ports, arm, so101, tmp_path):
    only_named_ports(tmp_path / "gone", arm.port)
    arm.state()
    before = arm.info.executed
    gone, busy = discovery.serial_robots()
    arm.state()
    assert arm.info.executed == before
    assert busy["id"] == f"serial:{arm.port}" and busy["fault"] == "in use by another process"
    assert "does not exist" in gone["fault"]
    so101.sense()


def test_a_silent_port_is_no_robot_and_costs_little_time(only_named_ports, tmp_path):
    master, slave = os.openpty()
    (tmp_path / "file").write_text("")
    only_named_ports(os.ttyname(slave), tmp_path / "file")
    start_s = time.monotonic()
    (row,) = discovery.serial_robots()
    assert time.monotonic() - start_s < 2.0
    assert "cannot be opened" in row["fault"]
    os.close(master)
    os.close(slave)


def test_only_video_nodes_that_capture_are_cameras(monkeypatch, tmp_path):
    for name, title in (("video0", "Webcam"), ("video1", "Webcam"), ("video10", "Wrist")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{title}\n")

    def captures(device):
        if device.name == "video10":
            raise PermissionError(13, "Permission denied")
        return device.name == "video0"

    monkeypatch.setattr(discovery, "_captures", captures)
    webcam, wrist = discovery._v4l2(tmp_path / "dev", tmp_path)
    assert webcam["id"] == f"camera:{tmp_path}/dev/video0" and webcam["detail"] == "Webcam"
    assert "Permission denied" in wrist["fault"]
