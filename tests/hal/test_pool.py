import itertools
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from embodied.core.errors import ConfigError, CorruptDataError, LeaseError
from hal.pool import file as pool_file
from hal.pool.holding import Holding
from hal.pool.pool import BootClock, DeviceRecord, Pool, PoolBusyError
from hal.pool.selectors import parse
from hal.pool.state import check_local, pool_path, state_dir

S = 1_000_000_000


class FakeClock:
    def __init__(self, now_s=100.0, boot_id="boot-0"):
        self.ns = round(now_s * S)
        self.boot_id = boot_id

    def now_ns(self):
        return self.ns

    def sleep_until(self, t_ns):
        self.ns = max(self.ns, t_ns)

    def tick(self, seconds):
        self.ns += round(seconds * S)


def arm(id, *capabilities, **fields):
    return DeviceRecord(id, "so101", ("robot", "arm"), "bench", capabilities, **fields)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def pool(tmp_path, clock):
    with Pool(tmp_path / "pool.sqlite", clock=clock) as opened:
        yield opened


def beat(pool, *ids, health="ready"):
    return [pool.update(id, health) for id in ids]


def ids(allocation):
    return [device.id for device in allocation.devices]


# --- the pool against a model -----------------------------------------------------------------

KINDS = {
    "a": arm("a", "camera"),
    "b": arm("b"),
    "c": arm("c", "camera", "gripper"),
    "d": DeviceRecord("d", "gpu"),
    "e": DeviceRecord("e", "gpu", ("arm",)),
}
WANTS = ["arm", "2 arm", "arm, gpu", "2 arm[camera]", "gpu", "id=a", "3 arm", "arm, arm[gripper]"]
HOLDERS = ["h0", "h1", "h2"]


class PoolMachine(RuleBasedStateMachine):
    """Several openings of one file against plain dicts, and a brute-force choice of devices."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = FakeClock()
        self.pools = [self.open() for _ in range(2)]
        self.devices = {}  # id -> [health, seen_ns or None, used_ns]
        self.waiting = {}  # request -> [holder, wanted, ttl_ns, polled_ns, turn], oldest first
        self.granted = {}  # request -> [set of ids still held, all ids, ttl_ns, expires_ns]
        self.held = {}  # request -> the client's newest Allocation
        self.gone = []  # allocations that must never come back
        self.token = 0
        self.boots = 0

    def open(self):
        return Pool(Path(self.folder.name) / "pool.sqlite", clock=self.clock)

    def teardown(self):
        for pool in self.pools:
            pool.close()
        self.folder.cleanup()

    def now(self):
        return self.clock.ns

    def end(self, request, at_ns):
        self.waiting.pop(request, None)
        for id in self.granted.pop(request, [()])[0]:
            self.devices[id][2] = at_ns
        if request in self.held:
            self.gone.append(self.held.pop(request))

    def health(self, id):
        health, seen_ns, _ = self.devices[id]
        return "lost" if seen_ns is None or self.now() - seen_ns > 3 * S else health

    def usable(self):
        found = [id for id in self.devices if self.health(id) in ("ready", "degraded")]
        return sorted(found, key=lambda id: (self.devices[id][2], id))

    def order(self):
        before, ranked = {}, []
        for request, (holder, wanted, _, _, turn) in self.waiting.items():
            ranked.append((before.get(holder, 0), turn, request))
            if self.best(wanted, self.usable())[1]:
                before[holder] = before.get(holder, 0) + 1
        return [request for *_, request in sorted(ranked)]

    def last_turn(self):
        return max((turn for *_, turn in self.waiting.values()), default=0)

    @staticmethod
    def best(wanted, offered):
        """Of the largest sets that can be placed, the one that comes first in `offered`."""
        places = [s for s in parse(wanted) for _ in range(s.count)]
        for size in range(min(len(places), len(offered)), 0, -1):
            for chosen in itertools.combinations(offered, size):
                for order in itertools.permutations(places, size):
                    if all(s.fits(KINDS[id]) for s, id in zip(order, chosen, strict=True)):
                        return list(chosen), size == len(places)
        return [], False

    @initialize(ids=st.sets(st.sampled_from(sorted(KINDS)), min_size=2))
    def begin(self, ids):
        for id in sorted(ids):
            self.register(id)

    def register(self, id, which=0):
        self.pools[which].register(KINDS[id])
        self.devices[id] = ["ready", self.now(), self.devices.get(id, [0, 0, 0])[2]]

    @precondition(lambda self: self.devices)
    @rule(
        data=st.data(),
        health=st.sampled_from(["ready"] * 4 + ["leased", "degraded", "halted", "absent"]),
    )
    def update(self, data, health):
        id = data.draw(st.sampled_from(sorted(self.devices)))
        lease = self.pools[0].update(id, health)
        self.devices[id][:2] = ["ready" if health == "leased" else health, self.now()]
        holders = [r for r, (held, *_) in self.granted.items() if id in held]
        assert (lease is not None) == bool(holders)
        if lease is not None:
            assert lease.expires_ns == self.granted[holders[0]][3]

    def remove(self, id, which):
        if id not in self.devices:
            assert not self.pools[which].remove(id)
            return
        assert self.pools[which].remove(id)
        del self.devices[id]
        for held, *_ in self.granted.values():
            held.discard(id)

    @rule(
        seconds=st.sampled_from([0.5, 1.0, 1.5, 2.5, 4.0, 9.0, 11.0]), alive=st.sampled_from("yyyn")
    )
    def tick(self, seconds, alive):
        self.clock.tick(seconds)
        for request, (_, _, _, expires_ns) in list(self.granted.items()):
            if expires_ns <= self.now():
                self.end(request, expires_ns)
        for request, (_, _, _, polled_ns, _) in list(self.waiting.items()):
            if polled_ns <= self.now() - 10 * S:
                del self.waiting[request]
        for id in self.devices if alive == "y" else ():
            self.pools[0].update(id, self.devices[id][0])
            self.devices[id][1] = self.now()

    @rule(
        holder=st.sampled_from(HOLDERS),
        wanted=st.sampled_from(WANTS),
        ttl_s=st.sampled_from([2.0, 5.0, 20.0]),
        which=st.integers(0, 1),
    )
    def request(self, holder, wanted, ttl_s, which):
        request = self.pools[which].request(holder, wanted, ttl_s)
        assert all(request > other for other in [*self.waiting, *self.granted])
        self.waiting[request] = [holder, wanted, round(ttl_s * S), self.now(), self.last_turn() + 1]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), which=st.integers(0, 1))
    def poll(self, data, which):
        for request in data.draw(st.permutations(list(self.waiting))):
            self.poll_one(request, which)

    def poll_one(self, request, which):
        taken = {id for held, *_ in self.granted.values() for id in held}
        usable = self.usable()
        free = [id for id in usable if id not in taken]
        for other in self.order():
            wanted = self.waiting[other][1]
            chosen, whole = self.best(wanted, free)
            if other == request:
                break
            if self.best(wanted, usable)[1]:
                free = [id for id in free if id not in chosen]
        allocation = self.pools[which].poll(request)
        assert (allocation is not None) == whole
        self.waiting[request][3] = self.now()
        if allocation is None:
            return
        assert set(ids(allocation)) == set(chosen)
        places = [s for s in parse(wanted) for _ in range(s.count)]
        assert all(s.fits(KINDS[id]) for s, id in zip(places, ids(allocation), strict=True))
        for device in allocation.devices:
            assert device.token > self.token
            self.token = device.token
        turn = self.last_turn() + 1
        holder, _, ttl_ns, _, _ = self.waiting.pop(request)
        for other, entry in self.waiting.items():
            if entry[0] == holder and other > request:
                entry[4] = turn
        assert allocation.holder == holder
        self.granted[request] = [set(chosen), set(chosen), ttl_ns, self.now() + ttl_ns]
        self.held[request] = allocation

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def poll_granted(self, data):
        request = data.draw(st.sampled_from(list(self.held)))
        held, everything, *_ = self.granted[request]
        if held == everything:
            assert self.pools[0].poll(request) == self.held[request]
        else:
            with pytest.raises(LeaseError, match="taken out of the pool"):
                self.pools[0].poll(request)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), which=st.integers(0, 1))
    def renew(self, data, which):
        request = data.draw(st.sampled_from(list(self.held)))
        held, everything, ttl_ns, _ = self.granted[request]
        if held != everything:
            with pytest.raises(LeaseError, match="taken out of the pool"):
                self.pools[which].renew(self.held[request])
            return
        self.held[request] = self.pools[which].renew(self.held[request])
        assert self.held[request].expires_ns == self.now() + ttl_ns
        self.granted[request][3] = self.now() + ttl_ns

    @precondition(lambda self: self.held)
    @rule(data=st.data(), by_request=st.booleans())
    def give_back(self, data, by_request):
        request = data.draw(st.sampled_from(list(self.held)))
        pool = self.pools[0]
        assert pool.cancel(request) if by_request else pool.release(self.held[request])
        self.end(request, self.now())

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from(list(self.waiting)))
        assert self.pools[1].cancel(request)
        del self.waiting[request]

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def what_has_ended_never_comes_back(self, data):
        allocation = data.draw(st.sampled_from(self.gone))
        with pytest.raises(LeaseError):
            self.pools[0].renew(allocation)
        with pytest.raises(LeaseError):
            self.pools[0].poll(allocation.request)
        assert not self.pools[0].release(allocation)

    def reopen(self, id, which):
        self.pools[which].close()
        self.pools[which] = self.open()

    @rule(
        what=st.sampled_from(["register", "register", "register", "remove", "reopen", "reboot"]),
        id=st.sampled_from(sorted(KINDS)),
        which=st.integers(0, 1),
    )
    def something_rare(self, what, id, which):
        getattr(self, what)(id, which)

    def reboot(self, id, which):
        for pool in self.pools:
            pool.close()
        self.boots += 1
        self.clock.boot_id, self.clock.ns = f"boot-{self.boots}", 5 * S
        self.pools = [self.open() for _ in self.pools]
        for request in list(self.granted):
            self.end(request, 0)
        self.waiting.clear()
        for device in self.devices.values():
            device[1:] = [None, 0]

    @invariant()
    def nobody_holds_what_another_holds(self):
        live = [a for a in self.held.values() if a.expires_ns > self.now()]
        tokens = [device.token for a in live for device in a.devices]
        assert len(set(tokens)) == len(tokens)
        held = [id for a in live for id in self.granted[a.request][0]]
        assert len(set(held)) == len(held)

    @invariant()
    def devices_and_queue_are_as_the_model_says(self):
        shown = self.pools[0].devices()
        assert [device.id for device in shown] == sorted(self.devices)
        for device in shown:
            holders = [r for r, (held, *_) in self.granted.items() if device.id in held]
            assert len(holders) <= 1
            assert device.holder == (self.held[holders[0]].holder if holders else "")
            health = self.health(device.id)
            assert device.health == ("leased" if health == "ready" and holders else health)
            if holders:
                expires_ns = self.granted[holders[0]][3]
                assert device.lease_remaining_s == (expires_ns - self.now()) / S > 0
        queue = self.pools[1].queue()
        assert [w.request for w in queue] == self.order()
        assert [w.position for w in queue] == list(range(1, len(queue) + 1))
        for waiting in queue:
            never = not self.best(self.waiting[waiting.request][1], sorted(self.devices))[1]
            assert bool(waiting.reason) == never


TestPoolAgainstModel = PoolMachine.TestCase
TestPoolAgainstModel.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True
)


# --- fairness ---------------------------------------------------------------------------------


def test_each_holder_has_its_turn(pool):
    pool.register(arm("a"))
    requests = [(holder, pool.request(holder, "arm")) for holder in ("x", "x", "x", "y", "z", "y")]
    served = []
    while requests:
        for holder, request in list(requests):
            if allocation := pool.poll(request):
                served.append(holder)
                requests.remove((holder, request))
                pool.release(allocation)
    assert served == ["x", "y", "z", "x", "y", "x"]


def test_one_that_waits_keeps_only_what_it_could_use(pool):
    for record in (arm("a"), arm("b"), DeviceRecord("g", "gpu"), DeviceRecord("h", "gpu")):
        pool.register(record)
    first = pool.acquire("first", "id=a")
    big = pool.request("big", "2 arm, gpu")
    assert pool.poll(big) is None
    small = pool.request("small", "arm")
    assert pool.poll(small) is None
    assert pool.waiting(big).position == 1 and pool.waiting(small).position == 2
    other = pool.acquire("other", "gpu", timeout_s=0)
    with pytest.raises(LeaseError, match=r"no devices for 'gpu' within 0 s.*before it.*big"):
        pool.acquire("another", "gpu", timeout_s=0)
    pool.release(first)
    assert pool.poll(small) is None
    assert ids(pool.poll(big))[:2] == ["b", "a"]
    assert [device.id for device in pool.devices() if device.free] == []
    pool.release(other)
    assert pool.acquire("another", "gpu", timeout_s=0)


def test_one_that_waits_for_a_broken_device_keeps_nothing(pool):
    pool.register(arm("a"))
    pool.register(arm("b"), "halted", "e-stop")
    both = pool.request("both", "2 arm")
    assert pool.poll(both) is None and pool.waiting(both).reason == ""
    one = pool.acquire("one", "arm", timeout_s=0)
    beat(pool, "b")
    assert pool.poll(both) is None
    pool.release(one)
    with pytest.raises(LeaseError, match=r"before it in the queue: both \('2 arm'\)"):
        pool.acquire("one", "arm", timeout_s=0)
    assert len(ids(pool.poll(both))) == 2


@pytest.mark.parametrize("seed", range(6))
def test_nobody_starves(pool, clock, seed):
    """Clients that always want something: each is served after those before it have ended."""
    draw = random.Random(seed)
    names = ["a", "b", "c", "d"]
    for name in names:
        pool.register(arm(name, *draw.sample(["x", "y"], draw.randint(0, 2))))
    wants = ["arm", "arm", "arm", "2 arm", "4 arm", "id=a, arm"]
    longest = 4
    waits, leases = {}, {}
    for step in range(150):
        clock.tick(1.0)
        beat(pool, *names)
        for client in draw.sample(range(6), 6):
            if client in leases:
                allocation, until = leases[client]
                if step >= until:
                    pool.release(allocation)
                    del leases[client]
                continue
            if client not in waits:
                waits[client] = (pool.request(f"h{client}", wants[client], 60.0), step)
                before = pool.waiting(waits[client][0]).position
                waits[client] += (step + before * (longest + 2),)
            request, _, latest = waits[client]
            assert step <= latest, (client, pool.queue())
            if allocation := pool.poll(request):
                leases[client] = (allocation, step + draw.randint(1, longest))
                del waits[client]


def test_a_request_that_nobody_polls_leaves_the_queue(pool, clock):
    pool.register(arm("a"))
    dead, alive = pool.request("dead", "arm"), pool.request("alive", "arm")
    for _ in range(3):
        clock.tick(3.0)
        beat(pool, "a")
        assert pool.poll(alive) is None
    clock.tick(1.0)
    assert pool.poll(alive)
    with pytest.raises(LeaseError, match="not polled for 10 s"):
        pool.poll(dead)


def test_the_least_recently_used_device_is_preferred(pool, clock):
    for id in "abc":
        pool.register(arm(id))
    used = []
    for _ in range(5):
        clock.tick(0.1)
        held = pool.acquire("h", "arm")
        used += ids(held)
        pool.release(held)
    assert used == ["a", "b", "c", "a", "b"]


# --- leases -----------------------------------------------------------------------------------


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


# --- time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_jumps_of_the_wall_clock_have_no_effect(tmp_path, monkeypatch, jump_s):
    with Pool(tmp_path / "pool.sqlite") as pool:
        pool.register(arm("a"))
        held = pool.acquire("h", "arm", ttl_s=0.5)
        wall_s, wall_ns = time.time, time.time_ns
        monkeypatch.setattr(time, "time", lambda: wall_s() + jump_s)
        monkeypatch.setattr(time, "time_ns", lambda: wall_ns() + round(jump_s * S))
        held = pool.renew(held)
        assert 0 < pool.devices()[0].lease_remaining_s <= 0.5
        assert held.expires_ns - BootClock().now_ns() <= 0.5 * S
        assert pool.devices()[0].health == "leased"
        time.sleep(0.55)
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


# --- processes --------------------------------------------------------------------------------

WORKER = """
import os, random, sys, time
from embodied.core.errors import LeaseError
from hal.pool.pool import BootClock, Pool
path, log, name, ttl_s = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
clock = BootClock()
def note(what, held, t_ns):
    for device in held.devices:
        os.write(out, f"{what} {device.id} {device.token} {t_ns}\\n".encode())
pool = Pool(path)
draw = random.Random(name)
while True:
    held = pool.acquire(name, draw.choice(["arm", "arm", "2 arm"]), ttl_s=ttl_s, timeout_s=60)
    note("granted", held, held.expires_ns - round(ttl_s * 1e9))
    try:
        for _ in range(draw.randint(0, 3)):
            time.sleep(ttl_s / 4)
            held = pool.renew(held)
            note("until", held, held.expires_ns)
    except LeaseError:
        continue  # a loaded machine: too late
    if draw.random() < 0.7:
        note("until", held, clock.now_ns())
        pool.release(held)
"""


def spawn(script, *args, **kwargs):
    return subprocess.Popen([sys.executable, "-c", script, *map(str, args)], **kwargs)


def test_processes_that_are_killed_neither_keep_nor_share_a_device(tmp_path):
    path, log, ttl_s = tmp_path / "pool.sqlite", tmp_path / "log", 0.4
    draw = random.Random(1)
    with Pool(path) as pool:
        for id in "ab":
            pool.register(arm(id))
        workers = [spawn(WORKER, path, log, f"w{k}-0", ttl_s) for k in range(4)]
        kills = 0
        end_s = time.monotonic() + 5.0
        while time.monotonic() < end_s:
            time.sleep(0.15)
            beat(pool, "a", "b")
            if log.exists() and draw.random() < 0.2:
                k = draw.randrange(len(workers))
                workers[k].send_signal(signal.SIGKILL)
                assert workers[k].wait() == -signal.SIGKILL  # it never failed by itself
                kills += 1
                for waiting in pool.queue():  # rather than wait until nobody has polled it
                    if waiting.holder.startswith(f"w{k}-"):
                        pool.cancel(waiting.request)
                workers[k] = spawn(WORKER, path, log, f"w{k}-{kills}", ttl_s)
        for worker in workers:
            worker.kill()
            worker.wait()
        beat(pool, "a", "b")
        assert all(device.lease_remaining_s <= ttl_s for device in pool.devices())
        for waiting in pool.queue():
            pool.cancel(waiting.request)
        assert pool.acquire("after", "2 arm", timeout_s=2)
    leases = {}
    for line in log.read_text().splitlines():
        what, id, token, t_ns = line.split()
        lease = leases.setdefault((id, int(token)), [None, None])
        lease[what == "until"] = int(t_ns)
    assert kills >= 3 and len(leases) > 10
    assert len({token for _, token in leases}) == len(leases)
    for id in "ab":
        spans = [leases[key] for key in sorted(leases) if key[0] == id]
        for (start_ns, until_ns), (next_ns, _) in itertools.pairwise(spans):
            assert start_ns < next_ns
            assert (until_ns or start_ns) <= next_ns


HAMMER = """
import os, sys
from hal.pool.pool import DeviceRecord, Pool
pool = Pool(sys.argv[1])
pool.register(DeviceRecord("a", "so101"))
for waiting in pool.queue():
    pool.cancel(waiting.request)
while True:
    held = pool.acquire("h", "so101", ttl_s=0.02, timeout_s=60)
    os.write(1, f"{held.devices[0].token}\\n".encode())
    pool.update("a", "ready", detail="x" * 400)
    if held.devices[0].token % 2:
        pool.release(held)
"""


def test_the_file_survives_kills_in_the_middle_of_writes(tmp_path):
    path = tmp_path / "pool.sqlite"
    tokens = []
    for k in range(4):
        child = spawn(HAMMER, path, stdout=subprocess.PIPE)
        tokens.append(int(child.stdout.readline()))
        time.sleep(0.05 + 0.02 * k)
        child.kill()
        tokens += [int(token) for token in child.stdout.read().split(b"\n")[:-1]]
        child.stdout.close()
        child.wait()
    assert tokens == sorted(set(tokens))
    with Pool(path) as pool:
        pool.register(arm("a"))
        for waiting in pool.queue():
            pool.cancel(waiting.request)
        assert pool.acquire("h", "arm", timeout_s=1).devices[0].token > tokens[-1]


STUCK = """
import sys, time
from hal.pool.pool import DeviceRecord, Pool
pool = Pool(sys.argv[1])
with pool._file.transaction() as tx:
    tx.rows("DELETE FROM devices")
    print("inside", flush=True)
    time.sleep(60)
"""


def test_a_process_stuck_in_a_transaction_is_named_and_undone_when_killed(tmp_path):
    path = tmp_path / "pool.sqlite"
    with Pool(path, busy_s=0.1) as pool:
        pool.register(arm("a"))
        child = spawn(STUCK, path, stdout=subprocess.PIPE)
        try:
            assert child.stdout.readline() == b"inside\n"
            with pytest.raises(PoolBusyError, match=rf"locked for 0.1 s by process {child.pid}"):
                pool.devices()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        assert [device.id for device in pool.devices()] == ["a"]


def test_a_forked_child_may_go_on_with_its_parents_pool(tmp_path):
    with Pool(tmp_path / "pool.sqlite") as pool:
        pool.register(arm("a"))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                parents = pool._file._connection
                pool.acquire("child", "arm", ttl_s=60)
                code = int(pool._file._connection is parents)
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert pool.devices()[0].holder == "child"


def test_threads_share_a_pool(tmp_path):
    with Pool(tmp_path / "pool.sqlite") as pool:
        pool.register(arm("a"))
        inside, worst = [], []

        def work(name):
            for _ in range(10):
                held = pool.acquire(name, "arm", timeout_s=20)
                inside.append(name)
                worst.append(len(inside))
                inside.remove(name)
                pool.release(held)
                pool.update("a", "ready")

        threads = [threading.Thread(target=work, args=(f"t{k}",)) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert worst == [1] * 30


# --- holding ----------------------------------------------------------------------------------


def test_holding_renews_and_gives_back(tmp_path):
    with Pool(tmp_path / "pool.sqlite") as pool:
        pool.register(arm("a"))
        with Holding(pool, "h", "arm", ttl_s=0.3) as held:
            first = held.allocation.expires_ns
            time.sleep(0.7)
            assert held.lost == "" and held.allocation.expires_ns > first
            assert [device.id for device in held.devices] == ["a"]
            assert pool.devices()[0].holder == "h"
        assert held.lost == "it was given back" and pool.devices()[0].free
        with pytest.raises(ValueError, match="mine"), Holding(pool, "h", "arm"):
            raise ValueError("mine")
        assert pool.devices()[0].free


def test_holding_notices_a_loss(tmp_path):
    reasons = []
    with Pool(tmp_path / "pool.sqlite") as pool:
        pool.register(arm("a"))
        with Holding(pool, "h", "arm", ttl_s=0.3, on_lost=reasons.append) as held:
            pool.remove("a")
            time.sleep(0.3)
            assert "taken out of the pool" in held.lost and reasons == [held.lost]


def test_holding_knows_that_time_is_up_even_if_its_thread_slept(pool, clock):
    pool.register(arm("a"))
    with pytest.raises(LeaseError, match="holds nothing yet"):
        _ = Holding(pool, "h", "arm").devices
    with Holding(pool, "h", "arm", ttl_s=10) as held:
        assert held.lost == ""
        clock.tick(10.5)
        assert held.lost == "the lease ended 0.5 s ago and could not be renewed in time"


def test_holding_tries_again_while_the_pool_is_busy(tmp_path):
    path = tmp_path / "pool.sqlite"
    with Pool(path, busy_s=0.02) as pool, Pool(path) as other:
        pool.register(arm("a"))
        with Holding(pool, "h", "arm", ttl_s=0.6) as held:
            with other._file.transaction():
                time.sleep(0.4)
            assert held.lost == ""
            time.sleep(0.4)
            assert held.lost == ""
            with other._file.transaction():
                time.sleep(0.8)
            assert held.lost and pool.devices()[0].free


# --- the file ---------------------------------------------------------------------------------


def test_a_damaged_file_is_named(tmp_path, clock):
    path = tmp_path / "pool.sqlite"
    path.write_bytes(b"these are no devices" * 100)
    with pytest.raises(CorruptDataError, match=r"pool.sqlite is damaged: file is not a database"):
        Pool(path)
    path.unlink()
    with Pool(path, clock=clock) as pool:
        for k in range(200):
            pool.register(arm(f"a:{k}"))
    data = bytearray(path.read_bytes())
    data[4096 * 2 : 4096 * 5] = os.urandom(4096 * 3)
    path.write_bytes(data)
    with pytest.raises(CorruptDataError, match="damaged"), Pool(path, clock=clock) as pool:
        pool.devices()


def test_damage_under_a_running_pool_is_named(pool, tmp_path):
    pool.register(arm("a"))
    pool._file._connection.execute("UPDATE devices SET record = '{'")
    with pytest.raises(CorruptDataError, match="damaged DeviceRecord"):
        pool.devices()


def test_a_foreign_file_is_left_alone(tmp_path):
    path = tmp_path / "pool.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="SQLite file of another program"):
        Pool(path)
    assert path.read_bytes() == before


def test_another_version_is_refused(tmp_path, clock):
    path = tmp_path / "pool.sqlite"
    Pool(path, clock=clock).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="has version 99 of the pool's format"):
        Pool(path)


def test_a_deleted_file_is_begun_anew_by_all(tmp_path, clock):
    path = tmp_path / "pool.sqlite"
    with Pool(path, clock=clock) as pool, Pool(path, clock=clock) as other:
        pool.register(arm("a"))
        held = pool.acquire("h", "arm")
        for file in tmp_path.glob("pool.sqlite*"):
            file.unlink()
        with pytest.raises(LeaseError, match="register it"):
            other.update("a", "ready")
        other.register(arm("a"))
        again = other.acquire("h", "arm", timeout_s=0)
        assert again.request == held.request  # what tells them apart is the token
        again = msgspec.structs.replace(again, devices=())
        for stale in (held, again):
            with pytest.raises(LeaseError):
                pool.renew(stale)
            assert not pool.release(stale)
        with pytest.raises(LeaseError, match="held by h"):
            pool.acquire("i", "arm", timeout_s=0)
        other.close()
        assert pool.devices()[0].holder == "h"


def test_a_pool_needs_a_directory_and_closes_twice(tmp_path, clock):
    with pytest.raises(ConfigError, match=r"cannot be used.*EMBODIED_STATE"):
        Pool(tmp_path / "none" / "pool.sqlite")
    with pytest.raises(ConfigError, match="cannot be used"):
        Pool(tmp_path)
    pool = Pool(tmp_path / "pool.sqlite", clock=clock)
    pool.close()
    pool.close()
    with pytest.raises(Exception, match="is closed"):
        pool.devices()


FULL = """
import os, sys
from embodied.core.errors import StorageFullError
from hal.pool.pool import DeviceRecord, Pool
folder = sys.argv[1]
pool = Pool(folder + "/pool.sqlite")
pool.register(DeviceRecord("kept", "so101"))
held = pool.acquire("h", "so101", ttl_s=600)
ballast = os.open(folder + "/ballast", os.O_WRONLY | os.O_CREAT)
try:
    while True:
        os.write(ballast, bytes(1 << 12))
except OSError:
    pass
full = 0
for k in range(300):
    try:
        pool.register(DeviceRecord(f"d:{k}", "so101", labels={"x": "y" * 3000}))
    except StorageFullError as error:
        assert "/pool.sqlite" in str(error), error
        full += 1
assert full > 10, full
os.ftruncate(ballast, 0)
assert pool.renew(held).devices == held.devices
assert len(pool.devices()) == 301 - full
pool.register(DeviceRecord("later", "so101"))
print("ok")
"""


def test_a_full_disk_is_named_and_passes(tmp_path):
    run = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):
        command = [*unshare, "sh", "-c", run, str(tmp_path)]
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            break
    else:
        pytest.skip("no private mount namespace here")
    command += [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "ok\n", done.stderr


# --- the state directory ----------------------------------------------------------------------


def test_the_state_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("EMBODIED_STATE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_dir() == tmp_path / "home/.local/state/embodied"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state_dir() == tmp_path / "xdg/embodied"
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path / "mine"))
    assert pool_path() == tmp_path / "mine/pool.sqlite"
    assert stat.S_IMODE(os.stat(tmp_path / "mine").st_mode) == 0o700
    monkeypatch.setenv("EMBODIED_STATE", "mine")
    with pytest.raises(ConfigError, match="EMBODIED_STATE is 'mine'; it must be an absolute path"):
        state_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot be made"):
        state_dir()


def test_a_pool_on_a_network_file_system_is_refused(tmp_path, monkeypatch):
    check_local(tmp_path)
    monkeypatch.setattr("hal.pool.state._filesystem", lambda path: "nfs4")
    with pytest.raises(ConfigError, match=r"network file system \(nfs4\)"):
        Pool(tmp_path / "pool.sqlite")
