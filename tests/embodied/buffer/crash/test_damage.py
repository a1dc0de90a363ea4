"""Bits that flip and bytes that are cut off cost what they hit, and nothing wrong is returned."""

import random
import shutil

import numpy as np
import pytest
from aftermath import read
from story import CODECS, IMAGE, SMALL_IMAGE, STATE, abandon, check_steps, make_episode

from embodied.buffer.log.segments import FIRST_OFFSET, segment_path
from embodied.buffer.read.gather import DamagedRowsError
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.read.table import SLOT_MASK
from embodied.buffer.sample.samplers import WindowSampler
from embodied.buffer.sample.windows import WindowSpec
from embodied.buffer.steps.blocks import block_path
from embodied.buffer.write.writer import ReplayWriter

PICTURES = WindowSpec(1, 1, observation_keys=(IMAGE, SMALL_IMAGE, STATE))


def write(path, steps, segment_bytes):
    with ReplayWriter(path, segment_bytes, codecs=CODECS) as writer:
        for step in steps:
            writer.append(step)
    return {step.key: step for step in steps}


def episodes(count, side=40):
    return [step for number in range(count) for step in make_episode("a", number, 3, side)]


def flip(path, at, bits=0x40):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bits]))


def place(reader, row):
    """Segment, and first byte and end, of a row's record."""
    table, slot = reader._tables[0], np.array([row & SLOT_MASK])
    return int(table.segment[slot[0]]), int(table.columns[".record"][slot[0]]), table.ends(slot)[0]


def test_every_cut_and_flip_of_the_last_step(ram_path, report):
    steps = make_episode("a", 0, 3, side=0)
    path, number = ram_path / "log", 0
    writer = ReplayWriter(path, 4096)
    for step in steps[:-1]:
        writer.append(step)
    start = writer._log.offset
    writer.append(steps[-1])
    end = writer._log.offset
    abandon(writer)
    whole = segment_path(path, 1, sealed=False).read_bytes()
    known = {step.key: step for step in steps}
    for at in range(start, end):
        cut = whole[:at] if at % 2 else whole[:at] + bytes(len(whole) - at)
        flipped = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        for content in (cut, flipped):
            if content == whole:
                continue
            shutil.rmtree(path)
            path.mkdir()
            segment_path(path, 1, sealed=False).write_bytes(content)
            found, _ = read(path)
            assert found.keys() == known.keys() - {steps[-1].key}, at
            with ReplayWriter(path, 4096) as writer:
                assert writer.append(steps[-1]) is not None
                assert writer.counts().damaged == 0
            number += 1
            if number % 7 == 0:
                found, closed = read(path)
                check_steps(found, known)
                assert found.keys() == known.keys() and closed == {("a", 0)}
    report(f"tail record of {end - start} bytes: {number} cuts and flips")


def test_damaged_pictures_are_found_at_first_touch(ram_path, report):
    known = write(ram_path / "whole", episodes(12), 40_000)
    with ReplayReader(ram_path / "whole") as reader:
        reader.refresh()
        row = int(reader.episodes[5].rows[1])
        number, start, end = place(reader, row)
    rng, path = random.Random(0), ram_path / "log"
    places = [*range(start, start + 40), *rng.sample(range(start + 40, int(end)), 40)]
    for at in places:
        shutil.copytree(ram_path / "whole", path)
        flip(segment_path(path, number, sealed=True), at)
        with ReplayReader(path) as reader:
            reader.refresh()
            sampler = WindowSampler(reader, PICTURES)
            assert reader.num_closed == 12
            damaged = reader.episodes[5].rows
            with pytest.raises(DamagedRowsError, match=rf"{number:08d}\.seg") as error:
                reader.take(IMAGE, damaged)
            assert error.value.rows == [row]
            assert reader.removed_episodes() == [("a", 5)] and reader.num_closed == 11
            assert reader.damaged == [(number, start)]
            for info in reader.finished():
                check_steps({step.key: step for step in reader.steps(info)}, known)
            assert sampler.refresh() == 0 and sampler.num_candidates == 33
        shutil.rmtree(path)
    report(f"sealed record: {len(places)} flips, each found at first touch")


def test_a_sampler_goes_on_over_damage(ram_path):
    known = write(ram_path / "log", episodes(30), 40_000)
    rng = np.random.default_rng(0)
    with ReplayReader(ram_path / "log") as reader:
        reader.refresh()
        bad = {4, 11, 12, 20, 29}
        for number in bad:
            segment, start, end = place(reader, int(reader.episodes[number].rows[2]))
            flip(
                segment_path(ram_path / "log", segment, sealed=True), int(rng.integers(start, end))
            )
    pictures = {tuple(step.observation[STATE]): step.observation[IMAGE] for step in known.values()}
    with ReplayReader(ram_path / "log") as reader:
        reader.refresh()
        sampler = WindowSampler(reader, PICTURES)
        for _ in range(60):
            batch = sampler.sample(16, rng)
            for state, picture in zip(batch[STATE][:, 0], batch[IMAGE][:, 0], strict=True):
                assert (pictures[tuple(state)] == picture).all()
            sampler.refresh()
        assert {episode for _, episode in reader.removed_episodes()} == bad
        assert sampler.num_candidates == 75


def test_header_of_a_sealed_segment(ram_path):
    known = write(ram_path / "log", episodes(12), 40_000)
    path = segment_path(ram_path / "log", 2, sealed=True)
    for at in range(FIRST_OFFSET):
        if at in range(8, 12):  # another format's number: see test_log
            continue
        flip(path, at)
        for _ in range(2):  # with the side file, and without
            found, closed = read(ram_path / "log")
            assert found.keys() == known.keys() and len(closed) == 12
            with ReplayWriter(ram_path / "log", 40_000) as writer:
                assert writer.counts().steps == 36
            block_path(ram_path / "log", 2).unlink()
        flip(path, at)


def test_side_files(ram_path, report):
    path = ram_path / "log"
    known = write(path, episodes(16, side=0), 2000)
    side = block_path(path, 2)
    whole, count = side.read_bytes(), 0
    flips = [
        whole[:at] + bytes([whole[at] ^ 0x11]) + whole[at + 1 :] for at in range(0, len(whole), 9)
    ]
    other = block_path(path, 1).read_bytes()
    for content in (None, b"", whole[:-1], whole[:100], whole + b"x", other, b"\xff" * 99, *flips):
        side.unlink(missing_ok=True)
        if content is not None:
            side.write_bytes(content)
        found, closed = read(path)
        assert found.keys() == known.keys() and len(closed) == 16
        check_steps(found, known)
        count += 1
        if count % 5 < 2:
            with ReplayWriter(path, 2000) as writer:
                assert writer.counts().episodes == 16 and writer.counts().damaged == 0
            assert len(side.read_bytes()) == len(whole)
    report(f"side files: {count} damaged ones, nothing lost")


def test_all_side_files_and_the_catalogue_lost(ram_path):
    path = ram_path / "log"
    known = write(path, episodes(16, side=0), 2000)
    names = {file.name for file in path.iterdir()}
    for name in names:
        if "seg" not in name:
            (path / name).unlink()
    (path / ".00000002.cols.77.88.tmp").write_bytes(b"half of a side fi")
    (path / "catalogue.sqlite").write_bytes(b"\0" * 5000)
    with ReplayWriter(path, 2000) as writer:
        tasks = {counts.task: counts.episodes for counts in writer.catalogue.tasks()}
        assert tasks == {"task 0": 8, "task 1": 8}
    found, closed = read(path)
    check_steps(found, known)
    assert found.keys() == known.keys() and len(closed) == 16
    assert {file.name for file in path.iterdir() if "sqlite" not in file.name} | {
        "catalogue.sqlite"
    } == names


def test_the_side_file_knows_of_a_lost_tail(ram_path):
    path = ram_path / "log"
    write(path, episodes(6, side=0), 1 << 16)
    with ReplayWriter(path) as writer:
        next_seq = writer.next_seq
    with open(segment_path(path, 1, sealed=True), "r+b") as file:
        file.seek(-300, 2)
        file.write(bytes(300))
    with ReplayWriter(path) as writer:
        assert writer.next_seq == next_seq
