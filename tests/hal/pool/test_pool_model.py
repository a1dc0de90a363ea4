"""The pool against a model of plain dicts, by random calls."""

import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pooling import FakeClock, S, arm, ids

from embodied.core.errors import LeaseError
from hal.pool.pool import DeviceRecord, Pool
from hal.pool.selectors import parse

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
