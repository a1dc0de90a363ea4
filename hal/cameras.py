"""Cameras beside a robot: each read by a thread at its own rate, the newest picture in a frame."""

import threading
import time
from collections.abc import Mapping

import msgspec
import numpy as np

from embodied.core.errors import DeviceLostError
from embodied.core.processes import run_normally
from embodied.core.protocols import Camera
from embodied.core.specs import DeviceSpec
from hal.health import RateMeter

_RETRY_S = 1.0


def picture_key(camera: str) -> str:
    """Key of a camera's observation."""
    return f"observation.images.{camera}"


class Cameras:
    """The cameras of one device, by name. A camera that fails keeps its last picture and its
    time, so that its age tells; it is opened again until it answers."""

    def __init__(self, cameras: Mapping[str, Camera]) -> None:
        self._feeds = {picture_key(name): _Feed(name, camera) for name, camera in cameras.items()}

    def __bool__(self) -> bool:
        return bool(self._feeds)

    def extend(self, spec: DeviceSpec) -> DeviceSpec:
        """The device's spec with the pictures among its observations."""
        if not self._feeds:
            return spec
        pictures = {key: feed.camera.spec for key, feed in self._feeds.items()}
        return msgspec.structs.replace(spec, observation={**spec.observation, **pictures})

    def open(self) -> None:
        """Connect all; each must deliver a first picture."""
        for feed in self._feeds.values():
            feed.open()

    def latest(self) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """Newest pictures and when each was taken (monotonic ns)."""
        newest = {key: feed.newest for key, feed in self._feeds.items()}
        return {k: p for k, (p, _) in newest.items()}, {k: t for k, (_, t) in newest.items()}

    def rates_hz(self) -> dict[str, float]:
        """Pictures per second of each camera."""
        return {key: feed.rate.per_second() for key, feed in self._feeds.items()}

    def close(self) -> None:
        """Disconnect all."""
        for feed in self._feeds.values():
            feed.close()


class _Feed:
    def __init__(self, name: str, camera: Camera) -> None:
        self.camera = camera
        self.rate = RateMeter()
        self.newest: tuple[np.ndarray, int] = (np.zeros(camera.spec.shape, np.uint8), 0)
        self._name = name
        self._closing = False
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        self.camera.open()
        self._read()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"camera {self._name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        if self._thread is not None:
            self._thread.join(timeout=2.0)
            self._thread = None
            self.camera.close()

    def _read(self) -> None:
        picture = self.camera.read()
        if picture.shape != self.camera.spec.shape or picture.dtype != np.uint8:
            raise DeviceLostError(
                f"camera '{self._name}' gave {picture.dtype}{picture.shape}; "
                f"uint8{self.camera.spec.shape} was declared"
            )
        self.newest = picture, time.monotonic_ns()
        self.rate.count()

    def _run(self) -> None:
        run_normally()
        while not self._closing:
            try:
                self._read()
            except Exception:  # noqa: BLE001 - whatever a third party's camera raises
                self.camera.close()
                time.sleep(_RETRY_S)
                try:
                    self.camera.open()
                except Exception:  # noqa: BLE001
                    continue
