"""Halts: set by anybody, at once, latched over restarts, until a person clears them."""

import os
import shutil
import threading
import time

import numpy as np
import pytest
from follower import Follower
from hand import (
    STEP_S,
    TICK_S,
    Hand,
    check_trajectory,
    many_seeds,
    opened,
    report,
    standstill_s,
    stopping_s,
)

from embodied.core.files import write_atomic
from hal.health import Health
from hal.safety.latch import HOST_STOP, Latch, latch_file, set_latch

UNREADABLE = [b"", b"\xff\xfe", b'{"reason": "", "unix_s": 1}', b"{}", b"["]


def wait_for_files(folder, count):
    """A device writes its own latch by a thread."""
    deadline_s = time.monotonic() + 20
    while len(list(folder.glob("*.halt"))) < count:
        assert time.monotonic() < deadline_s, "no latch on disk"
        time.sleep(0.001)


@many_seeds(50)
def test_a_halt_stops_the_arm_at_once_and_nothing_moves_it_until_a_person_clears_it(
    seeds, capsys, tmp_path
):
    times_s = []
    for seed in seeds:
        folder = tmp_path / str(seed)
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver, latches=folder)
        hand = Hand(device, rng)
        hand.wander(int(rng.integers(2, 20)))
        halted_at = len(driver.setpoints)
        device.halt("somebody pressed the button")
        device.advance(device.tick + round(stopping_s() / TICK_S) + 5)
        times_s.append(standstill_s(driver.setpoints, halted_at))
        check_trajectory(driver.setpoints)
        assert hand.send(np.zeros((2, 3))).rejections[0].code == "halted"
        hand = Hand(device, rng)
        assert hand.send(np.ones((2, 3))).rejections[0].code == "halted", "nor a new lease"
        device.close()
    report(capsys, "halt", times_s, stopping_s() + 2 * STEP_S)


@many_seeds(50)
def test_an_emergency_stop_by_file_outlasts_restarts_whatever_is_in_it(seeds, capsys, tmp_path):
    times_s = []
    for seed in seeds:
        folder = tmp_path / str(seed)
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver, latches=folder)
        hand = Hand(device, rng)
        hand.wander(int(rng.integers(2, 20)))
        name = HOST_STOP if rng.random() < 0.5 else device.info.id
        file = latch_file(folder, name)
        if rng.random() < 0.5:
            set_latch(file, "button")
        else:
            file.write_bytes(UNREADABLE[rng.integers(len(UNREADABLE))])
        halted_at = len(driver.setpoints)
        device.advance(device.tick + round(stopping_s() / TICK_S) + 5)
        times_s.append(standstill_s(driver.setpoints, halted_at))
        check_trajectory(driver.setpoints)
        device.close()
        for _ in range(int(rng.integers(1, 3))):
            device = opened(driver := Follower(), latches=folder)
            assert device.info.health is Health.HALTED and device.info.reason
            Hand(device, rng).wander(5)
            assert standstill_s(driver.setpoints, 0) == 0
            device.close()
        device = opened(driver := Follower(), latches=folder)
        file.unlink()
        device.advance(device.tick + 1)
        assert device.info.health is not Health.HALTED
        Hand(device, rng).wander(5)
        assert standstill_s(driver.setpoints, 0) > 0
        device.close()
        shutil.rmtree(folder)
    report(capsys, "emergency stop by file", times_s, stopping_s() + 2 * STEP_S)


@many_seeds(50)
def test_a_restarted_robot_waits_for_a_new_lease(seeds):
    for seed in seeds:
        driver, rng = Follower(), np.random.default_rng(seed)
        device = opened(driver)
        hand = Hand(device, rng)
        hand.wander(int(rng.integers(2, 20)))
        device.close()
        device, restarted_at = opened(driver), len(driver.setpoints)
        hand.device = device
        for token in (hand.token, 0):
            assert device.submit(hand.chunk(hand.absurd(8), lease_token=token)).rejections
            assert device.pulse(token)
            device.advance(device.tick + int(rng.integers(1, 9)))
        assert standstill_s(driver.setpoints, restarted_at) == 0
        Hand(device, rng).wander(5)
        assert standstill_s(driver.setpoints, restarted_at) > 0


def test_a_latched_halt_survives_restart(tmp_path):
    device = opened(latches=tmp_path)
    device.halt("collision")
    wait_for_files(tmp_path, 1)
    device.close()
    again = opened(latches=tmp_path)
    assert again.info.health is Health.HALTED and "collision" in again.info.reason
    driver = again.driver
    Hand(again, np.random.default_rng(0)).wander(5)
    assert standstill_s(driver.setpoints, 0) == 0
    again.clear()
    assert again.info.health is not Health.HALTED and not list(tmp_path.glob("*.halt"))
    Hand(again, np.random.default_rng(0)).wander(5)
    assert standstill_s(driver.setpoints, 0) > 0


def test_the_hosts_stop_halts_every_device_without_asking_it(tmp_path):
    device = opened(latches=tmp_path)
    hand = Hand(device, np.random.default_rng(0))
    hand.wander(3)
    set_latch(latch_file(tmp_path, HOST_STOP), "big red button")
    device.advance(device.tick + 1)
    assert device.info.health is Health.HALTED and "big red button" in device.info.reason
    latch_file(tmp_path, HOST_STOP).unlink()
    device.advance(device.tick + 1)
    assert device.info.health is not Health.HALTED
    assert hand.send(np.zeros((1, 3))).rejections, "clearing gives no old lease back"


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_latch_file_halts_whatever_is_in_it(tmp_path, content):
    device = opened(latches=tmp_path)
    hand = Hand(device, np.random.default_rng(0))
    latch_file(tmp_path, HOST_STOP).write_bytes(content)
    device.advance(device.tick + 1)
    assert device.info.health is Health.HALTED and device.info.reason
    assert hand.send(np.zeros((1, 3))).rejections[0].code == "halted"


def test_a_halt_without_a_reason_is_one_and_one_that_cannot_be_read_stands(tmp_path, monkeypatch):
    device = opened(latches=tmp_path)
    device.halt("")
    assert device.info.health is Health.HALTED
    wait_for_files(tmp_path, 1)
    time.sleep(0.05)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "lstat", refuse)
        device.advance(device.tick + 3)
        assert device.info.health is Health.HALTED
    moved = tmp_path.rename(tmp_path.with_name("away"))
    device.advance(device.tick + 3)
    assert device.info.health is Health.HALTED
    moved.rename(tmp_path)
    device.clear()
    assert device.info.health is not Health.HALTED


def test_a_devices_own_halt_outlasts_the_hosts_stop(tmp_path):
    device = opened(latches=tmp_path)
    set_latch(latch_file(tmp_path, HOST_STOP), "button")
    device.advance(device.tick + 1)
    device.halt("beyond its limits")
    wait_for_files(tmp_path, 2)
    latch_file(tmp_path, HOST_STOP).unlink()
    device.advance(device.tick + 1)
    assert "beyond its limits" in device.info.reason


def test_a_halt_stands_if_its_file_is_written_while_it_is_looked_for(tmp_path, monkeypatch):
    latch = Latch(tmp_path, "arm")
    looked_for = threading.Event()
    look = os.lstat

    def write_late(file, reason):
        assert looked_for.wait(5)
        write_atomic(file, b"{}")

    def look_early(path):
        try:
            return look(path)
        except FileNotFoundError:
            looked_for.set()
            if path == latch_file(tmp_path, "arm"):
                latch._writing.join(5)
            raise

    monkeypatch.setattr("hal.safety.latch.set_latch", write_late)
    latch.set("stop")
    monkeypatch.setattr(os, "lstat", look_early)
    latch.look()
    assert latch_file(tmp_path, "arm").exists() and latch.reason == "stop"
