"""What every importer provides, and how its arrays become an episode that is whole."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import msgspec
import numpy as np
from PIL import Image

from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, CorruptDataError

MAX_FRAMES = 1_000_000
"""Most frames that one episode of a foreign file may claim."""

Side = Annotated[int, msgspec.Meta(ge=1, le=4096)]
"""Of a picture, in pixels."""

_NAME_CHARACTERS = 200


class Dataset(Protocol):
    """Recorded episodes from elsewhere; a class with a typed `Config`, made from one, registered
    in the group `datasets`."""

    @property
    def tasks(self) -> frozenset[str]:
        """Of which tasks the episodes are, or may be. Raises ConfigError if there is none."""
        ...

    def episodes(self, limit: int | None = None) -> Iterator[list[Step]]:
        """Whole episodes, always the same in the same order: the final observation comes last.

        Their keys (stream, episode, index) depend on the source alone, so that what is imported
        twice is there once. Raises CorruptDataError that names file, episode and key before
        anything of a damaged episode is yielded.
        """
        ...


@dataclass
class Episode:
    """An episode as arrays. observation [T + 1, …]; action, reward, flags and policy_version of
    its T actions; t_ns [T + 1]. where: file and episode, for messages."""

    where: str
    stream: str
    number: int
    task: str
    observation: Mapping[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    t_ns: np.ndarray
    flags: Mapping[str, np.ndarray]
    policy_version: np.ndarray | None = None
    seed: int = -1
    _names: tuple[str, ...] = field(
        default=("terminated", "truncated", "success", "intervention", "held"), repr=False
    )

    def steps(self) -> list[Step]:
        """Its steps, checked. Raises CorruptDataError that names key and frame."""
        length = len(self.action)
        if not 1 <= length <= MAX_FRAMES:
            raise CorruptDataError(
                f"{self.where} has {length} actions; 1 to {MAX_FRAMES} and a final observation are "
                "right"
            )
        for key, array in self.observation.items():
            _check(self.where, key, array, length + 1)
        for key, array in (("action", self.action), ("reward", self.reward)):
            _check(self.where, key, array, length)
        if len(self.t_ns) != length + 1 or (np.diff(self.t_ns) < 0).any():
            raise CorruptDataError(f"{self.where}: its timestamps fall; rising ones are right")
        return [self._step(index, length) for index in range(length + 1)]

    def _step(self, index: int, length: int) -> Step:
        observation = {key: array[index] for key, array in self.observation.items()}
        if index == length:
            return Step(
                stream=self.stream,
                episode=self.number,
                index=index,
                observation=observation,
                action=np.zeros_like(self.action[0]),
                task=self.task,
                seed=self.seed,
                final=True,
                t_ns=int(self.t_ns[index]),
            )
        return Step(
            stream=self.stream,
            episode=self.number,
            index=index,
            observation=observation,
            action=self.action[index],
            reward=float(self.reward[index]),
            policy_version=-1 if self.policy_version is None else int(self.policy_version[index]),
            task=self.task,
            seed=self.seed,
            t_ns=int(self.t_ns[index]),
            **{name: bool(self.flags[name][index]) for name in self._names if name in self.flags},
        )


def _check(where: str, key: str, array: np.ndarray, length: int) -> None:
    if len(array) != length:
        raise CorruptDataError(f"{where}: '{key}' has {len(array)} frames; {length} are right")
    if array.dtype.kind == "f":
        finite = np.isfinite(array).reshape(length, -1).all(axis=1)
        if not finite.all():
            raise CorruptDataError(
                f"{where}: '{key}' of frame {int(np.argmin(finite))} is not finite; leave the "
                "episode out or mend it where it was recorded"
            )


def picture_frames(where: str, frames: int, shape: tuple[int, ...]) -> np.ndarray:
    """Room for pictures: uint8 [frames, *shape]. Raises ConfigError if there is too little RAM."""
    try:
        return np.empty((frames, *shape), np.uint8)
    except (MemoryError, ValueError):
        raise ConfigError(
            f"{where}: {frames} frames of {list(shape)} do not fit into memory; an episode is "
            "imported as a whole"
        ) from None


def fitted(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture [h, w, c] of 1 or 3 channels at another (height, width), uint8 [*size, c]: the
    largest window in its centre with these proportions, averaged over areas."""
    (height, width), channels = picture.shape[:2], picture.shape[2]
    scale = min(height / size[0], width / size[1])
    tall, wide = min(scale * size[0], height), min(scale * size[1], width)
    left, top = (width - wide) / 2, (height - tall) / 2
    image = Image.fromarray(picture if channels == 3 else picture[..., 0])
    box = (left, top, left + wide, top + tall)
    found = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BOX, box))
    return found.reshape(*size, channels)


def source_stream(name: str, *arrays: np.ndarray) -> str:
    """A stream's name for a source: readable, and told apart by arrays of its first episode.

    It stays the same when more episodes are recorded into the source.
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return f"{name[:_NAME_CHARACTERS]}-{digest.hexdigest()[:8]}"


def last_step(length: int) -> np.ndarray:
    """bool [length]: True at the last one."""
    return np.arange(length) == length - 1
