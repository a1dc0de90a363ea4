import os
import signal
import sys
import time

import numpy as np
import pytest

from embodied.buffer.load.loader import LoaderClient
from embodied.buffer.load.ring import BatchRing, RingArray, RingLayout, ring_layout
from embodied.buffer.sample.batches import ArraySize
from embodied.buffer.write.writer import ReplayWriter
from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError
from tests.support.picture_buffer import picture, picture_step, write_pictures

FRONT = "observation.images.front"
_SERVE = """
import socket, sys
import numpy as np
from pathlib import Path
from embodied.buffer.sample.priorities import Prioritised
from embodied.buffer.load.loader import Loader
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.samplers import WindowSampler
from embodied.buffer.sample.windows import WindowSpec

path, keys, strategy, link = sys.argv[1:]
reader = ReplayReader(Path(path))
strategy = Prioritised(Prioritised.Config(alpha=1.0)) if strategy == "prioritised" else None
spec = WindowSpec(1, 2, tuple(keys.split(",")))
with socket.socket(fileno=int(link)) as connection:
    rng = np.random.default_rng(0)
    sampler = WindowSampler(reader, spec, strategy=strategy)
    Loader(reader, sampler, connection, 8, rng, refresh_s=0.05).run(lambda: False)
"""


@pytest.fixture
def start(tmp_path):
    clients = []

    def start(keys=FRONT, strategy="uniform", **options):
        command = [sys.executable, "-c", _SERVE, str(tmp_path / "buffer"), keys, strategy]
        clients.append(LoaderClient(command, **options))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def wait_batch(client, priorities=None):
    deadline = time.monotonic() + 60
    batch = client.next(1.0, priorities)
    while batch is None:
        assert time.monotonic() < deadline
        batch = client.next(1.0)
    return batch


def check(batch):
    assert batch[FRONT].shape == (8, 1, 64, 64, 3)
    for image, action in zip(batch[FRONT][:, 0], batch["action"][:, 0, 0].astype(int), strict=True):
        np.testing.assert_array_equal(image, picture(action // 1000, action % 1000))
    return set((batch["action"][:, 0, 0] // 1000).astype(int).tolist())


def test_batches_come_and_follow_what_is_recorded(tmp_path, start):
    client = start()
    assert client.next(0.2) is None
    with ReplayWriter(tmp_path / "buffer", 1 << 20) as writer:
        for episode in range(4):
            for index in range(11):
                writer.append(picture_step(episode, index, 10))
        writer.flush()
        seen = set()
        for _ in range(30):
            seen |= check(wait_batch(client))
        assert seen == {0, 1, 2, 3}
        for index in range(11):
            writer.append(picture_step(4, index, 10))
        writer.flush()
        deadline = time.monotonic() + 60
        while 4 not in check(wait_batch(client)):
            assert time.monotonic() < deadline
    assert client.counts.steps == 50 and client.counts.candidates == 50
    assert client.counts.episodes == 5 and client.counts.hits > 0


def test_a_killed_loader_is_started_again_but_not_for_ever(tmp_path, start):
    write_pictures(tmp_path / "buffer", range(3))
    reasons = []
    client = start(on_restart=reasons.append)
    for _ in range(2):
        check(wait_batch(client))
        os.kill(client.pid, signal.SIGKILL)
        client.wait_ended()
        check(wait_batch(client))
    assert reasons == ["the loader process ended with status -9"] * 2
    with pytest.raises(EmbodiedError, match="4 times within a minute"):
        for _ in range(2):
            os.kill(client.pid, signal.SIGKILL)
            client.wait_ended()
            wait_batch(client)


def test_it_tells_of_its_memory_once_or_at_once(tmp_path, start):
    write_pictures(tmp_path / "buffer", range(2))
    early, late = start(), start()
    told = []
    early.on_ring(told.append)
    wait_batch(early)
    wait_batch(late)
    late.on_ring(told.append)
    assert len(told) == 2 and len(told[0]) == len(told[1]) > 0


def test_it_says_what_it_cannot_do_and_ends_when_nobody_listens(tmp_path, start):
    write_pictures(tmp_path / "buffer", range(3))
    with pytest.raises(ConfigError, match=r"observation\.nothing. is not recorded"):
        wait_batch(start("observation.nothing"))
    client = start()
    wait_batch(client)
    client.close()
    assert client.wait_ended() == 0


def test_priorities_come_back(tmp_path, start):
    write_pictures(tmp_path / "buffer", range(3))
    client = start(strategy="prioritised")
    batch = wait_batch(client)
    for _ in range(200):
        chosen = (batch["action"][:, 0, 0] == 1003).astype(float)
        batch = wait_batch(client, 1e-6 + chosen)
    assert (batch["action"][:, 0, 0] == 1003).mean() > 0.5


def test_a_ring_holds_what_is_written_to_it():
    sizes = {
        "a": ArraySize(np.dtype(np.uint8), (3, 5)),
        "b": ArraySize(np.dtype(np.float32), (3,)),
        "none": ArraySize(np.dtype(np.float32), (0, 4)),
    }
    ring = BatchRing.create(ring_layout(sizes, 3))
    for slot in range(3):
        ring.arrays(slot)["a"][...] = slot
        ring.arrays(slot)["b"][...] = 10 * slot
    other = BatchRing(ring.layout, os.dup(ring.fd))
    ring.close()
    for slot in range(3):
        assert (other.arrays(slot)["a"] == slot).all() and (
            other.arrays(slot)["b"] == 10 * slot
        ).all()
        assert other.arrays(slot)["none"].shape == (0, 4)
        assert other.arrays(slot)["a"].ctypes.data % 64 == 0
    for array in (RingArray("a", "uint8", (5000,), 0), RingArray("a", "object", (1,), 0)):
        with pytest.raises(CorruptDataError, match="does not lie in a slot"):
            BatchRing(RingLayout(1, 4096, (array,)), os.dup(other.fd))
    with pytest.raises(CorruptDataError, match="shared memory of"):
        BatchRing(RingLayout(64, 1 << 20, ()), os.dup(other.fd))
    other.close()
