import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from embodied.core import config
from embodied.core.errors import ConfigError, DeviceLostError
from embodied.core.protocols import Monitored
from hal.drivers.feetech import FeetechBus
from hal.drivers.so101 import SO101Config, SO101Leader
from hal.drivers.so101_arm import HIGH_RAD, LOW_RAD, SPEC, radians, raw_positions
from sim.so101.virtual import Faults, VirtualArm

STEP_RAD = 2 * np.pi / 4096
UNNOTICED_RAD = 5 * STEP_RAD
"""A jump of a goal by what rounding and gravity are worth: less than half a degree."""

SETTINGS = {(7, 1): 0, (21, 1): 16, (22, 1): 32, (23, 1): 0, (33, 1): 0, (40, 1): 1, (41, 1): 254}


def follow(driver, q_rad, seconds):
    """Drive to q_rad at 1 rad/s in steps of 10 ms."""
    goal = driver.sense()["observation.state"].astype(float)
    for _ in range(int(seconds * 100)):
        goal += np.clip(q_rad - goal, -0.01, 0.01)
        driver.drive(goal)
        time.sleep(0.01)


def test_raw_positions_are_the_inverse_of_radians():
    low, high = np.full(6, 900.0), np.full(6, 3100.0)
    raw = np.array([900, 1500, 2000, 2047, 2600, 3100])
    np.testing.assert_array_equal(raw_positions(radians(raw, low, high), low, high), raw)
    np.testing.assert_array_equal(raw_positions(np.full(6, 9.0), low, high), high)


def test_is_made_from_configuration(tmp_path):
    cls, options = config.component(
        "drivers", {"name": "so101", "port": "p", "calibration": "c"}, ""
    )
    driver = cls(options)
    assert isinstance(driver, Monitored) and driver.spec is SPEC
    assert driver.condition().temperature_c is None
    driver.close()
    for wrong in ({"p": 300}, {"retries": -1}, {"overload_is_normal": ("elbow",)}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SO101Config(port="p", calibration="c", **wrong)


def test_senses_drives_and_holds(arm, so101):
    before = so101.sense()
    SPEC.check(before)
    np.testing.assert_allclose(before["observation.state"], arm.state().q_rad, atol=3 * STEP_RAD)
    goal = before["observation.state"] + np.array([0.4, 0.2, -0.2, 0.1, 0.3, 0.3])
    follow(so101, goal, 0.8)
    np.testing.assert_allclose(arm.state().goal_rad, goal, atol=STEP_RAD)
    np.testing.assert_allclose(so101.sense()["observation.state"], goal, atol=0.1)
    so101.hold()
    held = arm.state().goal_rad
    np.testing.assert_allclose(held, so101.sense()["observation.state"], atol=0.03)
    time.sleep(0.2)
    so101.hold()
    np.testing.assert_array_equal(arm.state().goal_rad, held)
    condition = so101.condition()
    assert condition.temperature_c == 30.0 and condition.voltage_v == 12.0
    assert 0 <= condition.load < 0.5 and condition.retries == 0


def test_goals_stay_within_the_calibrated_range(arm, so101):
    so101.drive(np.full(6, 10.0))
    so101.sense()
    table = arm.calibration["elbow_flex"]
    limit = (table["range_max"] - table["range_min"]) / 2 * STEP_RAD
    assert arm.state().goal_rad[2] == pytest.approx(limit, abs=STEP_RAD)


def test_opening_holds_without_a_jump_and_closing_keeps_torque(arm, make_so101):
    rest = arm.state()
    assert not rest.powered.any()
    driver = make_so101()
    driver.open()
    opened = arm.state()
    assert opened.powered.all()
    assert opened.peaks.step_rad.max() < UNNOTICED_RAD
    driver.close()
    driver.close()
    assert arm.state().powered.all()
    limp = make_so101(torque_off_on_close=True)
    limp.open()
    assert arm.state().peaks.step_rad.max() < UNNOTICED_RAD
    limp.close()
    assert not arm.state().powered.any()


def test_settings_are_those_of_lerobot_and_written_only_once(arm, make_so101):
    driver = make_so101(p=12)
    driver.open()
    driver.close()
    bus = FeetechBus(arm.port)
    bus.open()
    for servo in range(1, 7):
        wanted = SETTINGS | {(21, 1): 12, (55, 1): 1}
        wanted |= {(16, 2): 500, (28, 2): 250, (36, 1): 25} if servo == 6 else {}
        assert {key: bus.read(servo, *key) for key in wanted} == wanted
    bus.close()
    arm.state()
    before = arm.info.executed
    driver.open()
    arm.state()
    assert arm.info.executed - before < 10


def test_works_on_a_bad_bus(arm, make_so101):
    driver = make_so101(answer_ms=6.0, retries=5)
    driver.open()
    arm.faults(Faults(drop=0.01, corrupt=0.01))
    for _ in range(80):
        driver.sense()
        driver.hold()
    assert driver.condition().retries > 0


@pytest.mark.parametrize("fault, named", [("overload", "overload"), ("overheat", "temperature")])
def test_faults_of_a_servo_name_the_joint(arm, so101, fault, named):
    arm.servo_fault("wrist_flex", fault)
    time.sleep(0.05)
    so101.sense()
    assert re.search(f"wrist_flex: .*{named}", so101.condition().fault)
    so101.hold()
    arm.servo_fault("wrist_flex", fault, on=False)
    time.sleep(0.05)
    so101.sense()
    assert not so101.condition().fault


def test_too_hot_for_us_is_a_fault_before_it_is_one_for_the_servo(arm, make_so101):
    driver = make_so101(max_temperature_c=29.0)
    driver.open()
    driver.sense()
    assert "gripper: 30 °C, more than 29 °C" in driver.condition().fault
    assert driver.condition().temperature_c == 30.0


def test_a_gripper_may_be_overloaded(arm, so101, make_so101):
    arm.overload("gripper")
    time.sleep(0.05)
    so101.sense()
    assert not so101.condition().fault
    so101.close()
    strict = make_so101(overload_is_normal=())
    strict.open()
    strict.sense()
    assert "gripper: overload" in strict.condition().fault


def test_unplugged_is_an_error_and_plugged_in_it_opens_again(arm, so101):
    arm.unplug()
    with pytest.raises(DeviceLostError, match="has gone"):
        so101.sense()
    so101.close()
    with pytest.raises(DeviceLostError, match="does not exist"):
        so101.open()
    so101.close()
    arm.plug()
    arm.clear_peaks()
    so101.open()
    so101.sense()
    assert arm.state().peaks.step_rad.max() < UNNOTICED_RAD


def test_without_power_it_says_who_is_silent_and_comes_back(arm, so101):
    arm.power_off()
    start_s = time.monotonic()
    with pytest.raises(DeviceLostError, match=r"servo 1 \(shoulder_pan\).*power"):
        so101.sense()
    assert time.monotonic() - start_s < 1.0
    so101.close()
    arm.power_on()
    arm.clear_peaks()
    so101.open()
    assert arm.state().powered.all()
    assert arm.state().peaks.step_rad.max() < UNNOTICED_RAD


def test_torque_lost_between_two_readings_is_noticed(arm, so101):
    arm.power_off()
    arm.power_on()
    with pytest.raises(DeviceLostError, match=r"shoulder_pan, .* lost torque"):
        for _ in range(10):
            so101.sense()
    with pytest.raises(DeviceLostError, match="lost torque"):
        so101.sense()


def test_another_arms_calibration_is_refused(arm, make_so101, tmp_path):
    file = tmp_path / "arm.json"
    table = json.loads(file.read_text())
    table["elbow_flex"]["homing_offset"] += 5
    file.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=r"elbow_flex\.homing_offset is .*embodied calibrate"):
        make_so101().open()
    assert not arm.state().powered.any()
    file.unlink()
    with pytest.raises(ConfigError, match="no calibration file"):
        make_so101().open()


def test_another_kind_of_servo_is_refused(arm, make_so101, monkeypatch):
    monkeypatch.setattr("hal.drivers.so101.STS3215", 2825)
    with pytest.raises(ConfigError, match=r"servo 1 \(shoulder_pan\) is model 777"):
        make_so101().open()


OWNER = """
import sys, time
import numpy as np
from hal.drivers.so101 import SO101, SO101Config
driver = SO101(SO101Config(port=sys.argv[1], calibration=sys.argv[2], answer_ms=20.0))
driver.open()
goal = driver.sense()["observation.state"].astype(float)
print("ready", flush=True)
while True:
    goal[0] += 0.015
    driver.drive(goal)
    time.sleep(0.01)
"""


def test_taking_over_from_a_killed_owner_does_not_jerk_a_moving_arm(arm, make_so101, tmp_path):
    command = [sys.executable, "-c", OWNER, arm.port, str(tmp_path / "arm.json")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    driver = make_so101()
    try:
        assert owner.stdout.readline() == "ready\n"
        time.sleep(0.3)
        assert arm.state().dq_rad_s[0] > 0.5
        with pytest.raises(DeviceLostError, match="in use by another process"):
            driver.open()
        arm.clear_peaks()
        os.kill(owner.pid, signal.SIGKILL)
        start_s = time.monotonic()
        driver.open()
        opened_s = time.monotonic() - start_s
        taken_over = arm.state()
        driver.hold()
        stopped = arm.state()
        driver.close()
    finally:
        owner.kill()
        owner.wait()
    assert opened_s < 1.0
    assert taken_over.powered.all() and taken_over.peaks.step_rad.max() < 0.02
    time.sleep(0.3)
    settled = arm.state()
    assert settled.powered.all()
    np.testing.assert_allclose(settled.q_rad, stopped.q_rad, atol=0.12)
    np.testing.assert_allclose(settled.q_rad[1:], taken_over.q_rad[1:], atol=0.02)


def test_leader_reads_the_hand_that_moves_it(tmp_path):
    pose = np.array([0.5, -0.4, 0.3, 0.6, -0.8, 0.4])
    with VirtualArm(tmp_path, seed=5, leader=True) as hand:
        hand.write_calibration(tmp_path / "leader.json")
        options = {"port": hand.port, "calibration": str(tmp_path / "leader.json")}
        cls, typed = config.component("teleoperators", {"name": "so101_leader", **options}, "t")
        leader = cls(typed)
        assert isinstance(leader, SO101Leader)
        leader.open()
        hand.lead(pose)
        time.sleep(0.8)
        action = leader.read({})
        assert action.dtype == np.float32 and leader.events() == []
        np.testing.assert_allclose(action[:5], pose[:5], atol=3 * STEP_RAD)
        share = (pose[5] - LOW_RAD[5]) / (HIGH_RAD[5] - LOW_RAD[5])
        assert action[5] == pytest.approx(LOW_RAD[5] + share * (HIGH_RAD[5] - LOW_RAD[5]), abs=0.01)
        hand.lead(np.full(6, 3.0))
        time.sleep(1.2)
        assert np.all(leader.read({}) <= np.array(HIGH_RAD, np.float32))
        leader.close()
        leader.close()
        with pytest.raises(DeviceLostError, match="not open"):
            leader.read({})
