import time

import numpy as np
import pytest
from follower import FOLLOWER_SPEC, Follower
from point import POINT_SPEC

from embodied.core.errors import ConfigError, DeviceLostError, StorageFullError
from hal.commander import Commander
from hal.device import Device, DeviceInfo
from hal.safety.config import SIMULATED
from hal.teleop import session as sessions
from hal.teleop.align import Alignment
from hal.teleop.asking import PersonStopped
from hal.teleop.keyboard import Keyboard, KeyboardConfig
from hal.teleop.session import Session


class Hands:
    """An arm that stands where it is told to; fails if asked to."""

    def __init__(self, pose=None):
        self.pose = None if pose is None else np.array(pose, np.float32)
        self.failing = None
        self.opened = 0
        self.signalled = []

    def open(self):
        if self.failing is not None:
            raise self.failing
        self.opened += 1

    def read(self, observation):
        if self.failing is not None:
            raise self.failing
        return self.pose

    def events(self):
        signalled, self.signalled = self.signalled, []
        return signalled

    def close(self):
        """Nothing to release."""


class Voice(Keyboard):
    """A keyboard without a terminal: events are put into it."""

    def __init__(self):
        super().__init__(KeyboardConfig())
        self.pressed = []

    def open(self):
        """No terminal."""

    def events(self):
        pressed, self.pressed = self.pressed, []
        return pressed


def state(*values):
    return {"observation.state": np.array(values, np.float32)}


def wait_until(true):
    until_s = time.monotonic() + 5
    while not true():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def test_the_target_leads_from_the_robot_to_the_arm_within_the_allowed_speed():
    alignment = Alignment(FOLLOWER_SPEC, 0.5)
    wanted = np.array([1.0, -0.6, 0.0], np.float32)
    targets = [alignment.target(wanted, state(0.0, 0.0, 1.0))]
    assert targets[0] == pytest.approx([0.0, 0.0, 1.0]) and alignment.running
    while alignment.running:
        targets.append(alignment.target(wanted, state(9, 9, 9)))
    assert targets[-1] == pytest.approx(wanted)
    speed = np.abs(np.diff(targets, axis=0)).max(0) * FOLLOWER_SPEC.tick_hz
    allowed = 0.5 * np.array(FOLLOWER_SPEC.motion.velocity)
    assert (speed <= 1.01 * allowed).all() and speed[2] == pytest.approx(allowed[2], rel=0.02)
    assert len(targets) == pytest.approx(1.875 * 1.0 / 0.5 * 50, abs=3), "the slowest joint"


def test_an_arm_that_moves_meanwhile_is_met():
    alignment = Alignment(FOLLOWER_SPEC, 0.5)
    for k in range(150):
        wanted = np.array([0.005 * k, 0.0, 1.0], np.float32)
        target = alignment.target(wanted, state(-0.5, 0.0, 1.0))
    assert not alignment.running and target == pytest.approx(wanted)


def test_letting_go_for_a_moment_goes_on_from_the_last_target():
    alignment = Alignment(FOLLOWER_SPEC, 0.5)
    pose = np.array([0.0, 0.0, 1.0], np.float32)
    alignment.target(pose, state(0.0, 0.0, 1.0))
    alignment.let_go()
    assert alignment.target(pose, state(0.0, -0.04, 1.0)) == pytest.approx(pose), "it sags"
    alignment.let_go()
    assert alignment.target(pose, state(0.0, 0.4, 1.0)) == pytest.approx([0.0, 0.4, 1.0])


def test_a_leader_far_away_is_followed_without_rejection_or_jump():
    safety = SIMULATED.__class__(heartbeat_s=None, overruns=0)
    assert safety.start_tolerance == 0.02
    info = DeviceInfo("follower:0", "follower", "here")
    with Device(Follower(), info=info, safety=safety) as device:
        session = Session(Hands([1.2, -0.8, 0.2]), speed=0.5)
        session.begin(device.spec)
        commander = Commander(device)
        for _ in range(250):
            frame = device.latest()
            action = session.read(frame.observation)
            ticket = commander.send(action[None], obs_tick=frame.tick, start_tick=frame.tick)
            assert not ticket.rejections
            device.advance(frame.tick + 1)
        frames = device.frames(0)
        at = np.array([frame.observation["observation.state"] for frame in frames])
        assert at[-1] == pytest.approx([1.2, -0.8, 0.2], abs=0.01)
        assert (np.abs(np.diff(at, axis=0)).max(0) * 50 < [1.2, 1.7, 0.6]).all()


def test_other_devices_get_the_hands_action_as_it_is():
    session = Session(Hands([0.3, 0.4]))
    session.begin(POINT_SPEC)
    assert session.read(state(9, 9)) == pytest.approx([0.3, 0.4])


def test_an_arm_for_another_robot_is_refused():
    session = Session(Hands([0.3, 0.4]))
    session.begin(FOLLOWER_SPEC)
    with pytest.raises(ConfigError, match=r"shape \(2,\); the device takes \(3,\)"):
        session.read(state(0, 0, 0))


def test_hands_that_fail_let_go_and_are_opened_again(monkeypatch):
    monkeypatch.setattr(sessions, "_RETRY_S", 0.0)
    hands = Hands([0.0, 0.0, 1.0])
    with Session(hands) as session:
        session.begin(FOLLOWER_SPEC)
        assert session.read(state(0, 0, 1)) is not None and session.state == "moving"
        hands.failing = DeviceLostError("/dev/ttyACM0 is gone")
        assert session.read(state(0, 0, 1)) is None
        assert session.read(state(0, 0, 1)) is None
        assert session.state == "not there: /dev/ttyACM0 is gone"
        hands.failing = None
        assert session.read(state(0, 0.5, 1)) == pytest.approx([0, 0.5, 1]), "begins anew"
        assert hands.opened == 2


def test_judgements_and_controls_are_kept_apart():
    hands, voice = Hands(), Voice()
    with Session(hands, keyboard=voice) as session:
        session.begin(FOLLOWER_SPEC)
        hands.signalled = ["failure"]
        session.read(state(0, 0, 1))
        voice.pressed = ["rerecord", "success", "stop"]
        wait_until(lambda: not voice.pressed)
        wait_until(lambda: session._controls[-1:] == ["stop"])
        assert session.events() == ["failure", "success"] and session.events() == []
        assert session.controls() == ["rerecord", "stop"] and session.controls() == []


def test_an_emergency_stop_acts_at_once_from_another_thread():
    halted = []
    voice = Voice()
    with Session(Hands(), keyboard=voice, on_estop=lambda: halted.append(1)) as session:
        voice.pressed = ["estop"]
        wait_until(lambda: halted)
        wait_until(lambda: session.controls() == ["estop"])


def test_a_halt_that_cannot_be_latched_is_said_aloud():
    said = []

    def full():
        raise StorageFullError("disk full")

    voice = Voice()
    with Session(Hands(), keyboard=voice, on_estop=full) as session:
        session.say = said.append
        voice.pressed = ["estop"]
        wait_until(lambda: said)
        assert "cut the power" in said[0]
        voice.pressed = ["stop"]
        wait_until(lambda: "stop" in session.controls())


def test_asking_waits_for_an_answer_from_now_on():
    said, waited = [], []
    voice = Voice()
    with Session(Hands(), keyboard=voice) as session:
        session.say = said.append
        voice.pressed = ["success"]
        wait_until(lambda: session._judgements)

        def meanwhile():
            waited.append(1)
            if len(waited) == 3:
                voice.pressed = ["success"]

        session.meanwhile = meanwhile
        session.ask("Ready?")
        assert said == ["Ready?"] and len(waited) >= 3


@pytest.mark.parametrize("event", ["stop", "estop"])
def test_asking_ends_when_the_person_stops(event):
    voice = Voice()
    with Session(Hands(), keyboard=voice) as session:
        session.say = lambda text: None
        voice.pressed = [event]
        with pytest.raises(PersonStopped) as stopped:
            session.ask("Ready?")
        assert stopped.value.event == event


def test_nobody_can_answer_a_script():
    session = Session(Hands())
    assert not session.can_ask and session.keyboard is None
    with pytest.raises(ConfigError, match="nobody can answer"):
        session.ask("Ready?")
    with pytest.raises(ConfigError, match="align_speed is 0"):
        Session(Hands(), speed=0.0)
