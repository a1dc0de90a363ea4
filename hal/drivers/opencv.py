"""A camera by way of OpenCV: a V4L2 device, a stream's URL, or a video file."""

import importlib
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embodied.core.errors import ConfigError, DeviceLostError, MissingDependencyError
from embodied.core.specs import ArraySpec

_OPEN_S = 5.0
_JOIN_S = 2.0


class OpenCVConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """source: number or path of a device, URL of a stream, or path of a video file.

    width, height, fps: what is asked of a device; of streams and files, what they must be.
    fourcc: pixel format to ask for, "MJPG" for instance; None leaves the choice to the driver.
    timeout_s: how long to wait for a picture (5 s for the first).
    """

    source: int | str
    width: int = 640
    height: int = 480
    fps: int = 30
    fourcc: str | None = None
    timeout_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("width", "height", "fps", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"opencv.{name} is {getattr(self, name)}; it must be positive")
        if self.fourcc is not None and len(self.fourcc) != 4:
            raise ConfigError(f"opencv.fourcc is '{self.fourcc}'; it must have 4 characters")


class OpenCVCamera:
    """A camera that gives the newest picture there is; of a file, every picture.

    A thread of its own fetches pictures, because OpenCV may wait for one for ten seconds.
    """

    Config = OpenCVConfig

    def __init__(self, config: OpenCVConfig) -> None:
        shape = (config.height, config.width, 3)
        self.spec = ArraySpec(shape, "uint8", rate_hz=float(config.fps))
        self._config = config
        self._cv2: Any = None
        self._source: _Source | None = None

    def open(self) -> None:
        """Connect and wait for the first picture; its size must be as configured.

        Raises DeviceLostError if there is no picture in time, ConfigError if its size differs.
        """
        self.close()
        try:
            self._cv2 = importlib.import_module("cv2")
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"camera {self._config.source} needs the package 'opencv-python-headless'; "
                "pip install 'embodied-stack[camera]' brings it"
            ) from error
        self._source = _Source(self._config, self._cv2)
        try:
            found = self._source.newest(_first_s(self._config)).shape
            if found != self.spec.shape:
                raise ConfigError(
                    f"{self._source.name} gives pictures of {found[1]}x{found[0]}; "
                    f"{self._config.width}x{self._config.height} are configured"
                )
        except BaseException:
            self.close()
            raise

    def read(self) -> np.ndarray:
        """The next picture [height, width, 3], uint8, RGB.

        Raises DeviceLostError if none comes in time.
        """
        if self._source is None:
            raise DeviceLostError(f"camera {self._config.source} is not open: call open() first")
        picture = self._source.newest(self._config.timeout_s, take=True)
        return self._cv2.cvtColor(picture, self._cv2.COLOR_BGR2RGB)

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        source, self._source = self._source, None
        if source is not None:
            source.close()


class _Source:
    """The thread that fetches pictures, and the one picture that it has ready."""

    def __init__(self, config: OpenCVConfig, cv2: Any) -> None:
        self.name = f"camera {config.source}"
        self._config = config
        self._cv2 = cv2
        self._every_picture = isinstance(config.source, str) and Path(config.source).is_file()
        self._changed = threading.Condition()
        self._picture: np.ndarray | None = None
        self._fault = ""
        self._closing = False
        self._thread = threading.Thread(target=self._fetch, name=self.name, daemon=True)
        self._thread.start()

    def newest(self, timeout_s: float, *, take: bool = False) -> np.ndarray:
        """The picture that is ready, once there is one; `take` makes room for the next."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._picture is not None or bool(self._fault), timeout_s
            )
            picture = self._picture
            if picture is None:
                reason = self._fault or f"no picture within {timeout_s:g} s"
                raise DeviceLostError(f"{self.name}: {reason}; is it connected, and not in use?")
            if take:
                self._picture = None
                self._changed.notify_all()
            return picture

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_JOIN_S)

    def _fetch(self) -> None:
        fault = "cannot be opened"
        try:
            capture = self._capture()
            while capture.isOpened() and not self._closing:
                found, picture = capture.read()
                if not found or picture is None:
                    fault = "gives no more pictures"
                    break
                self._hand_over(picture)
            capture.release()
        except self._cv2.error as error:
            fault = str(error)
        with self._changed:
            self._fault = fault
            self._changed.notify_all()

    def _hand_over(self, picture: np.ndarray) -> None:
        with self._changed:
            if self._every_picture:
                self._changed.wait_for(lambda: self._picture is None or self._closing)
            self._picture = picture
            self._changed.notify_all()

    def _capture(self) -> Any:
        cv2, config = self._cv2, self._config
        if isinstance(config.source, int) or config.source.startswith("/dev/"):
            api = cv2.CAP_V4L2 if sys.platform == "linux" else cv2.CAP_ANY
            capture = cv2.VideoCapture(config.source, api)
            if config.fourcc is not None:
                capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter_fourcc(*config.fourcc))
            capture.set(cv2.CAP_PROP_FRAME_WIDTH, config.width)
            capture.set(cv2.CAP_PROP_FRAME_HEIGHT, config.height)
            capture.set(cv2.CAP_PROP_FPS, config.fps)
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            return capture
        open_ms, read_ms = (round(1000 * s) for s in (_first_s(config), config.timeout_s))
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, open_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, read_ms]
        return cv2.VideoCapture(config.source, cv2.CAP_FFMPEG, limits)


def _first_s(config: OpenCVConfig) -> float:
    return max(_OPEN_S, config.timeout_s)
