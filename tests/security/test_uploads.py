"""What robot hosts upload, through a gateway into the buffer: bombs, replays, others' streams."""

import tempfile
from pathlib import Path

import pytest
from footprint import Footprint
from linking import KIND, RawHost
from ports import PORTS, Opened
from sites import run_gateway
from spooling import learners_buffer, make_step, payloads_in
from striking import HONEST, serves
from uploads import bombs, upload

from embodied.buffer.serve.messages import EpisodeRequest, ResumeRequest
from embodied.buffer.spool.messages import UPLOAD_REPLIES
from embodied.comms.codec import decode, encode
from embodied.comms.framing import pack, unpack
from embodied.comms.links import wire
from embodied.comms.links.client import Link
from embodied.core.errors import CorruptDataError, EmbodiedError

STREAM = "honest/arm"
MOST_GROWTH_MIB = 64
"""A quarter of what the smallest of the bombs becomes."""


def steps(first, end, length=99):
    return upload(*(make_step(0, index, length, STREAM) for index in range(first, end)))


@pytest.fixture
def site(tmp_path):
    with tempfile.TemporaryDirectory(prefix="s") as place:
        folder = Path(place)
        with learners_buffer(folder, "buffer") as log, run_gateway(folder) as gateway:
            yield gateway.address, log


def sent(address, message):
    """The header with which the gateway answers, in a session of its own."""
    with Link(address, HONEST, None) as link:
        return link.requests("experience", UPLOAD_REPLIES).request(*message, 20)[0]


def test_what_was_acknowledged_is_not_taken_again(site):
    address, log = site
    first, overlapping = steps(0, 6), steps(3, 9)
    assert sent(address, first).num_new == 6
    for _ in range(2):
        again = sent(address, first)
        assert (again.num_new, again.num_duplicate) == (0, 6)
    resumed = sent(address, (ResumeRequest(((STREAM, 0),)), {}))
    assert resumed.next_index == (6,)
    mixed = sent(address, overlapping)
    assert (mixed.num_new, mixed.num_duplicate) == (3, 3)
    with Link(address, HONEST, None) as link:
        uploads = link.requests("experience", UPLOAD_REPLIES)
        for message in (first, overlapping, first):
            assert uploads.request(*message, 20)[0].num_new == 0
    found = payloads_in(log)
    assert sorted(key[2] for key in found) == list(range(9))
    assert all(len(copies) == 1 for copies in found.values())


def test_a_session_that_was_recorded_and_is_played_again_adds_nothing(site):
    address, log = site
    whole = pack(1, encode(*steps(0, 4)))
    pieces = [wire.part_piece(KIND["experience"].id, 1, 0, len(whole), [whole])]
    for expected in (4, 0, 0):
        with RawHost(address) as host:
            assert host.hello(HONEST).version == 1
            host.send(*pieces)
            header, _ = decode(unpack(host.until("part").data)[1], UPLOAD_REPLIES)
            assert header.num_new == expected
            host.send(*pieces)
            assert "message 2 at byte 0" in host.until("goodbye").reason
    assert sorted(key[2] for key in payloads_in(log)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "stream", ["victim/arm", "../victim/arm", "/arm", "honest", "honestly/arm", "x\0honest/arm"]
)
def test_a_host_reaches_no_stream_but_its_own(site, stream):
    address, log = site
    for message in (
        upload(make_step(0, 0, 9, stream)),
        upload(make_step(0, 0, 9, STREAM), make_step(0, 0, 9, stream)),
        (ResumeRequest(((STREAM, 0), (stream, 0))), {}),
    ):
        with pytest.raises(EmbodiedError, match="its streams begin with 'honest/'"):
            sent(address, message)
    with pytest.raises(CorruptDataError, match="cannot be decoded"):
        sent(address, (EpisodeRequest(stream), {}))
    assert payloads_in(log) == {}


@pytest.mark.slow
def test_bombs_cost_the_learners_site_no_memory():
    request, arrays = upload(*(make_step(0, index, 9, STREAM) for index in range(3)))
    port = PORTS["gateway, experience"]
    with tempfile.TemporaryDirectory(prefix="s") as place:
        process = Opened("site", Path(place))
        try:
            address = process.address("gateway, experience")
            assert serves(port, address, process.folder, 1)
            memory = Footprint(process.process.pid)
            for name, message in bombs(request, arrays).items():
                with pytest.raises(CorruptDataError) as refusal:
                    sent(address, message)
                assert len(str(refusal.value)) > 20, name
            assert serves(port, address, process.folder, 2) and process.alive
            assert memory.growth_mib < MOST_GROWTH_MIB
        finally:
            process.close()
