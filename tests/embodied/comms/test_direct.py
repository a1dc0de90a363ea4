"""Requests over a plain Unix socket: the same promises as the channels', with fewer wake-ups."""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest

from embodied.comms import direct
from embodied.comms.codec import encode
from embodied.comms.direct import DirectClient, DirectServer
from embodied.comms.framing import pack
from embodied.core.errors import (
    ConfigError,
    CorruptDataError,
    EmbodiedError,
    LinkError,
    StorageFullError,
)


class Ask(msgspec.Struct, frozen=True, tag="ask", forbid_unknown_fields=True):
    n: int


class Tell(msgspec.Struct, frozen=True, tag="tell", forbid_unknown_fields=True):
    n: int


SCRIPT = """
import msgspec, sys
from embodied.comms.direct import DirectServer
class Ask(msgspec.Struct, tag='ask', forbid_unknown_fields=True):
    n: int
class Tell(msgspec.Struct, tag='tell', forbid_unknown_fields=True):
    n: int
server = DirectServer(sys.argv[1], Ask, lambda h, a: (Tell(h.n + 1), {}))
while True:
    server.poll(1)
"""


@pytest.fixture
def address(tmp_path):
    return f"ipc://{tmp_path}/s"


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


def raw(address):
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(10)
    link.connect(address.removeprefix("ipc://"))
    return link


def test_requests_with_arrays_of_every_size_come_back(address):
    rng = np.random.default_rng(0)
    with (
        DirectServer(address, Ask, double) as server,
        serving(server),
        DirectClient(server.address, Tell) as client,
    ):
        for size in (0, 1, 3, 1000, 1025, 300_000):
            arrays = {
                "bool": rng.random(size) > 0.5,
                "odd": rng.integers(0, 100, size).astype(np.uint8),
                "x": rng.normal(size=(size, 2)),
                "columns": np.asfortranarray(rng.normal(size=(size, 3)).astype(np.float32)),
            }
            header, found = client.request(Ask(size), arrays, 10)
            assert header == Tell(2 * size)
            for name, array in arrays.items():
                np.testing.assert_array_equal(found[name], array * 2)
                assert found[name].flags.aligned and not found[name].flags.writeable


def test_arrays_are_read_where_they_arrived(address):
    kept = []

    def keep(header, arrays):
        kept.append(arrays["x"])
        return Tell(0), {}

    with (
        DirectServer(address, Ask, keep) as server,
        serving(server),
        DirectClient(server.address, Tell) as client,
    ):
        for _ in range(3):
            client.request(Ask(1), {"b": np.ones(3, bool), "x": np.arange(5.0)}, 5)
    assert all(not array.flags.owndata for array in kept)
    assert [array.tolist() for array in kept] == [[0, 1, 2, 3, 4]] * 3, "and they stay as they are"


def test_many_clients_at_once(address):
    def ask(k, found):
        with DirectClient(address, Tell) as client:
            found[k] = [client.request(Ask(k + i), {}, 20)[0].n for i in range(50)]

    found = {}
    with DirectServer(address, Ask, double) as server, serving(server):
        threads = [threading.Thread(target=ask, args=(k, found)) for k in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {k: [2 * (k + i) for i in range(50)] for k in range(12)}


def test_timeout_then_late_reply_is_discarded(address):
    with DirectServer(address, Ask, double) as server, DirectClient(address, Tell) as client:
        started_s = time.monotonic()
        with pytest.raises(LinkError, match=r"no answer from ipc.* in 0.1 s; is its process"):
            client.request(Ask(1), {}, 0.1)
        assert 0.09 < time.monotonic() - started_s < 2
        while not server.poll(0.1):
            pass
        with serving(server):
            assert client.request(Ask(5), {}, 5)[0] == Tell(10)
        assert client.num_late == 1


def test_nobody_there_is_a_link_error(address):
    with DirectClient(address, Tell) as client:
        with pytest.raises(LinkError, match="is its process running"):
            client.request(Ask(1), {}, 0.05)
        with DirectServer(address, Ask, double) as server, serving(server):
            assert client.request(Ask(1), {}, 5)[0] == Tell(2)


def test_a_server_that_comes_late_is_waited_for(address):
    def late():
        time.sleep(0.3)
        with DirectServer(address, Ask, double) as server:
            while not server.poll(0.1):
                pass

    thread = threading.Thread(target=late)
    thread.start()
    with DirectClient(address, Tell) as client:
        assert client.request(Ask(1), {}, 5)[0] == Tell(2)
    thread.join()


def test_handler_errors_come_back_as_their_type(address):
    def handler(header, arrays):
        if header.n == 1:
            raise StorageFullError("disk of /x is full")

        class HomeMadeError(EmbodiedError):
            pass

        raise HomeMadeError("something else")

    with (
        DirectServer(address, Ask, handler) as server,
        serving(server),
        DirectClient(address, Tell) as client,
    ):
        with pytest.raises(StorageFullError, match="disk of /x is full"):
            client.request(Ask(1), {}, 5)
        with pytest.raises(EmbodiedError, match="something else"):
            client.request(Ask(2), {}, 5)


def test_a_message_that_cannot_be_decoded_is_answered_with_the_reason(address):
    with DirectServer(address, Ask, double) as server, serving(server):
        with DirectClient(address, Tell) as client:
            with pytest.raises(CorruptDataError, match="cannot be decoded"):
                client.request(Tell(1), {}, 5)
            assert client.request(Ask(1), {}, 5)[0] == Tell(2)
        assert server.num_bad == 1


def test_garbage_ends_its_own_connection_only(address):
    rng = np.random.default_rng(1)
    good = pack(7, encode(Ask(1), {"x": np.arange(3)}))
    bad = [rng.bytes(int(n)) for n in rng.integers(16, 400, 200)]
    bad += [
        struct.pack("<IIQ", 16, 0, 1),
        struct.pack("<IIQ", 16, 1 << 31, 1),
        struct.pack("<IIQ", 17, 200, 1) + b"x",
        struct.pack("<IIQ", 0xFFFFFFFF, 1, 1),
        struct.pack("<IIQI", 24, 1, 1, 0xFFFFFFFF) + b"xxxx",
    ]
    for _ in range(200):
        changed = bytearray(good)
        changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
        bad.append(bytes(changed))
    with DirectServer(address, Ask, double) as server, serving(server):
        with DirectClient(address, Tell) as client:
            for data in bad:
                with raw(address) as link:
                    link.sendall(data)
                assert client.request(Ask(1), {}, 5)[0] == Tell(2)
        assert server.num_bad > 100


def test_a_message_in_pieces_and_several_in_one(address):
    message = pack(7, encode(Ask(3), {}))
    with DirectServer(address, Ask, double) as server, serving(server), raw(address) as link:
        for k in range(len(message)):
            link.sendall(message[k : k + 1])
        first = link.recv(1 << 16)
        link.sendall(message * 5)
        rest = b""
        while len(rest) < 5 * len(first):
            rest += link.recv(1 << 16)
        assert rest == first * 5


def test_a_client_that_does_not_listen_delays_nobody_and_fills_nothing(address):
    calls = []

    def large(header, arrays):
        calls.append(header.n)
        return Tell(0), {"x": np.zeros(2_000_000, np.uint8)} if header.n else {}

    with DirectServer(address, Ask, large) as server, serving(server), raw(address) as deaf:
        deaf.sendall(pack(1, encode(Ask(1), {})) * 100)
        with DirectClient(address, Tell) as client:
            for _ in range(50):
                client.request(Ask(0), {}, 5)
        assert calls.count(1) == 1, "it gets no second answer before it has taken the first"
        total = 0
        while total < 100 * 2_000_000:
            total += len(deaf.recv(1 << 20))
        assert calls.count(1) == 100


def test_too_many_clients_are_turned_away_and_room_is_made_again(address):
    with DirectServer(address, Ask, double) as server, serving(server):
        links = [raw(address) for _ in range(direct.MAX_CLIENTS)]
        while len(server._clients) < direct.MAX_CLIENTS:
            time.sleep(0.01)
        with DirectClient(address, Tell) as client:
            with pytest.raises(LinkError):
                client.request(Ask(1), {}, 0.5)
            for link in links:
                link.close()
            while server._clients:
                time.sleep(0.01)
            assert client.request(Ask(1), {}, 5)[0] == Tell(2)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("tcp://127.0.0.1:5555", "no Unix socket"),
        ("tcp://0.0.0.0:5555", "mTLS"),
        ("ipc://relative", "absolute"),
        ("ipc:///" + "a" * 120, "107"),
        ("ipc:///no/such/folder/s", "cannot bind"),
    ],
)
def test_addresses_that_cannot_be_are_refused(address, message):
    with pytest.raises(ConfigError, match=message):
        DirectServer(address, Ask, double)


def test_server_can_be_rebound_at_once(address):
    for _ in range(5):
        with (
            DirectServer(address, Ask, double) as server,
            serving(server),
            DirectClient(address, Tell) as client,
        ):
            assert client.request(Ask(1), {}, 5)[0] == Tell(2)


@pytest.fixture
def start(address):
    """Starts servers as processes of their own."""
    children = []

    def run(script=SCRIPT):
        children.append(subprocess.Popen([sys.executable, "-c", script, address]))
        return children[-1]

    yield run
    for child in children:
        child.kill()
        child.wait()


def test_a_client_reaches_a_server_that_was_killed_and_restarted(address, start):
    with DirectClient(address, Tell) as client:
        for i in range(2):
            child = start()
            assert client.request(Ask(i), {}, 20)[0] == Tell(i + 1)
            child.kill()
            child.wait()
            with pytest.raises(LinkError, match="no answer"):
                client.request(Ask(9), {}, 0.1)


def test_a_request_that_a_server_did_not_read_goes_to_its_successor(address, start):
    first = start()
    with DirectClient(address, Tell) as client:
        assert client.request(Ask(1), {}, 20)[0] == Tell(2)
        os.kill(first.pid, signal.SIGSTOP)
        with pytest.raises(LinkError, match="no answer"):
            client.request(Ask(1), {}, 0.2)

        def replace():
            first.kill()
            first.wait()
            start()

        threading.Timer(0.3, replace).start()
        assert client.request(Ask(5), {}, 20)[0] == Tell(6)


def test_a_request_that_a_server_has_read_is_not_sent_again(address, start, tmp_path):
    counting = SCRIPT.replace(
        "(Tell(h.n + 1), {})", "(open(sys.argv[1][6:] + '.log', 'a').write('x'), os._exit(1))"
    ).replace("import msgspec", "import os, msgspec")
    start(counting)
    with DirectClient(address, Tell) as client:
        started_s = time.monotonic()
        with pytest.raises(LinkError, match=r"broke off: .*ended before it answered"):
            client.request(Ask(1), {}, 60)
        assert time.monotonic() - started_s < 30, "noticed at once"
        start()
        assert client.request(Ask(1), {}, 20)[0] == Tell(2)
    assert (tmp_path / "s.log").read_text() == "x"
