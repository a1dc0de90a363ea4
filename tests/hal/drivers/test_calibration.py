import json
import time

import numpy as np
import pytest

from embodied.core.errors import ConfigError, EmbodiedError
from hal.drivers import calibration
from hal.drivers.calibration import Calibrator
from hal.drivers.feetech import FeetechBus
from hal.drivers.so101_arm import HIGH_RAD, JOINTS, LOW_RAD
from sim.so101.virtual import VirtualArm


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    with VirtualArm(tmp_path_factory.mktemp("leader"), seed=4, leader=True) as virtual:
        yield virtual


@pytest.fixture
def bus(hand):
    opened = FeetechBus(hand.port, answer_ms=20.0)
    opened.open()
    yield opened
    opened.close()


def lead(hand, calibrator, pose):
    """Move the hand there, sampling on the way, as a person's terminal would."""
    hand.lead(pose)
    until_s = time.monotonic() + 10
    while time.monotonic() < until_s:
        if calibrator is not None:
            calibrator.sample()
        if np.abs(hand.state().q_rad - np.clip(pose, LOW_RAD, HIGH_RAD)).max() < 1e-3:
            return
    raise AssertionError(f"the hand did not reach {pose}")


def test_reads_what_lerobot_writes_and_writes_it_back(hand, bus, tmp_path):
    hand.write_calibration(tmp_path / "arm.json")
    table = calibration.load(tmp_path / "arm.json")
    assert calibration.differences(table, calibration.stored(bus)) == []
    calibration.save(tmp_path / "folder" / "copy.json", table)
    assert json.loads((tmp_path / "folder" / "copy.json").read_text()) == hand.calibration
    low, high = calibration.ranges(table)
    assert low.shape == (6,) and (low < high).all()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"id": 4}, r"gripper\.id is 4; it must be 6"),
        ({"drive_mode": 1}, "drive_mode"),
        ({"homing_offset": 2048}, "homing_offset is 2048"),
        ({"range_min": 3000, "range_max": 2000}, r"range is 3000\.\.2000"),
        ({"range_max": 4096}, "range is"),
        ({"range_max": 2000.5}, "cannot be read"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_wrong_file_is_refused_by_name(hand, tmp_path, change, named):
    table = json.loads(json.dumps(hand.calibration))
    table["gripper"] |= change
    (tmp_path / "arm.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=named):
        calibration.load(tmp_path / "arm.json")


def test_a_file_of_another_robot_is_refused(hand, tmp_path):
    table = {f"left_{joint}": row for joint, row in hand.calibration.items()}
    (tmp_path / "arm.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match="an SO-101 has shoulder_pan"):
        calibration.load(tmp_path / "arm.json")


def test_calibrates_an_arm_that_a_person_moves(hand, bus, tmp_path):
    middle = np.array([0.1, -0.1, 0.2, 0.0, 0.3, 0.5])
    calibrator = Calibrator(bus)
    with pytest.raises(EmbodiedError, match="center"):
        calibrator.sample()
    lead(hand, None, middle)
    calibrator.center()
    assert all(abs(row.present - 2047) <= 1 for row in calibrator.sample())
    with pytest.raises(EmbodiedError, match=r"shoulder_pan, .*gripper moved less than"):
        calibrator.finish(tmp_path / "arm.json")
    assert not (tmp_path / "arm.json").exists()
    low, high = np.array(LOW_RAD) / 2, np.array(HIGH_RAD) / 2
    lead(hand, calibrator, low)
    lead(hand, calibrator, high)
    rows = {row.joint: row for row in calibrator.sample()}
    assert all(row.enough for row in rows.values())
    table = calibrator.finish(tmp_path / "arm.json")
    assert calibration.load(tmp_path / "arm.json") == table == calibration.stored(bus)
    assert bus.read(1, 40, 1) == 0 and bus.read(1, 55, 1) == 1
    steps = 4096 / (2 * np.pi)
    for k, joint in enumerate(JOINTS):
        row = table[joint]
        if joint == "wrist_roll":
            assert (row.range_min, row.range_max) == (0, 4095)
            continue
        assert row.range_min == pytest.approx(2047 + (low - middle)[k] * steps, abs=3)
        assert row.range_max == pytest.approx(2047 + (high - middle)[k] * steps, abs=3)


def test_a_joint_that_passes_the_end_of_its_turn_is_named(hand, bus):
    calibrator = Calibrator(bus)
    pose = np.zeros(6)
    pose[0] = -1.6
    lead(hand, None, pose)
    calibrator.center()
    pose[0] = 1.9
    with pytest.raises(EmbodiedError, match="shoulder_pan has passed the end"):
        lead(hand, calibrator, pose)
