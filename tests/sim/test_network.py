import select
import socket
import threading
import time
from random import Random

import pytest

from embodied.core.errors import ConfigError
from sim.links import PROFILES, SEGMENT_BYTES, Link, Profile, Stream, profile_named
from sim.network import Relay

WAIT_S = 20.0
QUICK = Profile(delay_s=0.002, rate_bit_s=400e6)


class Target:
    """A server that keeps what each connection sends, and sends `reply` back at its end."""

    def __init__(self, reply=b""):
        self.reply = reply
        self.received = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = self._server.getsockname()
        self._ended = threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            connection, _ = self._server.accept()
            threading.Thread(target=self._keep, args=(connection,), daemon=True).start()

    def _keep(self, connection):
        data = read_all(connection)
        with connection:
            send_all(connection, self.reply)
        with self._ended:
            self.received.append(data)
            self._ended.notify_all()

    def wait_for(self, count):
        with self._ended:
            assert self._ended.wait_for(lambda: len(self.received) >= count, WAIT_S)
        return self.received


def read_all(connection):
    """What comes until the end or a reset."""
    connection.settimeout(WAIT_S)
    data = bytearray()
    while True:
        try:
            piece = connection.recv(1 << 16)
        except ConnectionError:
            return bytes(data)
        if not piece:
            return bytes(data)
        data += piece


def send_all(connection, data):
    try:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        return False
    return True


def attempt(relay, data):
    """What comes back for the data (None: until the other end closes); nothing if refused."""
    try:
        with socket.create_connection(relay.address, WAIT_S) as client:
            if data is not None:
                send_all(client, data)
            return read_all(client)
    except ConnectionError:
        return b""


def wait_until(condition):
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def pattern(seed, size):
    return Random(seed).randbytes(size)


# Times, computed on a clock of our own.


def test_a_link_keeps_its_rate_whatever_comes_when():
    link, random = Link(8e6), Random(0)
    now_s, sent, left_s = 0.0, 0, 0.0
    for _ in range(1000):
        size = random.randrange(1, 20_000)
        sent += size
        left_s = link.depart(now_s, size)
        now_s = max(now_s, left_s - random.uniform(0, 0.1))  # late, but there is always something
    assert left_s == pytest.approx(sent / 1e6)
    assert link.depart(left_s + 5, 1000) == pytest.approx(left_s + 5 + 0.001), "idle time is lost"
    assert Link(None).depart(3.0, 1 << 30) == 3.0


def test_two_connections_share_one_link():
    profile = Profile(rate_bit_s=8e6)
    link = Link(profile.rate_bit_s)
    streams = [Stream(profile, link, str(index)) for index in range(2)]
    arrivals = [stream.send(0.0, 1_000_000)[1] for stream in streams]
    assert arrivals == pytest.approx([1.0, 2.0])


def test_bytes_arrive_in_order_after_delay_and_jitter():
    profile = Profile(delay_s=0.1, jitter_s=0.05)
    stream = Stream(profile, Link(None), "seed")
    arrivals = [stream.send(0.2 * index, 100)[1] - 0.2 * index for index in range(200)]
    assert 0.1 <= min(arrivals) < 0.11 and 0.14 < max(arrivals) <= 0.15
    dense = Stream(profile, Link(None), "seed")
    times = [dense.send(0.001 * index, 100)[1] for index in range(200)]
    assert times == sorted(times)


def lost_at(seed, piece_bytes, loss=0.02, segments=20_000):
    """Round trips that each segment's piece waited."""
    stream = Stream(Profile(delay_s=0.5, loss=loss), Link(None), seed)
    waits, now_s = {}, 0.0
    for offset in range(0, segments * SEGMENT_BYTES, piece_bytes):
        now_s += 1000.0  # so that no piece waits for another
        wait = stream.send(now_s, piece_bytes)[1] - now_s - 0.5
        if round(wait):
            waits[offset // SEGMENT_BYTES] = round(wait)
    return waits


def test_losses_are_a_share_of_segments_and_follow_from_the_seed_and_the_place():
    waits = lost_at("a", SEGMENT_BYTES)
    assert 300 < len(waits) < 500, "2 % of 20,000 are 400, with a deviation of 20"
    assert sum(wait == 1 for wait in waits.values()) > 0.95 * len(waits)
    assert max(waits.values()) > 1, "a repeated segment is never lost"
    assert lost_at("a", SEGMENT_BYTES) == waits != lost_at("b", SEGMENT_BYTES)
    coarse = lost_at("a", 5 * SEGMENT_BYTES)
    assert set(coarse) == {place // 5 * 5 for place in waits}
    assert lost_at("a", SEGMENT_BYTES, loss=0.0) == {}


def test_what_is_behind_a_loss_waits_and_then_comes_at_once():
    profile = Profile(delay_s=0.1, loss=0.02, rate_bit_s=20e6)
    stream, link_only = Stream(profile, Link(20e6), "a"), Link(20e6)
    pieces = [(link_only.depart(0.0, 2896), stream.send(0.0, 2896)[1]) for _ in range(500)]
    arrivals = [arrival for _, arrival in pieces]
    assert arrivals == sorted(arrivals)
    stalled = [arrival for left_s, arrival in pieces if arrival > left_s + 0.1 + 1e-9]
    assert len(set(stalled)) < len(stalled) / 3
    assert all(arrival >= left_s + 0.1 - 1e-9 for left_s, arrival in pieces)


# The relay itself.


@pytest.mark.parametrize("name", [*PROFILES, "rough"])
def test_bytes_arrive_unchanged_in_both_directions(name):
    rough = Profile(delay_s=0.005, jitter_s=0.01, rate_bit_s=100e6, loss=0.05)
    profile = rough if name == "rough" else profile_named(name)
    sizes = [0, 1, 1447, 200_000]
    target = Target(reply=pattern("reply", 150_000))
    with Relay(target.address, profile, seed=3) as relay:
        clients = [socket.create_connection(relay.address, WAIT_S) for _ in sizes]
        for client, size in zip(clients, sizes, strict=True):
            threading.Thread(
                target=send_all, args=(client, pattern(size, size)), daemon=True
            ).start()
        for client in clients:
            assert read_all(client) == target.reply
            client.close()
        assert sorted(target.wait_for(len(sizes))) == sorted(pattern(size, size) for size in sizes)
        assert (relay.bytes_up, relay.bytes_down) == (sum(sizes), len(sizes) * len(target.reply))
        assert (relay.connections, relay.cuts) == (len(sizes), 0)


def test_a_transfer_is_never_faster_than_the_link():
    profile = Profile(delay_s=0.05, rate_bit_s=50e6)
    data, target = bytes(1_000_000), Target(reply=b"x")
    with Relay(target.address, profile) as relay:
        started_s = time.monotonic()
        with socket.create_connection(relay.address, WAIT_S) as client:
            assert send_all(client, data) and read_all(client) == b"x"
        took_s = time.monotonic() - started_s
    # 0.16 s on the link, two ways, and a round trip of TCP's handshake
    assert 0.16 + 0.2 <= took_s < 5


def test_a_receiver_that_does_not_read_slows_the_sender_down():
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    server.bind(("127.0.0.1", 0))
    server.listen()
    with server, Relay(server.getsockname(), QUICK) as relay:
        client = socket.create_connection(relay.address, WAIT_S)
        end, _ = server.accept()
        client.setblocking(False)
        sent, block = 0, bytes(1 << 20)
        while select.select([], [client], [], 1.0)[1]:
            sent += client.send(block)
            assert sent < 64 << 20, "the relay takes in everything"
        reader = threading.Thread(target=client.close)
        reader.start()
        assert len(read_all(end)) == sent
        reader.join()
        end.close()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_cuts_after_exactly_so_many_bytes(direction):
    payload = pattern("cut", 300_000)
    counts = [1, 2, 1447, 1448, 65_536, 131_071, 299_999, *Random(1).sample(range(1, 300_000), 8)]
    target = Target(reply=payload)
    with Relay(target.address, QUICK) as relay:
        for index, count in enumerate(counts):
            relay.cut_after(count, direction)
            before = relay.bytes_up if direction == "up" else relay.bytes_down
            with socket.create_connection(relay.address, WAIT_S) as client:
                sender = threading.Thread(
                    target=send_all, args=(client, payload if direction == "up" else b"?")
                )
                sender.start()
                got = read_all(client)
                sender.join(WAIT_S)
            received = target.wait_for(index + 1)[index]
            if direction == "up":
                assert received == payload[:count] and got == b""
            else:
                assert got == payload[:count] and received == b"?"
            after = relay.bytes_up if direction == "up" else relay.bytes_down
            assert after - before == count and relay.cuts == index + 1


def test_a_cut_closes_everything_and_refuses_for_a_time():
    target = Target()
    with Relay(target.address, Profile()) as relay:
        clients = [socket.create_connection(relay.address, WAIT_S) for _ in range(3)]
        for client in clients:
            client.sendall(b"hello")
        wait_until(lambda: relay.bytes_up == 15)
        ends_s = time.monotonic() + 0.5
        relay.cut(0.5)
        assert [read_all(client) for client in clients] == [b""] * 3
        assert target.wait_for(3) == [b"hello"] * 3
        refused = 0
        while True:
            tried_s = time.monotonic()
            assert attempt(relay, b"again") == b""
            if len(target.received) >= 4:
                break
            refused += 1
            assert tried_s < ends_s + WAIT_S
        assert refused > 0 and time.monotonic() >= ends_s
        assert target.wait_for(4)[3] == b"again"


def test_a_silent_link_lets_nothing_pass_and_closes_nothing():
    target = Target(reply=b"answer")
    with Relay(target.address, Profile()) as relay:
        with socket.create_connection(relay.address, WAIT_S) as client:
            client.sendall(b"before, ")
            wait_until(lambda: relay.bytes_up == 8)
            ends_s = time.monotonic() + 0.5
            relay.fall_silent(0.5)
            assert send_all(client, b"meanwhile")
            assert read_all(client) == target.reply and time.monotonic() >= ends_s
        assert target.wait_for(1) == [b"before, meanwhile"]
        assert (relay.connections, relay.cuts) == (1, 0)


def test_a_profile_cuts_now_and_then():
    target = Target()
    with Relay(target.address, Profile(cut_every_s=0.05), seed=1) as relay:
        for _ in range(5):
            assert attempt(relay, None) == b""
        assert relay.cuts >= 5


def test_no_thread_and_no_port_is_left():
    target, before = Target(), threading.active_count()
    with Relay(target.address, PROFILES["bad-4g"]) as relay:
        client = socket.create_connection(relay.address, WAIT_S)
        client.sendall(bytes(100_000))
        wait_until(lambda: relay.bytes_up > 0)
    assert read_all(client) == b""
    target.wait_for(1)
    wait_until(lambda: threading.active_count() <= before)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(relay.address, WAIT_S)


def test_a_target_that_is_not_there_closes_the_connection():
    with socket.socket() as nobody:  # holds the port, so that no other test listens there
        nobody.bind(("127.0.0.1", 0))
        with Relay(nobody.getsockname(), Profile()) as relay:
            assert attempt(relay, b"hello") == b"" and relay.connections == 0


def test_wrong_input_says_what_is_right():
    with pytest.raises(ConfigError, match="'cross-city'"):
        profile_named("cross-town")
    with pytest.raises(ConfigError, match="certificate"):
        Relay(("10.0.0.1", 80), Profile())
    for wrong in ({"loss": 1.0}, {"delay_s": -1.0}, {"rate_bit_s": 0.0}, {"cut_every_s": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Profile(**wrong)
