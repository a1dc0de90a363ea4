import time

import numpy as np
import pytest
from opengl import needs_opengl

from embodied.core.errors import ConfigError
from embodied.core.protocols import Renders, SimulatedDriver
from hal.drivers.so101_arm import HIGH_RAD, JOINTS, LOW_RAD, MODEL, SPEC
from sim.so101.arm import MAX_SPEED_RAD_S, QUANTUM_S, REST_RAD, Arm, load_model, mujoco
from sim.so101.driver import SPREAD_RAD, START_RAD, SimulatedSO101
from sim.so101.robots import Follower, Leader
from sim.so101.servo import OVERLOAD

LEVEL_RAD = np.array([0.0, 1.57, -1.57, 0.0, 0.0, 0.0])


def seconds(s):
    return round(s / QUANTUM_S)


def write(robot, address, value, size=2):
    for servo in robot.servos:
        servo.write(address, value.to_bytes(size, "little"))


def test_the_model_is_what_the_drivers_expect():
    model = mujoco.MjModel.from_xml_path(str(MODEL))
    assert tuple(model.joint(i).name for i in range(model.njnt)) == JOINTS
    assert tuple(model.actuator(i).name for i in range(model.nu)) == JOINTS
    np.testing.assert_allclose(model.jnt_range, np.transpose([LOW_RAD, HIGH_RAD]))
    assert model.site("tool").id >= 0
    assert model.opt.timestep == 0.001
    assert {model.camera(i).name for i in range(model.ncam)} == {"front", "wrist"}


def test_it_is_fast_enough():
    arm = Arm()
    arm.advance(100)
    best = {"step": 1.0, "kinematics": 1.0}
    for _ in range(5):
        started_s = time.thread_time()
        mujoco.mj_step(arm.model, arm.data, 1000)
        best["step"] = min(best["step"], (time.thread_time() - started_s) / 1000)
        started_s = time.thread_time()
        for _ in range(200):
            mujoco.mj_kinematics(arm.model, arm.data)
        best["kinematics"] = min(best["kinematics"], (time.thread_time() - started_s) / 200)
    assert best["step"] < 60e-6 and best["kinematics"] < 20e-6


@pytest.mark.parametrize("goal_rad", [np.zeros(6), LEVEL_RAD, REST_RAD])
def test_it_reaches_its_goals_and_holds_them_against_gravity(goal_rad):
    arm = Arm()
    arm.drive(goal_rad)
    arm.advance(seconds(2.5))
    state = arm.state()
    np.testing.assert_allclose(state.q_rad, goal_rad, atol=0.03)
    assert abs(state.dq_rad_s).max() < 0.01


def test_goals_are_approached_at_limited_speed():
    arm = Arm()
    arm.drive(REST_RAD + np.array([1.5, 0, 0, 0, 2.0, 0]))
    arm.advance(seconds(1.5))
    peaks = arm.state().peaks
    assert (peaks.dq_rad_s[[0, 4]] > 4.0).all()
    assert (peaks.dq_rad_s < 1.1 * MAX_SPEED_RAD_S).all()
    np.testing.assert_allclose(peaks.step_rad, [1.5, 0, 0, 0, 2.0, 0])
    assert peaks.q_rad[4] == pytest.approx(2.0, abs=0.05)
    arm.clear_peaks()
    assert not arm.state().peaks.step_rad.any()


def test_a_cube_may_lie_before_it():
    arm = Arm(load_model(cube=True))
    arm.advance(seconds(0.5))
    assert arm.data.body("cube").xpos[2] == pytest.approx(0.0125, abs=0.001)
    assert len(arm.state().q_rad) == 6


def test_without_torque_it_falls_and_with_it_it_holds():
    robot = Follower(0)
    write(robot, 40, 1, 1)
    write(robot, 42, 2047)
    robot.advance(seconds(2))
    up = robot.state()
    np.testing.assert_allclose(up.q_rad, 0, atol=0.02)
    robot.power(False)
    robot.advance(seconds(2))
    down = robot.state()
    assert not down.powered.any()
    assert abs(down.q_rad - up.q_rad).max() > 0.3
    robot.power(True)
    robot.advance(seconds(0.1))
    assert not any(servo.torque_on for servo in robot.servos)


def test_old_goals_are_jumped_to_when_torque_comes_on_and_that_is_recorded():
    robot = Follower(0)
    write(robot, 42, 2047)
    robot.advance(seconds(0.1))
    assert robot.state().peaks.step_rad.max() == 0
    write(robot, 40, 1, 1)
    assert robot.state().peaks.step_rad.max() > 1.0


def test_a_stalled_joint_stays_loads_its_servo_and_ends_in_overload():
    robot = Follower(0)
    write(robot, 40, 1, 1)
    robot.fault("elbow_flex", "stall", True)
    before_rad = robot.state().q_rad[2]
    write(robot, 42, 2047)
    robot.advance(seconds(1.5))
    elbow = robot.servos[2]
    assert abs(robot.state().q_rad[2] - before_rad) < 0.01
    assert elbow.get("present_load") == -1000
    assert elbow.get("present_current") > 400
    robot.advance(seconds(1.0))
    assert elbow.status == OVERLOAD
    assert elbow.torque_share == pytest.approx(0.2)
    robot.fault("elbow_flex", "stall", False)
    with pytest.raises(ConfigError, match="elbow_flex"):
        robot.fault("elbow", "stall", True)


def test_an_overheated_servo_lets_go():
    robot = Follower(0)
    write(robot, 40, 1, 1)
    write(robot, 42, 2047)
    robot.advance(seconds(2))
    robot.fault("shoulder_lift", "overheat", True)
    robot.advance(seconds(0.1))
    np.testing.assert_array_equal(robot.state().powered, [True, False, True, True, True, True])


def test_real_time_is_caught_up_but_a_pause_is_skipped():
    robot = Follower(0)
    robot.advance_to(100.0)
    start_s = robot.state().t_s
    robot.advance_to(100.0041)
    assert robot.state().t_s - start_s == pytest.approx(0.004)
    robot.advance_to(100.0061)
    assert robot.state().t_s - start_s == pytest.approx(0.006)
    robot.advance_to(160.0)
    assert robot.state().t_s - start_s == pytest.approx(0.006)
    robot.advance_to(160.1001)
    assert robot.state().t_s - start_s == pytest.approx(0.106)


def test_a_leader_moves_smoothly_within_its_joints_and_goes_where_it_is_led():
    leader = Leader(3)
    seen = []
    for k in range(1000):
        leader.advance_to(k * 0.02)
        seen.append(leader.state().q_rad)
    assert (np.ptp(seen, axis=0) > 0.1).all()
    assert leader.state().peaks.dq_rad_s.max() < 2.1
    assert abs(np.diff(seen, axis=0)).max() < 0.041
    leader.pose_rad, leader.amplitude_rad = np.full(6, 0.3), 0.0
    for k in range(1000, 1100):
        leader.advance_to(k * 0.02)
    leader.refresh()
    np.testing.assert_allclose(leader.state().q_rad, 0.3)
    assert {servo.get("present_position") for servo in leader.servos} == {2243}


@pytest.fixture
def driver():
    driver = SimulatedSO101()
    driver.open()
    yield driver
    driver.close()


def episode(driver, seed):
    driver.reset(seed)
    rng = np.random.default_rng(seed)
    out = [driver.sense()["observation.state"]]
    for _ in range(60):
        driver.drive(out[0] + rng.uniform(-0.2, 0.2, 6))
        driver.step_time()
        out.append(driver.sense()["observation.state"])
    return np.array(out)


def test_driver_repeats_bit_for_bit(driver):
    first = episode(driver, 5)
    other = episode(driver, 6)
    assert episode(driver, 5).tobytes() == first.tobytes()
    assert not np.array_equal(first[0], other[0])
    assert abs(first[0] - START_RAD).max() <= SPREAD_RAD + 1e-4
    fresh = SimulatedSO101()
    fresh.open()
    assert episode(fresh, 5).tobytes() == first.tobytes()
    fresh.close()


def test_driver_keeps_the_protocol_and_its_time(driver):
    assert isinstance(driver, SimulatedDriver)
    assert isinstance(driver, Renders)
    SPEC.check(driver.sense())
    driver.reset(0)
    started_s = driver.arm.state().t_s
    driver.step_time()
    assert driver.arm.state().t_s - started_s == pytest.approx(1 / SPEC.motion.servo_hz)
    driver.drive(np.zeros(6))
    for _ in range(20):
        driver.step_time()
    driver.hold()
    held = driver.sense()["observation.state"]
    np.testing.assert_allclose(driver.arm.goal_rad, held, atol=1e-6)


@needs_opengl
def test_driver_draws_the_arm(driver):
    picture = driver.render(160, 120)
    assert picture.shape == (120, 160, 3) and picture.dtype == np.uint8
    assert (picture[..., 0].astype(int) - picture[..., 2] > 100).mean() > 0.01
    with pytest.raises(ConfigError, match="front"):
        driver.picture("top", 160, 120)
