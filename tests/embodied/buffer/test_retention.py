import sqlite3

import numpy as np
import pytest

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.write.catalogue import NAME, Catalogue
from embodied.buffer.write.retention import Retention
from embodied.buffer.write.writer import ReplayWriter, StepOrderError
from embodied.core.errors import ConfigError, SpecError
from tests.support.picture_buffer import picture, picture_step

LENGTH = 10
MIB = 1 << 20


def add(writer, episode, stream="r0", length=LENGTH):
    for index in range(length + 1):
        writer.append(picture_step(episode, index, length, stream))
    writer.flush()


def disk_bytes(path):
    return sum(file.stat().st_size for file in path.glob("*.seg"))


def test_the_oldest_go_and_pinned_streams_stay(tmp_path):
    retention = Retention(max_bytes=2 * MIB, pinned=("demo*",))
    reader = ReplayReader(tmp_path)
    with ReplayWriter(tmp_path, MIB // 4, retention=retention) as writer:
        for episode in range(3):
            add(writer, episode, "demo-a")
        for episode in range(40):
            add(writer, episode)
            reader.refresh()
            for info in reader.finished()[-3:]:
                images = reader.take("observation.images.front", info.rows)
                np.testing.assert_array_equal(images[4], picture(info.episode, 4))
        assert disk_bytes(tmp_path) <= 2 * MIB + MIB // 4
        left = [info.key for info in reader.finished()]
        assert left[:3] == [("demo-a", n) for n in range(3)]
        newest = [number for stream, number in left if stream == "r0"]
        assert newest[-1] == 39 and newest[-5:] == list(range(35, 40)) and len(newest) < 20
        assert writer.counts().episodes == len(left) and reader.num_steps == LENGTH * len(left)
        # What was deleted does not come back, though a client may send it again.
        assert writer.append(picture_step(5, 0, LENGTH)) is None
        assert writer.next_episode("r0") == 40
    with ReplayWriter(tmp_path, MIB // 4) as writer:
        assert writer.append(picture_step(5, 0, LENGTH)) is None
        assert writer.counts().episodes == len(left)
    again = ReplayReader(tmp_path)
    again.refresh()
    assert [info.key for info in again.finished()] == left and not again.damaged


def test_an_episode_that_still_grows_is_not_deleted(tmp_path):
    with ReplayWriter(tmp_path, MIB // 8, retention=Retention(max_bytes=MIB // 8)) as writer:
        for index in range(60):
            writer.append(picture_step(0, index, 1000))
        writer.flush()
        reader = ReplayReader(tmp_path)
        reader.refresh()
        assert reader.num_steps == 60


def test_an_episode_that_was_left_open_does_not_hold_its_segment_for_ever(tmp_path):
    with ReplayWriter(tmp_path, MIB // 4, retention=Retention(max_bytes=MIB)) as writer:
        writer.append(picture_step(0, 0, LENGTH, "gone"))
        for episode in range(20):
            add(writer, episode)
        assert disk_bytes(tmp_path) <= MIB + MIB // 4
        assert writer.counts().streams["gone"].episodes == 0
        assert writer.append(picture_step(0, 1, LENGTH, "gone")) is None


def test_a_deleted_episode_is_gone_for_readers_and_for_good(tmp_path):
    reader = ReplayReader(tmp_path)
    with ReplayWriter(tmp_path) as writer:
        for episode in range(3):
            add(writer, episode)
        reader.refresh()
        writer.delete("r0", 1)
        with pytest.raises(ConfigError, match="no episode 1 of stream 'r0'"):
            writer.delete("r0", 1)
        reader.refresh()
        assert [info.episode for info in reader.finished()] == [0, 2]
        assert reader.removed_episodes() == [("r0", 1)]
        assert writer.append(picture_step(1, 0, LENGTH)) is None
    with ReplayWriter(tmp_path) as writer:
        assert writer.append(picture_step(1, 0, LENGTH)) is None
        assert writer.counts().episodes == 2 and writer.next_episode("r0") == 3
    with pytest.raises(ConfigError, match="max_bytes is 0"):
        Retention(max_bytes=0)


@pytest.mark.parametrize("damage", ["lost", "garbage", "another format"])
def test_the_catalogue_is_made_again_from_the_segments(tmp_path, damage):
    with ReplayWriter(tmp_path, MIB // 4) as writer:
        for episode in range(5):
            add(writer, episode)
        writer.delete("r0", 3)
    with ReplayWriter(tmp_path) as writer:
        tasks, versions = writer.catalogue.tasks(), writer.catalogue.versions()
        assert [(t.task, t.episodes, t.steps) for t in tasks] == [("look", 4, 40)]
        assert versions == {-1: 50}
        writer.catalogue.advance("gateway", 7)
        writer.catalogue.advance("gateway", 3)
        assert writer.catalogue.cursor("gateway") == 7 and writer.catalogue.cursor("other") == -1
    path = tmp_path / NAME
    if damage == "lost":
        path.unlink()
    elif damage == "garbage":
        path.write_bytes(b"no database" * 1000)
    else:
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 99")
    with ReplayWriter(tmp_path) as writer:
        assert (writer.catalogue.tasks(), writer.catalogue.versions()) == (tasks, versions)
        assert writer.catalogue.cursor("gateway") == -1
    with Catalogue(tmp_path) as catalogue:
        assert len(catalogue.segments()) == len(list(tmp_path.glob("*.seg")))


def test_streams_may_differ_but_not_within_one(tmp_path, make_step):
    with ReplayWriter(tmp_path) as writer:
        writer.append(picture_step(0, 0, 1))
        writer.append(picture_step(0, 1, 1))
        other = make_step("r1", 0, 0)
        writer.append(other)
        writer.append(make_step("r1", 0, 1, final=True))
        with pytest.raises(SpecError, match=r"lacks .*front: stream 'r0' has observation keys"):
            writer.append(
                make_step("r0", 1, 0, observation={"observation.state": np.zeros(2, "f4")})
            )
        with pytest.raises(StepOrderError, match=r"time goes backwards at index 1"):
            writer.append(picture_step(1, 0, 5))
            writer.append(make_step("r1", 1, 0, t_ns=10))
            writer.append(make_step("r1", 1, 1, t_ns=9))
    reader = ReplayReader(tmp_path)
    reader.refresh()
    a, b = reader.finished()
    assert reader.take("reward", np.append(a.rows, b.rows)).shape == (2,)
    with pytest.raises(ConfigError, match=r"'observation.state' is .* in stream r0 and .*r1"):
        reader.take("observation.state", np.append(a.rows, b.rows))
    assert reader.take("observation.state", b.rows).shape == (1, 3)
    assert [len(list(reader.steps(episode))) for episode in (a, b)] == [2, 2]
