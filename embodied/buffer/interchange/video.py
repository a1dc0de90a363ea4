"""Frames of a video file in their order, decoded once: no seeking from frame to frame."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embodied.buffer.interchange import lerobot
from embodied.buffer.interchange.dataset import picture_frames
from embodied.core.errors import CorruptDataError


class VideoFile:
    """Decodes a video from its beginning. shape: (height, width, channels) that it must have."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path = path
        self._shape = shape
        self._container: Any = None
        self._frames: Iterator[Any] = iter(())
        self._time_s = -1.0

    def read(self, from_s: float, frames: int, fps: float, where: str) -> np.ndarray:
        """Frames at from_s, from_s + 1/fps, …: uint8 [frames, h, w, c].

        Each is the one that lies within half a frame of its time. Raises CorruptDataError that
        names file and frame if there is none.
        """
        if self._container is None or from_s < self._time_s:
            self._open(where)
        found = picture_frames(where, frames, self._shape)
        half_s = 0.5 / fps
        for index in range(frames):
            wanted_s = from_s + index / fps
            frame = self._next(wanted_s - half_s, where)
            if frame is None or frame.time >= wanted_s + half_s:
                there = "the file ends before" if frame is None else f"the next is at {frame.time}"
                raise CorruptDataError(
                    f"{where}: {self.path} has no frame at {wanted_s:.3f} s (frame {index} of the "
                    f"episode); {there}"
                )
            found[index] = self._pixels(frame, where)
        return found

    def _next(self, after_s: float, where: str) -> Any:
        from av.error import FFmpegError

        try:
            for frame in self._frames:
                self._time_s = float(frame.time or 0.0)
                if self._time_s >= after_s:
                    return frame
        except (FFmpegError, ValueError) as error:
            raise self._damaged(where, error) from error
        return None

    def _pixels(self, frame: Any, where: str) -> np.ndarray:
        self._check(frame.width, frame.height, where)
        return frame.to_ndarray(format="rgb24")[..., : self._shape[2]]

    def _check(self, width: int, height: int, where: str) -> None:
        if (height, width) != self._shape[:2]:
            raise CorruptDataError(
                f"{where}: {self.path} has {height}×{width} pixels; info.json says "
                f"{self._shape[0]}×{self._shape[1]}"
            )

    def _open(self, where: str) -> None:
        try:
            import av
            from av.error import FFmpegError
        except ModuleNotFoundError as error:
            raise lerobot.missing(error.name) from error
        self.close()
        try:
            self._container = av.open(str(self.path))
            stream = self._container.streams.video[0]
            self._check(stream.width, stream.height, where)
            self._frames = self._container.decode(stream)
        except (FFmpegError, IndexError, ValueError, OSError) as error:
            raise self._damaged(where, error) from error
        self._time_s = -1.0

    def _damaged(self, where: str, error: Exception) -> CorruptDataError:
        return CorruptDataError(f"{where}: {self.path} cannot be decoded: {error}")

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._container is not None:
            self._container.close()
            self._container = None
