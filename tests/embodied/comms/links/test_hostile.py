"""Peers that keep to no rules: each is told why, costs only itself, and the gateway stays up."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linking import HELLO, Ask, RawHost, Tell, double, gateway, message, part, wait_for

from embodied.comms.links import link_pb2 as pb
from embodied.comms.links import wire
from embodied.comms.links.client import Link
from embodied.core.errors import ConfigError


@pytest.fixture(scope="module")
def server():
    with gateway() as made:
        yield made


def still_serves(server):
    with Link(server.address, wire.Hello("honest", "", ""), None) as link:
        assert link.requests("control", Tell).request(Ask(2), {}, 10)[0] == Tell(4)


def piece(**body):
    return pb.Piece(**body).SerializeToString()


PICKLE = b"cos\nsystem\n(S'touch /tmp/canary'\ntR."
WHOLE = message(4)
LYING_FRAMES = b"\xff\xff\x00\x00" + WHOLE[4:]

BREACHES = {
    "pickle": ([PICKLE], "no Piece"),
    "empty": ([b""], "without a body"),
    "second hello": ([wire.hello_piece(HELLO)], "a hello within a session"),
    "welcome": ([wire.welcome_piece("")], "a welcome within a session"),
    "unknown kind": ([wire.part_piece(99, 1, 0, 5, [b"hello"])], "kind 99"),
    "oversize": ([part(b"x", total=1 << 40)], "1 to 1048576 are right"),
    "zero total": ([part(b"x" * 100, total=0)], "a message of 0 bytes"),
    "gap": ([part(b"x" * 10, total=99), part(b"x", offset=20, total=99)], "at byte 10 of 99"),
    "other total": ([part(b"x", total=99), part(b"x", offset=1, total=98)], "of 99 was next"),
    "replayed": ([part(WHOLE), part(WHOLE)], "message 2 at byte 0"),
    "skipped": ([part(WHOLE, number=2)], "message 1 at byte 0"),
    "checksum": ([part(WHOLE)[:-1] + b"\x00"], "checksum"),
    "frames": ([part(LYING_FRAMES)], "says it has"),
    "no frames": ([part(b"x" * 5)], "message of 5 bytes"),
    "ack": ([piece(ack=pb.Ack(bytes=1))], "what was not sent"),
    "ack of messages": (
        [piece(ack=pb.Ack(handled=[pb.Handled(kind=1, messages=9)]))],
        "what was not sent",
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_ends_the_session_with_its_reason(server, name):
    pieces, why = BREACHES[name]
    with RawHost(server.address) as host:
        assert host.hello().version == 1
        host.send(*pieces)
        assert why in host.until("goodbye").reason
    still_serves(server)


@pytest.mark.parametrize(
    "first,why",
    [
        (PICKLE, "no Piece"),
        (part(WHOLE), "no Hello"),
        (piece(hello=pb.Hello(min_version=2, max_version=9, host="h")), "speaks versions 2 to 9"),
        (piece(hello=pb.Hello(min_version=1, max_version=1, host="../x")), "is no name"),
        (piece(hello=pb.Hello(min_version=1, max_version=1, host="h", software="9" * 65)), "64"),
    ],
)
def test_a_wrong_greeting_is_refused_with_its_reason(server, first, why):
    with RawHost(server.address) as host:
        host.send(first)
        welcome = pb.Piece.FromString(next(host.call)).welcome
        assert welcome.version == 0 and why in welcome.refusal
        assert list(host.call) == []


def test_a_piece_above_the_limit_is_refused_by_grpc(server):
    with RawHost(server.address) as host:
        host.hello()
        with pytest.raises(grpc.RpcError):
            host.send(bytes(wire.MAX_PIECE_BYTES + 8192))
            host.until("goodbye")
    still_serves(server)


def test_a_host_that_says_nothing_is_cut_off(server):
    with RawHost(server.address) as host, pytest.raises(grpc.RpcError) as cut:
        next(host.call)
    assert cut.value.code() is grpc.StatusCode.CANCELLED


def test_other_methods_are_not_there(server):
    with grpc.insecure_channel(server.address) as channel:
        for method in ("/embodied.link.v1.Link/Other", "/grpc.reflection.v1.ServerReflection/X"):
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(method)(b"", timeout=10)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.binary(max_size=200) | st.just(part(WHOLE)), min_size=1, max_size=4))
def test_garbage_never_stops_a_gateway(server, pieces):
    with RawHost(server.address) as host:
        host.hello()
        host.send(*pieces, PICKLE)
        assert host.until("goodbye").reason
    # the fixture's other tests show that it still serves


def test_pings_without_end_cost_nothing(server):
    with RawHost(server.address) as host:
        host.hello()
        host.send(*[piece(ping=pb.Ping(nonce=n)) for n in range(5000)], part(WHOLE))
        assert host.until("part").message == 1


def test_refused_admission_reaches_the_host():
    def admit(hello, certificate):
        assert certificate is None
        raise ConfigError(f"host '{hello.host}' is not permitted in run '{hello.run}'")

    with gateway(admit=admit) as server, Link(server.address, HELLO, None) as link:
        wait_for(lambda: "refused" in link.status().reason)
        assert "host 'left-arm' is not permitted in run 'run-1'" in link.status().reason
        assert not link.status().connected and not server.peers()


def test_sessions_are_bounded():
    with gateway(max_sessions=2) as server:
        hosts = [RawHost(server.address) for _ in range(3)]
        welcomes = [host.hello(wire.Hello(f"h{n}", "", "")) for n, host in enumerate(hosts)]
        refused = [w.refusal for w in welcomes if not w.version]  # all three call at once
        assert len(refused) == 1 and "has 2 sessions, its most" in refused[0]
        admitted = [host for host, w in zip(hosts, welcomes, strict=True) if w.version]
        admitted[0].__exit__()
        wait_for(lambda: len(server.peers()) == 1)
        with RawHost(server.address) as another:
            assert another.hello(wire.Hello("h9", "", "")).version == 1
        for host in hosts:
            if host is not admitted[0]:
                host.__exit__()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_a_handler_ends_only_its_session():
    def fail(host, header, arrays):
        if header.n == 0:
            raise ZeroDivisionError
        return double(host, header, arrays)

    with gateway(fail) as server:
        with RawHost(server.address) as host:
            host.hello()
            host.send(part(message(0)))
            assert "failed over a message of kind 'control'" in host.until("goodbye").reason
        still_serves(server)


def rogue(*pieces):
    """A gateway that answers a Hello with these pieces."""
    sent: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    stop = threading.Event()

    def session(requests, context):
        sent.put(next(requests))
        yield from pieces
        stop.wait(20)

    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.stream_stream_rpc_method_handler(session)
    generic = grpc.method_handlers_generic_handler(wire.SERVICE, {wire.RPC: handler})
    server.add_generic_rpc_handlers((generic,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}", stop


@pytest.mark.parametrize(
    "pieces,why",
    [
        ([PICKLE], "no Piece"),
        ([piece(ping=pb.Ping(nonce=1))], "no Welcome"),
        ([piece(welcome=pb.Welcome(version=7))], "version 7"),
        ([wire.welcome_piece(""), part(WHOLE, total=1 << 50)], "1 to 1048576 are right"),
        ([wire.welcome_piece(""), part(b"x" * 5)], "message of 5 bytes"),
        ([wire.welcome_piece(""), wire.goodbye_piece("enough")], "enough"),
    ],
)
def test_a_host_survives_a_gateway_that_breaks_the_rules(pieces, why):
    server, address, stop = rogue(*pieces)
    with Link(address, HELLO, None) as link:
        wait_for(lambda: why in link.status().reason)
        stop.set()
    server.stop(0).wait()
