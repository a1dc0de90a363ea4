"""What a lease is, what the pool says of devices, and what time does to both."""

import os
import subprocess
import time

import pytest
from pooling import FakeClock, S, arm, beat, ids

from embodied.core.errors import ConfigError, LeaseError
from hal.pool import file as pool_file
from hal.pool.pool import BootClock, DeviceRecord, Pool


def test_acquire_says_who_holds_what_and_what_is_missing(pool, clock):
    pool.register(arm("a"))
    pool.register(arm("b"), "halted", "e-stop")
    pool.register(DeviceRecord("g", "gpu"))
    pool.acquire("run7/actor", "arm", ttl_s=20)
    clock.tick(2.0)
    before = clock.ns
    with pytest.raises(LeaseError) as caught:
        pool.acquire("run8/actor", "2 arm, kuka", timeout_s=0.5)
    assert clock.ns == before + S // 2
    message = str(caught.value)
    assert "'2 arm, kuka' within 0.5 s" in message
    assert "a is held by run7/actor for 2.5 s, which must renew within 17.5 s" in message
    assert "b is halted (e-stop)" in message
    assert "cannot fulfil it: 'kuka' needs 1, 0 fit: 0 of kind 'kuka'" in message
    assert "g " not in message and pool.queue() == []
    beat(pool, "a", "b", "g", health="lost")
    many = [pool.request(f"h{k}", "arm") for k in range(12)]
    with pytest.raises(LeaseError, match=r"before it in the queue: h0 .* and 4 more"):
        pool.acquire("x", "arm", timeout_s=0)
    assert len(pool.queue()) == len(many)


def test_an_allocation_and_what_the_device_learns_of_it(pool, clock):
    pool.register(arm("a", address="ipc:///a"))
    assert beat(pool, "a") == [None]
    held = pool.acquire("h", "arm", ttl_s=5)
    [device] = held.devices
    assert (device.id, device.kind, device.host, device.address) == (
        "a",
        "so101",
        "bench",
        "ipc:///a",
    )
    assert held.expires_ns == clock.ns + 5 * S
    [lease] = beat(pool, "a")
    assert (lease.holder, lease.token, lease.expires_ns) == ("h", device.token, held.expires_ns)
    clock.tick(4.0)
    held = pool.renew(held)
    pool.register(arm("a", address="ipc:///new"))
    held = pool.renew(held)
    assert held.devices[0].address == "ipc:///new" and held.devices[0].token == device.token
    clock.tick(5.0)
    with pytest.raises(LeaseError, match=r"h no longer holds a: it was not renewed and ended 0\.0"):
        pool.renew(held)
    assert not pool.release(held) and beat(pool, "a") == [None]


def test_a_device_whose_host_is_silent_is_lost(pool, clock):
    pool.register(arm("a"))
    clock.tick(3.0)
    assert pool.devices()[0].health == "ready"
    clock.tick(1.2)
    [device] = pool.devices()
    assert (device.health, device.reason) == ("lost", "host process silent for 4 s")
    with pytest.raises(LeaseError, match=r"a is lost \(host process silent for 4 s\)"):
        pool.acquire("h", "arm", timeout_s=0)
    beat(pool, "a", health="degraded")
    assert ids(pool.acquire("h", "arm", timeout_s=0)) == ["a"]
    assert pool.devices()[0].health == "degraded" and pool.devices()[0].holder == "h"
    clock.tick(4000)
    assert pool.devices() == []


def test_a_device_has_one_owner(pool, clock):
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        pool.register(arm("a", owner_pid=stranger.pid))
        with pytest.raises(LeaseError, match=f"registered by process {stranger.pid}"):
            pool.register(arm("a"))
        with pytest.raises(LeaseError, match=f"belongs to process {stranger.pid} now"):
            pool.update("a", "ready")
        assert pool.update("a", "ready", owner_pid=stranger.pid) is None
        clock.tick(3.1)
        pool.register(arm("a"))  # silent for too long
        pool.remove("a")
        pool.register(arm("a", owner_pid=stranger.pid))
    finally:
        stranger.kill()
        stranger.wait()
    pool.register(arm("a"))  # dead
    pool.update("a", "ready")
    with pytest.raises(LeaseError, match="b is not in the pool: register it"):
        pool.update("b", "ready")


def test_reports_are_shown(pool):
    pool.register(arm("a", labels={"lab": "west"}))
    nan = float("nan")
    pool.update(
        "a", "degraded", "hot\ud800" + "!" * 600, rate_hz=9.9, tick_hz=10, load=0.5, detail="x"
    )
    [device] = pool.devices()
    assert (device.rate_hz, device.tick_hz, device.load, device.detail) == (9.9, 10, 0.5, "x")
    assert device.reason.startswith("hot?!") and len(device.reason) == 500
    assert device.labels == {"lab": "west"} and device.owner_pid == os.getpid()
    pool.update("a", "ready", rate_hz=nan, temperature_c=nan, load=float("inf"))
    [device] = pool.devices()
    assert (device.rate_hz, device.temperature_c, device.load) == (0.0, None, None)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda p: p.update("a", "fine"), "unknown health 'fine'"),
        (lambda p: p.register(arm("a"), "redy"), "unknown health 'redy'. Did you mean 'ready'"),
        (lambda p: p.request("", "arm"), "holder is ''"),
        (lambda p: p.request("a\nb", "arm"), "holder is"),
        (lambda p: p.request("h", "arm", ttl_s=0), "ttl_s is 0"),
        (lambda p: p.request("h", "arm", ttl_s=float("nan")), "ttl_s is nan"),
        (lambda p: p.request("h", []), "ask for 0 devices"),
        (lambda p: p.request("h", "arm["), "expected a capability"),
    ],
)
def test_wrong_arguments(pool, call, complaint):
    with pytest.raises(ConfigError, match=complaint):
        call(pool)
    assert pool.devices() == [] and pool.queue() == []


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_jumps_of_the_wall_clock_have_no_effect(tmp_path, monkeypatch, jump_s):
    with Pool(tmp_path / "pool.sqlite") as pool:
        pool.register(arm("a"))
        held = pool.acquire("h", "arm", ttl_s=1.0)
        wall_s, wall_ns = time.time, time.time_ns
        monkeypatch.setattr(time, "time", lambda: wall_s() + jump_s)
        monkeypatch.setattr(time, "time_ns", lambda: wall_ns() + round(jump_s * S))
        held = pool.renew(held)
        assert 0 < pool.devices()[0].lease_remaining_s <= 1.0
        assert held.expires_ns - BootClock().now_ns() <= 1.0 * S
        assert pool.devices()[0].health == "leased"
        time.sleep(1.05)
        with pytest.raises(LeaseError, match="was not renewed"):
            pool.renew(held)
        again = pool.acquire("h", "arm", timeout_s=0)
        assert again.devices[0].token > held.devices[0].token


def test_a_restart_of_the_host_voids_leases_but_tokens_go_on(tmp_path):
    path = tmp_path / "pool.sqlite"
    with Pool(path, clock=FakeClock(1000, "first")) as pool:
        pool.register(arm("a"))
        held = pool.acquire("h", "arm", ttl_s=600)
        waiting = pool.request("i", "arm")
    clock = FakeClock(1, "second")
    with Pool(path, clock=clock) as pool:
        [device] = pool.devices()
        assert (device.health, device.holder) == ("lost", "")
        assert device.reason == "host process silent since the host was started"
        assert pool.queue() == []
        with pytest.raises(LeaseError, match="the host was restarted"):
            pool.renew(held)
        with pytest.raises(LeaseError, match="not known"):
            pool.poll(waiting)
        beat(pool, "a")
        again = pool.acquire("h", "arm", timeout_s=0)
        assert again.devices[0].token > held.devices[0].token + 1000  # a lost block at the least


def test_tokens_are_synced_in_blocks_before_they_are_given(tmp_path, clock):
    """What a power cut may take back is the token, never the end of its block."""
    path = tmp_path / "pool.sqlite"
    with Pool(path, clock=clock) as pool:
        pool.register(arm("a"))
        synced, given = [], []
        for _ in range(2 * pool_file._TOKEN_BLOCK // 64):
            connection = pool._file._connection
            connection.execute("UPDATE meta SET token = token + 63")
            beat(pool, "a")
            held = pool.acquire("h", "arm")
            pool.release(held)
            given.append(held.devices[0].token)
            [[ceiling]] = connection.execute("SELECT ceiling FROM meta")
            synced.append(ceiling)
        assert all(a <= b for a, b in zip(given, synced, strict=True))
        assert given == sorted(set(given)) and len(set(synced)) == 3
