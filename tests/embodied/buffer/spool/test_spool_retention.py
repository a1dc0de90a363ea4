"""What a spool deletes: nothing that the learner's site has not acknowledged."""

import subprocess
from pathlib import Path

import pytest
import spooling
from hypothesis import given, settings
from hypothesis import strategies as st
from spooling import HOST, STREAM, Link, learners_site, payloads_in, pump_all, record
from tmpfs import script_in_tmpfs

from embodied.buffer.log.segments import list_segments
from embodied.buffer.serve.sink import LocalBuffer
from embodied.buffer.spool.uploader import Uploader
from embodied.buffer.upkeep.verification import foreign_files
from embodied.buffer.write.acknowledged import (
    NAME,
    Acknowledged,
    AcknowledgedFile,
    load_acknowledged,
)
from embodied.buffer.write.retention import Retention

SEGMENT = 1 << 13
SPOOLED = Retention(max_bytes=4 * SEGMENT, acknowledged_only=True)


def spool_bytes(path):
    return sum(file.stat().st_size for file in path.glob("*.seg"))


def test_only_what_is_acknowledged_is_deleted(tmp_path):
    spool = tmp_path / "spool"
    with LocalBuffer(spool, segment_bytes=SEGMENT, retention=SPOOLED) as buffer:
        for number in range(60):
            record(buffer, number)
        buffer.flush()
        assert len(payloads_in(spool)) == 600 and spool_bytes(spool) > 6 * SEGMENT
        with (
            learners_site(tmp_path) as log,
            Link(tmp_path) as link,
            Uploader(spool, link, HOST, batch_bytes=1 << 11) as uploader,
        ):
            for number in range(60, 90):
                # A long episode reaches over segments; its beginning stays until all of it is sent.
                record(buffer, number, length=9 if number % 10 else 150)
                for _ in range(4):
                    uploader.pump()
                    link.wait(0.002)
            pump_all(uploader, link)
            for number in range(90, 96):
                record(buffer, number)
                pump_all(uploader, link)
            found = payloads_in(log)
            assert len(found) == 93 * 10 + 3 * 151
            assert all(len(copies) == 1 for copies in found.values())
        assert spool_bytes(spool) <= SPOOLED.max_bytes + 2 * SEGMENT
        assert foreign_files(spool) == []
    with LocalBuffer(spool, STREAM, segment_bytes=SEGMENT, retention=SPOOLED) as buffer:
        assert buffer.next_episode() == 96
        record(buffer, 3)  # sent and deleted long ago
        assert (STREAM, 3, 0) not in payloads_in(spool)


def test_without_the_file_nothing_is_deleted_and_nothing_doubled(tmp_path):
    spool = tmp_path / "spool"
    with learners_site(tmp_path) as log:
        with LocalBuffer(spool, segment_bytes=SEGMENT) as buffer:
            for number in range(40):
                record(buffer, number)
        with Link(tmp_path) as link, Uploader(spool, link, HOST) as uploader:
            pump_all(uploader, link)
        assert len(load_acknowledged(spool).segments) > 4
        (spool / NAME).write_bytes(b"\xff" * 1000)
        with LocalBuffer(spool, segment_bytes=SEGMENT, retention=SPOOLED) as buffer:
            assert len(payloads_in(spool)) == 400
            record(buffer, 40)
        with Link(tmp_path) as link, Uploader(spool, link, HOST) as uploader:
            pump_all(uploader, link)
            assert {key[1] for key in link.sent} == {40}
        assert len(payloads_in(log)) == 410
        with LocalBuffer(spool, segment_bytes=SEGMENT, retention=SPOOLED):
            assert spool_bytes(spool) <= SPOOLED.max_bytes + SEGMENT


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A log's folder, what was stored for it last but one and last, and the file after each."""
    folder = tmp_path_factory.mktemp("spool")
    with LocalBuffer(folder, segment_bytes=SEGMENT) as buffer:
        for number in range(30):
            record(buffer, number)
    newest = max(list_segments(folder))
    values = [Acknowledged(tuple(range(1, n)), newest, {STREAM: n}) for n in (2, 3, 4)]
    file, states = AcknowledgedFile(folder), []
    for value in values:
        file.store(value)
        states.append((folder / NAME).read_bytes())
    file.close()
    return folder, values[1:], states[1:]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_torn_or_damaged_slot_leaves_the_one_before(stored, data):
    folder, values, (before, after) = stored
    (folder / NAME).write_bytes(after)
    assert load_acknowledged(folder) == values[1] and len(after) == len(before)
    differ = [i for i in range(0, 100) if after[i] != before[i]]
    differ = differ or [
        1 << 18 | i for i in range(100) if after[1 << 18 | i] != before[1 << 18 | i]
    ]
    at = data.draw(st.integers(differ[0], differ[-1]))
    if data.draw(st.booleans()):
        torn = after[:at] + before[at:]
    else:
        torn = after[:at] + bytes([after[at] ^ data.draw(st.integers(1, 255))]) + after[at + 1 :]
    (folder / NAME).write_bytes(torn)
    assert load_acknowledged(folder) == values[0]


def test_a_file_of_a_log_that_was_here_before_lets_nothing_be_deleted(tmp_path):
    with LocalBuffer(tmp_path) as buffer:
        record(buffer, 0)
    file = AcknowledgedFile(tmp_path)
    file.store(Acknowledged(tuple(range(1, 400)), 400))
    file.close()
    assert load_acknowledged(tmp_path) == Acknowledged()


FULL = """
import sys
from pathlib import Path
from embodied.buffer.serve.sink import LocalBuffer
from embodied.buffer.spool.uploader import Uploader
from embodied.buffer.write.retention import Retention
from embodied.core.errors import StorageFullError
from spooling import HOST, Link, learners_site, make_step, payloads_in, pump_all
spool, folder = Path(sys.argv[1]) / "spool", Path(sys.argv[2])
retention = Retention(max_bytes=1 << 30, acknowledged_only=True)
taken = []
with LocalBuffer(spool, segment_bytes=1 << 16, retention=retention) as buffer:
    def fill():
        number = taken[-1][1] + 1 if taken else 0
        while True:
            for index in range(10):
                step = make_step(number, index, 9, numbers=500)
                try:
                    buffer.add(step)
                except StorageFullError as error:
                    assert str(spool) in str(error), error
                    return step
                taken.append(step.key)
            number += 1
    step = fill()
    assert len(taken) > 50 and len(payloads_in(spool)) == len(taken), len(taken)
    with learners_site(folder) as log, Link(folder) as link, Uploader(spool, link, HOST) as up:
        for round in range(3):
            pump_all(up, link)
            buffer.add(step)  # what is acknowledged has given way
            taken.append(step.key)
            for index in range(step.index + 1, 10):
                step = make_step(step.episode, index, 9, numbers=500)
                buffer.add(step)
                taken.append(step.key)
            step = fill()
        pump_all(up, link)
        found = payloads_in(log)
        assert list(found) and sorted(found) == sorted(taken), (len(found), len(taken))
        assert all(len(copies) == 1 for copies in found.values())
        assert len(payloads_in(spool)) < len(taken)
    number = buffer.next_episode(step.stream)
    assert number in (step.episode, step.episode + 1), number
"""


def test_a_full_spool_refuses_steps_until_some_are_acknowledged(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    support = Path(spooling.__file__).parent
    script = "import sys; sys.path.insert(0, sys.argv[3])\n" + FULL
    command = script_in_tmpfs(script, mount, tmp_path, support, size="1100k")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
