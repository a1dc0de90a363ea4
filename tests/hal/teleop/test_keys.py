import numpy as np
import pytest
from follower import FOLLOWER_SPEC
from point import POINT_SPEC

from embodied.core.errors import ConfigError
from hal.teleop.jog import Jog, standing_at
from hal.teleop.keys import KeyboardConfig, Keys


def make_keys(**options):
    return Keys(KeyboardConfig(**options))


def test_a_key_counts_as_held_for_a_moment_and_engages_for_a_longer_one():
    keys = make_keys()
    assert not keys.engaged(0.0)
    keys.feed(b"q", 1.0)
    assert keys.rates(3, 1.05).tolist() == [1, 0, 0]
    keys.feed(b"s", 1.1)
    assert keys.rates(3, 1.11).tolist() == [1, -1, 0]
    assert keys.rates(3, 1.2).tolist() == [0, -1, 0]
    assert keys.rates(3, 1.3).tolist() == [0, 0, 0] and keys.engaged(1.3)
    assert not keys.engaged(1.5)


def test_opposite_keys_cancel_and_capitals_move_too():
    keys = make_keys()
    keys.feed(b"qaD", 0.0)
    assert keys.rates(3, 0.01).tolist() == [0, 0, -1]


def test_tab_takes_over_until_the_next_tab_or_a_stop():
    keys = make_keys()
    keys.feed(b"\t", 0.0)
    assert keys.engaged(100.0)
    keys.feed(b"q\t", 100.0)
    assert not keys.engaged(100.0), "letting go counts at once"
    keys.feed(b"\t ", 101.0)
    assert not keys.engaged(101.0) and keys.events(101.0) == ["estop"]


def test_every_event_has_its_key():
    keys = make_keys()
    keys.feed(b"\n\rxX\x7f\x08u \x1b", 0.0)
    expected = ["success"] * 2 + ["failure"] * 4 + ["rerecord", "estop"]
    assert keys.events(0.01) == expected
    assert keys.events(0.1) == ["stop"] and keys.events(0.2) == []


@pytest.mark.parametrize(
    "pieces", [[b"\x1b[A"], [b"\x1b", b"[1;5C"], [b"\x1bOP"], [b"\x1b[", b"3~"]]
)
def test_arrow_and_function_keys_mean_nothing(pieces):
    keys = make_keys()
    for k, piece in enumerate(pieces):
        keys.feed(piece, 0.01 * k)
    assert keys.events(1.0) == [] and not keys.rates(3, 0.02).any()
    keys.feed(b"a", 1.0)
    assert keys.rates(1, 1.0).tolist() == [-1], "what follows is read again"


def test_escape_and_then_something_else_is_a_stop():
    keys = make_keys()
    keys.feed(b"\x1bq", 0.0)
    assert keys.events(0.0) == ["stop"] and keys.rates(1, 0.0).tolist() == [1]


def test_any_bytes_do_no_harm():
    keys = make_keys()
    keys.feed(bytes(range(256)) * 3, 0.0)
    keys.feed(np.random.default_rng(0).bytes(4000), 1.0)
    assert set(keys.events(2.0)) <= {"success", "failure", "rerecord", "stop", "estop"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keys": ("q",)}, "no pair"),
        ({"keys": ("qa", "aw")}, "twice"),
        ({"keys": ("qx",)}, "'x' in 'qx' cannot move"),
        ({"keys": ("Qa",)}, "small letters"),
        ({"step": 0.0}, "step is 0.0"),
        ({"held_s": -1.0}, "held_s is -1.0"),
    ],
)
def test_a_wrong_key_map_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        KeyboardConfig(**options)


def test_too_few_keys_for_the_device():
    with pytest.raises(ConfigError, match="2 pairs; the device's action has 3"):
        KeyboardConfig(keys=("qa", "ws")).steps(FOLLOWER_SPEC)


def test_a_step_is_a_share_of_the_range_or_in_the_actions_unit():
    assert KeyboardConfig(step=0.1).steps(FOLLOWER_SPEC) == pytest.approx([0.3, 0.2, 0.2])
    assert KeyboardConfig(step=0.1, unit="own").steps(FOLLOWER_SPEC) == pytest.approx([0.1] * 3)


def state(*values):
    return {"observation.state": np.array(values, np.float32)}


def test_jogging_begins_at_the_measured_pose_and_steps_from_its_own_target():
    jog = Jog(FOLLOWER_SPEC, np.full(3, 0.02), 0.5)
    up = np.array([1.0, 0.0, -1.0])
    assert jog.act(up, state(0.1, 0.2, 0.3)) == pytest.approx([0.1, 0.2, 0.3])
    assert jog.act(up, state(0.1, 0.2, 0.3)) == pytest.approx([0.12, 0.2, 0.28])
    assert jog.act(up, state(0.1, 0.2, 0.3)) == pytest.approx([0.14, 0.2, 0.26])
    assert jog.act(np.zeros(3), state(0.11, 0.2, 0.29)) == pytest.approx([0.14, 0.2, 0.26])


def test_the_target_stays_inside_the_limits_and_near_a_robot_that_does_not_follow():
    jog = Jog(FOLLOWER_SPEC, np.full(3, 0.05), 0.5)
    up = np.array([1.0, 0.0, 1.0])
    for _ in range(200):
        action = jog.act(up, state(1.4, 0.0, 0.5))
    assert action == pytest.approx([1.5, 0.0, 0.7]), "limit; 0.2 s ahead at 1 rad/s"
    assert action.dtype == np.float32


def test_an_arm_that_sags_is_not_lowered_by_every_new_beginning():
    jog = Jog(FOLLOWER_SPEC, np.full(3, 0.02), 0.5)
    still = np.zeros(3)
    jog.act(still, state(0.0, 0.0, 1.0))
    for _ in range(20):
        jog.rest()
        action = jog.act(still, state(0.0, -0.03, 1.0))
    assert action == pytest.approx([0.0, 0.0, 1.0])
    jog.rest()
    assert jog.act(still, state(0.5, 0.0, 1.0)) == pytest.approx([0.5, 0.0, 1.0]), "moved since"
    jog.begin()
    assert jog.act(still, state(0.49, 0.0, 1.0)) == pytest.approx([0.49, 0.0, 1.0])


def test_standing_at_takes_the_last_target_only_where_all_joints_are_near():
    measured = np.array([0.0, 0.0, 1.0], np.float32)
    near, far = np.array([0.05, 0.0, 1.0]), np.array([0.0, 0.2, 1.0])
    assert standing_at(near, measured, FOLLOWER_SPEC) is near
    assert standing_at(far, measured, FOLLOWER_SPEC) == pytest.approx(measured)


def test_devices_that_are_not_position_controlled_get_the_rate():
    jog = Jog(POINT_SPEC, np.zeros(2), 0.5)
    assert jog.act(np.array([1.0, -1.0]), state(9.0, 9.0)) == pytest.approx([0.5, -0.5])
    assert jog.act(np.zeros(2), state(9.0, 9.0)) == pytest.approx([0.0, 0.0])
