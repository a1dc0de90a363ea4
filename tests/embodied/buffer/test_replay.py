import errno
import itertools

import numpy as np
import pytest

from embodied.buffer.log.segments import SegmentFile, list_segments, segment_path
from embodied.buffer.log.storage import Storage
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.steps.blocks import block_path
from embodied.buffer.steps.records import decode_step
from embodied.buffer.write.writer import ReplayWriter, StepOrderError, StreamCounts
from embodied.core.errors import ConfigError, RunInUseError, SpecError, StorageFullError

SMALL = 8192
STATE, IMAGE = "observation.state", "observation.images.front"


def interleaved(*episodes):
    turns = itertools.zip_longest(*episodes)
    return [step for turn in turns for step in turn if step is not None]


def row_ids(reader):
    """(stream, episode, index) → row id of everything that is there."""
    found = {}
    for info in reader.episodes:
        rows = enumerate(info.rows.tolist())
        found |= {(*info.key, index): row for index, row in rows if row >= 0}
        if info.final_row >= 0:
            found[*info.key, len(info.rows)] = info.final_row
    return found


def place(reader, row):
    """(segment, offset) of a row's record."""
    table = reader._tables[0]
    return int(table.segment[row]), int(table.columns[".record"][row])


def test_steps_come_back_as_columns(tmp_path, make_episode):
    steps = interleaved(
        make_episode("a", 0, 4, task="push", seed=7, policy_version=3),
        make_episode("b", 0, 6, closed=False),
        make_episode("a", 1, 3, intervention=True),
    )
    with ReplayWriter(tmp_path, SMALL) as writer:
        seqs = [writer.append(step) for step in steps]
        assert seqs == sorted(set(seqs))
        assert writer.flush() == seqs[-1]
    reader = ReplayReader(tmp_path)
    assert reader.refresh() == 13 and reader.num_steps == 13
    assert reader.refresh() == 0
    assert (reader.num_episodes, reader.num_closed) == (3, 2)
    assert (reader.feature(IMAGE).dtype, reader.feature(STATE).shape) == ("uint8", (3,))
    ids = row_ids(reader)
    assert ids.keys() == {step.key for step in steps} and len(set(ids.values())) == 15
    names = (STATE, IMAGE, "action", "reward", "final", "intervention", "t_ns")
    columns = reader.gather(names, np.array([ids[step.key] for step in steps]))
    assert columns[IMAGE].dtype == np.uint8
    for at, step in enumerate(steps):
        for key, value in step.observation.items():
            assert (columns[key][at] == value).all()
        assert (columns["action"][at] == step.action).all()
        assert columns["reward"][at] == step.reward
        assert columns["final"][at] == step.final
        assert columns["intervention"][at] == step.intervention
    a0, b0, a1 = sorted(reader.episodes, key=lambda e: (e.episode, e.stream))
    assert a0.rows.tolist() == [ids["a", 0, i] for i in range(4)]
    assert a0.final_row == ids["a", 0, 4] and reader.take("final", np.array(a0.final_row))
    assert not a0.rows.flags.writeable
    assert (a0.task, a0.seed, a0.closed, a0.policy_versions) == ("push", 7, True, (3, 3))
    assert (b0.closed, b0.final_row, len(b0.rows)) == (False, -1, 6)
    assert (a1.interventions, a0.interventions) == (3, 0)


def test_flags_and_versions_of_an_episode(tmp_path, make_step):
    versions = [4, 9, 2]
    with ReplayWriter(tmp_path, SMALL) as writer:
        for i, version in enumerate(versions):
            writer.append(
                make_step(
                    index=i,
                    policy_version=version,
                    success=i == 2,
                    terminated=i == 2,
                    intervention=i == 1,
                    held=i == 0,
                )
            )
        writer.append(make_step(index=3, final=True, policy_version=77))
    reader = ReplayReader(tmp_path)
    reader.refresh()
    (episode,) = reader.episodes
    assert episode.policy_versions == (2, 9)
    assert episode.success and episode.interventions == 1
    assert reader.take("held", episode.rows).tolist() == [True, False, False]
    assert reader.take("terminated", episode.rows[:, None]).tolist() == [[False], [False], [True]]


def test_duplicates_are_dropped_also_after_reopening(tmp_path, make_episode):
    steps = interleaved(make_episode("a"), make_episode("b"))
    for round_number in range(3):
        with ReplayWriter(tmp_path, SMALL) as writer:
            kept = [writer.append(step) for step in steps]
            assert all((seq is None) == (round_number > 0) for seq in kept)
            assert [writer.append(step) for step in steps] == [None] * len(steps)
    reader = ReplayReader(tmp_path)
    assert reader.refresh() == 10 and reader.damaged == []


def test_order_within_an_episode(tmp_path, make_step):
    with ReplayWriter(tmp_path, SMALL) as writer:
        with pytest.raises(StepOrderError, match="index 1 leaves a gap; index 0 is next"):
            writer.append(make_step(index=1))
        writer.append(make_step(index=0))
        with pytest.raises(ConfigError, match="index 2 leaves a gap; index 1 is next"):
            writer.append(make_step(index=2))
        writer.append(make_step(index=1, final=True))
        with pytest.raises(StepOrderError, match="closed by its final observation at index 1"):
            writer.append(make_step(index=2))
        assert writer.counts().steps == 1


def test_counts_and_next_episode_survive(tmp_path, make_episode):
    for check in (False, True):
        with ReplayWriter(tmp_path, SMALL) as writer:
            if not check:
                for step in make_episode("a", 0, 3) + make_episode("a", 4, 2, closed=False):
                    writer.append(step)
                for step in make_episode("b", 0, 1):
                    writer.append(step)
            counts = writer.counts()
            assert (counts.steps, counts.episodes, counts.damaged) == (6, 2, 0)
            assert counts.streams == {"a": StreamCounts(5, 2, 1), "b": StreamCounts(1, 1, 1)}
            assert [writer.next_episode(s) for s in "abc"] == [5, 1, 0]


def test_a_step_of_another_schema_is_refused(tmp_path, make_step):
    for _ in range(2):
        with ReplayWriter(tmp_path, SMALL) as writer:
            writer.append(make_step())
            other = {"observation.state": np.zeros(3, np.float32)}
            with pytest.raises(SpecError, match=r"lacks observation\.images\.front: stream 'r0'"):
                writer.append(make_step(index=1, observation=other))
            with pytest.raises(SpecError, match=r"action of step .* is float32 \[5\]"):
                writer.append(make_step(index=1, action=np.zeros(5, np.float32)))


def test_reader_names_a_difference_of_schemas(tmp_path, make_step):
    with ReplayWriter(tmp_path, SMALL) as writer:
        writer.append(make_step("a"))
        writer.append(make_step("b", action=np.zeros(5, np.float32)))
        writer.append(make_step("c", observation={STATE: np.zeros(3, np.float32)}))
    reader = ReplayReader(tmp_path)
    assert reader.refresh() == 3
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"float32 \[2\] in streams? a.* \[5\] in stream b:"):
            reader.feature("action")
        with pytest.raises(ConfigError, match="is recorded by stream a, not by stream c"):
            reader.feature(IMAGE)
        with pytest.raises(SpecError, match=r"action of a recording in .* is float32 \[5\]"):
            _ = reader.schema
    states = reader.take(STATE, np.array([info.rows[0] for info in reader.episodes]))
    assert states[:, 2].tolist() == [ord("a"), ord("b"), 0]


def test_ram_budget_is_kept_and_stated(tmp_path, make_episode):
    with ReplayWriter(tmp_path) as writer:
        for episode in range(30):
            for step in make_episode("a", episode, 99):
                writer.append(step)
    reader = ReplayReader(tmp_path)
    reader.refresh()
    rows = np.concatenate([episode.rows for episode in reader.finished()])
    (table,) = reader._tables
    assert 3000 * table.row_bytes <= table.nbytes < 2 * 3000 * table.row_bytes
    tight = ReplayReader(tmp_path, ram_bytes=table.nbytes)
    tight.refresh()
    assert tight._tables[0].nbytes <= table.nbytes
    assert (tight.take("action", rows) == reader.take("action", rows)).all()
    small = ReplayReader(tmp_path, ram_bytes=table.nbytes - 1)
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"ram_bytes={table.nbytes - 1}"):
            small.refresh()


def test_places_point_at_the_records(tmp_path, make_episode):
    steps = [step for e in range(30) for step in make_episode("a", e, 5)]
    with ReplayWriter(tmp_path, SMALL) as writer:
        for step in steps:
            writer.append(step)
    reader = ReplayReader(tmp_path)
    reader.refresh()
    segments, ids = list_segments(tmp_path), row_ids(reader)
    assert len(segments) > 1 and reader.schema is not None
    for step in steps[::7]:
        number, offset = place(reader, ids[step.key])
        path = segment_path(tmp_path, number, sealed=segments[number])
        with SegmentFile(path, number) as file:
            record = file.record_at(offset)
            assert record is not None
            assert decode_step(record.payload, reader.schema).key == step.key


def test_reader_follows_a_writer(tmp_path, make_episode):
    reader = ReplayReader(tmp_path / "later")
    assert reader.refresh() == 0 and reader.schema is None
    with ReplayWriter(tmp_path / "later", SMALL) as writer:
        for episode in range(40):
            for step in make_episode("a", episode, 7):
                writer.append(step)
            assert reader.refresh() == 7
            assert [info.episode for info in reader.closed_episodes(episode)] == [episode]


def test_a_damaged_segment_costs_only_its_episodes(tmp_path, make_episode):
    steps = [step for e in range(60) for step in make_episode("a", e, 5)]
    with ReplayWriter(tmp_path, SMALL) as writer:
        for step in steps:
            writer.append(step)
    path = segment_path(tmp_path, 2, sealed=True)
    data = bytearray(path.read_bytes())
    for at in range(32, len(data)):
        data[at] = 0xFF  # nothing of it is left, its schema included
    path.write_bytes(data)
    reader = ReplayReader(tmp_path)  # the side file has all that is small
    reader.refresh()
    assert reader.num_closed == 60 and not reader.damaged
    block_path(tmp_path, 2).unlink()
    reader = ReplayReader(tmp_path)
    reader.refresh()
    closed = {info.episode for info in reader.closed_episodes()}
    assert 30 < len(closed) < 60 and reader.damaged
    for info in reader.closed_episodes():
        assert len(info.rows) == 5 and (info.rows >= 0).all()
    # What was lost can be sent again, and completes its episodes.
    with ReplayWriter(tmp_path, SMALL) as writer:
        again = [writer.append(step) for step in steps]
        assert sum(seq is not None for seq in again) == len(steps) - len(row_ids(reader))
    reader = ReplayReader(tmp_path)
    reader.refresh()
    assert reader.num_closed == 60
    for info in reader.closed_episodes():
        states = reader.take(STATE, info.rows)
        assert states[:, 1].tolist() == [0, 1, 2, 3, 4] and set(states[:, 0]) == {info.episode}


def test_one_flipped_byte_costs_one_episode(tmp_path, make_episode):
    with ReplayWriter(tmp_path) as writer:
        for episode in range(5):
            for step in make_episode("a", episode, 5):
                writer.append(step)
    reader = ReplayReader(tmp_path)
    reader.refresh()
    number, offset = place(reader, reader.episodes[2].rows[3])
    path = segment_path(tmp_path, number, sealed=True)
    data = bytearray(path.read_bytes())
    data[offset + 60] ^= 4
    path.write_bytes(data)
    block_path(tmp_path, number).unlink()
    ReplayWriter(tmp_path).close()  # makes the side file again
    assert block_path(tmp_path, number).exists()
    reader = ReplayReader(tmp_path)
    assert reader.refresh() == 24
    assert [info.episode for info in reader.closed_episodes()] == [0, 1, 3, 4]
    assert [row >= 0 for row in reader.episodes[2].rows] == [True, True, True, False, True]


def test_a_full_disk_leaves_the_writer_usable(tmp_path, make_step):
    class FullStorage(Storage):
        full = False

        def reserve(self, fd, nbytes):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")

    storage = FullStorage()
    with ReplayWriter(tmp_path, 1024, storage=storage) as writer:
        storage.full = True
        with pytest.raises(StorageFullError, match="no space left"):
            for i in range(100):
                writer.append(make_step(index=i))
        storage.full = False
        for i in range(100):
            writer.append(make_step(index=i))
    reader = ReplayReader(tmp_path)
    assert reader.refresh() == 100 and len(reader.episodes) == 1


def test_one_writer(tmp_path):
    with ReplayWriter(tmp_path, SMALL), pytest.raises(RunInUseError):
        ReplayWriter(tmp_path, SMALL)
