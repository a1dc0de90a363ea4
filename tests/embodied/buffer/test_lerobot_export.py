"""Round trips through the real LeRobot library, whose import takes seconds."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from embodied.buffer.interchange.lerobot_export import export
from embodied.buffer.interchange.lerobot_import import LeRobotEpisodes
from embodied.buffer.interchange.recording import closed_episodes
from embodied.buffer.serve.sink import LocalBuffer
from embodied.buffer.upkeep.contents import Contents
from embodied.buffer.upkeep.maintenance import Selection
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, MissingDependencyError, SpecError
from embodied.run.record import import_dataset

LENGTHS = {("r0", 0): 6, ("r0", 3): 1, ("r1", 0): 9}
FIELDS = ("reward", "policy_version", "terminated", "truncated", "success", "intervention", "held")


def picture(episode, index, channels=3):
    image = np.zeros((48, 64, channels), np.uint8)
    image[...] = np.linspace(20, 120, 48)[:, None, None].astype(np.uint8)
    image[10 + index : 20 + index, 10:30] = 100 + 30 * episode
    return image


def make_episode(stream, number, length, observation=None):
    for index in range(length + 1):
        last, final = index == length - 1, index == length
        yield Step(
            stream,
            number,
            index,
            observation={
                "observation.images.top": picture(number, index),
                "observation.images.grey": picture(number, index, 1),
                "observation.state": np.array([number, index], np.float32),
                "observation.scalar": np.array(index / 3, np.float64),
                "observation.matrix": np.full((2, 3), index, np.int32),
                **(observation or {}),
            },
            action=np.array([number * 1000 + index, -index], np.float32),
            reward=0.0 if final else index / 4,
            terminated=last and number == 0,
            truncated=last and number != 0,
            success=last and stream == "r0",
            intervention=not final and index % 2 == 0,
            held=not final and index == 1,
            policy_version=-1 if final else index,
            task="push" if stream == "r0" else "",
            seed=number + 7,
            final=final,
            t_ns=1_000_000_007 + index * 50_000_000,
        )


def record(path, **options):
    with LocalBuffer(path) as buffer:
        for (stream, number), length in LENGTHS.items():
            for step in make_episode(stream, number, length, **options):
                buffer.add(step)
        for step in list(make_episode("r1", 1, 4))[:-1] if not options else ():
            buffer.add(step)  # an episode that is not over yet
    return path


@pytest.fixture
def buffer(tmp_path):
    return record(tmp_path / "buffer")


def write(buffer, target, **options):
    contents = Contents(buffer)
    return export(contents, closed_episodes(contents, Selection()), target, **options)


def steps(buffer):
    contents = Contents(buffer)
    return {
        key: [stored.step() for stored in contents.of_episode(episode)]
        for key, episode in contents.episodes.items()
        if episode.closed
    }


@pytest.mark.slow
@pytest.mark.parametrize("images", ["video", "image"])
def test_buffer_to_lerobot_to_buffer(tmp_path, buffer, images):
    frames = []
    written = write(buffer, tmp_path / "set", images=images, on_step=lambda: frames.append(1))
    assert written == (3, sum(LENGTHS.values()) + 3) and len(frames) == written[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["buffer", "set"]
    for _ in range(2):
        dataset = LeRobotEpisodes(LeRobotEpisodes.Config(path=str(tmp_path / "set")))
        with LocalBuffer(tmp_path / "back") as back:
            import_dataset(back, dataset.episodes())
    original, returned = steps(buffer), steps(tmp_path / "back")
    assert len(returned) == len(original) == 3
    for (stream, number), episode in returned.items():
        assert stream.startswith("set-")
        before = original[stream.split("/")[1], number]
        assert len(episode) == len(before)
        for a, b in zip(episode, before, strict=True):
            assert (a.index, a.task, a.seed, a.final, a.t_ns) == (
                b.index,
                b.task,
                b.seed,
                b.final,
                b.t_ns,
            )
            if not a.final:
                assert [getattr(a, name) for name in FIELDS] == [
                    getattr(b, name) for name in FIELDS
                ]
                np.testing.assert_array_equal(a.action, b.action)
            assert a.observation.keys() == b.observation.keys()
            for key, value in b.observation.items():
                found = a.observation[key]
                assert (found.dtype, found.shape) == (value.dtype, value.shape)
                if "images" in key and images == "video":
                    assert np.abs(found.astype(int) - value).mean() < 4
                else:
                    np.testing.assert_array_equal(found, value)


@pytest.mark.slow
@pytest.mark.parametrize("images", ["video", "image"])
def test_lerobot_itself_loads_the_export_and_makes_windows(tmp_path, buffer, images):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    write(buffer, tmp_path / "set", images=images)
    top = "observation.images.top"
    data = LeRobotDataset(
        "local/set",
        root=tmp_path / "set",
        video_backend="pyav",
        delta_timestamps={top: [-0.05, 0.0], "action": [0.0, 0.05, 0.1], "next.reward": [0.0]},
    )
    assert (data.num_episodes, data.num_frames, data.fps) == (3, 19, 20)
    item = data[4]
    assert item["task"] == "push" and item["action"].tolist() == [[4, -4], [5, -5], [5, -5]]
    assert item["action_is_pad"].tolist() == [False, False, False]
    assert item[top].shape == (2, 3, 48, 64)
    for frame, index in zip(item[top], (3, 4), strict=True):
        wanted = picture(0, index).transpose(2, 0, 1) / 255
        assert np.abs(frame.numpy() - wanted).mean() < 0.02
    first = data[0]
    assert first[f"{top}_is_pad"].tolist() == [True, False]
    assert data[6]["complementary_info.final"] and not data[5]["complementary_info.final"]
    assert bool(data[5]["next.done"]) and bool(data[5]["next.terminated"])
    assert data.meta.stats["action"]["max"].tolist() == [3000, 0]


@pytest.mark.slow
def test_without_final_observations_the_last_frame_becomes_one(tmp_path, buffer):
    contents = Contents(buffer)
    long = closed_episodes(contents, Selection(episodes=(0,)))
    assert export(contents, long, tmp_path / "set", final=False, fps=20) == (2, 15)
    dataset = LeRobotEpisodes(LeRobotEpisodes.Config(path=str(tmp_path / "set")))
    assert [len(episode) for episode in dataset.episodes()] == [7, 10]
    with pytest.raises(ConfigError, match=r"stream 'r0', episode 3 has one step.*final=true"):
        write(buffer, tmp_path / "short", final=False)


@pytest.mark.slow
def test_an_export_that_fails_leaves_nothing(tmp_path, buffer):
    def stop():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write(buffer, tmp_path / "set", on_step=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["buffer"]


def test_what_lerobot_cannot_hold_is_said_before_anything_is_written(tmp_path, buffer):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="already there"):
        write(buffer, tmp_path / "there")
    odd = record(tmp_path / "odd", observation={"observation.odd": np.zeros((5, 4, 3), np.uint8)})
    with pytest.raises(SpecError, match=r"'observation\.odd' has 5×4 pixels.*images=image"):
        write(odd, tmp_path / "set")
    named = record(tmp_path / "named", observation={"index": np.zeros(2, np.float32)})
    with pytest.raises(SpecError, match="'index' cannot be exported: LeRobot uses"):
        write(named, tmp_path / "set")
    slash = record(tmp_path / "slash", observation={"a/b": np.zeros(2, np.float32)})
    with pytest.raises(SpecError, match="allows no '/'"):
        write(slash, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_rate_is_asked_for_where_times_do_not_tell_it(tmp_path, make_episode):
    with LocalBuffer(tmp_path / "buffer") as buffer:
        for step in make_episode("r0", 0):
            buffer.add(step)
    with pytest.raises(ConfigError, match="fps="):
        write(tmp_path / "buffer", tmp_path / "set")


def test_streams_with_other_arrays_are_not_exported_together(tmp_path, buffer, make_episode):
    with LocalBuffer(buffer) as more:
        for step in make_episode("other", 0):
            more.add(step)
    with pytest.raises(SpecError, match=r"choose by streams"):
        write(buffer, tmp_path / "set")
    contents = Contents(buffer)
    assert len(closed_episodes(contents, Selection(streams=("r0", "r1")))) == 3
    assert len(closed_episodes(contents, Selection(streams=("r0",)), successful=True)) == 2
    with pytest.raises(ConfigError, match="no successful episode"):
        closed_episodes(contents, Selection(streams=("r1",)), successful=True)
    with pytest.raises(ConfigError, match="no task pull; it has"):
        closed_episodes(contents, Selection(tasks=("pull",)))


def test_the_extra_is_named_where_lerobot_is_missing(tmp_path, buffer, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(disable_progress_bars=lambda: None)
    )
    monkeypatch.setitem(sys.modules, "lerobot.datasets.lerobot_dataset", None)
    with pytest.raises(MissingDependencyError, match=r"embodied-stack\[lerobot\]"):
        write(buffer, tmp_path / "set")
    assert not (tmp_path / "set").exists()
