"""Pictures of a simulated robot's cameras, which may be slower than the robot."""

from collections.abc import Callable

import numpy as np

from embodied.core.frames import Observation
from hal.cameras import picture_key
from sim.family import SimConfig

Draw = Callable[[str, int, int], np.ndarray]
"""From a camera's name, width and height to a picture [height, width, 3], uint8."""


class Pictures:
    """The pictures of `sim.cameras`, drawn at a reset and every `sim.picture_ticks` from there on;
    in between the last ones stay."""

    def __init__(self, config: SimConfig, draw: Draw) -> None:
        self._config = config
        self._draw = draw
        self._ticks = 0
        self._last: dict[str, np.ndarray] = {}

    def begin(self) -> None:
        """The robot was reset."""
        self._ticks = 0

    def step(self) -> None:
        """A tick has passed."""
        self._ticks += 1

    def observe(self) -> Observation:
        """By observation key."""
        if self._ticks % self._config.picture_ticks == 0:
            size = self._config.image_size
            self._last = {
                picture_key(camera): self._draw(camera, size, size)
                for camera in self._config.cameras
            }
        return dict(self._last)
