"""The PushT demonstrations by people, published with Diffusion Policy (Chi et al. 2023)."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.frames import Observation
from sim.pusht import block_features

_MAX_STEPS = 1_000_000
_MAX_VALUES = 20 * _MAX_STEPS
_PICTURES_AT_ONCE = 512


class PushTDemonstrations:
    """Episodes of 10 Hz steps from an `.npz` (state only) or `.zarr.zip` (with images) file.

    Recorded without rewards: every action counts as an expert's, success is not judged, and
    the last recorded observation ends each episode as truncated.
    """

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """path: the file; docs/data.md says where it is published. images: observe the camera."""

        path: str
        images: bool = False

    tasks = frozenset({"pusht"})

    def __init__(self, config: Config) -> None:
        self._path = Path(config.path)
        self._images = config.images
        if not self._path.exists():
            raise ConfigError(
                f"demonstrations.dataset.path: no file {self._path}. "
                "docs/data.md says where the PushT demonstrations are published."
            )
        if config.images and self._path.suffix != ".zip":
            raise ConfigError(f"{self._path.name} holds no images; give the .zarr.zip file")
        arrays = self._read_zarr() if self._path.suffix == ".zip" else self._read_npz()
        self._state, self._action, self._ends, self._img = arrays
        self._check()

    def __len__(self) -> int:
        return len(self._ends)

    def episodes(self, limit: int | None = None) -> Iterator[list[Step]]:
        """Episodes in their published order, each a list of steps with the final observation."""
        first = 0
        for number, end in enumerate(self._ends[:limit].tolist()):
            yield self._episode(number, first, end)
            first = end

    def _episode(self, number: int, first: int, end: int) -> list[Step]:
        steps: list[Step] = []
        for row in range(first, end):
            final = row == end - 1
            steps.append(
                Step(
                    stream="pusht_human",
                    episode=number,
                    index=row - first,
                    observation=self._observation(row),
                    action=self._action[row],
                    truncated=row == end - 2,
                    intervention=True,
                    task="pusht",
                    final=final,
                )
            )
        return steps

    def _observation(self, row: int) -> Observation:
        agent_x, agent_y, block_x, block_y, angle_rad = self._state[row]
        angle_rad = np.arctan2(np.sin(angle_rad), np.cos(angle_rad))
        observation = {
            "observation.state": np.array([agent_x, agent_y], np.float32),
            "observation.environment_state": block_features(block_x, block_y, angle_rad),
        }
        if self._img is not None:
            observation["observation.images.top"] = np.asarray(self._img[row]).astype(np.uint8)
        return observation

    def _read_npz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, None]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                if sum(member.file_size for member in archive.infolist()) > 8 * _MAX_VALUES:
                    raise ValueError(f"it unpacks to more than {8 * _MAX_VALUES} bytes")
            with np.load(self._path, allow_pickle=False) as data:
                return data["state"], data["action"], data["episode_ends"], None
        except (KeyError, ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
            raise self._damaged(error) from error

    def _read_zarr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        import zarr
        from zarr.storage import ZipStore

        try:
            with ZipStore(self._path, mode="r") as store:
                root = zarr.open_group(store, mode="r")
                keys = ("data/state", "data/action", "meta/episode_ends")
                found = (_numbers(root[key], _MAX_VALUES) for key in keys)
                state, action, ends = (np.asarray(stored) for stored in found)
                images = _pictures(root["data/img"]) if self._images else None
                return state, action, ends, images
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise self._damaged(error) from error

    def _check(self) -> None:
        steps = len(self._state)
        ends = self._ends
        whole = (
            self._state.shape == (steps, 5)
            and self._action.shape == (steps, 2)
            and 0 < len(ends) <= steps <= _MAX_STEPS
            and ends[-1] == steps
            and bool((np.diff(ends, prepend=0) > 1).all())
            and bool(np.isfinite(self._state).all() and np.isfinite(self._action).all())
        )
        if not whole:
            raise CorruptDataError(
                f"{self._path}: state {self._state.shape}, action {self._action.shape} and "
                f"{len(ends)} episode ends do not fit; [N, 5], [N, 2] and ends rising to N do"
            )
        self._action = self._action.astype(np.float32)

    def _damaged(self, error: Exception) -> CorruptDataError:
        return CorruptDataError(
            f"{self._path} cannot be read as PushT demonstrations "
            f"({type(error).__name__}: {error}); fetch it again (docs/data.md)"
        )


def _numbers(stored: Any, most: int) -> Any:
    """A zarr array, of numbers only and bounded before memory is taken."""
    if stored.dtype.kind not in "fiu" or stored.size > most:
        raise ValueError(f"{stored.name} is {stored.dtype} {stored.shape}")
    return stored


def _pictures(stored: Any) -> np.ndarray:
    """Read pictures, which are stored as floats, a few at a time."""
    pictures = np.empty(_numbers(stored, 200 * _MAX_VALUES).shape, np.uint8)
    for first in range(0, len(pictures), _PICTURES_AT_ONCE):
        part = slice(first, first + _PICTURES_AT_ONCE)
        pictures[part] = stored[part]
    return pictures
