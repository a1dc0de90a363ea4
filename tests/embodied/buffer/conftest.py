import numpy as np
import pytest

from embodied.core.episodes import Step


def _make_step(stream="r0", episode=0, index=0, **fields):
    """A step whose arrays tell where it belongs."""
    state = np.array([episode, index, sum(stream.encode())], np.float32)
    image = np.full((2, 2, 3), (episode * 31 + index) % 256, np.uint8)
    observation = {"observation.state": state, "observation.images.front": image}
    action = np.array([episode * 1000 + index, -index], np.float32)
    return Step(
        stream,
        episode,
        index,
        fields.pop("observation", observation),
        fields.pop("action", action),
        **fields,
    )


def _make_episode(stream="r0", episode=0, length=5, closed=True, **fields):
    steps = [_make_step(stream, episode, i, reward=float(i), **fields) for i in range(length)]
    return steps + [_make_step(stream, episode, length, final=True)] * closed


@pytest.fixture
def make_step():
    return _make_step


@pytest.fixture
def make_episode():
    return _make_episode
