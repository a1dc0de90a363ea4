"""A folder of videos as episodes of pictures in which nobody knows what was done."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from embodied.buffer.interchange.dataset import Episode, Side, fitted, last_step, source_stream
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, CorruptDataError, MissingDependencyError

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

_MAX_SIDE = 1 << 13
_MAX_BYTES = 1 << 32
_ROUNDING_S = 1e-6


class VideoFolder:
    """Video files, in folders of folders or not: one file is one episode of one camera.

    The picture of tick k is the frame whose time is nearest to k / hz after the first one's: of a
    slower video some frames come twice, of a faster one some not at all. It is turned as the file
    says, and the largest window in its centre with the wanted proportions is made `image_size`.
    The last picture is the final observation. Each step's action is a single 0, marked as held, so
    that it is no label.
    """

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """path: the folder. key: of the pictures, such as observation.images.top. image_size:
        [height, width] of that camera. hz: the robot's control rate. task: name to give to the
        episodes; None: the folder's."""

        path: str
        key: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
        image_size: tuple[Side, Side]
        hz: Annotated[float, msgspec.Meta(gt=0, le=1000)]
        task: str | None = None

    def __init__(self, config: Config) -> None:
        self._config = config
        self._root = Path(config.path)
        if not self._root.is_dir():
            raise ConfigError(f"no folder {self._root}")
        self._files = sorted(
            path
            for path in self._root.rglob("*")
            if path.suffix.lower() in SUFFIXES and path.is_file() and path.name[0] != "."
        )
        if not self._files:
            raise ConfigError(f"{self._root} holds no video file ({' '.join(SUFFIXES)})")
        self._task = config.task or self._root.resolve().name
        self.tasks = frozenset({self._task})

    def __len__(self) -> int:
        return len(self._files)

    def episodes(self, limit: int | None = None) -> Iterator[list[Step]]:
        """One episode for each file, by the files' names."""
        for path in self._files[:limit]:
            yield self._episode(path).steps()

    def _episode(self, path: Path) -> Episode:
        pictures = np.stack(list(_pictures(path, self._config.image_size, self._config.hz)))
        length = len(pictures) - 1
        name = str(path.relative_to(self._root)).encode(errors="replace")
        origin = np.frombuffer(name, np.uint8), np.array([self._config.hz])
        return Episode(
            where=str(path),
            stream=source_stream(
                f"{self._root.resolve().name}/{name.decode()}", *origin, pictures[0]
            ),
            number=0,
            task=self._task,
            observation={self._config.key: pictures},
            action=np.zeros((length, 1), np.float32),
            reward=np.zeros(length, np.float32),
            t_ns=np.round(np.arange(length + 1) * (1e9 / self._config.hz)).astype(np.int64),
            flags={"truncated": last_step(length), "held": np.ones(length, np.bool_)},
        )


def _pictures(path: Path, size: tuple[int, int], hz: float) -> Iterator[np.ndarray]:
    """The picture of each tick, uint8 [*size, 3]. Raises CorruptDataError that names the file."""
    tick = 0
    for frame, until_s in _shown(path):
        while tick / hz <= until_s + _ROUNDING_S:
            if tick * 3 * size[0] * size[1] > _MAX_BYTES:
                raise ConfigError(
                    f"{path}: its pictures at {hz} Hz take more than {_MAX_BYTES >> 30} GiB, and "
                    "an episode is imported as a whole; cut it into several files"
                )
            yield fitted(_upright(frame), size)
            tick += 1
    if tick < 2:
        raise CorruptDataError(
            f"{path} gives {tick} pictures at {hz} Hz; an episode needs 2 at least: leave it out"
        )


def _shown(path: Path) -> Iterator[tuple[Any, float]]:
    """Each frame, and until when, since the first one, its time is the nearest."""
    previous: Any = None
    start_s = half_s = 0.0
    for frame in _frames(path):
        if previous is None:
            start_s = frame.time
        else:
            half_s = (frame.time - previous.time) / 2
            yield previous, previous.time - start_s + half_s
        previous = frame
    if previous is not None:
        yield previous, previous.time - start_s + half_s


def _frames(path: Path) -> Iterator[Any]:
    """Decoded frames in their order, whose times rise."""
    try:
        import av
        from av.error import FFmpegError
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"videos need the package '{error.name}', which is not installed; "
            "pip install 'embodied-stack[lerobot]' brings it"
        ) from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it holds no pictures")
            time_s = -np.inf
            for frame in container.decode(container.streams.video[0]):
                if max(frame.width, frame.height) > _MAX_SIDE:
                    raise ValueError(f"a frame has {frame.width}×{frame.height} pixels")
                if frame.time is None or frame.time <= time_s:
                    raise ValueError(f"a frame's time is {frame.time} s, after {time_s} s")
                time_s = frame.time
                yield frame
    except (FFmpegError, ValueError, OSError) as error:
        raise CorruptDataError(f"{path} cannot be decoded: {error}") from error


def _upright(frame: Any) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
