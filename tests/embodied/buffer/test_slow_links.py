"""A buffer client over links on which an acknowledgement takes longer than resend_s."""

import threading
import time
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
from linking import HELLO, port_of
from spooling import make_step

from embodied.buffer.serve.client import BufferClient
from embodied.buffer.serve.messages import REPLIES, REQUESTS, AppendReply
from embodied.buffer.serve.patience import Patience
from embodied.buffer.serve.service import BufferService
from embodied.comms.channels import RequestClient, RequestServer
from embodied.comms.links.client import Link
from embodied.comms.links.server import LinkServer
from embodied.comms.links.services import Service
from sim.links import PROFILES
from sim.network import Relay

BAD = msgspec.structs.replace(PROFILES["bad-4g"], cut_every_s=None)
LAST = 5


@contextmanager
def behind_a_bad_network(tmp_path):
    """A buffer service behind a gateway behind a relay: relay, link, and what was answered."""
    replies, ended = [], threading.Event()
    service = BufferService(tmp_path / "log", f"ipc://{tmp_path}/s")

    def serve():
        while not ended.is_set():
            service.poll(0.05)

    thread = threading.Thread(target=serve)
    thread.start()
    passed_on = RequestClient(f"ipc://{tmp_path}/s", REPLIES)

    def answer(host, header, arrays):
        replies.append(passed_on.request(header, arrays, 30))
        return replies[-1]

    services = {"experience": Service(REQUESTS, answer)}
    try:
        with (
            LinkServer("127.0.0.1:0", services, None, lambda *_: None) as server,
            Relay(("127.0.0.1", port_of(server.address)), BAD) as relay,
            Link(f"127.0.0.1:{relay.address[1]}", HELLO, None) as link,
        ):
            assert link.wait(20)
            yield relay, link, replies
    finally:
        ended.set()
        thread.join()
        passed_on.close()
        service.close()


def big_step(index):
    picture = np.random.default_rng(index).integers(0, 256, (500, 500, 3), np.uint8)
    return make_step(0, index, LAST, observation={"observation.images.front": picture})


def counts(replies):
    """Steps that were new, and that were there already."""
    appended = [header for header, _ in replies if isinstance(header, AppendReply)]
    return sum(a.num_new for a in appended), sum(a.num_duplicate for a in appended)


@pytest.mark.slow
def test_nothing_that_is_under_way_is_sent_again(tmp_path):
    with behind_a_bad_network(tmp_path) as (_, link, replies):
        client = BufferClient(link.requests("experience", REPLIES), "s", resend_s=1.0)
        for index in range(LAST + 1):
            client.add(big_step(index))
        client.flush(60)
        assert client.num_resent == 0 and counts(replies) == (LAST + 1, 0)


@pytest.mark.slow
def test_what_a_cut_took_is_sent_again_at_once(tmp_path):
    with behind_a_bad_network(tmp_path) as (relay, link, replies):
        # An acknowledgement that never comes would be waited for until the test has failed.
        client = BufferClient(link.requests("experience", REPLIES), "s", resend_s=1e3)
        for index in range(LAST + 1):
            client.add(big_step(index))
        client.pump()
        relay.cut(0.5)
        client.flush(60)
        assert client.num_resent >= 1
        new, again = counts(replies)
        assert new == LAST + 1 and again <= new


def test_patience_follows_acknowledgements_and_doubles_without(tmp_path):
    patience = Patience(2.0)
    for _ in range(50):
        patience.measured(0.01)
    assert patience.timeout_s == 2.0
    for _ in range(50):
        patience.measured(5.0)
    assert 5.0 < patience.timeout_s < 10.0
    before = patience.timeout_s
    patience.ran_out()
    assert patience.timeout_s == 2 * before
    for _ in range(20):
        patience.ran_out()
    assert patience.timeout_s == 60.0
    patience.measured(5.0)
    assert patience.timeout_s < 10.0


def test_a_slow_service_inside_the_host_is_asked_ever_less_often(tmp_path):
    """It answers nothing for long: the same batch does not come at every resend_s."""
    address, seen = f"ipc://{tmp_path}/s", []

    def note(header, arrays):
        seen.append(arrays["lengths"].size)
        return AppendReply(0, arrays["lengths"].size, 0), {}

    with (
        RequestServer(address, REQUESTS, note) as server,
        BufferClient(address, "s", resend_s=0.05) as client,
    ):
        began_s = time.monotonic()
        client.add(make_step(0, 0, 5))
        while client.num_resent < 5:
            client.pump()
            assert time.monotonic() - began_s < 30
            time.sleep(0.005)
        assert time.monotonic() - began_s >= 0.05 * (1 + 2 + 4 + 8 + 16)
        while client.unacknowledged:
            server.poll(0.05)
            client.pump()
        assert sum(seen) == client.num_resent + 1
