import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tmpfs import script_in_tmpfs

from embodied.buffer.log.append import LogWriter
from embodied.buffer.log.segments import FIRST_OFFSET, RECORD_HEADER, list_segments, segment_path
from embodied.buffer.log.storage import Storage
from embodied.buffer.log.tail import LogReader
from embodied.core.errors import ConfigError, CorruptDataError, RunInUseError

SMALL = 4096


def read_all(path):
    reader = LogReader(path)
    records = [(record.seq, bytes(record.payload)) for record in reader.poll()]
    reader.close()
    return records, reader.damaged


def payload_of(seq, largest=300):
    return random.Random(seq).randbytes(random.Random(-seq - 1).randint(0, largest))


def write(path, count, segment_bytes=SMALL):
    """Append `count` records whose payload is a function of their number."""
    with LogWriter(path, segment_bytes) as writer:
        for _ in range(count):
            writer.append(payload_of(writer.next_seq))
        writer.flush()


def expected(count):
    return [(seq, payload_of(seq)) for seq in range(count)]


def abandon(writer):
    """Leave the writer and its files as SIGKILL would."""
    os.close(writer._lock)
    if writer._fd is not None:
        os.close(writer._fd)
    writer._lock = writer._fd = None


def test_round_trip_over_segments_and_reopening(tmp_path):
    for total in (30, 60, 90):
        write(tmp_path, 30)
        assert read_all(tmp_path) == (expected(total), [])
    assert len(list_segments(tmp_path)) > 3
    assert all(list_segments(tmp_path).values())  # closing seals


def test_parts_and_schema_are_kept(tmp_path):
    with LogWriter(tmp_path, SMALL) as writer:
        assert writer.flush() == -1
        assert writer.append(b"ab", bytearray(b"cd"), memoryview(b"ef"), b"", schema=7) == 0
        assert writer.append() == 1
        assert writer.flush() == 1
    reader = LogReader(tmp_path)
    records = list(reader.poll())
    assert [(r.schema, bytes(r.payload), r.segment) for r in records] == [
        (7, b"abcdef", 1),
        (0, b"", 1),
    ]
    assert records[0].offset == FIRST_OFFSET


def test_only_one_writer_and_its_pid_is_named(tmp_path):
    with (
        LogWriter(tmp_path, SMALL),
        pytest.raises(RunInUseError, match=f"pid {os.getpid()}"),
    ):
        LogWriter(tmp_path, SMALL)
    LogWriter(tmp_path, SMALL).close()


def test_record_larger_than_a_segment(tmp_path):
    with LogWriter(tmp_path, SMALL) as writer:
        largest = SMALL - FIRST_OFFSET - RECORD_HEADER.size
        with pytest.raises(ConfigError, match=f"segment_bytes \\(now {SMALL}\\)"):
            writer.append(bytes(largest + 1))
        assert writer.append(bytes(largest)) == 0
    assert read_all(tmp_path)[0] == [(0, bytes(largest))]


KILLED = """
import random, sys, os
from embodied.buffer.log.append import LogWriter
def payload_of(seq, largest):
    return random.Random(seq).randbytes(random.Random(-seq - 1).randint(0, largest))
largest = int(sys.argv[2])
writer = LogWriter(sys.argv[1], 400_000)
os.write(1, b"-1\\n")
while True:
    for _ in range(random.randint(1, 20)):
        writer.append(payload_of(writer.next_seq, largest))
    os.write(1, b"%d\\n" % writer.flush())
"""


@pytest.mark.slow
def test_sigkill_at_random_points_loses_nothing_acknowledged(tmp_path):
    largest = 60_000
    acknowledged = -1
    for trial in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(largest)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        first = child.stdout.readline()
        assert first == b"-1\n"
        time.sleep(random.Random(trial).uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        lines = child.stdout.read().split(b"\n")
        child.wait()
        # The last element is an incomplete line, or empty behind a complete one.
        acknowledged = max([acknowledged, *map(int, lines[:-1])])
        records, damaged = read_all(tmp_path)
        assert len(records) > acknowledged
        assert records == [(seq, payload_of(seq, largest)) for seq in range(len(records))]
        assert damaged == []
    assert acknowledged > 50 and len(list_segments(tmp_path)) > 5


def test_every_cut_and_flip_of_the_tail_record(tmp_path):
    writer = LogWriter(tmp_path, SMALL)
    for payload in (b"first", b"second", b"third record"):
        writer.append(payload)
    start = writer.offset - len(b"third record") - RECORD_HEADER.size
    start -= start % 8
    path = segment_path(tmp_path, 1, sealed=False)
    whole = path.read_bytes()
    abandon(writer)
    last = start + RECORD_HEADER.size + len(b"third record")
    broken = []
    for at in range(start, last):
        broken.append(whole[:at] + bytes(len(whole) - at))  # never reached the disk
        broken.append(whole[:at])
        broken.append(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
    for content in broken:
        path.write_bytes(content)
        assert [p for _, p in read_all(tmp_path)[0]] == [b"first", b"second"]
        with LogWriter(tmp_path, SMALL) as writer:
            assert writer.append(b"new") == 2
        records, damaged = read_all(tmp_path)
        assert records == [(0, b"first"), (1, b"second"), (2, b"new")] and damaged == []
        assert list_segments(tmp_path) == {1: True}
        segment_path(tmp_path, 1, sealed=True).unlink()


def test_damage_in_a_sealed_segment_costs_one_record(tmp_path):
    write(tmp_path, 60)
    assert list(list_segments(tmp_path).values())[:2] == [True, True]
    path = segment_path(tmp_path, 2, sealed=True)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        records, damaged = read_all(tmp_path)
        lost = set(expected(60)) - set(records)
        assert len(lost) <= 1 and set(records) <= set(expected(60))
        assert [seq for seq, _ in records] == sorted({seq for seq, _ in records})
        assert all(number == 2 for number, _ in damaged)
        assert bool(lost) <= bool(damaged)
    path.write_bytes(b"")
    records, damaged = read_all(tmp_path)
    assert damaged[0] == (2, 0) and 0 < len(records) < 60
    with LogWriter(tmp_path, SMALL) as writer:
        assert writer.next_seq == 60


def test_damage_in_the_open_segment_costs_one_record(tmp_path):
    """Bits that rot below acknowledged records must not take those along."""
    writer = LogWriter(tmp_path, 1 << 16)
    for seq in range(5):
        writer.append(payload_of(seq))
    abandon(writer)
    path = segment_path(tmp_path, 1, sealed=False)
    data = bytearray(path.read_bytes())
    data[data.index(payload_of(2)) + 1] ^= 1
    path.write_bytes(data)
    write(tmp_path, 5, segment_bytes=1 << 16)
    records, damaged = read_all(tmp_path)
    assert records == [record for record in expected(10) if record[0] != 2]
    assert len(damaged) == 1


def test_a_damaged_tail_of_the_last_sealed_segment_does_not_stop_the_writer(tmp_path):
    writer = LogWriter(tmp_path, SMALL)
    for seq in range(40):
        writer.append(payload_of(seq))
    abandon(writer)
    numbers = list_segments(tmp_path)
    last = max(number for number, sealed in numbers.items() if sealed)
    path = segment_path(tmp_path, last, sealed=True)
    data = path.read_bytes()
    path.write_bytes(data[:-20] + bytes(20))
    with LogWriter(tmp_path, SMALL) as writer:
        assert writer.next_seq == 40  # the open segment's header and records know


class Crash(BaseException):
    pass


class CrashingStorage(Storage):
    """The n-th operation that changes the disk, and all later ones, raise."""

    def __init__(self, countdown):
        self.countdown = countdown

    def __getattribute__(self, name):
        real = object.__getattribute__(self, name)
        if name not in vars(Storage) or name in ("open", "close"):
            return real

        def call(*args, **kwargs):
            self.countdown -= 1
            if self.countdown == 0 and name == "write":  # a torn write
                fd, buffers, offset = args
                os.pwrite(fd, b"".join(buffers)[:30], offset)
            if self.countdown <= 0:
                raise Crash(name)
            return real(*args, **kwargs)

        return call


def test_a_crash_before_any_call_to_the_disk_is_survived(tmp_path):
    crash_after = 0
    finished = False
    while not finished:
        crash_after += 1
        path = tmp_path / str(crash_after)
        storage = CrashingStorage(crash_after)
        writer, durable = None, -1
        try:
            for _ in range(2):
                writer = LogWriter(path, 256, storage=storage)
                for _ in range(6):
                    writer.append(payload_of(writer.next_seq, 60))
                    durable = writer.flush()
                abandon(writer)
                writer = None
            finished = True
        except Crash:
            pass
        if writer is not None and writer._lock is not None:
            abandon(writer)
        with LogWriter(path, 256) as writer:
            assert writer.next_seq > durable
            count = writer.next_seq
            writer.append(payload_of(count, 60))
        records, damaged = read_all(path)
        assert records == [(seq, payload_of(seq, 60)) for seq in range(count + 1)]
        assert damaged == []
    assert crash_after > 30


@pytest.mark.parametrize("content", [b"", bytes(SMALL), b"EMBSEGM", b"\xff" * 100])
def test_an_open_segment_without_header_is_replaced(tmp_path, content):
    write(tmp_path, 20)
    last = max(list_segments(tmp_path))
    reader = LogReader(tmp_path)
    assert len(list(reader.poll())) == 20
    with LogWriter(tmp_path, SMALL) as writer:
        writer.ensure_room(SMALL - 200)  # seals the last one and begins another
        assert writer.segment == last + 1
    segment_path(tmp_path, last + 1, sealed=False).write_bytes(content)
    assert list(reader.poll()) == []
    write(tmp_path, 20)
    assert read_all(tmp_path) == (expected(40), [])
    assert [record.seq for record in reader.poll()] == list(range(20, 40))
    assert reader.damaged == []


def test_reader_follows_a_live_writer(tmp_path):
    script = (
        "import random, sys\n"
        "from embodied.buffer.log.append import LogWriter\n"
        "def payload_of(seq, largest=300):\n"
        "    return random.Random(seq).randbytes(random.Random(-seq - 1).randint(0, largest))\n"
        "with LogWriter(sys.argv[1], 20_000) as writer:\n"
        "    for seq in range(4000): writer.append(payload_of(seq))\n"
    )
    reader = LogReader(tmp_path / "log")
    assert list(reader.poll()) == []
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "log")])
    records, polls, deadline = [], 0, time.monotonic() + 30
    while len(records) < 4000 and time.monotonic() < deadline:
        new = [(record.seq, bytes(record.payload)) for record in reader.poll()]
        polls += bool(new)
        records += new
    assert child.wait() == 0
    assert records == expected(4000) and polls > 3 and reader.damaged == []


def test_a_full_disk_keeps_what_is_there_and_recovers(tmp_path):
    script = """
import os, sys
from embodied.buffer.log.append import LogWriter
from embodied.buffer.log.tail import LogReader
from embodied.core.errors import StorageFullError
path = sys.argv[1] + "/log"
with open(sys.argv[1] + "/ballast", "wb") as file:
    file.write(bytes(400_000))
writer = LogWriter(path, 100_000)
count = 0
for attempt in range(2):
    try:
        while True:
            writer.append(bytes([count % 256]) * 10_000)
            count += 1
    except StorageFullError as error:
        assert path in str(error), error
    assert writer.flush() == count - 1
def check():
    records = [(r.seq, bytes(r.payload)) for r in LogReader(path).poll()]
    assert records == [(i, bytes([i % 256]) * 10_000) for i in range(count)], len(records)
check()
writer.close()
LogWriter(path, 100_000).close()
writer = LogWriter(path, 100_000)
os.unlink(sys.argv[1] + "/ballast")
full = count
for _ in range(20):
    assert writer.append(bytes([count % 256]) * 10_000) == count
    count += 1
writer.flush()
check()
print(full)
"""
    done = subprocess.run(
        script_in_tmpfs(script, tmp_path), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 40


def test_a_segment_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("embodied.buffer.log.segments.FORMAT", 1)
    write(tmp_path, 3)
    monkeypatch.undo()
    for read in (LogWriter, lambda path: list(LogReader(path).poll())):
        with pytest.raises(CorruptDataError, match="log format 1; this release reads format 2"):
            read(tmp_path)


def test_after_a_failed_sync_nothing_is_acknowledged_any_more(tmp_path):
    class FailingStorage(Storage):
        fails = False

        def sync_data(self, fd):
            if self.fails:
                raise OSError(5, "I/O error")

    storage = FailingStorage()
    writer = LogWriter(tmp_path, SMALL, storage=storage)
    writer.append(b"x")
    storage.fails = True
    with pytest.raises(OSError, match="I/O error"):
        writer.flush()
    storage.fails = False
    for action in (writer.flush, lambda: writer.append(b"y")):
        with pytest.raises(OSError, match="restart the process"):
            action()
    writer.close()
