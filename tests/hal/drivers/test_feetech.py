import contextlib
import os
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied.core.errors import DeviceLostError, MissingDependencyError
from hal.drivers.feetech import STS3215, FeetechBus, decode_sign, encode_sign, faults
from sim.so101.virtual import Faults, VirtualArm

IDS = range(1, 7)


@pytest.fixture(scope="module")
def shared_arm(tmp_path_factory):
    with VirtualArm(tmp_path_factory.mktemp("bus"), seed=3) as virtual:
        yield virtual


@pytest.fixture
def arm(shared_arm):
    shared_arm.plug()
    shared_arm.faults(Faults())
    return shared_arm


@given(st.integers(-2047, 2047))
def test_sign_and_magnitude_are_inverse(value):
    assert decode_sign(encode_sign(value, 11), 11) == value


def test_a_number_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="below 2048"):
        encode_sign(2048, 11)


def test_status_bits_have_names():
    assert faults(0) == ()
    assert faults(32 + 4) == ("over-temperature", "overload")
    assert faults(64) == ("status 0x40",)


def test_reads_and_writes_registers(bus):
    assert bus.ping(3) == STS3215
    assert bus.ping(9) is None
    bus.write(3, 42, 2, 1234)
    assert bus.read(3, 42, 2) == 1234
    bus.sync_write(42, 2, {1: 300, 2: 4000})
    answers = bus.sync_read([1, 2, 3], 42, 2)
    assert [int.from_bytes(answers[i].data, "little") for i in (1, 2, 3)] == [300, 4000, 1234]
    assert all(answer.status == 0 for answer in answers.values())


def test_repeats_what_was_lost_or_damaged(arm, bus):
    bus.answer_ms = 4.0
    bus.retries = 5
    arm.faults(Faults(drop=0.02, corrupt=0.02))
    for _ in range(60):
        assert len(bus.sync_read(IDS, 56, 8)) == 6
    assert bus.repeated > 3


def test_a_missing_servo_is_named_in_bounded_time(bus):
    bus.answer_ms = 20.0
    took_s = []
    for _ in range(5):  # the machine may be busy in most of them
        start_s = time.monotonic()
        with pytest.raises(DeviceLostError, match=r"servo 9 \(\?\) did not answer in 3 attempts"):
            bus.sync_read([1, 9], 56, 8)
        took_s.append(time.monotonic() - start_s)
    assert min(took_s) < 0.1  # (2 + 1) * (20 + 2) ms, and room
    assert bus.repeated == 2 * 5


def test_a_late_answer_is_not_taken_for_the_next(arm, bus):
    bus.retries = 0
    bus.answer_ms = 4.0
    arm.faults(Faults(late=1.0, late_s=0.03))
    with pytest.raises(DeviceLostError):
        bus.read(1, 3, 2)
    arm.faults(Faults())
    time.sleep(0.05)
    bus.answer_ms = 20.0
    assert bus.read(1, 11, 2) != STS3215


def test_a_port_has_one_owner(arm, bus):
    other = FeetechBus(arm.port)
    with pytest.raises(DeviceLostError, match="in use by another process"):
        other.open()
    bus.close()
    other.open()
    other.close()
    other.close()


def test_errors_say_what_is_wrong_with_the_port(tmp_path, arm, bus):
    with pytest.raises(DeviceLostError, match="does not exist"):
        FeetechBus(str(tmp_path / "nothing")).open()
    with pytest.raises(DeviceLostError, match="cannot be opened"):
        (tmp_path / "file").write_text("")
        FeetechBus(str(tmp_path / "file")).open()
    with pytest.raises(DeviceLostError, match="call open"):
        FeetechBus(arm.port).read(1, 3, 2)
    arm.unplug()
    with pytest.raises(DeviceLostError, match=f"{arm.port} has gone"):
        bus.read(1, 3, 2)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scservo_sdk", None)
    with pytest.raises(MissingDependencyError, match="feetech-servo-sdk"):
        FeetechBus("/dev/ttyACM0")


def test_noise_without_end_is_not_listened_to():
    master, slave = os.openpty()
    os.set_blocking(master, False)
    stop = threading.Event()

    def babble():
        while not stop.is_set():
            with contextlib.suppress(BlockingIOError):
                os.write(master, bytes(range(250)))

    thread = threading.Thread(target=babble, daemon=True)
    bus = FeetechBus(os.ttyname(slave), retries=0)
    bus.open()
    thread.start()
    start_s = time.monotonic()
    with pytest.raises(DeviceLostError, match="damaged"):
        bus.read(1, 3, 2)
    assert time.monotonic() - start_s < 1.0, "noise has no end"
    stop.set()
    thread.join()
    bus.close()
    os.close(master)
    os.close(slave)
