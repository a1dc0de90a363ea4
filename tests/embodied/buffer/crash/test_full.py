"""A file system that is full at any moment, a reader beside, and then space again."""

import subprocess
from pathlib import Path

import pytest
from aftermath import read
from story import check_steps, make_episode
from tmpfs import script_in_tmpfs

from embodied.buffer.log.segments import list_segments
from embodied.buffer.write.catalogue import Catalogue
from embodied.buffer.write.retention import Retention
from embodied.buffer.write.writer import ReplayWriter
from embodied.core.errors import StorageFullError

SUPPORT = str(Path(__file__).parents[3] / "support")

FILL = """
import os, sys
from pathlib import Path
mount, support, first, last, stride = sys.argv[1:]
sys.path.insert(0, support)
from aftermath import read
from story import CODECS, check_steps, make_step, steps_in_reader
from embodied.buffer.steps.blocks import block_path
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.log.segments import list_segments
from embodied.buffer.log.storage import Storage
from embodied.buffer.write.writer import ReplayWriter
from embodied.core.errors import StorageFullError

SEGMENT_BYTES = 64 << 10
ballast = Path(mount) / "ballast"

def leave(nbytes):
    ballast.unlink(missing_ok=True)
    space = os.statvfs(mount)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_bsize - nbytes)

def steps():
    episode = 0
    while True:
        for index in range(6):
            yield make_step("a" if episode % 3 else "force", episode, index, index == 5)
        episode += 1

class Filled(Storage):
    # while a segment is sealed, somebody else takes all space
    def rename(self, source, target):
        super().rename(source, target)
        if full_when_sealing:
            leave(0)

def opened():
    return ReplayWriter(path, SEGMENT_BYTES, codecs=CODECS, chunk_rows=3, storage=Filled())

def check():
    reader.refresh()
    found = steps_in_reader(reader)
    check_steps(found, known)
    assert found.keys() >= acknowledged, len(found)
    return found

counts = dict(full=0, appended=0, without_side_file=0, not_opened=0)
for run, spare in enumerate(range(int(first), int(last), int(stride))):
    full_when_sealing = run % 2 == 1
    path = Path(mount) / "log"
    known, acknowledged, todo = {}, set(), steps()
    with ReplayReader(path) as reader:
        ballast.unlink(missing_ok=True)
        writer = opened()
        leave(spare)
        for attempt in range(3):
            step = next(todo)
            try:
                while True:
                    known[step.key] = step
                    assert writer.append(step) is not None
                    if len(known) % 4 == 0:
                        writer.flush()
                        acknowledged = set(known)
                    step = next(todo)
            except StorageFullError as error:
                assert mount in str(error), error
                counts["full"] += 1
            check()
            writer.flush()
            acknowledged = set(known) - {step.key}
            assert acknowledged <= check().keys()
            if attempt == 1:
                writer.close()
                sealed = [number for number, sealed in list_segments(path).items() if sealed]
                counts["without_side_file"] += sum(not block_path(path, n).exists() for n in sealed)
                try:
                    opened().close()
                except StorageFullError:
                    counts["not_opened"] += 1
                check()
            leave(spare + (attempt + 1) * 200_000)
            if attempt == 1:
                writer = opened()
            assert writer.append(step) is not None, "the same step again, once there is space"
        full_when_sealing = False
        writer.flush()
        acknowledged = set(known)
        writer.close()
        assert check().keys() == known.keys()
        counts["appended"] += len(known)
    ballast.unlink()
    opened().close()
    assert all(list_segments(path).values())
    assert all(block_path(path, number).exists() for number in list_segments(path))
    assert read(path)[0].keys() == known.keys()
    for file in path.iterdir():
        file.unlink()
print(counts)
"""


def fill(path, report, first, last, stride):
    command = script_in_tmpfs(FILL, path, SUPPORT, first, last, stride, size="16m")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    report(f"full file system: {done.stdout.strip()}")


def test_a_full_file_system(tmp_path, report):
    fill(tmp_path, report, 300_000, 420_000, 31_000)


@pytest.mark.slow
def test_a_file_system_full_at_any_moment(tmp_path, report):
    fill(tmp_path, report, 200_000, 440_000, 4096)


def test_deletions_go_on_without_space_for_the_catalogue(ram_path, monkeypatch):
    def full(*_):
        raise StorageFullError("no space")

    retention = Retention(max_bytes=9000)
    steps = [step for number in range(40) for step in make_episode("a", number, 3, 0)]
    with ReplayWriter(ram_path, 3000, retention=retention) as writer:
        for number, step in enumerate(steps):
            if number == 60:
                monkeypatch.setattr(Catalogue, "remove", full)
                monkeypatch.setattr(Catalogue, "note", full)
            if number == 120:
                monkeypatch.undo()
            assert writer.append(step) is not None
    there = list_segments(ram_path)
    assert len(there) < 6
    found, _ = read(ram_path)
    check_steps(found, {step.key: step for step in steps})
    with ReplayWriter(ram_path, 3000) as writer:
        assert writer.catalogue.segments().keys() == there.keys()
