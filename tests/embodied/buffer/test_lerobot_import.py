import json
import subprocess
import sys

import lerobot_v3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embodied.buffer.interchange.lerobot_import import LeRobotEpisodes
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.errors import ConfigError, CorruptDataError
from embodied.run.record import import_dataset

DATA = "data/chunk-000/file-000.parquet"


def opened(root, **options):
    return LeRobotEpisodes(LeRobotEpisodes.Config(path=str(root), **options))


def read(root, **options):
    return list(opened(root, **options).episodes())


def last(*values):
    """A column that is False but in its last rows."""

    def make(_, length):
        return [False] * (length - len(values)) + list(values)

    return make


@pytest.fixture
def root(tmp_path):
    return lerobot_v3.write(tmp_path / "set")


def edit(path, **columns):
    """Replace columns of a parquet file; None drops one."""
    table = pq.read_table(path)
    for name, values in columns.items():
        position = table.column_names.index(name)
        table = table.remove_column(position)
        if values is not None:
            table = table.append_column(name, values)
    pq.write_table(table, path)


def test_frames_become_steps_and_the_last_one_the_final_observation(root):
    first, second = read(root)
    assert [len(first), len(second)] == [5, 3]
    assert {step.stream for step in first + second} == {first[0].stream}
    assert first[0].stream.startswith("set-")
    for number, episode in enumerate((first, second)):
        assert [step.index for step in episode] == list(range(len(episode)))
        assert [step.final for step in episode] == [False] * (len(episode) - 1) + [True]
        assert [step.truncated for step in episode][-2:] == [True, False]
        for step in episode:
            assert step.episode == number and step.task == "push" and step.seed == -1
            np.testing.assert_array_equal(
                step.observation["observation.state"], [number, step.index]
            )
            assert step.t_ns == pytest.approx(step.index * 100_000_000, abs=10_000)
            if not step.final:
                np.testing.assert_array_equal(step.action, np.full(3, step.index + 100 * number))
                assert step.intervention and not step.success and step.action.dtype == np.float32


def test_repeating_the_last_frame_keeps_its_action(root):
    first, _ = read(root, final="repeat")
    assert len(first) == 6
    np.testing.assert_array_equal(first[4].action, np.full(3, 4))
    assert first[5].observation["observation.state"].tolist() == [0, 4]
    assert first[5].t_ns > first[4].t_ns and first[4].truncated


@pytest.mark.parametrize(
    ("done", "length"),
    [
        ((True,), 6),  # rewards and ends of the last frame are kept
        ((True, True), 5),  # LeRobot's padding of what its simulators end with
    ],
)
def test_where_the_ends_are_tells_what_the_last_frame_is(tmp_path, done, length):
    extra = {
        "next.reward": ("float32", lambda _, n: np.arange(n, dtype=np.float32)),
        "next.done": ("bool", last(*done)),
        "next.success": ("bool", last(*done)),
    }
    root = lerobot_v3.write(tmp_path / "set", extra=extra)
    first, _ = read(root)
    assert len(first) == length
    assert first[-2].terminated and first[-2].success and not first[-2].truncated
    assert [step.reward for step in first[:-1]] == list(range(length - 1))
    assert not any(step.success for step in first[:-2])


def test_an_end_without_success_is_truncated(tmp_path):
    extra = {"next.done": ("bool", last(True)), "next.success": ("bool", last(False))}
    first, _ = read(lerobot_v3.write(tmp_path / "set", extra=extra))
    assert first[-2].truncated and not first[-2].terminated


def test_what_the_data_set_does_not_say_can_be_said(root):
    first, _ = read(root, expert=False, success=True, task="lift")
    assert first[0].task == "lift" and not any(step.intervention for step in first)
    assert [step.success for step in first] == [False, False, False, True, False]


def test_videos_are_decoded_in_sequence(tmp_path):
    root = lerobot_v3.write(tmp_path / "set", (5, 1, 4), video=True, pictures="observation.wrist")
    with pytest.raises(CorruptDataError, match="has 0 actions"):
        read(root)
    episodes = read(root, final="repeat")
    assert [len(episode) for episode in episodes] == [6, 2, 5]
    for number, episode in enumerate(episodes):
        for step in episode[:-1]:
            wanted = lerobot_v3.picture(number, step.index)
            found = step.observation[lerobot_v3.VIDEO]
            assert found.shape == (32, 48, 3) and found.dtype == np.uint8
            assert np.abs(found.astype(int) - wanted).mean() < 4, (number, step.index)
            np.testing.assert_array_equal(step.observation["observation.wrist"], wanted)


def test_importing_twice_adds_nothing_and_a_longer_recording_adds_the_rest(tmp_path):
    root = lerobot_v3.write(tmp_path / "one" / "set")
    longer = lerobot_v3.write(tmp_path / "two" / "set", (5, 3, 4))
    for source, episodes in ((root, 2), (root, 2), (longer, 3)):
        with LocalBuffer(tmp_path / "buffer") as buffer:
            import_dataset(buffer, opened(source).episodes())
        with ReplayReader(tmp_path / "buffer") as reader:
            reader.refresh()
            assert reader.num_closed == episodes


def test_of_several_tasks_some_are_chosen_or_all_renamed(tmp_path):
    root = lerobot_v3.write(tmp_path / "set", (3, 4, 5), tasks=("push", "lift"))
    assert opened(root).tasks == {"push", "lift"}
    assert opened(root, task="both").tasks == {"both"}
    chosen = opened(root, only_tasks=("lift",))
    assert chosen.tasks == {"lift"} and [len(e) for e in chosen.episodes(limit=1)] == [4]
    assert [len(e) for e in opened(root, only_tasks=("push",)).episodes()] == [3, 5]
    with pytest.raises(ConfigError, match="no task pull; it has lift; push"):
        opened(root, only_tasks=("pull",))


def test_a_limit_reads_no_further(tmp_path):
    root = lerobot_v3.write(tmp_path / "set", (3, 4, 5))
    edit(root / "meta/episodes/chunk-000/file-000.parquet", length=pa.array([3, 4, 99]))
    assert [len(e) for e in opened(root).episodes(limit=2)] == [3, 4]
    with pytest.raises(CorruptDataError, match="ends before frame 98 of episode 2"):
        read(root)


def test_observations_can_be_chosen(tmp_path):
    root = lerobot_v3.write(tmp_path / "set", video=True)
    first, _ = read(root, observation=("observation.state",))
    assert first[0].observation.keys() == {"observation.state"}
    with pytest.raises(ConfigError, match=r"no observation\.stat; its observations are"):
        opened(root, observation=("observation.stat",))


def test_cameras_can_be_named_and_sized_as_the_robots(tmp_path):
    root = lerobot_v3.write(tmp_path / "set", video=True)
    state, front = "observation.state", "observation.images.front"
    named = {lerobot_v3.VIDEO: front, state: state}
    first, _ = read(root, observation=named, image_size=(16, 16))
    assert first[2].observation.keys() == {front, state}
    picture = first[2].observation[front].astype(int)
    assert picture.shape == (16, 16, 3) and abs(picture[..., 0].mean() - 50) < 8
    assert picture[:7, :7, 2].min() > 150 and picture[9:, 9:, 2].max() < 60
    with pytest.raises(ConfigError, match="one name to two keys"):
        opened(root, observation=dict.fromkeys(named, front))


def test_a_note_of_ours_gives_streams_shapes_and_seeds_back(tmp_path):
    note = {
        "format": 1,
        "features": {"observation.state": ["float32", [2, 1]], "action": ["float32", [3]]},
        "episodes": [["r0", 7, 42, 5], ["r1", 0, -1, 3]],
    }
    first, second = read(lerobot_v3.write(tmp_path / "set", note=note))
    assert first[0].stream.endswith("/r0") and second[0].stream.endswith("/r1")
    assert (first[0].episode, first[0].seed, second[0].episode) == (7, 42, 0)
    assert first[0].observation["observation.state"].shape == (2, 1)


def test_a_note_of_other_episodes_is_refused(tmp_path):
    note = {"format": 1, "features": {}, "episodes": [["r0", 7, 42, 4]]}
    with pytest.raises(CorruptDataError, match=r"embodied\.json does not belong"):
        opened(lerobot_v3.write(tmp_path / "set", note=note))


def test_folders_that_are_no_data_set_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no LeRobot data set"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match=r"v2\.1; format v3 is read. Convert"):
        opened(lerobot_v3.write(tmp_path / "old", version="v2.1"))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("meta/info.json", "info.json cannot be read"),
        ("meta/tasks.parquet", "tasks.parquet cannot be read as parquet"),
        ("meta/episodes/chunk-000/file-000.parquet", "cannot be read as parquet"),
        (DATA, "file-000.parquet cannot be read as parquet"),
        (f"videos/{lerobot_v3.VIDEO}/chunk-000/file-000.mp4", "episode 0.*top.*mp4"),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncated_files_are_named(tmp_path, file, said, share):
    root = lerobot_v3.write(tmp_path / "set", video=True)
    data = (root / file).read_bytes()
    (root / file).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CorruptDataError, match=said):
        read(root)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        (
            "action",
            pa.array([[1.0, 2.0, 3.0]] * 7 + [[1.0, 2.0]]),
            r"'action' is not float32 \[3\]",
        ),
        ("action", pa.array([[1.0, 2.0, None]] * 8), "'action' is not"),
        ("action", pa.array(["up"] * 8), "'action' is not"),
        ("action", None, "no column action"),
        ("action", pa.array([[1.0, 2.0, np.nan]] * 8), "'action' of frame 0 is not finite"),
        ("frame_index", pa.array([0, 1, 2, 4, 3, 0, 1, 2]), "frames are not numbered"),
        ("episode_index", pa.array([0, 0, 0, 0, 1, 1, 1, 1]), "episode 0"),
        ("task_index", pa.array([9] * 8), "tasks"),
        ("timestamp", pa.array([0.0, 0.1, 0.2, 0.1, 0.4, 0.0, 0.1, 0.2]), "timestamps fall"),
    ],
)
def test_wrong_columns_are_named_with_file_and_episode(root, column, values, said):
    edit(root / DATA, **{column: values})
    with pytest.raises(CorruptDataError, match=said) as caught:
        read(root)
    assert "set" in str(caught.value)


def test_nothing_of_a_damaged_episode_is_imported(tmp_path, root):
    bad = pa.array([[1.0, 2.0, 3.0]] * 7 + [[1.0, 2.0, np.inf]])
    edit(root / DATA, action=bad)
    with LocalBuffer(tmp_path / "buffer") as buffer:
        with pytest.raises(CorruptDataError, match="episode 1: 'action' of frame 2"):
            import_dataset(buffer, opened(root, final="repeat").episodes())
        assert (buffer.counts().episodes, buffer.counts().steps) == (1, 5)


@pytest.mark.parametrize(
    "template",
    [
        "../../{chunk_index}/{file_index}",
        "/etc/passwd",
        "{chunk_index.__class__}",
        "{file_index:>99999999999}",
        "{0}",
    ],
)
def test_path_templates_cannot_leave_the_data_set(root, template):
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"data_path": template}))
    with pytest.raises(CorruptDataError, match="template"):
        read(root)


def test_pictures_of_another_size_than_declared_are_refused(tmp_path):
    root = lerobot_v3.write(tmp_path / "set", pictures="observation.wrist")
    file = lerobot_v3.png(np.zeros((2000, 2000, 3), np.uint8))
    rows = pa.array([{"bytes": file, "path": None}] * 8)
    edit(root / DATA, **{"observation.wrist": rows})
    with pytest.raises(CorruptDataError, match=r"'observation\.wrist' of frame 0.*2000×2000"):
        read(root)


def test_videos_of_another_size_or_length_are_refused(tmp_path):
    root = lerobot_v3.write(tmp_path / "set", video=True)
    video = root / f"videos/{lerobot_v3.VIDEO}/chunk-000/file-000.mp4"
    frames = [lerobot_v3.picture(0, frame) for frame in range(6)]
    lerobot_v3.encode(video, frames, 10)
    with pytest.raises(CorruptDataError, match=r"episode 1.*no frame at 0\.6"):
        read(root)
    lerobot_v3.encode(video, [frame[:16] for frame in frames], 10)
    with pytest.raises(CorruptDataError, match=r"16×48 pixels; info\.json says 32×48"):
        read(root)


def test_importing_needs_neither_torch_nor_lerobot(root):
    code = (
        "import sys; from embodied.buffer.interchange.lerobot_import import LeRobotEpisodes as L; "
        f"assert list(L(L.Config(path={str(root)!r})).episodes()); "
        "assert not {'torch', 'lerobot'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_extra_is_named_where_it_is_missing(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError.__base__, match=r"embodied-stack\[lerobot\]"):
        opened(root)
