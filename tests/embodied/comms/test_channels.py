import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest
import zmq

from embodied.comms.channels import (
    ErrorReply,
    PullChannel,
    PushChannel,
    RequestClient,
    RequestServer,
)
from embodied.comms.codec import encode
from embodied.core.errors import ConfigError, EmbodiedError, LinkError, StorageFullError


class Ask(msgspec.Struct, frozen=True, tag="ask", forbid_unknown_fields=True):
    n: int


class Tell(msgspec.Struct, frozen=True, tag="tell", forbid_unknown_fields=True):
    n: int


@pytest.fixture(params=["ipc", "tcp"])
def address(request, tmp_path):
    return f"ipc://{tmp_path}/s" if request.param == "ipc" else "tcp://127.0.0.1:*"


@contextmanager
def serving(server):
    stop = threading.Event()

    def loop():
        while not stop.is_set():
            server.poll(0.01)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def double(header, arrays):
    return Tell(2 * header.n), {name: array * 2 for name, array in arrays.items()}


def wait_for(condition, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def test_request_and_pipelining(address):
    with (
        RequestServer(address, Ask, double) as server,
        serving(server),
        RequestClient(server.address, Tell) as client,
    ):
        header, arrays = client.request(Ask(4), {"x": np.arange(3)}, 5)
        assert header == Tell(8) and arrays["x"].tolist() == [0, 2, 4]
        sent = {client.send(Ask(i), {}): i for i in range(20)}
        # A request in between must not swallow the pipelined answers.
        assert client.request(Ask(100), {}, 5)[0] == Tell(200)
        replies = []
        wait_for(lambda: replies.extend(client.receive_ready()) or len(replies) == 20)
        assert {reply.id: reply.header.n for reply in replies} == {
            k: 2 * i for k, i in sent.items()
        }


def test_timeout_then_late_reply_is_discarded(tmp_path):
    with (
        RequestServer(f"ipc://{tmp_path}/s", Ask, double) as server,
        RequestClient(server.address, Tell) as client,
    ):
        with pytest.raises(LinkError, match="no answer from ipc"):
            client.request(Ask(1), {}, 0.1)
        wait_for(lambda: server.poll(0.1))
        with serving(server):
            assert client.request(Ask(5), {}, 5)[0] == Tell(10)
        assert client.num_late == 1


def test_nobody_there_is_a_link_error(tmp_path):
    with RequestClient(f"ipc://{tmp_path}/none", Tell) as client:
        assert client.send(Ask(1), {}) is None
        with pytest.raises(LinkError, match="is its process running"):
            client.request(Ask(1), {}, 0.05)


def test_handler_errors_come_back_as_their_type(tmp_path):
    def handler(header, arrays):
        if header.n == 1:
            raise StorageFullError("disk of /x is full")

        class HomeMadeError(EmbodiedError):
            pass

        raise HomeMadeError("something else")

    with (
        RequestServer(f"ipc://{tmp_path}/s", Ask, handler) as server,
        serving(server),
        RequestClient(server.address, Tell) as client,
    ):
        with pytest.raises(StorageFullError, match="disk of /x is full"):
            client.request(Ask(1), {}, 5)
        with pytest.raises(EmbodiedError, match="something else"):
            client.request(Ask(2), {}, 5)
    # Only errors of ours are looked up by name.
    assert type(ErrorReply("annotations", "x").exception()) is EmbodiedError


def test_commit_runs_before_replies_and_can_refuse(tmp_path):
    calls = []
    failing = [False]

    def handler(header, arrays):
        calls.append(header.n)
        return Tell(header.n), {}

    def commit():
        calls.append("commit")
        if failing[0]:
            raise StorageFullError("full")

    with (
        RequestServer(f"ipc://{tmp_path}/s", Ask, handler, commit) as server,
        RequestClient(server.address, Tell) as client,
    ):
        wait_for(lambda: client.send(Ask(0), {}) is not None)
        for i in (1, 2):
            client.send(Ask(i), {})
        time.sleep(0.1)
        assert server.poll(1) == 3
        assert calls == [0, 1, 2, "commit"]
        failing[0] = True
        client.send(Ask(3), {})
        assert server.poll(1) == 1
        replies = []
        wait_for(lambda: replies.extend(client.receive_ready()) or len(replies) == 4)
        assert [reply.header for reply in replies[:3]] == [Tell(0), Tell(1), Tell(2)]
        assert replies[3].header == ErrorReply("StorageFullError", "full")


def test_bad_messages_are_counted_and_do_no_harm(tmp_path):
    with RequestServer(f"ipc://{tmp_path}/s", Ask, double) as server, serving(server):
        raw = zmq.Context.instance().socket(zmq.DEALER)
        raw.setsockopt(zmq.LINGER, 0)
        raw.connect(server.address)
        good = [bytes(frame) for frame in encode(Ask(1), {})]
        bad = [[b""], [b"x"], [b"12345678", b"junk"], [b"12345678", *good, b"extra"]]
        bad += [[b"12345678"] + [b""] * 2000, [b"short", *good]]
        for frames in bad:
            raw.send_multipart(frames)
        with RequestClient(server.address, Tell) as client:
            assert client.request(Ask(1), {}, 5)[0] == Tell(2)
        wait_for(lambda: server.num_bad == len(bad))
        raw.close()


def test_push_drops_and_counts_when_full(tmp_path):
    with PushChannel(f"ipc://{tmp_path}/s", max_queued=10) as push:
        start = time.monotonic()
        assert not any(push.send(Ask(i), {}) for i in range(100))
        assert push.num_dropped == 100 and time.monotonic() - start < 1
        with PullChannel(push.address, Ask, max_queued=10) as pull:
            wait_for(lambda: push.send(Ask(0), {}))
            received = []
            wait_for(lambda: received.extend(pull.receive_ready()) or received)
            dropped = push.num_dropped
            big = np.zeros(100_000)
            sent = sum(push.send(Ask(i), {"x": big}) for i in range(1000))
            assert 0 < sent < 1000 and push.num_dropped == dropped + 1000 - sent
            received.clear()
            wait_for(lambda: received.extend(pull.receive_ready()) or len(received) == sent)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("tcp://0.0.0.0:5555", "mTLS"),
        ("tcp://*:5555", "mTLS"),
        ("tcp://10.0.0.1:5555", "mTLS"),
        ("tcp://127.0.0.1.evil.org:5555", "mTLS"),
        ("tcp://127.0.0.1:5;tcp://8.8.8.8:1", "mTLS"),
        ("ipc://relative", "absolute"),
        ("ipc://@abstract", "absolute"),
        ("ipc:///" + "a" * 120, "107"),
        ("udp://127.0.0.1:1", "unknown"),
    ],
)
def test_addresses_beyond_this_host_are_refused(address, message):
    with pytest.raises(ConfigError, match=message):
        RequestServer(address, Ask, double)
    with pytest.raises(ConfigError, match=message):
        RequestClient(address, Tell)


def test_server_can_be_rebound_at_once(tmp_path):
    address = f"ipc://{tmp_path}/s"
    for _ in range(5):
        with (
            RequestServer(address, Ask, double) as server,
            serving(server),
            RequestClient(address, Tell) as client,
        ):
            assert client.request(Ask(1), {}, 5)[0] == Tell(2)


def test_client_reaches_a_server_that_was_killed_and_restarted(tmp_path):
    address = f"ipc://{tmp_path}/s"
    script = (
        "import msgspec, sys\n"
        "from embodied.comms.channels import RequestServer\n"
        "class Ask(msgspec.Struct, tag='ask', forbid_unknown_fields=True):\n    n: int\n"
        "class Tell(msgspec.Struct, tag='tell', forbid_unknown_fields=True):\n    n: int\n"
        "server = RequestServer(sys.argv[1], Ask, lambda h, a: (Tell(h.n + 1), {}))\n"
        "while True:\n    server.poll(1)\n"
    )
    with RequestClient(address, Tell) as client:
        for i in range(2):
            child = subprocess.Popen([sys.executable, "-c", script, address])
            try:
                assert client.request(Ask(i), {}, 20)[0] == Tell(i + 1)
            finally:
                child.kill()
                child.wait()
            with pytest.raises(LinkError):
                client.request(Ask(9), {}, 0.1)
