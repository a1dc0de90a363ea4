"""The transition that every contender stores, and the buffers that hold it.

Two uint8 cameras, 30 floats of state, a chunk of 16 actions of 7 floats, reward, done, version.
Ours keeps one action a step and puts the chunk together from 16 of them.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from embodied.core.episodes import Step

BATCH = 256
HORIZON = 16
CAMERAS = ("camera0", "camera1")
STATE = "state"
EPISODE_RECORDS = 200
"""Records of an episode: 199 actions and the last observation."""

_POOL = 64


def fields(side: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Name → dtype and shape of the transition's arrays."""
    image = (np.dtype(np.uint8), (side, side, 3))
    return {
        **dict.fromkeys(CAMERAS, image),
        STATE: (np.dtype(np.float32), (30,)),
        "action": (np.dtype(np.float32), (HORIZON, 7)),
        "reward": (np.dtype(np.float32), ()),
        "done": (np.dtype(np.bool_), ()),
        "version": (np.dtype(np.int64), ()),
    }


def record_bytes(side: int) -> int:
    """Bytes of one transition."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in fields(side).values())


class Source:
    """Transitions and steps of a side length; images come in turn out of a pool of random ones."""

    def __init__(self, side: int, seed: int = 0) -> None:
        self.side = side
        self._rng = np.random.default_rng(seed)
        count = _POOL if side else 1
        self._images = self._rng.integers(0, 256, (count, side, side, 3), np.uint8)

    def transitions(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Transitions start..start+count-1 as arrays [count, ...]."""
        at = np.arange(start, start + count)
        return {
            CAMERAS[0]: self._images[at % _POOL],
            CAMERAS[1]: self._images[(5 * at + 1) % _POOL],
            STATE: self._rng.random((count, 30), np.float32),
            "action": self._rng.random((count, HORIZON, 7), np.float32),
            "reward": np.zeros(count, np.float32),
            "done": at % EPISODE_RECORDS == EPISODE_RECORDS - 1,
            "version": at // EPISODE_RECORDS,
        }

    def steps(
        self, count: int, length: int = EPISODE_RECORDS, stream: str = "robot"
    ) -> Iterator[Step]:
        """So many records of episodes, each of `length`; without images if the side is 0."""
        states = self._rng.random((1024, 30), np.float32)
        actions = self._rng.random((1024, 7), np.float32)
        for i in range(count):
            episode, index = divmod(i, length)
            observation = {STATE: states[i % 1024]}
            if self.side:
                observation[CAMERAS[0]] = self._images[i % _POOL]
                observation[CAMERAS[1]] = self._images[(5 * i + 1) % _POOL]
            yield Step(
                stream,
                episode,
                index,
                observation,
                actions[i % 1024],
                policy_version=episode,
                task="benchmark",
                seed=episode,
                final=index == length - 1,
                t_ns=i * 20_000_000,
            )


def segment_files(path: Path) -> list[Path]:
    """Segments of one of our buffers, in order."""
    return sorted([*path.glob("*.seg"), *path.glob("*.seg.open")])
