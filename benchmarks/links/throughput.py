"""A link's throughput against a plain TLS socket's, between two processes of this machine.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.links.throughput [--rounds 9]

Both use mutual TLS. A message is one array: the link packs, cuts, sums (CRC32C), joins and
decodes it; the socket only carries its bytes into an array of the right size. Times are from the
call that sends to the end of an answer of a few bytes; the two take turns within every round, and
the ratio is the median of the rounds' ratios.
"""

import argparse
import multiprocessing
import socket
import ssl
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from embodied.comms.identity.authority import Authority
from embodied.comms.identity.credentials import (
    Bundle,
    load_bundle,
    server_credentials,
)
from embodied.comms.identity.peer import Peer
from embodied.comms.links.client import Link
from embodied.comms.links.kinds import CONTROL, MIB, Bound, Kind
from embodied.comms.links.server import LinkServer
from embodied.comms.links.services import Service
from embodied.comms.links.wire import Hello

ROOM = Bound(4, 1024 * MIB, 1024 * MIB)
BULK = Kind(id=9, name="bulk", priority=2, policy="block", up=ROOM, down=ROOM)
KINDS = (CONTROL, BULK)
CHUNK_BYTES = 1 << 18


class Blob(msgspec.Struct, frozen=True, tag="blob", forbid_unknown_fields=True):
    """An array follows."""


class Size(msgspec.Struct, frozen=True, tag="size", forbid_unknown_fields=True):
    """What came."""

    nbytes: int


def context(side: int, bundle: Bundle) -> ssl.SSLContext:
    """Mutual TLS with one authority."""
    made = ssl.SSLContext(side)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_cert_chain(bundle.folder / "certificate.pem", bundle.folder / "key.pem")
    made.load_verify_locations(cadata=bundle.authority_pem.decode())
    made.verify_mode = ssl.CERT_REQUIRED
    made.check_hostname = side == ssl.PROTOCOL_TLS_CLIENT
    return made


def serve(ready: Connection, bundle: Bundle) -> None:
    """The other process: a gateway and a TLS socket; ends with its connection."""

    def answer(host: str, header: Blob, arrays: dict[str, np.ndarray]):
        return Size(arrays["x"].nbytes), {}

    tls = context(ssl.PROTOCOL_TLS_SERVER, bundle)
    listener = socket.create_server(("127.0.0.1", 0))
    services = {"bulk": Service(Blob, answer)}
    with LinkServer(
        "127.0.0.1:0", services, server_credentials(lambda: bundle), lambda *_: None, kinds=KINDS
    ) as server:
        ready.send((server.address, listener.getsockname()[1]))
        with tls.wrap_socket(listener.accept()[0], server_side=True) as link:
            while head := link.recv(8):
                array = np.empty(int.from_bytes(head, "little"), np.uint8)
                view, place = memoryview(array), 0
                while place < len(view):
                    place += link.recv_into(view[place : place + CHUNK_BYTES])
                link.sendall(b"k")


def rounds(link: Link, plain: ssl.SSLSocket, nbytes: int, count: int) -> tuple[list[float], ...]:
    """Seconds over the link and over the socket, round by round."""
    array = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    array.flags.writeable = False
    requests = link.requests("bulk", Size)
    times: tuple[list[float], ...] = ([], [])
    for number in range(count + 1):
        started_s = time.perf_counter()
        header, _ = requests.request(Blob(), {"x": array}, 120)
        link_s = time.perf_counter() - started_s
        assert header == Size(nbytes)
        started_s = time.perf_counter()
        plain.sendall(nbytes.to_bytes(8, "little"))
        plain.sendall(memoryview(array))
        assert plain.recv(1) == b"k"
        plain_s = time.perf_counter() - started_s
        if number:  # the first warms up
            times[0].append(link_s)
            times[1].append(plain_s)
    return times


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", default="1,20,200", help="MB, with commas between")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """All sizes, with certificates made in `folder`."""
    authority = Authority.create(folder / "authority", "benchmark")
    authority.issue(Peer("gateway", "hub"), folder / "hub", dns=["localhost"], ip=["127.0.0.1"])
    authority.issue(Peer("robot", "host", ("*",)), folder / "host")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=serve, args=(theirs, load_bundle(folder / "hub"))
    )
    process.start()
    address, port = ours.recv()
    bundle = load_bundle(folder / "host")
    tls = context(ssl.PROTOCOL_TLS_CLIENT, bundle)
    print("| MB | link, ms | TLS socket, ms | link's throughput / socket's |")
    print("|---|---|---|---|")
    with (
        tls.wrap_socket(
            socket.create_connection(("127.0.0.1", port)), server_hostname="localhost"
        ) as plain,
        Link(address, Hello("host", "", ""), lambda: bundle, kinds=KINDS) as link,
    ):
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for size in map(int, arguments.sizes.split(",")):
            link_s, plain_s = rounds(link, plain, size * 1_000_000, arguments.rounds)
            ratio = median(b / a for a, b in zip(link_s, plain_s, strict=True))
            times = f"{median(link_s) * 1e3:.1f} | {median(plain_s) * 1e3:.1f}"
            print(f"| {size} | {times} | {ratio:.2f} |")
    process.join()


if __name__ == "__main__":
    main()
