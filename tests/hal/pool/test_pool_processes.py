"""Processes and threads that share a pool, and are killed or stuck in it."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from pooling import arm, beat

from hal.pool.pool import Pool, PoolBusyError

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
        begun_s = time.monotonic()

        def enough():
            granted = log.read_text().count("granted") if log.exists() else 0
            return kills >= 3 and granted > 20

        while (spent_s := time.monotonic() - begun_s) < 5.0 or not (enough() or spent_s > 60.0):
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
