import h5py
import numpy as np
import pytest
from robomimic_file import write

from embodied.buffer.interchange.robomimic import RobomimicEpisodes
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.errors import ConfigError, CorruptDataError
from embodied.run.record import import_dataset


def opened(path, **options):
    return RobomimicEpisodes(RobomimicEpisodes.Config(path=str(path), **options))


def read(path, **options):
    return list(opened(path, **options).episodes())


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "lift.hdf5")


def test_demonstrations_become_episodes(path):
    first, second = read(path)
    assert opened(path).tasks == {"Lift"} and len(opened(path)) == 2
    assert [len(first), len(second)] == [5, 4]
    assert first[0].observation.keys() == {
        "observation.robot0_eef_pos",
        "observation.object",
        "observation.images.agentview_image",
    }
    for number, episode in enumerate((first, second)):
        for step in episode:
            assert (step.episode, step.task) == (number, "Lift")
            position = step.observation["observation.robot0_eef_pos"]
            assert position.dtype == np.float32
            assert position.tolist() == [step.index, step.index + number, step.index]
            assert (step.observation["observation.images.agentview_image"] == step.index).all()
            assert step.t_ns == step.index * 20_000_000
        assert episode[-1].final and not episode[-2].final
        assert episode[-2].terminated and episode[-2].success and not episode[-2].truncated
        assert [step.reward for step in episode[:-2]] == [0.0] * (len(episode) - 2)
        assert all(step.intervention for step in episode[:-1])
        assert episode[1].action.tolist() == list(range(7, 14))
        assert episode[1].action.dtype == np.float32


def test_without_next_obs_the_last_frame_is_the_final_observation(tmp_path):
    path = write(tmp_path / "lift.hdf5", next_obs=False)
    first, _ = read(path)
    assert len(first) == 4 and first[-1].final
    assert first[-1].observation["observation.object"][0] == 6
    assert first[-2].truncated and not first[-2].success, "its reward went with the last action"
    first, _ = read(path, final="repeat")
    assert len(first) == 5 and first[-2].terminated and first[-2].success


def test_without_outcomes_nothing_succeeded_unless_it_is_said(tmp_path):
    path = write(tmp_path / "lift.hdf5", outcome=False)
    first, _ = read(path)
    assert first[-2].truncated and not first[-2].success and first[0].reward == 0.0
    first, _ = read(path, success=True, expert=False)
    assert first[-2].success and not first[0].intervention


def test_keys_can_be_renamed_joined_and_left_out(path):
    names = {"agentview_image": "observation.images.front"}
    first, _ = read(path, observation=names, state=("robot0_eef_pos", "object"), task="lift")
    assert first[0].task == "lift"
    assert first[0].observation.keys() == {"observation.images.front", "observation.state"}
    assert first[2].observation["observation.state"].shape == (13,)
    assert first[2].observation["observation.state"][:3].tolist() == [2, 2, 2]
    with pytest.raises(ConfigError, match=r"obs has no objct; it has .*object"):
        read(path, state=("objct",))


def test_a_filter_key_and_a_limit_choose_demonstrations(tmp_path):
    path = write(tmp_path / "lift.hdf5", (3, 4, 5), demos=(0, 1, 10))
    assert [len(e) for e in read(path, filter_key="train")] == [5]
    assert [e[0].episode for e in read(path)] == [0, 1, 10]
    assert len(list(opened(path).episodes(limit=1))) == 1
    with pytest.raises(ConfigError, match="no filter key 'valid'; it has train"):
        opened(path, filter_key="valid")
    part, whole = read(path, filter_key="train")[0], read(path)[1]
    assert part[0].key == whole[0].key, "a selection has the same names as all of it"


def test_importing_twice_adds_nothing(path, tmp_path):
    for _ in range(2):
        with LocalBuffer(tmp_path / "buffer") as buffer:
            import_dataset(buffer, opened(path).episodes())
    with ReplayReader(tmp_path / "buffer") as reader:
        reader.refresh()
        assert (reader.num_closed, reader.num_steps) == (2, 7)


def damaged(path, edit):
    with h5py.File(path, "a") as file:
        edit(file)
    with pytest.raises(CorruptDataError) as caught:
        read(path)
    return str(caught.value)


def replace(group, key, value):
    if key in group:
        del group[key]
    if value is not None:
        group[key] = value


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("actions", None, "demo_1: no array 'actions'"),
        ("actions", np.zeros((2, 7)), "demo_1, obs: '.*' has 3 frames; .*\\(2\\) are right"),
        ("actions", np.full((3, 7), np.nan), "demo_1: 'action' of frame 0 is not finite"),
        ("actions", np.array([b"a", b"b", b"c"]), "demo_1: 'actions' is"),
        ("obs/object", np.zeros((2, 10)), "demo_1, obs: 'observation.object' has 2 frames"),
        ("obs", None, "no group 'obs' in .*demo_1"),
        ("next_obs/object", None, "demo_1: next_obs has other keys"),
        ("rewards", np.zeros(2), "demo_1: 2 rewards of 3 actions"),
    ],
)
def test_damage_names_file_demonstration_and_key(path, key, value, said):
    import re

    text = damaged(path, lambda file: replace(file["data/demo_1"], key, value))
    assert "lift.hdf5" in text and re.search(said, text), text


def test_files_that_are_none_are_named(tmp_path, path):
    with pytest.raises(ConfigError, match="no file"):
        opened(tmp_path / "nothing.hdf5")
    (tmp_path / "text.hdf5").write_text("no HDF5")
    with pytest.raises(CorruptDataError, match="cannot be read as HDF5"):
        opened(tmp_path / "text.hdf5")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CorruptDataError, match=r"lift\.hdf5"):
        read(path)
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file.create_group("data")
    with pytest.raises(CorruptDataError, match="no demonstrations data/demo_k"):
        opened(tmp_path / "other.hdf5")
