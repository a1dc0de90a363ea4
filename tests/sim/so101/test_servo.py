import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal.drivers.so101_arm import HIGH_RAD, JOINTS, LOW_RAD, SERVO_IDS, radians, raw_positions
from sim.so101.robots import calibration
from sim.so101.servo import OVERHEAT, OVERLOAD, REGISTERS, SIGN_BITS, VOLTAGE, Servo


@pytest.fixture
def servo():
    servo = Servo(3, homing_offset=-450, low=900, high=3200)
    servo.sense(position=2000, speed_ticks=0.0, load=0.0, elapsed_s=0.0)
    servo.restart()
    return servo


def word(servo, address):
    return int.from_bytes(servo.read(address, 2), "little")


def test_registers_do_not_overlap():
    places = [a for address, size, _ in REGISTERS.values() for a in range(address, address + size)]
    assert len(places) == len(set(places))


def test_identity_as_delivered(servo):
    assert word(servo, 3) == 777
    assert servo.id == 3
    assert servo.get("homing_offset") == -450
    assert word(servo, 31) == 450 | 1 << 11


@given(st.sampled_from(sorted(SIGN_BITS)), st.integers(-40000, 40000))
def test_sign_and_magnitude(name, value):
    servo = Servo(1, homing_offset=0, low=0, high=4095)
    servo.put(name, value)
    limit = (1 << SIGN_BITS[name]) - 1
    assert servo.get(name) == max(-limit, min(limit, value))
    address = REGISTERS[name][0]
    assert (word(servo, address) >> SIGN_BITS[name] & 1) == (value < 0)


@given(st.integers(-700, 700), st.floats(-1700, 1700))
def test_goal_at_the_present_position_means_no_motion(offset, turned):
    servo = Servo(1, homing_offset=offset, low=0, high=4095)
    zero = 2047 + offset
    servo.put("goal_position", servo.position_of(turned, zero))
    assert servo.goal_turned(turned, zero) == pytest.approx(turned, abs=0.5001)


def test_goal_is_kept_within_the_limits(servo):
    servo.put("goal_position", 4000)
    assert servo.goal_turned(0.0, 2047 - 450) == 3200 - 2047


def test_what_is_read_only_stays(servo):
    before = servo.read(0, 5), servo.read(56, 15)
    assert servo.write(0, bytes(5)) and servo.write(56, bytes(15))
    assert (servo.read(0, 5), servo.read(56, 15)) == before


@pytest.mark.parametrize("address, size", [(250, 10), (255, 2), (0, 0)])
def test_nothing_beyond_the_table(servo, address, size):
    assert servo.read(address, size) is None
    assert not servo.write(address, bytes(size))


def test_eeprom_outlives_power_only_if_unlocked(servo):
    servo.write(31, (100).to_bytes(2, "little"))
    assert servo.get("homing_offset") == 100
    servo.restart()
    assert servo.get("homing_offset") == -450
    servo.write(55, b"\x00")
    servo.write(31, (100).to_bytes(2, "little"))
    servo.restart()
    assert servo.get("homing_offset") == 100
    assert servo.get("lock") == 1


def test_power_up_leaves_torque_off_and_the_goal_where_the_arm_is(servo):
    servo.write(40, b"\x01")
    servo.write(42, (3000).to_bytes(2, "little"))
    assert servo.torque_share == 1.0
    servo.restart()
    assert not servo.torque_on
    assert servo.torque_share == 0.0
    assert servo.get("goal_position") == 2000


def test_long_heavy_load_is_overload_until_torque_is_switched_off(servo):
    servo.write(40, b"\x01")
    for _ in range(19):
        servo.sense(2000, 0.0, 0.95, 0.1)
    assert servo.status == 0
    for _ in range(3):
        servo.sense(2000, 0.0, 0.95, 0.1)
    assert servo.status == OVERLOAD
    assert servo.torque_share == pytest.approx(0.2)
    servo.write(40, b"\x00")
    servo.sense(2000, 0.0, 0.0, 0.1)
    servo.write(40, b"\x01")
    servo.sense(2000, 0.0, 0.0, 0.1)
    assert servo.status == 0
    assert servo.torque_share == 1.0


@pytest.mark.parametrize(
    "fault, bit, share", [("overheat", OVERHEAT, 0.0), ("undervoltage", VOLTAGE, 1.0)]
)
def test_forced_faults(servo, fault, bit, share):
    servo.write(40, b"\x01")
    servo.forced.add(fault)
    servo.sense(2000, 0.0, 0.1, 0.01)
    assert servo.status == bit
    assert servo.torque_share == share
    servo.forced.clear()
    servo.sense(2000, 0.0, 0.1, 0.01)
    assert servo.status == 0
    assert servo.torque_share == 1.0


def test_torque_limit_holds(servo):
    servo.write(40, b"\x01")
    servo.write(48, (300).to_bytes(2, "little"))
    assert servo.torque_share == pytest.approx(0.3)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_covers_the_joints_and_agrees_with_the_arms_conversion(seed):
    rows = calibration(seed)
    assert {joint: row["id"] for joint, row in rows.items()} == SERVO_IDS
    low = np.array([rows[joint]["range_min"] for joint in JOINTS])
    high = np.array([rows[joint]["range_max"] for joint in JOINTS])
    assert (radians(low, low, high) <= LOW_RAD).all()
    assert (radians(high, low, high) >= HIGH_RAD).all()
    np.testing.assert_array_equal(raw_positions(np.zeros(6), low, high), 2047)
    assert (low >= 0).all() and (high < 4096).all()
