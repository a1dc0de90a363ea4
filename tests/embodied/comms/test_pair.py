"""The connection between a process and the one that started it."""

import socket
import struct
import threading
import time

import msgspec
import numpy as np
import pytest

from embodied.comms import pair
from embodied.comms.codec import encode
from embodied.comms.framing import pack
from embodied.comms.pair import PairEnd
from embodied.core.errors import CorruptDataError, LinkError, SpecError


class Ask(msgspec.Struct, frozen=True, tag="ask", forbid_unknown_fields=True):
    n: int


class Tell(msgspec.Struct, frozen=True, tag="tell", forbid_unknown_fields=True):
    n: int


@pytest.fixture
def links():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_messages_come_whole_and_in_order(links):
    ours, theirs = (PairEnd(link, Ask) for link in links)
    arrays = {"x": np.arange(1 << 20, dtype=np.float32), "none": np.zeros((0, 3))}

    def send():
        for n in range(3):
            ours.send(n, Ask(10 * n), arrays, 10)

    thread = threading.Thread(target=send)
    thread.start()
    for n in range(3):
        found = theirs.receive(10)
        assert (found.id, found.header) == (n, Ask(10 * n)) and found.arrays.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found.arrays[name], array)
    thread.join()


def test_an_end_that_is_gone_silent_or_deaf_is_a_link_error_in_time(links, monkeypatch):
    ours, theirs = (PairEnd(link, Ask) for link in links)
    started_s = time.monotonic()
    with pytest.raises(LinkError, match=r"no answer in 0\.05 s"):
        ours.receive(0.05)
    with pytest.raises(LinkError, match=r"no message in 0\.05 s"):
        ours.send(1, Ask(1), {"x": np.zeros(1 << 22)}, 0.05)
    monkeypatch.setattr(pair, "MAX_BYTES", 1 << 10)
    with pytest.raises(SpecError, match="at most 1024"):
        theirs.send(1, Ask(1), {"x": np.zeros(1 << 10)})
    theirs.close()
    for _ in range(2):
        with pytest.raises(LinkError, match=r"ended|broke off"):
            ours.receive()
    with pytest.raises(LinkError, match="broke off"):
        ours.send(2, Ask(1), {})
    assert time.monotonic() - started_s < 5


def test_what_cannot_be_a_message_is_refused(links):
    good = pack(7, encode(Ask(1), {"x": np.arange(3)}))
    bad = [
        pack(7, encode(Tell(1), {})),
        struct.pack("<IIQ", 0xFFFFFFFF, 1, 1),
        struct.pack("<IIQ", 3, 1, 1),
        struct.pack("<IIQ", 16, 1 << 31, 1),
        struct.pack("<IIQI", 24, 1, 1, 0xFFFFFFFF) + b"xxxx",
        good[:16] + bytes(len(good) - 16),
    ]
    for data in bad:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(data)
            with pytest.raises(CorruptDataError):
                PairEnd(theirs, Ask).receive(5)
    ours, theirs = links
    ours.sendall(good[:-1])
    with pytest.raises(LinkError, match="no answer"):
        PairEnd(theirs, Ask).receive(0.05)
