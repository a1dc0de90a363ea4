"""Software OpenGL for MuJoCo: which backend to use, and pictures from named cameras."""

import copy
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from embodied.core.errors import DeviceLostError, MissingDependencyError
from embodied.core.registry import unknown

_BACKENDS = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}
_INSTALL = "apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri"


def choose_backend() -> str:
    """Set MUJOCO_GL before MuJoCo is imported, unless the user has; return what is in force.

    EGL where its library loads, else OSMesa, else "disable": everything but pictures works.
    """
    if "MUJOCO_GL" not in os.environ:
        found = (name for name, library in _BACKENDS.items() if _loads(library))
        os.environ["MUJOCO_GL"] = next(found, "disable")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    return os.environ["MUJOCO_GL"]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


class Cameras:
    """Pictures of one MuJoCo model.

    Shadows, reflections and multisampling cost most of a frame's time in software; shadows=False
    turns them off in the model itself, so collection and evaluation must agree on it. shadows=True
    leaves the model as it is.
    """

    def __init__(self, model: Any, *, shadows: bool) -> None:
        self._model = model
        self._renderers: dict[tuple[int, int], Any] = {}
        self._stills: Cameras | None = None
        self._drawing = threading.Lock()
        self._closed = False
        if not shadows:
            model.light_castshadow[:] = 0
            model.mat_reflectance[:] = 0
            model.vis.quality.offsamples = 0

    def names(self) -> list[str]:
        """Cameras that the model defines."""
        return [self._model.camera(i).name for i in range(self._model.ncam)]

    def check(self, camera: str) -> None:
        """Raise ConfigError, with the nearest match, unless the model has this camera."""
        if camera not in self.names():
            raise unknown("camera", camera, self.names())

    def render(self, data: Any, camera: str, width: int, height: int) -> np.ndarray:
        """Picture [height, width, 3], uint8."""
        return self._renderer(data, camera, width, height).render()

    def snapshot(self, data: Any, camera: str, width: int, height: int) -> Callable[[], np.ndarray]:
        """Keep the scene as it is; what is returned draws it while `data` goes on.

        Always call that from the same thread: OpenGL contexts belong to one.
        """
        still = copy.copy(data)

        def picture() -> np.ndarray:
            with self._drawing:
                if self._closed:
                    raise DeviceLostError("the simulator was closed before its picture was drawn")
                self._stills = self._stills or Cameras(self._model, shadows=True)
                return self._stills.render(still, camera, width, height)

        return picture

    def _renderer(self, data: Any, camera: str, width: int, height: int) -> Any:
        size = (width, height)
        if size not in self._renderers:
            self._renderers[size] = self._make(width, height)
        renderer = self._renderers[size]
        renderer.update_scene(data, camera)
        return renderer

    def _make(self, width: int, height: int) -> Any:
        import mujoco

        if os.environ.get("MUJOCO_GL") == "disable":
            raise MissingDependencyError(
                "rendering needs OpenGL, and neither libEGL.so.1 nor libOSMesa.so.8 loads. "
                f"Install it with: {_INSTALL}"
            )
        self._model.vis.global_.offwidth = max(self._model.vis.global_.offwidth, width)
        self._model.vis.global_.offheight = max(self._model.vis.global_.offheight, height)
        try:
            return mujoco.Renderer(self._model, height, width)
        except (ImportError, RuntimeError, AttributeError) as error:
            raise MissingDependencyError(
                f"OpenGL backend '{os.environ.get('MUJOCO_GL')}' failed ({error}). "
                f"Install it with: {_INSTALL}"
            ) from error

    def close(self) -> None:
        """Free the OpenGL contexts."""
        with self._drawing:
            self._closed = True
            if self._stills is not None:
                self._stills.close()
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()


def main() -> None:
    """Say which OpenGL backend will render, or how to install one (python -m sim.rendering)."""
    missing = [name for name in ("libGL.so.1", "libgthread-2.0.so.0") if not _loads(name)]
    if missing:
        sys.stdout.write(
            f"PushT needs {' and '.join(missing)}, all else runs without. "
            "Install with: apt-get install -y libgl1 libglib2.0-0\n"
        )
    backend = choose_backend()
    if backend == "disable":
        sys.stdout.write(
            "No OpenGL library: everything runs but pictures and videos. "
            f"Install it with: {_INSTALL}\n"
        )
    else:
        sys.stdout.write(f"Pictures are rendered with {backend}.\n")


if __name__ == "__main__":
    main()
