"""Readers beside a writer that rotates and deletes; writers beside each other."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from aftermath import read
from story import IMAGE, SMALL_IMAGE, STATE, check_steps, make_episode, make_step, same

from embodied.buffer.log import tail
from embodied.buffer.log.segments import SegmentFile, list_segments
from embodied.buffer.log.tail import LogReader
from embodied.buffer.read import replay
from embodied.buffer.read.cache import SegmentCache
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.samplers import WindowSampler
from embodied.buffer.sample.windows import WindowSpec
from embodied.buffer.serve.service import BufferClient, BufferService
from embodied.buffer.steps.blocks import Block
from embodied.buffer.write.progress import StepOrderError
from embodied.buffer.write.retention import Retention
from embodied.buffer.write.writer import ReplayWriter
from embodied.core.errors import RunInUseError

SUPPORT = str(Path(__file__).parents[3] / "support")
RETENTION = Retention(max_bytes=90_000, pinned=("demo",))

WRITE = """
import random, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from story import CODECS, make_episode
from embodied.buffer.write.retention import Retention
from embodied.buffer.write.writer import ReplayWriter
rng = random.Random(0)
retention = Retention(max_bytes=90_000, pinned=("demo",))
options = {"codecs": CODECS, "retention": retention, "chunk_rows": 2}
with ReplayWriter(Path(sys.argv[2]), 25_000, **options) as writer:
    for step in make_episode("demo", 0, 3):
        writer.append(step)
    for episode in range(int(sys.argv[3])):
        for step in make_episode("a", episode, rng.randint(1, 6)):
            writer.append(step)
        if rng.random() < 0.5:
            writer.flush()
        if rng.random() < 0.1 and episode > 3:
            writer.delete("a", episode - 1)
"""


def check_episode(reader, info):
    """Every step of a closed episode, all arrays."""
    for index, step in enumerate(reader.steps(info)):
        assert same(step, make_step(*info.key, index, step.final)), step.key


def test_a_reader_during_rotation_and_deletion(ram_path, report):
    path, counts, rng = ram_path / "log", Counter(), np.random.default_rng(0)
    spec = WindowSpec(2, 2, observation_keys=(IMAGE, SMALL_IMAGE, STATE))
    command = [sys.executable, "-c", WRITE, SUPPORT, str(path), "500"]
    reader = ReplayReader(path, ram_bytes=1 << 20)
    sampler = WindowSampler(reader, spec)
    with subprocess.Popen(command) as writer:
        while writer.poll() is None:
            counts["steps"] += reader.refresh()
            sampler.refresh()
            for info in random.sample(reader.finished(), min(3, reader.num_closed)):
                check_episode(reader, info)
                counts["episodes checked"] += 1
            if sampler.num_candidates:
                batch = sampler.sample(8, rng)
                assert batch[IMAGE].shape == (8, 2, 40, 40, 3)
            counts["refreshes"] += 1
            time.sleep(float(rng.choice([0, 0, 0.05])))
    assert writer.returncode == 0
    reader.refresh()
    counts["removed"] = len(reader.removed_episodes())
    left = {info.key for info in reader.finished()}
    assert reader.damaged == [] and left == read(path)[1]
    assert ("demo", 0) in left and ("a", 499) in left
    assert counts["removed"] > 50 and counts["episodes checked"] > 50
    report(f"reader beside a writer: {dict(counts)}")


def test_anything_between_two_operations_of_a_reader(ram_path, monkeypatch, report):
    """Whatever the reader opens may have been sealed or deleted since it looked."""
    path, rng, counts = ram_path / "log", random.Random(0), Counter()
    writer = ReplayWriter(path, 25_000, retention=RETENTION, chunk_rows=1)
    numbers, busy = iter(range(1 << 30)), []

    def write(few):
        busy.append(True)
        for _ in range(rng.randint(0, few)):
            for step in make_episode("a", next(numbers), rng.randint(1, 4)):
                writer.append(step)
            if rng.random() < 0.7:
                writer.flush()
        busy.clear()

    def before(owner, name):
        real = getattr(owner, name)

        def called(*args, **kwargs):
            if not busy and rng.random() < 0.3:
                write(rng.choice([2, 30]))
                counts[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    write(20)
    reader = ReplayReader(path, ram_bytes=1 << 20)
    before(SegmentFile, "__init__")
    before(SegmentFile, "record_at")
    before(Block, "load")
    before(SegmentCache, "open")
    before(replay, "list_segments")
    before(tail, "list_segments")
    for turn in range(60):
        write(2)
        reader.refresh()
        if turn % 3 == 0:  # another one, to which the open segment is new
            with ReplayReader(path) as late:
                late.refresh()
                for info in rng.sample(late.finished(), min(2, late.num_closed)):
                    check_episode(late, info)
                assert late.damaged == []
        for info in rng.sample(reader.finished(), min(2, reader.num_closed)):
            check_episode(reader, info)
    monkeypatch.undo()
    writer.close()
    reader.refresh()
    assert {info.key for info in reader.finished()} == read(path)[1]
    assert reader.damaged == []
    report(f"writer between two operations of a reader: {dict(counts)}")
    wanted = {"__init__", "record_at", "load", "open", "list_segments"}
    assert counts.keys() == wanted


def test_a_name_that_is_not_seen_while_it_changes(ram_path, monkeypatch):
    """A directory's listing may miss a file that is renamed meanwhile."""
    path, hidden = ram_path / "log", set()

    def listing(directory):
        found = list_segments(directory)
        missed = hidden & found.keys()
        hidden.difference_update(missed)
        return {number: sealed for number, sealed in found.items() if number not in missed}

    monkeypatch.setattr(replay, "list_segments", listing)
    monkeypatch.setattr(tail, "list_segments", listing)
    reader = ReplayReader(path)
    known = {}
    with ReplayWriter(path, 2600) as writer:
        for number in range(12):
            for step in make_episode("a", number, 4, 0):
                writer.append(step)
                known[step.key] = step
            hidden.update(list_segments(path))
            reader.refresh()
            reader.refresh()
            assert reader.num_closed == number + 1 and reader.removed_episodes() == []
    hidden.update(list(list_segments(path))[1::2])
    again = LogReader(path)
    assert len({record.segment for record in again.poll()}) == len(list_segments(path))


def test_the_lock_goes_with_its_process(ram_path):
    script = "import sys, time\nfrom embodied.buffer.write.writer import ReplayWriter\n"
    script += "writer = ReplayWriter(sys.argv[1])\nprint('up', flush=True)\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", script, str(ram_path)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"up\n"
    before = {file.name: file.read_bytes() for file in ram_path.glob("*.seg*")}
    for claim in (
        lambda: ReplayWriter(ram_path),
        lambda: BufferService(ram_path, f"ipc://{ram_path}/s"),
    ):
        with pytest.raises(RunInUseError, match=f"pid {child.pid}"):
            claim()
    assert before == {file.name: file.read_bytes() for file in ram_path.glob("*.seg*")}
    child.send_signal(signal.SIGKILL)
    child.wait()
    ReplayWriter(ram_path).close()


@contextmanager
def serving(path, address):
    with BufferService(path, address, 20_000) as service:
        stop = threading.Event()
        thread = threading.Thread(target=service.serve, args=(stop.is_set, 0.005))
        thread.start()
        try:
            yield service
        finally:
            stop.set()
            thread.join()


def test_two_clients_of_one_stream(ram_path):
    """Each is given numbers of its own."""
    address, rng, known = f"ipc://{ram_path}/s", random.Random(0), {}
    with (
        serving(ram_path / "log", address),
        BufferClient(address, "a", batch_steps=4) as one,
        BufferClient(address, "a", batch_steps=4) as two,
    ):
        for turn in range(12):
            first, second = one.next_episode(), two.next_episode()
            assert (first, second) == (2 * turn, 2 * turn + 1)
            queues = {one: make_episode("a", first, 7, 0), two: make_episode("a", second, 5, 0)}
            while any(queues.values()):
                client = rng.choice([client for client, queue in queues.items() if queue])
                step = queues[client].pop(0)
                client.add(step)
                known[step.key] = step
                if rng.random() < 0.2:
                    client.add(known[rng.choice(list(known))])  # it does not know the answer
                    client.flush()
            one.flush()
            two.flush()
        assert one.stats().steps == 12 * 12 and one.stats().episodes == 24
    found, closed = read(ram_path / "log")
    check_steps(found, known)
    assert found.keys() == known.keys() and len(closed) == 24


def test_two_clients_of_one_episode(ram_path):
    address, steps = f"ipc://{ram_path}/s", make_episode("a", 0, 9, 0)
    with (
        serving(ram_path / "log", address),
        BufferClient(address, "a", resend_s=0.2) as one,
        BufferClient(address, "a", resend_s=0.2) as two,
    ):
        for step in steps[:4]:
            one.add(step)
        one.flush()
        two.add(steps[6])
        with pytest.raises(StepOrderError, match=r"'a', episode 0.*index 6.*index 4 is next"):
            two.flush(0.5)
        for step in steps[4:6]:
            one.add(step)
        one.flush()
        two.flush(5)  # it was kept
        for client in (two, one):
            for step in steps:
                client.add(step)
            client.flush()
        assert one.stats().steps == 9
        late = make_step("a", 0, 10, side=0)
        with BufferClient(address, "a") as third:
            third.add(late)
            with pytest.raises(
                StepOrderError, match=r"'a', episode 0 is closed.*index 9.*index 10"
            ):
                third.flush(0.3)
    found, _ = read(ram_path / "log")
    check_steps(found, {step.key: step for step in steps})
    assert len(found) == 10
