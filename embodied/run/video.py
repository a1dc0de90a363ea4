"""Films of rollouts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from embodied.core.errors import MissingDependencyError
from hal.commander import Leasable

_FPS = 20
_SIDE = 224


class Film:
    """Films one device's episodes as mp4, at 20 pictures per second of the device's time.

    fault: why there are no pictures, where OpenGL is missing; the episode goes on without.
    """

    def __init__(self, device: Leasable) -> None:
        self._device = device
        self._every = max(1, round(device.spec.tick_hz / _FPS))
        self._fps = device.spec.tick_hz / self._every
        self._pictures: list[Any] = []
        self._count = 0
        self.fault: str | None = None

    def picture(self) -> None:
        """Take a picture, if one is due at this tick."""
        if self.fault is None and self._count % self._every == 0:
            try:
                picture = self._device.render(_SIDE, _SIDE)
            except MissingDependencyError as error:
                self.fault = str(error)
                return
            if picture is not None:
                self._pictures.append(picture)
        self._count += 1

    def save(self, path: Path) -> bool:
        """Write the film, forget it; False if the device cannot draw itself."""
        pictures, self._pictures, self._count = self._pictures, [], 0
        if not pictures:
            return False
        write_film(path, [*pictures, *[pictures[-1]] * int(self._fps / 2)], self._fps)
        return True


def write_film(path: Path, pictures: Iterable[np.ndarray], fps: float) -> None:
    """Write pictures [H, W, 3], uint8, as mp4; their edges are repeated to multiples of 16."""
    import imageio.v2 as imageio

    temporary = path.with_name(f".{path.name}")
    film: Any = imageio.get_writer(
        temporary, format="FFMPEG", fps=fps, codec="libx264", macro_block_size=16
    )
    with film:
        for picture in pictures:
            below, right = (-side % 16 for side in picture.shape[:2])
            film.append_data(np.pad(picture, ((0, below), (0, right), (0, 0)), mode="edge"))
    temporary.rename(path)
