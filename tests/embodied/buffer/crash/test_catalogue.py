"""A catalogue that is lost, damaged, not ours or held by somebody else harms nothing."""

import random
import sqlite3

import pytest
from aftermath import read
from disk import RecordingStorage
from story import IMAGE, abandon, check_steps, make_episode

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.write.catalogue import NAME
from embodied.buffer.write.writer import ReplayWriter
from embodied.core.errors import RunInUseError

TASKS = [("task 0", 6, 18), ("task 1", 6, 18)]


def write(path, first=0):
    with ReplayWriter(path, 3000) as writer:
        for number in range(first, first + 12):
            for step in make_episode("a", number, 3, 0):
                writer.append(step)


def tasks(path):
    with ReplayWriter(path, 3000) as writer:
        assert writer.counts().steps == 36
        assert sum(writer.catalogue.versions().values()) == 36
        return [(counts.task, counts.episodes, counts.steps) for counts in writer.catalogue.tasks()]


def other_database(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE segments (something)")
        db.execute("PRAGMA user_version=1")
    db.close()


def test_a_damaged_catalogue_is_made_again(ram_path, report):
    write(ram_path)
    assert tasks(ram_path) == TASKS
    file, rng = ram_path / NAME, random.Random(0)
    whole = file.read_bytes()
    definitions = whole.index(b"CREATE")
    places = [*range(0, 108, 3), *rng.sample(range(definitions, 4096), 40)]
    contents = [whole[:at] + bytes([whole[at] ^ 0x81]) + whole[at + 1 :] for at in places]
    contents += [b"", b"text", whole[:100], whole[:4096], whole[:-1], whole[::-1]]
    for number, content in enumerate(contents):
        file.write_bytes(content)
        file.with_name(NAME + "-wal").write_bytes(content[: number * 50])
        assert tasks(ram_path) == TASKS
    file.unlink()
    other_database(file)
    assert tasks(ram_path) == TASKS
    report(f"catalogues: {len(contents) + 1} damaged or foreign ones, each made again")


def test_another_program_holds_the_catalogue(ram_path):
    write(ram_path)
    db = sqlite3.connect(ram_path / NAME, isolation_level=None)
    with ReplayWriter(ram_path, 3000) as writer:
        db.execute("BEGIN IMMEDIATE")
        steps = make_episode("a", 12, 20, 0)
        for step in steps:
            assert writer.append(step) is not None
        db.execute("ROLLBACK")
    db.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RunInUseError, match="locked by another program"):
        ReplayWriter(ram_path, 3000)
    db.execute("ROLLBACK")
    db.close()
    with ReplayWriter(ram_path, 3000) as writer:
        assert sum(counts.steps for counts in writer.catalogue.tasks()) == 56
    assert read(ram_path)[0].keys() >= {step.key for step in steps}


def test_names_of_new_directories_are_synced(ram_path):
    path = ram_path / "run" / "buffer"
    storage = RecordingStorage(path)
    ReplayWriter(path, storage=storage).close()
    assert storage.synced_elsewhere == [ram_path, ram_path / "run"]


def test_a_segment_that_the_next_writer_makes_larger(ram_path):
    steps = [step for number in range(12) for step in make_episode("a", number, 3)]
    writer = ReplayWriter(ram_path, 40_000)
    for step in steps[:8]:
        writer.append(step)
    with ReplayReader(ram_path) as reader:
        reader.refresh()
        reader.take(IMAGE, reader.episodes[0].rows)
        abandon(writer)
        with ReplayWriter(ram_path, 400_000) as writer:
            for step in steps[8:]:
                writer.append(step)
            reader.refresh()
            assert reader.num_closed == 12
            for info in reader.finished():
                found = {step.key: step for step in reader.steps(info)}
                check_steps(found, {step.key: step for step in steps})
