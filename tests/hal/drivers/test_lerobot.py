import numpy as np
import pytest

from embodied.core import config
from embodied.core.errors import ConfigError, DeviceLostError, MissingDependencyError
from hal.drivers.lerobot import LeRobotConfig, _is_rate
from sim.so101.virtual import VirtualArm

JOINT_KEYS = tuple(
    f"{joint}.pos"
    for joint in (
        "shoulder_pan",
        "shoulder_lift",
        "elbow_flex",
        "wrist_flex",
        "wrist_roll",
        "gripper",
    )
)


def make(kind, **options):
    cls, typed = config.component(kind, {"name": "lerobot", **options}, "here")
    return cls(typed)


def test_a_motion_needs_all_its_limits():
    with pytest.raises(ConfigError, match="velocity, acceleration and jerk"):
        LeRobotConfig(type="so101_follower", velocity=(1.0,))


def test_velocities_and_torques_are_known_by_their_names():
    rates = ("x.vel", "mobile_base.vtheta", "joint_1.torque")
    assert all(map(_is_rate, rates)) and not any(map(_is_rate, JOINT_KEYS))


@pytest.mark.slow
def test_runs_lerobots_so101(arm, tmp_path):
    pytest.importorskip("lerobot")
    options = {"port": arm.port, "id": "arm", "calibration_dir": str(tmp_path)}
    driver = make(
        "drivers",
        type="so101_follower",
        config=options,
        low=[-120],
        high=[120],
        velocity=[90],
        acceleration=[500],
        jerk=[5000],
        servo_hz=60,
    )
    assert driver.spec.action.names == JOINT_KEYS and driver.spec.motion.servo_hz == 60
    driver.open()
    before = driver.sense()
    driver.spec.check(before)
    angles = np.rad2deg(arm.state().q_rad)
    np.testing.assert_allclose(before["observation.state"][:5], angles[:5], atol=0.5)
    driver.hold()
    held = arm.state().goal_rad
    driver.drive(before["observation.state"] + np.float32(2.0))
    assert np.abs(arm.state().goal_rad - held)[:5].max() > 0.02
    driver.hold()
    arm.unplug()
    with pytest.raises(Exception, match="Input/output"):
        driver.sense()
    driver.close()
    driver.close()
    with pytest.raises(ConnectionError):
        driver.open()
    arm.plug()
    driver.open()
    driver.sense()
    driver.close()
    (tmp_path / "arm.json").unlink()
    with pytest.raises(ConfigError, match=r"lerobot-calibrate --robot\.type=so101_follower"):
        driver.open()
    with pytest.raises(DeviceLostError, match="call open"):
        driver.sense()


@pytest.mark.slow
def test_reads_lerobots_so101_leader(tmp_path):
    pytest.importorskip("lerobot")
    with VirtualArm(tmp_path, seed=2, leader=True) as hand:
        hand.write_calibration(tmp_path / "hand.json")
        options = {"port": hand.port, "id": "hand", "calibration_dir": str(tmp_path)}
        leader = make("teleoperators", type="so101_leader", config=options)
        assert leader.names == JOINT_KEYS
        leader.open()
        action = leader.read({})
        assert action.shape == (6,) and action.dtype == np.float32 and leader.events() == []
        leader.close()


@pytest.mark.slow
def test_what_lerobot_does_not_know_or_lacks_is_named(tmp_path):
    pytest.importorskip("lerobot")
    options = {"calibration_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match="Did you mean 'so101_follower'"):
        make("drivers", type="so101_folower", config=options)
    with pytest.raises(ConfigError, match="prt"):
        make("drivers", type="so101_follower", config={"prt": "x", **options})
    with pytest.raises(ConfigError, match="does not say what its actions are"):
        make("teleoperators", type="keyboard", config=options)
    try:
        make("drivers", type="koch_follower", config={"port": "x", **options})
    except MissingDependencyError as error:
        assert "dynamixel_sdk" in str(error)
    base = make("drivers", type="lekiwi_client", config={"remote_ip": "127.0.0.1", **options})
    assert base.spec.action.names[-3:] == ("x.vel", "y.vel", "theta.vel")
    assert base.spec.observation["observation.images.front"].dtype == "uint8"
