import sys
import time

import numpy as np
import pytest
from terminal import Terminal

from embodied.cli.main import main
from hal.drivers import calibration
from hal.drivers.feetech import FeetechBus
from hal.drivers.so101_arm import HIGH_RAD, LOW_RAD
from sim.so101.virtual import VirtualArm

CALIBRATE = [sys.executable, "-m", "embodied.cli.main", "calibrate"]


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    with VirtualArm(tmp_path_factory.mktemp("arm"), seed=4, leader=True) as virtual:
        yield virtual


def lead(hand, pose):
    hand.lead(pose)
    until_s = time.monotonic() + 10
    while np.abs(hand.state().q_rad - np.clip(pose, LOW_RAD, HIGH_RAD)).max() > 1e-3:
        assert time.monotonic() < until_s
        time.sleep(0.02)


def stored(hand):
    bus = FeetechBus(hand.port, answer_ms=20.0)
    bus.open()
    try:
        return calibration.stored(bus)
    finally:
        bus.close()


def test_a_person_calibrates_an_arm_in_the_terminal(hand, tmp_path):
    file = tmp_path / "new" / "arm.json"
    low, high = np.array(LOW_RAD) / 2, np.array(HIGH_RAD) / 2
    with Terminal([*CALIBRATE, hand.port, str(file)]) as terminal:
        terminal.wait("goes limp")
        terminal.keys("\n")
        terminal.wait("middle of its travel")
        lead(hand, (low + high) / 2)
        terminal.keys("\n")
        terminal.wait("move it further")
        terminal.keys("\n")
        lead(hand, low)
        lead(hand, high)
        time.sleep(0.3)
        assert not file.exists(), "Enter does not count before every joint has moved"
        terminal.keys("\n")
        assert terminal.end() == 0, terminal.output
        assert terminal.restored and "calibration written" in terminal.output
    table = calibration.load(file)
    assert table == stored(hand)
    steps = 4096 / (2 * np.pi) * (high - low)[:4]
    joints = list(table.values())[:4]
    assert [row.range_max - row.range_min for row in joints] == pytest.approx(steps, abs=6)


def test_escape_writes_nothing(hand, tmp_path):
    before = stored(hand)
    with Terminal([*CALIBRATE, hand.port, str(tmp_path / "arm.json")]) as terminal:
        terminal.wait("goes limp")
        terminal.keys("\x1b")
        assert terminal.end() == 1 and terminal.restored
        assert "nothing written" in terminal.output
    assert not (tmp_path / "arm.json").exists() and stored(hand) == before


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_a_port_in_use_and_a_file_that_is_there_are_refused(hand, tmp_path, capsys):
    file = tmp_path / "arm.json"
    bus = FeetechBus(hand.port, answer_ms=20.0)
    bus.open()
    try:
        assert main(["calibrate", hand.port, str(file)]) == 2
        assert "in use by another process" in said(capsys)
    finally:
        bus.close()
    assert main(["calibrate", hand.port, str(file)]) == 2
    assert "not a terminal" in said(capsys)
    assert main(["calibrate", "/dev/nowhere", str(file)]) == 2
    assert "does not exist" in said(capsys)
    file.touch()
    assert main(["calibrate", hand.port, str(file)]) == 2
    assert "--overwrite" in said(capsys)
