"""Buffers that read random batches of the same transitions, each filled when it is made."""

import importlib.util
import os
from pathlib import Path

import numpy as np

from benchmarks.buffer.data import BATCH, CAMERAS, HORIZON, STATE, Source, fields, record_bytes
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.samplers import WindowSampler, WindowSpec
from embodied.buffer.write.writer import ReplayWriter

_CHUNK = 64


def write_ours(path: Path, source: Source, count: int) -> None:
    """A buffer of ours with so many records."""
    with ReplayWriter(path) as writer:
        for i, step in enumerate(source.steps(count)):
            writer.append(step)
            if i % _CHUNK == _CHUNK - 1:
                writer.flush()


def write_memmaps(path: Path, source: Source, count: int) -> dict[str, np.ndarray]:
    """One np.memmap for each field, filled."""
    path.mkdir(parents=True)
    maps = {
        name: np.memmap(path / name, dtype, "w+", shape=(count, *shape))
        for name, (dtype, shape) in fields(source.side).items()
    }
    for start in range(0, count, _CHUNK):
        part = source.transitions(start, min(_CHUNK, count - start))
        for name, array in part.items():
            maps[name][start : start + len(array)] = array
    for array in maps.values():
        array.flush()
    return maps


class GatherLimit:
    """The limit: np.take of whole packed records out of one array in RAM, into an array."""

    name = "gather limit (np.take of packed records in RAM)"

    def __init__(self, path: Path, source: Source, count: int) -> None:
        size = record_bytes(source.side)
        rng = np.random.default_rng(1)
        self._records = np.empty((count, size), np.uint8)
        self._records[:] = rng.integers(0, 256, size, np.uint8)
        self._out = np.empty((BATCH, size), np.uint8)
        self._rng = rng

    def read(self) -> int:
        """One batch."""
        rows = self._rng.integers(len(self._records), size=BATCH)
        np.take(self._records, rows, axis=0, out=self._out, mode="clip")
        return BATCH


class Ours:
    """A draw of the sampler, fetched into the learner's arrays, as the learner's pipeline does."""

    name = "ours, into the learner's arrays"
    n_step = 0
    into = True

    def __init__(self, path: Path, source: Source, count: int) -> None:
        if not path.exists():
            write_ours(path, source, count)
        self.reader = ReplayReader(path)
        self.reader.refresh()
        spec = WindowSpec(1, HORIZON, (*CAMERAS, STATE), n_step=self.n_step)
        self.sampler = WindowSampler(self.reader, spec)
        sizes = self.sampler.batch_spec(BATCH)
        self._out = {name: np.empty(size.shape, size.dtype) for name, size in sizes.items()}
        self._rng = np.random.default_rng(2)

    def read(self) -> int:
        """One batch."""
        draw = self.sampler.draw(BATCH, self._rng)
        self.sampler.fetch(draw, self._out if self.into else None)
        return BATCH


class OursFresh(Ours):
    """The same into new arrays every time."""

    name = "ours, into new arrays"
    into = False


class OursNext(Ours):
    """With the observations after one step as well, as LeRobot's buffer always gives them."""

    name = "ours, next observations too"
    n_step = 1


class Memmap:
    """One np.memmap for each field, np.take of each into an array."""

    name = "np.memmap, one file a field"

    def __init__(self, path: Path, source: Source, count: int) -> None:
        maps = write_memmaps(path, source, count)
        self._maps = {name: np.asarray(array) for name, array in maps.items()}
        self._out = {n: np.empty((BATCH, *a.shape[1:]), a.dtype) for n, a in self._maps.items()}
        self._count = count
        self._rng = np.random.default_rng(3)

    def read(self) -> int:
        """One batch."""
        rows = self._rng.integers(self._count, size=BATCH)
        for name, array in self._maps.items():
            np.take(array, rows, axis=0, out=self._out[name], mode="clip")
        return BATCH


class TorchRL:
    """torchrl's replay buffer on LazyMemmapStorage, its own random sampler."""

    name = "torchrl LazyMemmapStorage"
    package = "torchrl"
    remark = "pip install torchrl"

    def __init__(self, path: Path, source: Source, count: int) -> None:
        os.environ.setdefault("RL_LOGGING_LEVEL", "ERROR")
        import torch
        from tensordict import TensorDict
        from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer

        storage = LazyMemmapStorage(count, scratch_dir=path)
        self._buffer = TensorDictReplayBuffer(storage=storage, batch_size=BATCH)
        for start in range(0, count, _CHUNK):
            part = source.transitions(start, min(_CHUNK, count - start))
            arrays = {name: torch.from_numpy(array) for name, array in part.items()}
            self._buffer.extend(TensorDict(arrays, batch_size=[len(part["reward"])]))

    def read(self) -> int:
        """One batch."""
        return len(self._buffer.sample())


class LeRobot:
    """lerobot's ReplayBuffer for RL, optimize_memory=True, no augmentation."""

    name = "lerobot ReplayBuffer (optimize_memory)"
    package = "lerobot"
    remark = "pip install lerobot==0.4.4"

    def __init__(self, path: Path, source: Source, count: int) -> None:
        import torch
        from lerobot.rl.buffer import ReplayBuffer

        keys = (*CAMERAS, STATE)
        self._buffer = ReplayBuffer(
            count,
            device="cpu",
            state_keys=keys,
            image_augmentation_function=lambda images: images,
            use_drq=False,
            optimize_memory=True,
        )
        for start in range(0, count, _CHUNK):
            part = source.transitions(start, min(_CHUNK, count - start))
            arrays = {name: torch.from_numpy(array) for name, array in part.items()}
            for i in range(len(arrays["reward"])):
                state = {key: arrays[key][i : i + 1] for key in keys}
                self._buffer.add(
                    state,
                    arrays["action"][i : i + 1],
                    float(arrays["reward"][i]),
                    state,
                    bool(arrays["done"][i]),
                    False,
                    {"version": float(arrays["version"][i])},
                )

    def read(self) -> int:
        """One batch."""
        return len(self._buffer.sample(BATCH)["reward"])


def is_installed(contender: type[TorchRL] | type[LeRobot]) -> bool:
    """Whether the contender's package is there."""
    return importlib.util.find_spec(contender.package) is not None
