"""A buffer of pictures whose values tell where they belong."""

import numpy as np

from embodied.buffer.write.writer import ReplayWriter
from embodied.core.episodes import Step

SIDE = 64


def picture(episode, index, side=SIDE):
    """A picture that compresses badly and is known from episode and index."""
    rng = np.random.default_rng((episode, index))
    return rng.integers(0, 256, (side, side, 3), np.uint8)


def picture_step(episode, index, length, stream="r0", side=SIDE):
    """A step with a picture; the one at `length` is the last observation."""
    return Step(
        stream,
        episode,
        index,
        {
            "observation.images.front": picture(episode, index, side),
            "observation.state": np.array([episode, index], np.float32),
        },
        np.array([episode * 1000 + index], np.float32),
        task="look",
        final=index == length,
        t_ns=index * 20_000_000,
    )


def write_pictures(path, episodes, length=10, segment_bytes=1 << 20, side=SIDE, **options):
    """Write closed episodes of pictures; the writer is closed again."""
    with ReplayWriter(path, segment_bytes, **options) as writer:
        for episode in episodes:
            for index in range(length + 1):
                writer.append(picture_step(episode, index, length, side=side))
            writer.flush()
