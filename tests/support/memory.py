"""A replay's reader in memory, in plain Python: what samplers are tested with."""

import random

import numpy as np

from embodied.buffer.read.episodes import EpisodeInfo
from embodied.buffer.read.gather import DamagedRowsError
from embodied.buffer.steps.schema import Feature
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError

_DTYPES = {"reward": "float32", "policy_version": "int64", "t_ns": "int64"}


class MemoryReader:
    """Steps by opaque row ids; those of removed episodes are given to other steps."""

    def __init__(self, seed=0):
        self._random = random.Random(seed)
        self._steps: dict[int, Step] = {}
        self._free: list[int] = []
        self._rows: dict[tuple[str, int], list[int]] = {}
        self._closed: list[EpisodeInfo] = []
        self._removed: list[tuple[str, int]] = []
        self.damaged: set[tuple[str, int]] = set()
        self.prefetched: list[tuple[tuple[str, ...], np.ndarray]] = []
        self.taken = 0

    def add(self, step):
        if not self._free:
            count = len(self._steps)
            self._free = [row * 1000 + 17 for row in range(count, count + 64)]
        row = self._free.pop(self._random.randrange(len(self._free)))
        self._steps[row] = step
        rows = self._rows.setdefault((step.stream, step.episode), [])
        rows.append(row)
        if step.final:
            self._closed.append(self._info(rows))

    def _info(self, rows):
        steps = [self._steps[row] for row in rows[:-1]]
        final = self._steps[rows[-1]]
        versions = [s.policy_version for s in steps] or [-1]
        return EpisodeInfo(
            stream=final.stream,
            episode=final.episode,
            task=final.task,
            seed=final.seed,
            rows=np.array(rows[:-1], np.int64),
            final_row=rows[-1],
            closed=True,
            success=any(s.success for s in steps),
            interventions=sum(s.intervention for s in steps),
            policy_versions=(min(versions), max(versions)),
        )

    def remove(self, stream, episode):
        self._free += self._rows.pop((stream, episode))
        self._removed.append((stream, episode))

    def closed_episodes(self, since=0):
        return self._closed[since:]

    def removed_episodes(self, since=0):
        return self._removed[since:]

    def feature(self, name):
        for step in self._steps.values():
            array = {**step.observation, "action": step.action}.get(name)
            if array is not None:
                return Feature(name, array.dtype.name, array.shape)
        raise ConfigError(f"'{name}' is not recorded")

    def take(self, name, rows):
        return self.gather((name,), rows)[name]

    def gather(self, names, rows, out=None):
        flat = np.asarray(rows).ravel().tolist()
        self.taken += len(flat)
        steps = [self._steps[row] for row in flat]
        keys = {(s.stream, s.episode) for s in steps} & self.damaged
        if keys and any("image" in name for name in names):
            for key in keys:
                self.damaged.discard(key)
                self.remove(*key)
            raise DamagedRowsError("damaged", [])
        found = {}
        for name in names:
            if name == "action" or name.startswith("observation"):
                feature = self.feature(name)
                dtype, shape = feature.dtype, feature.shape
                values = [s.action if name == "action" else s.observation[name] for s in steps]
            else:
                dtype, shape = _DTYPES.get(name, "bool"), ()
                values = [getattr(s, name) for s in steps]
            array = np.array(values, dtype).reshape(*np.shape(rows), *shape)
            if out is None:
                found[name] = array
            else:
                assert out[name].dtype == dtype and out[name].flags.c_contiguous
                out[name][...] = array
                found[name] = out[name]
        return found

    def prefetch(self, names, rows):
        self.prefetched.append((tuple(names), rows))
