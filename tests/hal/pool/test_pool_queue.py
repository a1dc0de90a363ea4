"""Who is served next, and what one that waits keeps from others."""

import random

import pytest
from pooling import arm, beat, ids

from embodied.core.errors import LeaseError
from hal.pool.pool import DeviceRecord


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
