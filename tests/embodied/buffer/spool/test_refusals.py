"""What the receiver lets in, and what becomes of steps that it or the learner's buffer refuses."""

import resource

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from spooling import (
    HOST,
    STREAM,
    Gateway,
    Link,
    check_arrived,
    learners_buffer,
    learners_site,
    make_step,
    payloads_in,
    pump_all,
    pump_until,
    record,
)
from uploads import bombs, changed, upload

from embodied.buffer.log.segments import list_segments, segment_path
from embodied.buffer.log.tail import LogReader
from embodied.buffer.serve.messages import REPLIES, ResumeRequest
from embodied.buffer.serve.sink import LocalBuffer
from embodied.buffer.spool.messages import UPLOAD_REPLIES, unwrap, wrap
from embodied.buffer.spool.receiver import ForeignStreamError, Receiver
from embodied.buffer.spool.uploader import Uploader
from embodied.buffer.steps.records import encode_step
from embodied.buffer.steps.schema import Codecs, encode_schema
from embodied.buffer.write.writer import ReplayWriter
from embodied.comms.channels import ErrorReply, RequestClient
from embodied.core.errors import CorruptDataError, LinkError


def test_lies_bombs_and_damage_are_refused_before_anything_is_written(tmp_path):
    request, arrays = upload(*(make_step(0, i, 9) for i in range(3)))
    assert len(unwrap(request, arrays)[1]) == 3
    with learners_site(tmp_path) as log, RequestClient(f"ipc://{tmp_path}/g", UPLOAD_REPLIES) as up:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, (header, sent) in bombs(request, arrays).items():
            with pytest.raises(CorruptDataError) as refusal:
                up.request(header, sent, 10)
            assert len(str(refusal.value)) > 20, name
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB
        assert payloads_in(log) == {}
        up.request(request, arrays, 10)
        assert len(payloads_in(log)) == 3


def test_a_feature_that_lies_inside_a_step_is_refused_by_the_buffer(tmp_path):
    pixels = {"observation.images.front": np.zeros((16, 16, 3), np.uint8)}
    schema = Codecs({"observation.images.*": "zstd"}).schema_of(
        make_step(0, 0, 9, observation=pixels)
    )
    payload = bytes(encode_step(make_step(0, 0, 9, observation=pixels), schema))
    blob = zstandard.ZstdCompressor(level=1).compress(pixels["observation.images.front"])
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 20))[: len(blob)]
    assert blob in payload
    request, arrays = wrap(encode_schema(schema), [payload.replace(blob, bomb)])
    with learners_site(tmp_path) as log, RequestClient(f"ipc://{tmp_path}/g", UPLOAD_REPLIES) as up:
        with pytest.raises(CorruptDataError, match="episode 0, index 0"):
            up.request(request, arrays, 10)
        assert payloads_in(log) == {}


def test_a_host_writes_and_asks_about_its_own_streams_only(tmp_path):
    with learners_site(tmp_path) as log, Link(tmp_path) as link:
        for stream in ("robot-2/arm", "robot-1", "robot-11/arm", "/arm", "x/robot-1/arm"):
            mixed = upload(make_step(0, 0, 9), make_step(0, 0, 9, stream))
            for header, arrays in (mixed, (ResumeRequest(((stream, 0),)), {})):
                number = link.send(header, arrays)
                while number is None:
                    number = link.send(header, arrays)
                assert link.wait(10)
                (reply,) = link.receive_ready()
                assert isinstance(reply.header, ErrorReply)
                assert reply.header.kind == ForeignStreamError.__name__
                assert stream in reply.header.message and "begin with" in reply.header.message
        assert payloads_in(log) == {}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_comes_is_refused_clearly_or_is_what_was_sent(data):
    request, arrays = upload(*(make_step(0, i, 9) for i in range(4)))
    receiver = Receiver(HOST, None)  # type: ignore[arg-type] - check needs no link
    payloads = arrays["payloads"].copy()
    lengths = arrays["lengths"].copy()
    what = data.draw(st.sampled_from(["payloads", "lengths", "schema", "cut"]))
    schema = request.schema
    flip = st.integers(1, 255)
    if what == "payloads":
        payloads[data.draw(st.integers(0, payloads.size - 1))] ^= data.draw(flip)
    elif what == "lengths":
        lengths.view(np.uint8)[data.draw(st.integers(0, 15))] ^= data.draw(flip)
    elif what == "schema":
        at = data.draw(st.integers(0, len(schema) - 1))
        schema = schema[:at] + bytes([schema[at] ^ data.draw(flip)]) + schema[at + 1 :]
    else:
        payloads = payloads[: data.draw(st.integers(0, payloads.size - 1))]
    with pytest.raises(CorruptDataError):
        receiver.check(changed(request, schema=schema), {"payloads": payloads, "lengths": lengths})


def test_the_receiver_says_so_when_the_buffer_does_not_answer(tmp_path):
    with RequestClient(f"ipc://{tmp_path}/b", REPLIES) as requests:
        receiver = Receiver(HOST, requests, timeout_s=0.05)
        with pytest.raises(LinkError, match=r"did not answer in 0\.05 s"):
            receiver.handle(*upload(make_step(0, 0, 9)))


def test_what_the_learner_refuses_is_set_aside_and_all_else_goes_on(tmp_path):
    with ReplayWriter(tmp_path / "learner") as writer:
        writer.append(make_step(0, 0, 9, f"{HOST}/leg", numbers=3))  # other arrays
    with (
        LocalBuffer(tmp_path / "spool") as spool,
        learners_buffer(tmp_path),
        Link(tmp_path) as link,
        Uploader(tmp_path / "spool", link, HOST) as uploader,
    ):
        for number in range(4):
            record(spool, number)
            record(spool, number, stream=f"{HOST}/leg")
            record(spool, number, stream="elsewhere/arm")
        gateway = Gateway(tmp_path)
        try:
            pump_until(uploader, link, lambda: uploader.status().num_set_aside == 8)
            pump_until(uploader, link, lambda: uploader.status().depth_steps == 79)
        finally:
            gateway.cut()
        reasons = {stream: why for stream, _, why in uploader.status().set_aside}
        assert "SpecError" in reasons[f"{HOST}/leg"]
        assert "does not begin with 'robot-1/'" in reasons["elsewhere/arm"]
        found = payloads_in(tmp_path / "learner")
        assert sum(key[0] == STREAM for key in found) == 40 and len(found) == 41


def test_a_spool_that_was_emptied_does_not_lose_its_new_steps_silently(tmp_path):
    with learners_site(tmp_path) as log:
        for folder, numbers in (("first", range(5)), ("second", range(2))):
            with LocalBuffer(tmp_path / folder) as spool:
                for number in numbers:
                    record(spool, number, length=5 + len(numbers))
            with Link(tmp_path) as link, Uploader(tmp_path / folder, link, HOST) as uploader:
                if folder == "first":
                    pump_all(uploader, link)
                    continue
                pump_until(uploader, link, lambda u=uploader: u.status().num_set_aside == 2)
                assert "another stream name" in uploader.status().set_aside[0][2]
                assert not link.sent and uploader.status().depth_steps == 16
        check_arrived(tmp_path / "first", log)


def test_a_damaged_record_costs_its_episode_only(tmp_path):
    with LocalBuffer(tmp_path / "spool", segment_bytes=1 << 20) as spool:
        for number in range(6):
            record(spool, number)
    (number,) = list_segments(tmp_path / "spool")
    records = [r for r in LogReader(tmp_path / "spool").poll() if r.schema > 1]
    with open(segment_path(tmp_path / "spool", number, sealed=True), "r+b") as file:
        file.seek(records[24].offset + 40)  # episode 2, index 4
        file.write(b"\xff\xff")
    with (
        learners_site(tmp_path) as log,
        Link(tmp_path) as link,
        Uploader(tmp_path / "spool", link, HOST) as uploader,
    ):
        pump_until(uploader, link, lambda: uploader.status().depth_steps == 5)
        found = payloads_in(log)
        assert len(found) == 54
        assert [key[2] for key in found if key[1] == 2] == [0, 1, 2, 3]
