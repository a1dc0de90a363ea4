"""The part file of an open segment: whatever becomes of it, what is found is what the log holds."""

import errno
import os
import shutil
import struct
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from aftermath import open_segment_by_chunks, read
from crc32c import crc32c
from disk import RecordingStorage
from story import CODECS, SIDE, abandon, check_steps, make_episode

from embodied.buffer.log.segments import FIRST_OFFSET, SegmentFile, segment_path
from embodied.buffer.log.storage import Storage
from embodied.buffer.read import replay
from embodied.buffer.read.cache import SegmentCache
from embodied.buffer.read.gather import DamagedRowsError
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.steps import chunks
from embodied.buffer.steps.blocks import Block
from embodied.buffer.steps.chunks import part_path
from embodied.buffer.upkeep.contents import Contents
from embodied.buffer.upkeep.maintenance import compact, merge
from embodied.buffer.upkeep.verification import verify
from embodied.buffer.write.retention import Retention
from embodied.buffer.write.writer import ReplayWriter

HEAD = struct.Struct("<8sIIIIQQQQ24s")
BYTES = 1 << 16


def killed(path, first=0, last=6, side=0):
    """A writer that dies with several chunks and a few steps behind them; what it had appended."""
    writer = ReplayWriter(path, 3 * BYTES, codecs=CODECS, chunk_rows=3)
    steps = [
        step
        for n in range(first, last)
        for s in ("a", "force")
        for step in make_episode(s, n, 2, side)
    ]
    for number, step in enumerate(steps):
        writer.append(step)
        if number % 5 == 0:
            writer.flush()
        if number == 7:
            writer.delete("a", first)
    abandon(writer)
    return {step.key: step for step in steps if step.key[:2] != ("a", first)}


def check(path, known):
    """A reader and a writer find what was appended; returns the end of what chunks held."""
    covered = open_segment_by_chunks(path)
    found, _ = read(path)
    check_steps(found, known)
    assert found.keys() == known.keys()
    return covered.end


def check_opening(path, known):
    with ReplayWriter(path, BYTES, codecs=CODECS, chunk_rows=3) as writer:
        assert writer.counts().steps == sum(not step.final for step in known.values())
        for step in known.values():
            assert writer.append(step) is None
        more = make_episode("b", 0, 5, 0)
        for step in more:
            writer.append(step)
            writer.flush()
        open_segment_by_chunks(path)
    assert not part_path(path, 1).exists()
    found, _ = read(path)
    check_steps(found, known | {step.key: step for step in more})
    assert len(found) == len(known) + len(more)


def chunks_of(data):
    """Where each chunk of a part file begins, and the end."""
    found, at = [], 0
    while (at := data.find(b"EMBCOLS", at)) >= 0:
        found.append(at)
        at += 1
    return [*found, len(data)]


def test_every_cut_and_flip_of_a_part_file(ram_path, report):
    path = ram_path / "log"
    known = killed(path)
    part, count = part_path(path, 1), 0
    whole = part.read_bytes()
    starts = chunks_of(whole)
    full = check(path, known)
    ends = [FIRST_OFFSET, *(HEAD.unpack_from(whole, at)[7] for at in starts[:-1])]
    assert len(starts) > 4 and ends[-1] == full
    for at in range(0, len(whole), 8):
        chunk = sum(start <= at for start in starts[:-1]) - 1
        torn = whole[: at - at % 512] + bytes(len(whole) - at + at % 512)
        flip = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        for content in (whole[:at], torn, flip)[count % 3 :][:1]:
            part.write_bytes(content)
            end = open_segment_by_chunks(path).end
            assert end <= ends[chunk] if content is torn else end == ends[chunk]
            if count % 20 < 3:
                copy = ram_path / "copy"
                shutil.copytree(path, copy)
                check(copy, known)
                check_opening(copy, known)
                shutil.rmtree(copy)
        count += 1
    report(f"part file of {len(starts) - 1} chunks: {count} cuts, torn tails and flips")


def test_chunks_that_are_missing_or_twice(ram_path):
    path = ram_path / "log"
    known = killed(path)
    part = part_path(path, 1)
    whole = part.read_bytes()
    starts = chunks_of(whole)
    pieces = [whole[a:b] for a, b in pairwise(starts)]
    first = HEAD.unpack_from(pieces[0])[7]
    for content, end in (
        (b"".join(pieces[1:]), FIRST_OFFSET),
        (b"".join([pieces[0], *pieces[2:]]), first),
        (b"".join([pieces[0], pieces[0], *pieces[1:]]), first),
        (b"".join([pieces[0], bytes(len(pieces[1])), *pieces[2:]]), first),
        (b"".join([pieces[0], pieces[2], pieces[1]]), first),
        (b"", FIRST_OFFSET),
    ):
        part.write_bytes(content)
        assert check(path, known) == end
    part.unlink()
    part.mkdir()
    assert check(path, known) == FIRST_OFFSET
    part.rmdir()
    check_opening(path, known)


def test_a_part_file_of_another_segment(ram_path):
    """The same number and first sequence number, and chunks that are whole."""
    known = killed(ram_path / "log")
    killed(ram_path / "other", 1, 7)
    shutil.copy(part_path(ram_path / "other", 1), part_path(ram_path / "log", 1))
    assert check(ram_path / "log", known) == FIRST_OFFSET
    check_opening(ram_path / "log", known)


def test_a_part_file_that_goes_beyond_its_segment(ram_path):
    path = ram_path / "log"
    killed(path)
    file = segment_path(path, 1, sealed=False)
    full = open_segment_by_chunks(path).end
    for end in (full - 1, full // 2, FIRST_OFFSET + 9, FIRST_OFFSET, 3):
        os.truncate(file, end)
        assert open_segment_by_chunks(path).end <= end or end < FIRST_OFFSET
        read(path)
    ReplayWriter(path, BYTES).close()
    assert not part_path(path, 1).exists()


@pytest.mark.parametrize("field", range(1, 9))
def test_heads_that_claim_anything(ram_path, field):
    """Right checksums, wrong claims: refused before memory is taken."""
    path = ram_path / "log"
    known = killed(path)
    part = part_path(path, 1)
    whole = part.read_bytes()
    values = list(HEAD.unpack_from(whole))
    start, stop = HEAD.size, HEAD.size + values[3]
    for claim in {0, 1, (1 << 31) + 5, (1 << 32) - 1} - {values[field]}:
        changed = [*values[:field], claim, *values[field + 1 :]]
        head = HEAD.pack(*changed)
        crc = crc32c(whole[start:stop], crc32c(head[12:]))
        changed[1] = claim if field == 1 else crc
        part.write_bytes(HEAD.pack(*changed) + whole[HEAD.size :])
        assert check(path, known) == FIRST_OFFSET


def test_what_is_left_over_is_removed(ram_path):
    path = ram_path / "log"
    known = killed(path)
    shutil.copy(part_path(path, 1), part_path(path, 2))
    shutil.copy(part_path(path, 1), part_path(path, 77))
    writer = ReplayWriter(path, BYTES, chunk_rows=3)
    assert part_path(path, 1).exists()
    assert not part_path(path, 2).exists() and not part_path(path, 77).exists()
    part_path(path, 2).write_bytes(part_path(path, 1).read_bytes())  # by somebody else, meanwhile
    for number in range(40):
        for step in make_episode("more", number, 5):
            writer.append(step)
            known[step.key] = step
        writer.flush()
    assert segment_path(path, 2, sealed=True).exists()
    assert [file.name for file in path.glob("*.part")] == [
        part_path(path, writer._log.segment).name
    ]
    open_segment_by_chunks(path)
    writer.close()
    assert not list(path.glob("*.part"))
    assert read(path)[0].keys() == known.keys()


def test_a_writer_that_never_flushes(ram_path):
    storage = RecordingStorage(ram_path)
    writer = ReplayWriter(ram_path, 1 << 20, chunk_rows=8, storage=storage)
    steps = [step for number in range(30) for step in make_episode("a", number, 9, 0)]
    for step in steps:
        writer.append(step)
    abandon(writer)
    covered = open_segment_by_chunks(ram_path)
    assert len(steps) - sum(covered.rows) <= 4 * 8
    writes = [op for op in storage.ops if op.kind == "write" and op.data.startswith(b"EMBCOLS")]
    assert len(writes) == len(steps) // 32


class FullForChunks(Storage):
    full = False

    def write(self, fd, parts, offset):
        if self.full and bytes(parts[0]).startswith(b"EMBCOLS"):
            super().write(fd, [b"".join(parts)[: 200 + offset % 100]], offset)
            raise OSError(errno.ENOSPC, "no space")
        super().write(fd, parts, offset)


def test_no_space_for_a_chunk(ram_path):
    storage = FullForChunks()
    writer = ReplayWriter(ram_path, 1 << 20, chunk_rows=4, storage=storage)
    known = {}
    for number in range(60):
        storage.full = number % 20 > 12 or number < 3
        for step in make_episode("a", number, 3, 0):
            known[step.key] = step
            assert writer.append(step) is not None
        assert writer.flush() == writer.next_seq - 1
        covered = open_segment_by_chunks(ram_path)
        assert storage.full or sum(covered.rows) > len(known) - 8
    abandon(writer)
    check(ram_path, known)


def test_what_comes_from_chunks_is_verified_at_first_touch(ram_path):
    path = ram_path / "log"
    known = killed(path, last=3, side=SIDE)
    end = open_segment_by_chunks(path).end
    file = segment_path(path, 1, sealed=False)
    rows = next(rows for rows in Block.read(file, 1).rows.values() if len(rows) > 4)
    record = int(rows.view[".record"][4])
    assert record < end
    with open(file, "r+b") as opened:
        opened.seek(record + 2000)
        byte = opened.read(1)[0]
        opened.seek(record + 2000)
        opened.write(bytes([byte ^ 4]))
    with ReplayReader(path) as reader:
        reader.refresh()
        assert reader.damaged == []
        assert reader.num_steps == sum(not step.final for step in known.values())
        for info in reader.finished():
            with suppress(DamagedRowsError):
                check_steps({step.key: step for step in reader.steps(info)}, known)
        assert reader.damaged == [(1, record)]
        assert reader.removed_episodes()[1:] == [("a", 1)]


@pytest.mark.parametrize("deed", ["chunk", "seal", "delete"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (replay, "load_chunks"),
        (chunks, "_read_heads"),
        (SegmentFile, "head_at"),
        (chunks, "_fill"),
        (ReplayReader, "_take_block"),
        (SegmentCache, "open"),
    ],
)
def test_a_late_reader(ram_path, monkeypatch, owner, name, deed):
    """Whatever the writer does while a reader takes over the chunks of its open segment."""
    path, numbers, calls = ram_path / "log", iter(range(99)), []
    retention = Retention(max_bytes=1) if deed == "delete" else None
    writer = ReplayWriter(path, 80_000, codecs=CODECS, retention=retention, chunk_rows=4)

    def write(count):
        for _ in range(count):
            for step in make_episode("a", next(numbers), 3, SIDE):
                writer.append(step)
            writer.flush()

    write(2)
    assert open_segment_by_chunks(path).rows == [8]
    real = getattr(owner, name)

    def called(*args, **kwargs):
        calls.append(name)
        if len(calls) == 1:
            write({"chunk": 1, "seal": 4, "delete": 9}[deed])
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)
    with ReplayReader(path) as reader:
        reader.refresh()
        assert calls
        monkeypatch.undo()
        write(1)
        reader.refresh()
        writer.close()
        reader.refresh()
        steps = {step.key: step for info in reader.finished() for step in reader.steps(info)}
        found, closed = read(path)
        assert {info.key for info in reader.finished()} == closed and steps.keys() == found.keys()
        check_steps(steps, found)
        assert reader.damaged == [] and ("a", next(numbers) - 1) in closed
        assert (("a", 0) in closed) == (deed != "delete")


def test_tools_beside_part_files(ram_path):
    path = ram_path / "log"
    known = killed(path)
    assert part_path(path, 1).exists()
    report = verify(path)
    assert report.ok and report.findings == ()
    assert Contents(path).num_steps == report.steps
    merge([path], ram_path / "both")
    assert read(ram_path / "both")[0].keys() == known.keys()
    part_path(path, 5).write_bytes(b"x")
    assert [(f.kind, f.file) for f in verify(path).findings] == [("orphan", "00000005.cols.part")]
    compact(path)
    assert not list(Path(path).glob("*.part"))
    assert read(path)[0].keys() == known.keys()
