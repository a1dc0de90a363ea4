"""Episodes of an HDF5 file in robomimic's layout (Mandlekar et al. 2021): data/demo_k/…"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from embodied.buffer.interchange.dataset import MAX_FRAMES, Episode, last_step, source_stream
from embodied.buffer.steps.schema import MAX_STEP_BYTES
from embodied.comms.codec import DTYPES
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, CorruptDataError, MissingDependencyError

_DEMO = re.compile(r"demo_(\d{1,9})")
_GIGABYTES = 16


class RobomimicEpisodes:
    """Demonstrations of `data/demo_k`: `actions` [T, D], `obs/*` [T, …], and if there are any
    `next_obs/*`, `rewards` and `dones` [T].

    An observation `obs/K` is called "observation.K", a picture (uint8 [h, w, 3])
    "observation.images.K"; float64 becomes float32. The final observation is the last of
    `next_obs`; without that group the last frame of `obs`, whose action is dropped (`final:
    repeat` keeps it and repeats the frame). A step succeeded if its reward is at least 1, as
    robomimic's sparse rewards are. The last step is terminated if it is done and the episode
    succeeded, else truncated; `dones` before it are ignored, as robomimic trains on them too.
    """

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """path: the file. task: name of its task; None: its env_args' env_name. observation: keys
        of `obs` to take, and their names here; None: all. state: keys of `obs` that are joined to
        "observation.state", in this order. filter_key: take the episodes that mask/KEY lists.
        final: see above. fps: steps a second, for their times; None: as env_args has it, else 20.
        expert: whether all actions are an expert's. success: take every episode as successful."""

        path: str
        task: str | None = None
        observation: dict[str, str] | None = None
        state: tuple[str, ...] = ()
        filter_key: str | None = None
        final: Literal["last_frame", "repeat"] = "last_frame"
        fps: float | None = None
        expert: bool = True
        success: bool = False

    def __init__(self, config: Config) -> None:
        self._config = config
        self._path = Path(config.path)
        if not self._path.is_file():
            raise ConfigError(f"no file {self._path}")
        with self._open() as file:
            data = self._group(file, "data", "data")
            self._arguments = self._env_args(data)
            self._demos = self._numbers(file, data)

    def _open(self) -> Any:
        try:
            import h5py
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"HDF5 files need the package '{error.name}', which is not installed; "
                "pip install 'embodied-stack[data]' brings it"
            ) from error
        try:
            return h5py.File(self._path, "r")
        except OSError as error:
            raise CorruptDataError(f"{self._path} cannot be read as HDF5: {error}") from error

    def __len__(self) -> int:
        return len(self._demos)

    @property
    def tasks(self) -> frozenset[str]:
        """The configured task, or the file's environment. Raises ConfigError without either."""
        return frozenset({self._task})

    @property
    def _task(self) -> str:
        name = self._config.task or self._arguments.get("env_name")
        if not isinstance(name, str):
            raise ConfigError(f"{self._path} does not name its task; give task=…")
        return name

    def episodes(self, limit: int | None = None) -> Iterator[list[Step]]:
        """Demonstrations by their number."""
        with self._open() as file:
            data = file["data"]
            stream = ""
            for number in self._demos[:limit]:
                if not stream:
                    first = data[f"demo_{self._first}"]
                    actions = self._array(first, "actions", f"{self._path}, {first.name}")
                    stream = source_stream(self._path.resolve().stem, actions)
                yield self._episode(data[f"demo_{number}"], number, stream).steps()

    def _episode(self, demo: Any, number: int, stream: str) -> Episode:
        where = f"{self._path}, demo_{number}"
        action = self._array(demo, "actions", where)
        length = len(action)
        observation = self._observations(self._group(demo, "obs", where), f"{where}, obs", length)
        reward = self._optional(demo, "rewards", where, length)
        done = self._optional(demo, "dones", where, length) > 0
        if "next_obs" in demo:
            after = self._observations(demo["next_obs"], f"{where}, next_obs", length)
            if after.keys() != observation.keys():
                raise CorruptDataError(f"{where}: next_obs has other keys than obs")
            last = {key: array[-1:] for key, array in after.items()}
        elif self._config.final == "repeat":
            last = {key: array[-1:] for key, array in observation.items()}
        else:
            last = {}
            length -= 1
            done[max(length - 1, 0) :] |= done[-1]
        if last:
            observation = {k: np.concatenate([v, last[k]]) for k, v in observation.items()}
        at_end = last_step(length)
        success = (reward >= 1)[:length] | (at_end & self._config.success)
        terminated = at_end & done[:length] & bool(success.any())
        rate = self._config.fps or self._rate()
        return Episode(
            where=where,
            stream=stream,
            number=number,
            task=self._task,
            observation=observation,
            action=action[:length],
            reward=reward[:length],
            t_ns=np.round(np.arange(length + 1) * (1e9 / rate)).astype(np.int64),
            flags={
                "success": success,
                "terminated": terminated,
                "truncated": at_end & ~terminated,
                "intervention": np.full(length, self._config.expert),
            },
        )

    def _observations(self, group: Any, where: str, length: int) -> dict[str, np.ndarray]:
        names = self._config.observation
        wanted = list(group) if names is None else list(names)
        if unknown := sorted({*wanted, *self._config.state} - set(group)):
            raise ConfigError(f"{where} has no {', '.join(unknown)}; it has {', '.join(group)}")
        found: dict[str, np.ndarray] = {}
        for key in wanted:
            if key in self._config.state and names is None:
                continue
            array = self._array(group, key, where)
            picture = array.ndim == 4 and array.dtype == np.uint8
            default = f"observation.images.{key}" if picture else f"observation.{key}"
            found[default if names is None else names[key]] = array
        if self._config.state:
            parts = [self._array(group, key, where) for key in self._config.state]
            if any(len(part) != length for part in parts):
                raise CorruptDataError(f"{where}: keys of state differ in length")
            flat = [part.reshape(length, -1).astype(np.float32) for part in parts]
            found["observation.state"] = np.concatenate(flat, axis=1)
        for key, array in found.items():
            if len(array) != length:
                raise CorruptDataError(
                    f"{where}: '{key}' has {len(array)} frames; as many as actions ({length}) are "
                    "right"
                )
        return found

    def _array(self, group: Any, key: str, where: str) -> np.ndarray:
        """Read an array, of numbers only and bounded before memory is taken."""
        stored = group.get(key)
        shape, dtype = getattr(stored, "shape", None), getattr(stored, "dtype", None)
        if shape is None or dtype is None:
            raise CorruptDataError(f"{where}: no array '{key}'; it has {', '.join(group)}")
        item = math.prod(shape[1:]) * dtype.itemsize
        fits = shape and 1 <= shape[0] <= MAX_FRAMES and item <= MAX_STEP_BYTES
        if dtype.name not in DTYPES or not fits or item * shape[0] > _GIGABYTES << 30:
            raise CorruptDataError(
                f"{where}: '{key}' is {dtype} {list(shape)}; numbers [T, …] of at most "
                f"{_GIGABYTES} GiB are right"
            )
        try:
            array = np.asarray(stored[()])
        except OSError as error:
            raise CorruptDataError(f"{where}: '{key}' cannot be read: {error}") from error
        return array.astype(np.float32) if array.dtype == np.float64 else array

    def _optional(self, demo: Any, key: str, where: str, length: int) -> np.ndarray:
        """Numbers [T]; zeros where they are missing."""
        if key not in demo:
            return np.zeros(length, np.float32)
        array = self._array(demo, key, where).reshape(-1)
        if len(array) != length:
            raise CorruptDataError(f"{where}: {len(array)} {key} of {length} actions")
        return array.astype(np.float32)

    def _group(self, parent: Any, name: str, where: str) -> Any:
        found = parent.get(name)
        if found is None or not hasattr(found, "keys"):
            raise CorruptDataError(
                f"{self._path}: no group '{name}' in {where}; robomimic's layout is "
                "data/demo_k/{actions, obs/…}"
            )
        return found

    def _numbers(self, file: Any, data: Any) -> list[int]:
        """Numbers of the wanted demonstrations, in rising order."""
        numbers = {int(match[1]) for name in data if (match := _DEMO.fullmatch(name))}
        self._first = min(numbers, default=0)
        key = self._config.filter_key
        if key is not None:
            masks = file.get("mask", {})
            if key not in masks:
                raise ConfigError(
                    f"{self._path} has no filter key '{key}'; it has {', '.join(masks) or 'none'}"
                )
            names = [name.decode(errors="replace") for name in np.asarray(masks[key]).tolist()]
            listed = {int(match[1]) for name in names if (match := _DEMO.fullmatch(name))}
            numbers &= listed
        if not numbers:
            raise CorruptDataError(f"{self._path}: no demonstrations data/demo_k")
        return sorted(numbers)

    def _env_args(self, data: Any) -> dict[str, Any]:
        text = data.attrs.get("env_args", "{}")
        try:
            found = json.loads(text)
        except (TypeError, ValueError, RecursionError):
            raise CorruptDataError(f"{self._path}: attribute env_args of data is no JSON") from None
        return found if isinstance(found, dict) else {}

    def _rate(self) -> float:
        arguments = self._arguments.get("env_kwargs")
        rate = arguments.get("control_freq") if isinstance(arguments, dict) else None
        return float(rate) if isinstance(rate, (int, float)) and rate > 0 else 20.0
