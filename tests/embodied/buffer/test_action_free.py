"""Sources of which only what was seen counts, beside labelled ones."""

import lerobot_v3
import numpy as np
import pytest
from windowing import STATE, assert_batch_is, make_steps

from embodied.buffer.interchange.lerobot_import import LeRobotEpisodes
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.sampling import (
    OWN,
    OwnSource,
    SamplingConfig,
    SourceConfig,
    check_sampling,
    open_sampling,
)
from embodied.buffer.sample.windows import WindowSpec
from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError
from embodied.core.specs import ArraySpec

SPEC = WindowSpec(2, 3, (STATE,), future=(2,), future_keys=(STATE,), n_step=2, discount=0.9)
SEEN = {STATE: ArraySpec((3,))}


def record(path, steps):
    with LocalBuffer(path) as buffer:
        for step in steps:
            buffer.add(step)
    return path


def elsewhere(stream, length=7):
    """An episode of another robot, of five joints, in which nobody demonstrated anything."""
    name = f"s{stream}"
    return [
        Step(
            name,
            0,
            index,
            {STATE: np.array([stream, 0, index], np.float32)},
            np.full(5, 9, np.float32),
            truncated=index == length - 1,
            final=index == length,
        )
        for index in range(length + 1)
    ]


@pytest.fixture
def own(tmp_path):
    """A reader of the run's own steps, and these by episode."""
    rng = np.random.default_rng(0)
    episodes = {("s0", number): make_steps(0, number, 6, rng) for number in range(3)}
    path = record(tmp_path / "own", (s for steps in episodes.values() for s in steps))
    with ReplayReader(path) as reader:
        reader.refresh()
        yield reader, episodes


def demonstrated(episode, flags):
    return flags.intervention


def sampling(reader, path, spec=SPEC, **options):
    source = SourceConfig(path=str(path), actions=False, **options)
    config = SamplingConfig(ratio=2.0, sources={"seen": source})
    return open_sampling(config, reader, spec, {OWN: OwnSource(demonstrated)}, ReplayReader)


def test_exactly_their_share_has_no_labels_whatever_was_recorded(own, tmp_path):
    reader, episodes = own
    opened = sampling(reader, record(tmp_path / "seen", elsewhere(4)))
    rng, taken, seen = np.random.default_rng(1), np.zeros(2), set()
    for batches in range(1, 21):
        batch = opened.sampler.sample(8, rng)
        assert batch["action"].shape == (8, 3, 2)
        taken += np.bincount(batch["source"], minlength=2)
        assert (np.abs(taken - np.array([2, 1]) / 3 * 8 * batches) < 1).all()
        free = {name: array[batch["source"] == 1] for name, array in batch.items()}
        assert free["action_is_pad"].all() and not free["action"].any()
        for before, later, past in zip(
            free[STATE], free["future." + STATE], free["future_is_pad"], strict=True
        ):
            step = int(before[1, 2])
            assert before[:, 0].tolist() == [4, 4] and before[0, 2] == max(step - 1, 0)
            assert later[0].tolist() == [4, 0, min(step + 2, 7)] and past[0] == (step + 2 > 7)
            seen.add(step)
        labelled = {name: array[batch["source"] == 0] for name, array in batch.items()}
        labelled.pop("source")
        assert_batch_is(labelled, episodes, SPEC, lambda step: step.intervention)
    assert seen == set(range(7))
    opened.close()


def test_statistics_of_actions_are_of_labels_alone_those_of_observations_of_all(own, tmp_path):
    reader, episodes = own
    opened = sampling(reader, record(tmp_path / "seen", elsewhere(40)))
    alone = open_sampling(
        SamplingConfig(), reader, SPEC, {OWN: OwnSource(demonstrated)}, ReplayReader
    )
    found, of_own = (part.sampler.statistics() for part in (opened, alone))
    assert found["action"] == of_own["action"]
    labels = [s.action for x in episodes.values() for s in x[:-1] if s.intervention and not s.held]
    assert found["action"].max == np.max(labels, axis=0).tolist()
    assert (of_own[STATE].max[0], found[STATE].max[0]) == (0, 40)
    assert found[STATE].count == of_own[STATE].count + 7
    opened.close()


def test_draw_strategies_see_what_was_recorded(own, tmp_path):
    reader, _ = own
    path = record(tmp_path / "seen", [*elsewhere(4), *elsewhere(5, length=20)])
    draw = {"name": "recency", "last_steps": 10}
    opened = sampling(reader, path, draw=draw)
    batch = opened.sampler.sample(60, np.random.default_rng(0))
    states = batch[STATE][batch["source"] == 1][:, 1]
    assert (states[:, 0] == 5).all() and states[:, 2].min() >= 10
    opened.close()


def test_a_lerobot_data_set_of_another_robot_shows_what_it_saw(tmp_path):
    data = LeRobotEpisodes.Config(path=str(lerobot_v3.write(tmp_path / "demos", video=True)))
    path = record(
        tmp_path / "seen", (step for steps in LeRobotEpisodes(data).episodes() for step in steps)
    )
    camera = lerobot_v3.VIDEO
    rng = np.random.default_rng(0)
    mine = [
        Step(
            "r",
            0,
            index,
            {camera: np.zeros((32, 48, 3), np.uint8), "extra": np.zeros(1, np.float32)},
            rng.normal(size=7).astype(np.float32),
            intervention=True,
            final=index == 5,
        )
        for index in range(6)
    ]
    spec = WindowSpec(1, 2, (camera,))
    with ReplayReader(record(tmp_path / "own", mine)) as reader:
        reader.refresh()
        opened = sampling(reader, path, spec)
        batch = opened.sampler.sample(12, rng)
        opened.close()
    free = batch["source"] == 1
    assert free.sum() == 4 and batch["action"].shape == (12, 2, 7)
    assert batch["action_is_pad"][free].all() and batch["action"][~free].any()
    assert batch[camera][free].reshape(4, -1).max(axis=1).min() > 100
    assert not batch[camera][~free].any()


def test_sources_that_lack_what_is_read_are_refused_at_the_start(tmp_path):
    path = record(tmp_path / "seen", elsewhere(4))
    config = SamplingConfig(sources={"seen": SourceConfig(path=str(path), actions=False)})
    check_sampling(config, SEEN, ReplayReader)
    camera = {"observation.images.top": ArraySpec((4, 4, 3), "uint8")}
    for observed, match in (
        ({**SEEN, **camera}, r"seen lacks observation\.images\.top.*=\[observation\.state\] makes"),
        (camera, r"seen lacks observation\.images\.top.*the source has observation\.state"),
        ({STATE: ArraySpec((4,))}, r"state is float32 \[3\] there and float32 \[4\] of the robot"),
    ):
        with pytest.raises(ConfigError, match=match):
            check_sampling(config, observed, ReplayReader)


def test_without_saying_so_only_demonstrations_are_learned_from(own, tmp_path):
    reader, _ = own
    path = record(tmp_path / "seen", elsewhere(4))
    config = SamplingConfig(sources={"seen": SourceConfig(path=str(path))})
    with pytest.raises(ConfigError, match=r"no step is selected.*actions=false"):
        open_sampling(config, reader, SPEC, {OWN: OwnSource(demonstrated)}, ReplayReader)
    with pytest.raises(ConfigError, match="path=none is neither"):
        check_sampling(
            SamplingConfig(sources={"seen": SourceConfig(path="none")}), SEEN, ReplayReader
        )
