"""A link that is cut after every byte of a transfer: steps go up, weights come down, all the same.

Every case has work of its own: an episode in the host's spool and a new version at the learner's.
It begins while the link is up and idle; then so many bytes more pass in one direction, and the
connection is gone. Both transfers go on over the next one.
"""

import tempfile
import threading
import time
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
from sites import Learner, Robots, closing
from sizes import size
from spooling import check_arrived, record

from embodied.buffer.log.tail import LogReader
from embodied.buffer.serve.service import BufferService
from embodied.buffer.serve.sink import LocalBuffer
from embodied.buffer.spool import uploader
from embodied.buffer.steps.records import decode_header
from embodied.comms.links import client
from embodied.run.site import hostlink
from embodied.run.telemetry import address
from embodied.weights.mirror import WeightMirror
from embodied.weights.store import WeightStore
from sim.links import Profile
from sim.network import Relay

HOST = "arm"
STREAM = f"{HOST}/arm"
PIECE_BYTES = 64
MOST_S = 30.0
PATIENCE_S = 2 * MOST_S
"""What is lost is asked for again because the link says so, never because time has passed."""


class Case:
    """A learner's site and a host, through all cases. acts: the version at the host."""

    def __init__(self, learner, host, relay, spool):
        self.learner, self.host, self.relay, self.spool = learner, host, relay, spool
        self.here = WeightStore(host.run.weights)
        self.log = LogReader(learner.run.buffer)
        self.arrived = set()
        self.number = 0
        self.acts = 0

    def run(self, num_bytes=None, direction="up"):
        """One transfer, cut after so many bytes of a direction; the bytes that passed, by it."""
        self.pump_until(lambda: self.host.link.connected)
        relay, before = self.relay, (self.relay.bytes_up, self.relay.bytes_down)
        cuts = relay.cuts + (num_bytes is not None)
        self.number += 1
        record(self.spool, self.number, 1, STREAM)
        self.spool.flush()
        assert self.learner.store.publish({"w": weights(self.number)}, {}).version == self.number
        self.learner.store.prune(3)
        if num_bytes is not None:
            relay.cut_after(num_bytes, direction)
        self.pump_until(lambda: self.acts == self.number and self.delivered and relay.cuts == cuts)
        assert {(self.number, 0), (self.number, 1)} <= self.look(), "acknowledged, and not there"
        return {"up": relay.bytes_up - before[0], "down": relay.bytes_down - before[1]}

    @property
    def delivered(self):
        return self.host.link.status().hosts[0].spool_steps == 0

    def pump_until(self, condition):
        """At every instant what acts is the version before or the new one, whole."""
        deadline_s = time.monotonic() + MOST_S
        while not condition():
            assert time.monotonic() < deadline_s, self.host.link.status()
            self.host.link.pump()
            version = self.here.latest_version() or 0
            if version != self.acts:
                assert version == self.acts + 1
                arrays, _ = self.here.load(version)
                np.testing.assert_array_equal(arrays["w"], weights(version))
                self.acts = version
            time.sleep(0.001)

    def look(self):
        """(episode, index) of all steps that are durable at the learner's site, none twice."""
        for entry in self.log.poll():
            if entry.schema > 1:
                header, _ = decode_header(entry.payload)
                assert (header.episode, header.index) not in self.arrived
                self.arrived.add((header.episode, header.index))
        return self.arrived


def weights(version):
    return np.random.default_rng(version).integers(0, 256, 24).astype(np.float32)


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(client, "FIRST_BACKOFF_S", 0.002)
    monkeypatch.setattr(client, "MAX_BACKOFF_S", 0.01)
    monkeypatch.setattr(hostlink, "_WEIGHTS_S", 0.01)
    monkeypatch.setattr(hostlink, "_LOST_S", PATIENCE_S)
    monkeypatch.setattr(uploader, "_RETRY_S", 0.005)
    monkeypatch.setitem(uploader.Uploader.__init__.__kwdefaults__, "resend_s", PATIENCE_S)
    asked = partialmethod(WeightMirror.next_request, PIECE_BYTES)
    monkeypatch.setattr(WeightMirror, "next_request", asked)
    memory = Path("/dev/shm")  # every case waits for a dozen fsyncs
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        learner = Learner(Path(folder))
        buffer = learner.run.buffer, address(learner.sockets, "buffer"), 1 << 22
        target = "127.0.0.1", int(learner.address.rpartition(":")[2])
        with closing(learner), BufferService(*buffer) as service, Relay(target, Profile()) as relay:
            stop = threading.Event()
            serving = threading.Thread(target=service.serve, args=(stop.is_set, 0.01))
            serving.start()
            where = f"127.0.0.1:{relay.address[1]}"
            host = Robots(Path(folder), HOST, learner, address=where)
            try:
                with closing(host), LocalBuffer(host.run.buffer) as spool:
                    yield Case(learner, host, relay, spool)
                check_arrived(host.run.buffer, learner.run.buffer)
            finally:
                stop.set()
                serving.join(20)


def test_cuts_at_some_bytes_of_a_transfer(case):
    for place in range(0, 1200, 80):
        case.run(place, "up")
        case.run(place + 40, "down")


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["up", "down"])
def test_cuts_at_every_byte_of_a_transfer(case, direction):
    num_bytes = max(case.run()[direction] for _ in range(5))
    assert num_bytes > 500
    for place in range(0, num_bytes, size(1, 7)):
        case.run(place, direction)
