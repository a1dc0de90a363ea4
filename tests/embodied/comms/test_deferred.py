import time
from concurrent.futures import Future

import msgspec
import numpy as np
import pytest
import zmq

from embodied.comms.channels import RequestClient
from embodied.comms.deferred import DeferredServer
from embodied.core.errors import EmbodiedError, SpecError


class Ask(msgspec.Struct, frozen=True, tag="ask", forbid_unknown_fields=True):
    n: int


class Tell(msgspec.Struct, frozen=True, tag="tell", forbid_unknown_fields=True):
    n: int


@pytest.fixture
def asked(tmp_path):
    """(server, client, futures by what was asked)."""
    futures = {}

    def promise(header, arrays):
        if header.n < 0:
            raise SpecError("n is negative")
        futures[header.n] = Future()
        return futures[header.n]

    address = f"ipc://{tmp_path}/s"
    with DeferredServer(address, Ask, promise) as server, RequestClient(address, Tell) as client:
        yield server, client, futures


def until(condition, *servers):
    ends_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends_s
        for server in servers:
            server.poll(0.01)


def send(client, n):
    assert client.wait(10.0, zmq.POLLOUT)
    return client.send(Ask(n), {})


def test_answers_leave_when_they_are_there_in_any_order(asked):
    server, client, futures = asked
    numbers = {n: send(client, n) for n in range(5)}
    until(lambda: len(futures) == 5, server)
    replies = {}
    for n in (3, 0, 4, 1, 2):
        futures[n].set_result((Tell(2 * n), {"x": np.full(n, n)}))
        until(
            lambda n=n: (
                replies.update({r.id: r for r in client.receive_ready()}) or numbers[n] in replies
            ),
            server,
        )
        assert len(replies) == [3, 0, 4, 1, 2].index(n) + 1
        assert replies[numbers[n]].header == Tell(2 * n)
        np.testing.assert_array_equal(replies[numbers[n]].arrays["x"], np.full(n, n))


def test_an_answer_wakes_the_server_at_once(asked):
    server, client, futures = asked
    send(client, 1)
    until(lambda: futures, server)
    futures[1].set_result((Tell(1), {}))
    started_s = time.monotonic()
    assert server.poll(60.0) == 1
    assert time.monotonic() - started_s < 30.0


def test_refusals_come_as_errors_and_bugs_are_raised(asked):
    server, client, futures = asked
    send(client, -1)
    send(client, 1)
    until(lambda: futures, server)
    futures[1].set_exception(EmbodiedError("not today"))
    replies = []
    until(lambda: replies.extend(client.receive_ready()) or len(replies) == 2, server)
    said = [reply.header for reply in replies]
    assert [(e.kind, e.message) for e in said] == [
        ("SpecError", "n is negative"),
        ("EmbodiedError", "not today"),
    ]
    send(client, 2)
    until(lambda: 2 in futures, server)
    futures[2].set_exception(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        server.poll(10.0)


def test_what_cannot_be_read_is_dropped_and_answers_after_closing_are_harmless(asked):
    server, client, futures = asked
    assert client.wait(10.0, zmq.POLLOUT)
    client._socket.send_multipart([b"12345678", b"nonsense"])
    client._socket.send_multipart([b"short", b""])
    send(client, 1)
    until(lambda: futures, server)
    assert server.num_bad == 2
    server.close()
    futures[1].set_result((Tell(1), {}))
