from pathlib import Path

import numpy as np
import pytest

from embodied.buffer.read.replay import ReplayReader
from embodied.cli.main import main
from embodied.core.errors import ConfigError, CorruptDataError
from sim.family import SimConfig
from sim.pusht import PushTDriver, block_features
from sim.pusht_demos import PushTDemonstrations

FIXTURE = Path(__file__).parents[1] / "data" / "pusht_three_episodes.npz"


def demonstrations(path=FIXTURE, **options):
    return PushTDemonstrations(PushTDemonstrations.Config(path=str(path), **options))


def test_episodes_are_the_published_ones():
    with np.load(FIXTURE) as data:
        state, action, ends = data["state"], data["action"], data["episode_ends"]
    found = list(demonstrations().episodes())
    assert [len(episode) for episode in found] == np.diff(ends, prepend=0).tolist()
    first = 0
    for episode in found:
        for offset, step in enumerate(episode):
            np.testing.assert_array_equal(
                step.observation["observation.state"], state[first + offset, :2]
            )
            np.testing.assert_array_equal(step.action, action[first + offset])
        assert [step.final for step in episode] == [False] * (len(episode) - 1) + [True]
        assert episode[-2].truncated and not any(step.terminated for step in episode)
        first += len(episode)
    assert len(list(demonstrations().episodes(2))) == 2


def test_replaying_the_actions_pushes_the_block_onto_its_mark():
    driver = PushTDriver(SimConfig())
    driver.open()
    with np.load(FIXTURE) as data:
        state, action, ends = data["state"], data["action"], data["episode_ends"]
    best, first = [], 0
    for end in ends:
        driver.set_state(state[first, :2], state[first, 2:4], state[first, 4])
        start = driver.sense()["observation.environment_state"]
        recorded = block_features(state[first, 2], state[first, 3], state[first, 4])
        np.testing.assert_allclose(start, recorded, atol=1.0)
        coverage = []
        for row in action[first:end]:
            driver.drive(row)
            driver.step_time()
            coverage.append(driver.signals()["coverage"])
        best.append(max(coverage))
        first = end
    driver.close()
    assert np.mean(best) > 0.8


def test_a_twin_goes_on_as_the_driver_does_and_leaves_it_alone():
    driver = PushTDriver(SimConfig())
    driver.open()
    with np.load(FIXTURE) as data:
        state, action = data["state"], data["action"]
    driver.set_state(state[0, :2], state[0, 2:4], state[0, 4])
    moved = 0.0
    for first in range(0, 96, 16):
        twins = [driver.twin(), driver.twin()]
        before = driver.sense()["observation.environment_state"]
        for row in action[first : first + 16]:
            for one, target in ((driver, row), (twins[0], row), (twins[1], 512 - row)):
                one.drive(target)
                one.step_time()
        seen, like, other = (one.sense() for one in (driver, *twins))
        for key, value in seen.items():
            np.testing.assert_allclose(like[key], value, atol=0.5)
        assert twins[0].signals()["coverage"] == pytest.approx(
            driver.signals()["coverage"], abs=0.01
        )
        assert np.abs(other["observation.state"] - seen["observation.state"]).max() > 1
        moved += np.abs(seen["observation.environment_state"] - before).max()
        for twin in twins:
            twin.close()
    driver.close()
    assert moved > 50


def test_the_block_s_angle_has_no_jump():
    near = block_features(0.0, 0.0, np.pi - 1e-3), block_features(0.0, 0.0, -np.pi + 1e-3)
    np.testing.assert_allclose(near[0], near[1], atol=0.3)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*nowhere\.npz"):
        demonstrations(tmp_path / "nowhere.npz")
    with pytest.raises(ConfigError, match="no images"):
        demonstrations(images=True)
    data = FIXTURE.read_bytes()
    broken = tmp_path / "broken.npz"
    for damage in (data[: len(data) // 2], b"", b"PK\x03\x04 nonsense"):
        broken.write_bytes(damage)
        with pytest.raises(CorruptDataError, match=r"broken\.npz"):
            demonstrations(broken)
    with np.load(FIXTURE) as whole:
        np.savez(broken, state=whole["state"][:-1], action=whole["action"], episode_ends=[3])
    with pytest.raises(CorruptDataError, match="do not fit"):
        demonstrations(broken)


def test_importing_twice_adds_nothing(tmp_path, capsys):
    arguments = [
        "collect",
        "task=pusht",
        "demonstrations.source=dataset",
        "demonstrations.episodes=null",
        f"demonstrations.dataset={{name: pusht_human, path: {FIXTURE}}}",
        f"output={tmp_path / 'buffer'}",
    ]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert "imported 3 episodes, 417 steps" in capsys.readouterr().out
    reader = ReplayReader(tmp_path / "buffer")
    reader.refresh()
    assert reader.num_closed == 3 and sum(len(e.rows) for e in reader.closed_episodes()) == 417


def test_a_dataset_of_another_task_is_refused(tmp_path, capsys):
    arguments = [
        "collect",
        "task=pointmass",
        "demonstrations.source=dataset",
        f"demonstrations.dataset={{name: pusht_human, path: {FIXTURE}}}",
        f"output={tmp_path / 'buffer'}",
    ]
    assert main(arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds episodes of pusht, and the run's task is pointmass" in said


def test_pictures_are_read_from_a_zarr_archive(tmp_path):
    import zarr
    from zarr.storage import ZipStore

    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (700, 4, 4, 3)).astype(np.float32)
    path = tmp_path / "demos.zarr.zip"
    with ZipStore(path, mode="w") as store:
        root = zarr.open_group(store, mode="w")
        root["data/state"] = rng.uniform(0, 512, (700, 5)).astype(np.float32)
        root["data/action"] = rng.uniform(0, 512, (700, 2)).astype(np.float32)
        root["meta/episode_ends"] = np.array([300, 700])
        root["data/img"] = pictures
    steps = [step for episode in demonstrations(path, images=True).episodes() for step in episode]
    found = np.stack([step.observation["observation.images.top"] for step in steps])
    assert found.dtype == np.uint8 and np.array_equal(found, pictures)
