import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.so101.bus import (
    ACTION,
    BROADCAST,
    PING,
    READ,
    REG_WRITE,
    SYNC_READ,
    SYNC_WRITE,
    WRITE,
    Faults,
    FeetechBus,
    Parser,
    packet,
)
from sim.so101.robots import Follower

IDS = bytes(range(1, 7))
GOAL = 2500


def goals(value=GOAL):
    rows = b"".join(bytes([i]) + value.to_bytes(2, "little") for i in IDS)
    return packet(BROADCAST, SYNC_WRITE, bytes([42, 2]) + rows)


class Host:
    """The other end of the wire: sends, lets a second pass, returns what came."""

    def __init__(self):
        self.robot = Follower(0)
        self.bus = FeetechBus(self.robot, seed=1)
        self.now_s = 0.0

    def send(self, data, wait_s=1.0):
        self.bus.receive(data, self.now_s)
        self.now_s += wait_s
        return self.bus.ready(self.now_s)

    def goal_registers(self):
        return [servo.get("goal_position") for servo in self.robot.servos]


@pytest.fixture
def host():
    return Host()


@pytest.fixture(scope="module")
def shared_host():
    return Host()


packets = st.tuples(st.integers(0, 253), st.integers(0, 255), st.binary(max_size=40))


@given(st.lists(packets, max_size=5), st.data())
def test_packets_are_found_however_they_are_cut(wanted, data):
    stream = b"".join(packet(*row) for row in wanted)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    parser = Parser()
    pieces = [stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)])]
    found = [row for piece in pieces for row in parser.feed(piece, 0.0)]
    assert found == wanted
    assert parser.num_bad == 0


@given(st.lists(st.binary(max_size=600), max_size=10))
def test_after_any_garbage_and_a_pause_the_next_packet_is_found(garbage):
    parser = Parser()
    for piece in garbage:
        parser.feed(piece, 0.0)
        assert len(parser._buffer) <= 600
    assert (1, PING, b"") in parser.feed(packet(1, PING), 1.0)


@given(st.binary(max_size=20).filter(lambda data: b"\xff" not in data))
def test_garbage_before_a_packet_costs_nothing(garbage):
    assert Parser().feed(garbage + packet(2, READ, b"\x38\x02"), 0.0) == [(2, READ, b"\x38\x02")]


def test_a_packet_with_any_one_wrong_byte_is_never_taken():
    right = goals()
    for place, wrong in itertools.product(range(len(right)), range(1, 256)):
        changed = bytearray(right)
        changed[place] ^= wrong
        assert Parser().feed(bytes(changed), 0.0) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=64), packets), max_size=8))
def test_garbage_and_odd_packets_never_raise(shared_host, pieces):
    for piece in pieces:
        shared_host.send(piece if isinstance(piece, bytes) else packet(*piece))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.integers(1, 255))
def test_a_bad_checksum_never_moves_a_servo(shared_host, garbage, wrong):
    before = shared_host.goal_registers()
    bad = goals(1234)[:-1] + bytes([goals(1234)[-1] ^ wrong])
    for data in (garbage, bad, garbage):
        assert shared_host.send(data) == []
    assert shared_host.goal_registers() == before


def test_ping_and_broadcast_ping(host):
    assert host.send(packet(4, PING)) == [packet(4, 0)]
    assert host.send(packet(9, PING)) == []
    assert host.send(packet(BROADCAST, PING)) == [packet(i, 0) for i in IDS]


def test_read_and_write(host):
    assert host.send(packet(1, READ, b"\x03\x02")) == [packet(1, 0, (777).to_bytes(2, "little"))]
    assert host.send(packet(2, WRITE, b"\x28\x01")) == [packet(2, 0)]
    assert host.robot.servos[1].torque_on
    assert host.send(packet(BROADCAST, WRITE, b"\x28\x01")) == []
    assert all(servo.torque_on for servo in host.robot.servos)


def test_sync_read_answers_in_the_order_asked(host):
    order = bytes([5, 1, 9, 3])
    answers = host.send(packet(BROADCAST, SYNC_READ, b"\x05\x01" + order))
    assert answers == [packet(i, 0, bytes([i])) for i in (5, 1, 3)]


def test_sync_write_is_not_answered_and_moves_the_arm(host):
    host.send(packet(BROADCAST, WRITE, b"\x28\x01"))
    before = host.robot.state().q_rad
    assert host.send(goals(2100)) == []
    assert host.goal_registers() == [2100] * 6
    host.robot.advance(1000)
    after = host.robot.state()
    np.testing.assert_allclose(after.q_rad, 53 * 2 * np.pi / 4096, atol=0.03)
    assert abs(before - after.q_rad).max() > 1.0


def test_registered_write_waits_for_action(host):
    assert host.send(packet(1, REG_WRITE, b"\x2a\x00\x08")) == [packet(1, 0)]
    assert host.goal_registers()[0] != 2048
    assert host.send(packet(BROADCAST, ACTION)) == []
    assert host.goal_registers()[0] == 2048


def test_answers_take_their_time_on_the_wire(host):
    request = packet(BROADCAST, SYNC_READ, b"\x38\x02" + IDS)
    assert host.send(request, wait_s=10e-6 * len(request)) == []
    assert len(host.bus.ready(host.now_s + 10e-6 * 6 * 8 - 1e-6)) == 5
    assert len(host.bus.ready(host.now_s + 10e-6 * 6 * 8 + 1e-6)) == 1
    assert host.bus.next_s() is None


def test_status_stands_in_the_answer(host):
    host.robot.fault("shoulder_pan", "overload", True)
    assert host.send(packet(1, PING)) == [packet(1, 32)]
    host.robot.fault("shoulder_pan", "overload", False)
    assert host.send(packet(1, PING)) == [packet(1, 0)]


def test_without_power_nothing_happens(host):
    host.robot.power(False)
    assert host.send(packet(1, PING)) == []
    host.send(goals())
    assert GOAL not in host.goal_registers()


def test_dropped_packets_are_neither_answered_nor_carried_out(host):
    host.bus.faults = Faults(drop=1.0)
    assert host.send(packet(1, WRITE, b"\x28\x01")) == []
    assert not host.robot.servos[0].torque_on


@pytest.mark.parametrize(
    "faults", [Faults(drop=0.3), Faults(corrupt=0.3), Faults(late=0.3, late_s=9.0)]
)
def test_faults_come_as_often_as_asked_and_the_same_with_one_seed(faults):
    seen = []
    for _ in range(2):
        host = Host()
        host.bus.faults = faults
        ways = 1 if faults.late else 2
        answers = [host.send(packet(1, PING), wait_s=0.01) for _ in range(400)]
        good = sum(answer == [packet(1, 0)] for answer in answers)
        assert good / 400 == pytest.approx(0.7**ways, abs=0.08)
        seen.append(answers)
    assert seen[0] == seen[1]


def test_a_late_answer_comes_after_younger_ones(host):
    host.bus.faults = Faults(late=1.0, late_s=0.05)
    assert host.send(packet(1, PING), wait_s=0.01) == []
    host.bus.faults = Faults()
    assert host.send(packet(2, PING), wait_s=0.01) == [packet(2, 0)]
    assert host.bus.ready(host.now_s + 0.05) == [packet(1, 0)]


@pytest.mark.parametrize("wrong", [{"drop": 1.5}, {"late_s": -1}, {"lost": 0.1}, {"corrupt": "x"}])
def test_faults_are_checked(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, Faults)
