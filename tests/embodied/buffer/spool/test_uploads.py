"""Steps of a spool reach the learner's buffer as they are stored, once, in order, at once."""

import numpy as np
import pytest
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

from embodied.buffer.serve.sink import LocalBuffer
from embodied.buffer.spool.names import prefix_of, stream_name
from embodied.buffer.spool.uploader import Uploader
from embodied.buffer.write.writer import ReplayWriter
from embodied.core.errors import ConfigError, RunInUseError


@pytest.mark.parametrize("codec", ["raw", "zstd", "webp", "jpeg:90"])
def test_records_travel_as_they_are_stored(tmp_path, codec):
    rng = np.random.default_rng(0)
    codecs = {"observation.images.*": codec}
    with LocalBuffer(tmp_path / "spool", codecs=codecs) as spool, learners_site(tmp_path) as log:
        for episode in range(3):
            for index in range(8):
                picture = rng.integers(0, 255, (32, 32, 3), np.uint8)
                seen = {"observation.images.front": picture, "observation.state": np.ones(3, "f4")}
                spool.add(make_step(episode, index, 7, observation=seen))
        spool.flush()
        with Link(tmp_path) as link, Uploader(tmp_path / "spool", link, HOST) as uploader:
            pump_all(uploader, link)
            status = uploader.status()
        assert status.sent_steps == status.acknowledged_steps == 24
        assert status.resent_steps == status.duplicate_steps == status.depth_bytes == 0
        assert status.error is None
        check_arrived(tmp_path / "spool", log)


def test_small_features_are_compressed_on_the_way_and_pictures_are_not(tmp_path):
    with learners_site(tmp_path) as log, Link(tmp_path) as link:
        with LocalBuffer(tmp_path / "spool") as spool:
            record(spool, 0, length=200, numbers=30)
        with Uploader(tmp_path / "spool", link, HOST) as uploader:
            depth_bytes = sum(len(p[0]) for p in payloads_in(tmp_path / "spool").values())
            pump_all(uploader, link)
            assert link.nbytes == uploader.status().sent_bytes < depth_bytes / 4
        check_arrived(tmp_path / "spool", log)


def test_steps_are_sent_before_their_episode_ends(tmp_path):
    with (
        LocalBuffer(tmp_path / "spool") as spool,
        learners_site(tmp_path) as log,
        Link(tmp_path) as link,
        Uploader(tmp_path / "spool", link, HOST) as uploader,
    ):
        for index in range(40):
            spool.add(make_step(0, index, 39))
            pump_all(uploader, link)
            assert len(payloads_in(log)) == index + 1
        check_arrived(tmp_path / "spool", log)


def test_an_outage_is_caught_up_in_order_and_nothing_acknowledged_is_sent_again(tmp_path):
    """The link is cut, time and again, at moments when batches are under way."""
    with (
        LocalBuffer(tmp_path / "spool", segment_bytes=1 << 18) as spool,
        learners_buffer(tmp_path) as log,
        Link(tmp_path) as link,
        Uploader(tmp_path / "spool", link, HOST, resend_s=0.3, batch_bytes=1 << 12) as uploader,
    ):
        acknowledged = 0
        for outage in range(4):
            for number in range(20):
                record(spool, outage * 20 + number, length=49)
                uploader.pump()
            gateway = Gateway(tmp_path)
            wanted = acknowledged + 300
            pump_until(uploader, link, lambda n=wanted: uploader.status().acknowledged_steps > n)
            acknowledged = uploader.status().acknowledged_steps
            gateway.cut()
        gateway = Gateway(tmp_path)
        try:
            pump_all(uploader, link)
        finally:
            gateway.cut()
        status = uploader.status()
        assert status.acknowledged_steps == 4 * 20 * 50
        check_arrived(tmp_path / "spool", log)
        # Only what was under way when the link was cut may have been sent twice.
        assert status.duplicate_steps <= status.resent_steps < 4 * 4 * 60


def test_a_new_uploader_goes_on_where_the_learners_site_is(tmp_path):
    with (
        LocalBuffer(tmp_path / "spool", segment_bytes=1 << 14) as spool,
        learners_site(tmp_path) as log,
        Link(tmp_path) as link,
    ):
        for number in range(12):
            record(spool, number)
        record(spool, 12, length=3)
        with Uploader(tmp_path / "spool", link, HOST, batch_bytes=1 << 10) as uploader:
            pump_until(uploader, link, lambda: uploader.status().acknowledged_steps > 40)
            under_way = uploader.status().in_flight_batches
        there = len(payloads_in(log))
        for index in range(4, 10):
            spool.add(make_step(13, index - 4, 5))
        with Uploader(tmp_path / "spool", link, HOST) as uploader:
            pump_all(uploader, link)
            status = uploader.status()
        assert status.sent_steps <= 130 - there
        assert status.duplicate_steps == 0 or under_way
        check_arrived(tmp_path / "spool", log)


def test_an_episode_that_the_learners_site_deleted_is_done_with(tmp_path):
    with LocalBuffer(tmp_path / "spool") as spool:
        record(spool, 0)
        record(spool, 1)
    with ReplayWriter(tmp_path / "learner") as writer:
        for index in range(4):
            writer.append(make_step(0, index, 9))
        writer.delete(STREAM, 0)
    with (
        learners_site(tmp_path) as log,
        Link(tmp_path) as link,
        Uploader(tmp_path / "spool", link, HOST) as uploader,
    ):
        pump_all(uploader, link)
        assert {key[1] for key in link.sent} == {1}
    assert len(payloads_in(log)) == 14


def test_names_and_one_uploader_at_a_time(tmp_path):
    assert stream_name("robot-1", "arm") == STREAM and prefix_of("a.b_c-9") == "a.b_c-9/"
    for name in ("", "a/b", "../x", "-a", "a" * 64, "ä", "a\n"):
        with pytest.raises(ConfigError, match="host name"):
            prefix_of(name)
    LocalBuffer(tmp_path / "spool").close()
    with (
        Link(tmp_path) as link,
        Uploader(tmp_path / "spool", link, HOST),
        pytest.raises(RunInUseError, match="is being sent by another process"),
    ):
        Uploader(tmp_path / "spool", link, HOST)
    with Link(tmp_path) as link, pytest.raises(ConfigError, match="fresh_share"):
        Uploader(tmp_path / "spool", link, HOST, fresh_share=1.0)
