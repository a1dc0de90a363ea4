"""Promises of every registered data set."""

from pathlib import Path

import lerobot_v3
import numpy as np
import pytest
import robomimic_file

from embodied.buffer.serve.sink import LocalBuffer
from embodied.core import config, registry

PUSHT = Path(__file__).parents[2] / "data" / "pusht_three_episodes.npz"
NEEDS = {"videos": {"key": "observation.images.top", "image_size": (16, 16), "hz": 10}}
"""Options that a data set must be given, by its name."""


@pytest.fixture
def source(tmp_path, make_episode):
    """Something to read, by a data set's name."""

    def _source(name):
        path = tmp_path / "source"
        if name == "pusht_human":
            return PUSHT
        if name == "robomimic":
            return robomimic_file.write(path)
        if name == "lerobot":
            return lerobot_v3.write(path, video=True)
        if name == "videos":
            for number in range(2):
                frames = [lerobot_v3.picture(number, frame) for frame in range(4)]
                lerobot_v3.encode(path / f"{number}.mp4", frames, fps=10)
            return path
        with LocalBuffer(path) as buffer:
            for number in range(2):
                for step in make_episode("r0", number):
                    buffer.add(step)
        return path

    return _source


@pytest.mark.parametrize("name", registry.names("datasets"))
def test_whole_episodes_in_one_order_under_names_of_their_own(name, source):
    options = {"name": name, "path": str(source(name)), **NEEDS.get(name, {})}
    made, typed = config.component("datasets", options, "dataset")
    first, again = (list(made(typed).episodes()) for _ in range(2))
    assert len(first) >= 2 and made(typed).tasks >= {step.task for step in first[0]}
    assert len(list(made(typed).episodes(limit=1))) == 1
    for episode, same in zip(first, again, strict=True):
        assert [step.key for step in episode] == [step.key for step in same]
        assert [step.index for step in episode] == list(range(len(episode)))
        assert [step.final for step in episode] == [False] * (len(episode) - 1) + [True]
        assert len({step.key[:2] for step in episode}) == 1
        assert (np.diff([step.t_ns for step in episode]) >= 0).all()
        assert not any(step.terminated and step.truncated for step in episode)
    assert len({episode[0].key for episode in first}) == len(first)
