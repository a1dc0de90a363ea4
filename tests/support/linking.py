"""What tests of links share: messages, kinds, a gateway, and a host that keeps to no rules."""

import queue
import subprocess
import sys
import time

import grpc
import msgspec
import numpy as np

from embodied.comms.codec import encode
from embodied.comms.framing import pack
from embodied.comms.links import link_pb2 as pb
from embodied.comms.links import wire
from embodied.comms.links.kinds import KINDS
from embodied.comms.links.server import LinkServer
from embodied.comms.links.services import Service

HELLO = wire.Hello("left-arm", "run-1", "0.1")
KIND = {kind.name: kind for kind in KINDS}


class Ask(msgspec.Struct, frozen=True, tag="ask", forbid_unknown_fields=True):
    n: int


class Tell(msgspec.Struct, frozen=True, tag="tell", forbid_unknown_fields=True):
    n: int


def double(host, header, arrays):
    return Tell(2 * header.n), {name: array * 2 for name, array in arrays.items()}


def welcome(hello, certificate):
    pass


def gateway(handler=double, address="127.0.0.1:0", admit=welcome, **options):
    services = {name: Service(Ask, handler) for name in ("control", "experience", "telemetry")}
    return LinkServer(address, services, None, admit, **options)


def port_of(address):
    return int(address.rpartition(":")[2])


def wait_for(condition, timeout_s=20.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "timed out"
        time.sleep(0.005)


def frozen(nbytes, seed=0):
    """An array that need not be copied to be sent."""
    array = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    array.flags.writeable = False
    return array


SCRIPT = """
import sys, threading
sys.path[:0] = [sys.argv[2]]
from linking import gateway
server = gateway(address=sys.argv[1])
sys.stdout.write(server.address + "\\n"); sys.stdout.flush()
threading.Event().wait()
"""


def gateway_process(address="127.0.0.1:0"):
    """A gateway in a process of its own, and its address."""
    command = [sys.executable, "-c", SCRIPT, address, __file__.rpartition("/")[0]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = process.stdout.readline().strip()
    assert found
    return process, found


def message(n, number=1, **arrays):
    """A whole message as it crosses."""
    return pack(number, encode(Ask(n), arrays))


def part(data, kind="control", number=1, offset=0, total=None):
    whole = len(data) if total is None else total
    return wire.part_piece(KIND[kind].id, number, offset, whole, [data])


class RawHost:
    """Speaks gRPC to a gateway and sends whatever it is told to."""

    def __init__(self, address, credentials=None):
        if credentials is None:
            self._channel = grpc.insecure_channel(address, wire.OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, wire.OPTIONS)
        self._pieces = queue.SimpleQueue()
        self.call = self._channel.stream_stream(wire.METHOD)(
            iter(self._pieces.get, None), timeout=60
        )

    def send(self, *pieces):
        for piece in pieces:
            self._pieces.put(piece)

    def hello(self, hello=HELLO):
        self.send(wire.hello_piece(hello))
        return pb.Piece.FromString(next(self.call)).welcome

    def until(self, body):
        """The next piece with this body."""
        for raw in self.call:
            piece = pb.Piece.FromString(raw)
            if piece.WhichOneof("body") == body:
                return getattr(piece, body)
        raise AssertionError(f"the call ended without a {body}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pieces.put(None)
        self.call.cancel()
        self._channel.close()
