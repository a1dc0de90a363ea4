"""A virtual arm on a pseudo-terminal, and a driver that is open on it."""

import pytest
from hardware import punctual

from hal.drivers.feetech import FeetechBus
from hal.drivers.so101 import SO101, SO101Config
from sim.so101.virtual import VirtualArm


@pytest.fixture
def arm(tmp_path):
    with VirtualArm(tmp_path, seed=3) as virtual:
        punctual(virtual).write_calibration(tmp_path / "arm.json")
        yield virtual


@pytest.fixture
def make_so101(arm, tmp_path):
    made = []

    def make(**options):
        # A busy machine keeps the virtual servos waiting for longer than real ones ever do.
        options = {"answer_ms": 20.0} | options
        config = SO101Config(port=arm.port, calibration=str(tmp_path / "arm.json"), **options)
        made.append(SO101(config))
        return made[-1]

    yield make
    for driver in made:
        driver.close()


@pytest.fixture
def so101(make_so101):
    driver = make_so101()
    driver.open()
    return driver


@pytest.fixture
def bus(arm):
    opened = FeetechBus(arm.port, answer_ms=20.0, names={3: "elbow_flex"})
    opened.open()
    yield opened
    opened.close()
