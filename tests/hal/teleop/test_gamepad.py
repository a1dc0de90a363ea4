import os
import struct
import time

import numpy as np
import pytest
from follower import FOLLOWER_SPEC
from point import POINT_SPEC

from embodied.core.errors import ConfigError
from hal.teleop import gamepad
from hal.teleop.gamepad import Gamepad, GamepadConfig, Pad, enumerate_gamepads

TAKEOVER = 5


def event(kind, number, value, *, initial=False):
    return struct.pack("<IhBB", 1234, value, kind | (0x80 if initial else 0), number)


def button(number, down=True, **options):
    return event(1, number, int(down), **options)


def axis(number, value, **options):
    return event(2, number, round(32767 * value), **options)


STATE = {"observation.state": np.array([0.1, 0.2, 0.5], np.float32)}


def test_axes_have_a_dead_zone_and_a_sign():
    pad = Pad(GamepadConfig(axes=("a0", "-a1", "b4-b5", "a5-a2", ""), takeover=9, dead_zone=0.2))
    pad.feed(axis(0, 0.1) + axis(1, -0.6) + button(4))
    assert pad.rates(5) == pytest.approx([0.0, 0.5, 1.0, 0.0, 0.0], abs=1e-3)
    pad.feed(axis(0, 1.0) + button(5) + axis(5, 1.0) + axis(2, -1.0))
    assert pad.rates(5) == pytest.approx([1.0, 0.5, 0.0, 1.0, 0.0], abs=1e-3)
    assert pad.rates(7).tolist()[5:] == [0, 0] and pad.rates(2).shape == (2,)


def test_triggers_at_rest_move_nothing():
    pad = Pad(GamepadConfig(axes=("a5-a2",)))
    pad.feed(axis(2, -1.0, initial=True) + axis(5, -1.0, initial=True))
    assert pad.rates(1).tolist() == [0]


def test_structs_may_come_in_pieces():
    pad = Pad(GamepadConfig())
    data = button(TAKEOVER) + button(0) + button(1)
    for k in range(len(data)):
        pad.feed(data[k : k + 1])
    assert pad.engaged and pad.events() == ["success", "failure"] and pad.events() == []


def test_what_is_held_while_it_connects_does_not_count():
    pad = Pad(GamepadConfig())
    pad.feed(button(TAKEOVER, initial=True) + button(3, initial=True))
    assert not pad.engaged and pad.events() == []
    pad.feed(button(TAKEOVER, down=False) + button(TAKEOVER))
    assert pad.engaged


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axes": ("x3",)}, "'x3' is none of"),
        ({"speed": 2.0}, "speed is 2.0"),
        ({"dead_zone": 1.0}, "dead_zone"),
        ({"buttons": {"succes": 1}}, "Did you mean 'success'"),
        ({"takeover": 3}, "two meanings"),
    ],
)
def test_a_wrong_mapping_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        GamepadConfig(**options)


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "js0"
    os.mkfifo(path)
    return path


@pytest.fixture
def make_pad(fifo):
    made = []

    def make(**options):
        options = {"axes": ("a0", "a1", "a2")} | options
        made.append(Gamepad(GamepadConfig(device=str(fifo), **options)))
        return made[-1]

    yield make
    for pad in made:
        pad.close()


def test_moves_the_target_while_the_takeover_button_is_held(make_pad, fifo):
    pad = make_pad(speed=0.5)
    pad.begin(FOLLOWER_SPEC)
    pad.open()
    with fifo.open("wb", buffering=0) as hand:
        hand.write(axis(0, 1.0) + axis(2, -1.0))
        assert pad.read(STATE) is None
        hand.write(button(TAKEOVER))
        assert pad.read(STATE) == pytest.approx([0.1, 0.2, 0.5]), "begins where the robot stands"
        assert pad.read(STATE) == pytest.approx([0.12, 0.2, 0.49]), "half of 2 and 1 rad/s"
        hand.write(button(TAKEOVER, down=False))
        assert pad.read(STATE) is None
        hand.write(button(3) + button(2))
        assert pad.events() == ["estop", "rerecord"]


def test_unplugged_it_lets_go_and_plugged_in_it_goes_on(make_pad, fifo, monkeypatch):
    monkeypatch.setattr(gamepad, "_RETRY_S", 0.0)
    pad = make_pad()
    pad.begin(POINT_SPEC)
    pad.open()
    hand = fifo.open("wb", buffering=0)
    hand.write(button(TAKEOVER) + axis(0, 1.0) + button(0))
    assert pad.read(STATE) is not None
    hand.close()
    fifo.rename(fifo.with_name("gone"))
    assert pad.read(STATE) is None
    assert pad.read(STATE) is None and "No such file" in pad.fault
    assert pad.events() == ["success"], "what was pressed before counts"
    fifo.with_name("gone").rename(fifo)
    with open(os.open(fifo, os.O_RDWR), "wb", buffering=0) as hand:
        assert pad.read(STATE) is None and pad.fault == ""
        hand.write(button(TAKEOVER, initial=True) + axis(0, 1.0, initial=True))
        assert pad.read(STATE) is None, "held while it was plugged in"
        hand.write(button(TAKEOVER, down=False) + button(TAKEOVER))
        assert pad.read(STATE) == pytest.approx([0.3, 0.0])


def test_reading_takes_no_time(make_pad, fifo):
    pad = make_pad()
    pad.begin(FOLLOWER_SPEC)
    pad.open()
    with fifo.open("wb", buffering=0) as hand:
        hand.write(button(TAKEOVER))
        started_s = time.monotonic()
        for _ in range(100):
            pad.read(STATE)
        assert time.monotonic() - started_s < 2.0, "a tick each would be as much"


def test_without_a_gamepad_it_says_so(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="No such file"):
        Gamepad(GamepadConfig(device=str(tmp_path / "js7"))).open()
    monkeypatch.setattr(gamepad, "_DEVICES", str(tmp_path / "js*"))
    assert enumerate_gamepads() == []
    with pytest.raises(ConfigError, match="there is none"):
        Gamepad(GamepadConfig()).open()
    with pytest.raises(ConfigError, match="6 sources"):
        spec = POINT_SPEC.__class__(
            POINT_SPEC.observation, POINT_SPEC.action.__class__((7,), low=(-1,), high=(1,)), 20.0
        )
        Gamepad(GamepadConfig()).begin(spec)


def test_lists_gamepads_in_order_with_their_faults(tmp_path, monkeypatch):
    monkeypatch.setattr(gamepad, "_DEVICES", str(tmp_path / "js*"))
    for name in ("js10", "js2"):
        (tmp_path / name).touch()
    rows = enumerate_gamepads()
    assert [row["id"] for row in rows] == [f"gamepad:{tmp_path}/js2", f"gamepad:{tmp_path}/js10"]
    assert all(row["kind"] == "teleoperator" and row["detail"] for row in rows)
    monkeypatch.setattr(gamepad.os, "access", lambda path, mode: False)
    assert "group 'input'" in enumerate_gamepads()[0]["fault"]
