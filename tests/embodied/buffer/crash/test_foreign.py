"""Segments that are missing, empty, of others, or no segments at all."""

import shutil

import pytest
from aftermath import read
from story import CODECS, check_steps, make_episode

from embodied.buffer.log.segments import segment_path
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.steps.blocks import block_path
from embodied.buffer.write.writer import ReplayWriter

SEGMENT_BYTES = 2600


def episodes(stream, count):
    return [step for number in range(count) for step in make_episode(stream, number, 4, 0)]


@pytest.fixture
def replay(ram_path):
    """A replay of several segments, its steps by key, and which of them each segment has."""
    path = ram_path / "log"
    known, segments = {}, {}
    with ReplayWriter(path, SEGMENT_BYTES, codecs=CODECS) as writer:
        for step in episodes("a", 10) + episodes("b", 4):
            writer.append(step)
            known[step.key] = step
            segments.setdefault(writer._log.segment, set()).add(step.key)
    assert len(segments) > 5
    return path, known, segments


def remains(path, known, lost):
    """What must hold when all of `lost` is gone; then it is sent again and is there."""
    found, closed = read(path)
    check_steps(found, known)
    assert found.keys() == known.keys() - lost
    assert closed == {key[:2] for key in known} - {key[:2] for key in lost}
    with ReplayWriter(path, SEGMENT_BYTES, codecs=CODECS) as writer:
        again = [writer.append(step) for step in known.values()]
        assert sum(seq is not None for seq in again) == len(lost)
        assert writer.flush() == writer.next_seq - 1
    found, closed = read(path)
    check_steps(found, known)
    assert found.keys() == known.keys() and len(closed) == 14


@pytest.mark.parametrize("side_file", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        bytes(3000),
        b"# a text that somebody put here\n" * 40,
        b"EMBSEGM\xe5",
        "directory",
    ],
    ids=["missing", "empty", "zeros", "text", "beginning", "directory"],
)
@pytest.mark.parametrize("which", ["first", "middle", "newest"])
def test_in_place_of_a_segment(replay, which, content, side_file):
    path, known, segments = replay
    number = {"first": 1, "middle": 3, "newest": max(segments)}[which]
    segment = segment_path(path, number, sealed=True)
    segment.unlink()
    if not side_file:
        block_path(path, number).unlink()
    if content == "directory":
        segment.mkdir()
    elif content is not None:
        segment.write_bytes(content)
    remains(path, known, segments[number])


def test_additional_files(replay):
    path, known, _ = replay
    for name in ("00000077.seg", "00000078.seg.open", "00000079.cols", "notes.txt", "3.seg"):
        (path / name).write_bytes(b"something else")
    (path / "00000080.seg").mkdir()
    remains(path, known, set())


def test_a_copied_segment_doubles_nothing(replay):
    path, known, segments = replay
    newest = max(segments)
    for number, copy in ((2, newest + 1), (5, newest + 7)):
        shutil.copy(segment_path(path, number, sealed=True), segment_path(path, copy, sealed=True))
    for _ in range(2):
        with ReplayReader(path) as reader:
            assert reader.refresh() == sum(not step.final for step in known.values())
            assert reader.num_closed == 14 and reader.damaged
            for info in reader.finished():
                check_steps({step.key: step for step in reader.steps(info)}, known)
        with ReplayWriter(path, SEGMENT_BYTES, codecs=CODECS) as writer:
            assert [writer.append(step) for step in known.values()] == [None] * len(known)
            assert writer.counts().steps == sum(not step.final for step in known.values())
            assert writer.counts().episodes == 14


@pytest.mark.parametrize("number", [3, 99])
def test_a_segment_of_another_replay(replay, ram_path, number):
    path, known, segments = replay
    others = episodes("other", 4)
    with ReplayWriter(ram_path / "other", SEGMENT_BYTES, codecs=CODECS) as writer:
        theirs = {step.key: step for step in others if writer.append(step) is not None}
    lost = segments.get(number, set())
    for of in (segment_path, block_path):
        options = {"sealed": True} if of is segment_path else {}
        shutil.copy(of(ram_path / "other", 2, **options), of(path, number, **options))
    found, _ = read(path)
    check_steps(found, known | theirs)
    assert known.keys() - lost <= found.keys()
    assert {key[0] for key in found} == {"a", "b", "other"}
    with ReplayWriter(path, SEGMENT_BYTES, codecs=CODECS) as writer:
        for step in (*known.values(), *others):
            writer.append(step)
    found, closed = read(path)
    check_steps(found, known | theirs)
    assert found.keys() == known.keys() | theirs.keys() and len(closed) == 18
