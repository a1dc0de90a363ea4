"""Links that break: killed gateways, cut and silent connections, gateways that stop reading."""

import os
import queue
import signal
import threading
import time

import numpy as np
import pytest
from linking import (
    HELLO,
    Ask,
    RawHost,
    Tell,
    frozen,
    gateway,
    gateway_process,
    message,
    part,
    port_of,
    wait_for,
)
from relay import Relay
from sizes import size

from embodied.comms.links import client as client_module
from embodied.comms.links.client import Link
from embodied.core.errors import LinkError


def dial(address, **options):
    return Link(address, HELLO, None, **options)


def ask_until_answered(link, client, n, timeout_s=90.0):
    """What a user does: send again what was lost."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return client.request(Ask(n), {}, 5)[0]
        except LinkError:
            assert time.monotonic() < deadline_s, link.status()


def test_a_killed_gateway_is_found_again_when_it_is_back():
    process, address = gateway_process()
    try:
        with dial(address) as link:
            client = link.requests("control", Tell)
            assert client.request(Ask(1), {}, 20)[0] == Tell(2)
            process.send_signal(signal.SIGSTOP)
            lost = client.send(Ask(5), {})
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            wait_for(lambda: not link.status().connected)
            assert client.send(Ask(1), {}) is None
            process, _ = gateway_process(address)
            assert ask_until_answered(link, client, 7) == Tell(14)
            assert link.status().reconnects == 1
            assert lost not in [reply.id for reply in client.receive_ready()]
    finally:
        process.kill()
        process.wait()


def test_a_request_under_way_says_at_once_that_the_link_broke():
    hold = threading.Event()

    def slow(host, header, arrays):
        assert hold.wait(30)
        return Tell(1), {}

    with (
        gateway(slow) as server,
        Relay(port_of(server.address)) as relay,
        dial(relay.address) as link,
    ):
        client = link.requests("control", Tell)
        link.wait(10)
        threading.Timer(0.2, relay.cut).start()
        with pytest.raises(LinkError, match="broke before it answered"):
            client.request(Ask(1), {}, 30)
        hold.set()
        assert ask_until_answered(link, client, 2) == Tell(1)


@pytest.mark.parametrize("first", [0, 1, 24, 100, 200, 300])
def test_a_cut_in_the_greeting_is_got_over(first):
    with (
        gateway() as server,
        Relay(port_of(server.address), cuts=[first, first + 1]) as relay,
        dial(relay.address) as link,
    ):
        client = link.requests("control", Tell)
        assert ask_until_answered(link, client, 3) == Tell(6)
        assert relay.connections == 3


def sweep(cuts, monkeypatch):
    """Cut a connection after each of these numbers of bytes while requests are made; every one is
    answered rightly in the end. (A session with one request takes about 1010 bytes.)"""
    monkeypatch.setattr(client_module, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(client_module, "MAX_BACKOFF_S", 0.02)
    with (
        gateway() as server,
        Relay(port_of(server.address), cuts=cuts) as relay,
        dial(relay.address) as link,
    ):
        client, n = link.requests("control", Tell), 0
        while relay.cuts:
            n += 1
            assert ask_until_answered(link, client, n) == Tell(2 * n)
        assert ask_until_answered(link, client, 0) == Tell(0)
        assert client.num_bad == 0


def test_cuts_at_some_bytes_of_a_transfer(monkeypatch):
    sweep(list(range(5, 1050, 41)), monkeypatch)


@pytest.mark.slow
def test_cuts_at_every_byte_of_a_transfer(monkeypatch):
    sweep(list(range(0, 1050, size(1, 5))), monkeypatch)


def test_a_silent_link_is_dropped_by_both_ends():
    with gateway() as server, Relay(port_of(server.address)) as relay, dial(relay.address) as link:
        link.wait(10)
        wait_for(server.peers)
        relay.flowing.clear()
        wait_for(lambda: not link.status().connected, 10)
        assert "nothing came in 3 s" in link.status().reason
        wait_for(lambda: not server.peers(), 10)
        relay.flowing.set()
        assert link.wait(10)


def test_a_host_that_dials_again_takes_its_own_place():
    with gateway() as server, RawHost(server.address) as old, RawHost(server.address) as new:
        assert old.hello().version == 1
        wait_for(server.peers)
        assert new.hello().version == 1
        assert "another session of host 'left-arm'" in old.until("goodbye").reason
        assert list(server.peers()) == ["left-arm"]
        new.send(part(message(4)))
        assert new.until("part").message == 1


def rss_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_memory_is_bounded_when_the_host_stops_reading():
    with gateway() as server, RawHost(server.address) as host:
        host.hello()
        wait_for(server.peers)
        big = frozen(1 << 20)
        before = rss_bytes()
        for n in range(3000):
            server.push("left-arm", "weights", Tell(n), {"x": big}, key=str(n))
            server.push("left-arm", "control", Tell(n), {"x": big[: 1 << 18]})
        assert rss_bytes() - before < 100 << 20
        depths = server.peers()["left-arm"].depths
        assert depths["weights"] <= 17 and depths["control"] <= 65


def test_memory_is_bounded_when_the_gateway_stops_reading():
    process, address = gateway_process()
    try:
        with dial(address) as link:
            client = link.requests("experience", Tell)
            link.wait(20)
            process.send_signal(signal.SIGSTOP)
            big, before = np.zeros(1 << 20, np.uint8), rss_bytes()
            taken = sum(client.send(Ask(n), {"x": big}) is not None for n in range(500))
            assert 1 <= taken <= 80
            assert rss_bytes() - before < 200 << 20
    finally:
        process.kill()
        process.wait()


def test_eight_hosts_that_send_more_than_is_taken_get_equal_shares():
    """What takes experience serves in the order of coming, as a buffer's writer, and so slowly that
    every host has some waiting; the host that tries hardest gets no more than the others."""
    got = {f"host-{n}": 0 for n in range(8)}
    arrived: queue.SimpleQueue[tuple[str, threading.Event] | None] = queue.SimpleQueue()
    enough = threading.Event()

    def take():
        pending = []
        while (work := arrived.get()) is not None:
            pending.append(work)
            while len({host for host, _ in pending}) == len(got) or (enough.is_set() and pending):
                host, taken = pending.pop(0)
                if not enough.is_set():
                    got[host] += 1
                if sum(got.values()) >= 400:
                    enough.set()
                taken.set()

    def write(host, header, arrays):
        taken = threading.Event()
        arrived.put((host, taken))
        assert taken.wait(30)
        return Tell(0), {}

    def push(link):
        client = link.requests("experience", Tell)
        while not enough.is_set():
            while client.send(Ask(1), {"x": big}) is not None:
                pass
            client.wait(0.1)
            client.receive_ready()

    big = frozen(64 << 10)
    taker = threading.Thread(target=take)
    taker.start()
    with gateway(write) as server:
        links = [Link(server.address, client_module.wire.Hello(h, "", ""), None) for h in got]
        for link in links:
            assert link.wait(20)
        pushers = [*links, *links[:1] * 3]
        threads = [threading.Thread(target=push, args=(link,)) for link in pushers]
        for thread in threads:
            thread.start()
        assert enough.wait(60), got
        for thread in threads:
            thread.join()
        for link in links:
            assert link.status().reconnects == 0
            link.close()
    arrived.put(None)
    taker.join()
    assert max(got.values()) - min(got.values()) <= 2, got
