"""Batches of windows: what they consist of, and reading them once they have been drawn.

Legend: B batch, To history, H horizon, D action, n steps of a backup, S later steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from embodied.buffer.read.episodes import EpisodeInfo
from embodied.buffer.read.gather import DamagedRowsError
from embodied.buffer.sample.returns import reward_column, rewards_of
from embodied.buffer.sample.windows import (
    EPISODE_SUCCESS,
    FUTURE,
    FUTURE_IS_PAD,
    NEXT,
    RETURN_TO_GO,
    Backup,
    Windows,
    WindowSpec,
)
from embodied.buffer.steps.schema import Feature
from embodied.core.errors import ConfigError, EmbodiedError
from embodied.core.instructions import GOAL, TASK

Arrays = dict[str, np.ndarray]

_AHEAD = ("action", "reward", "terminated", "truncated")
_FLOAT32, _BOOL, _INT64 = np.dtype(np.float32), np.dtype(np.bool_), np.dtype(np.int64)
_UINT8 = np.dtype(np.uint8)
_METADATA = {"policy_version": _INT64, "t_ns": _INT64}


class StaleDrawError(EmbodiedError):
    """Episodes of which steps were drawn have been removed since: draw again."""


DRAW_AGAIN = (DamagedRowsError, StaleDrawError)
"""What fetch raises where another draw will do."""


class StepReader(Protocol):
    """What a sampler needs of a reader; ReplayReader has it.

    Row ids are opaque int64, good until the episode is removed; it never closes again then.
    """

    def feature(self, name: str) -> Feature:
        """dtype and shape of an observation key or "action"; ConfigError if there is none."""
        ...

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Values of a column, [*rows.shape, *shape]."""
        ...

    def gather(
        self, names: Sequence[str], rows: np.ndarray, out: Mapping[str, np.ndarray] | None = None
    ) -> Arrays:
        """Values of several columns, written into out if there is one. Raises DamagedRowsError
        for steps that cannot be read; their episodes are removed then."""
        ...

    def prefetch(self, names: Sequence[str], rows: np.ndarray) -> None:
        """Start reading; returns at once."""
        ...

    def closed_episodes(self, since: int = 0) -> list[EpisodeInfo]:
        """Closed episodes in the order in which they closed, without the first `since`."""
        ...

    def removed_episodes(self, since: int = 0) -> list[tuple[str, int]]:
        """(stream, episode) of those removed, in order, without the first `since`."""
        ...


class ArraySize(NamedTuple):
    """dtype and shape of one array of a batch."""

    dtype: np.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Draw:
    """A batch drawn but not read. numbers: the steps' own, for update, int64 [B]. rows: where its
    data are. weights: importance weights, float32 [B], None without. removed: how many episodes
    had been removed when it was drawn. It stays valid until one of its own episodes is removed."""

    numbers: np.ndarray
    rows: Windows
    weights: np.ndarray | None
    removed: int

    def __len__(self) -> int:
        return len(self.numbers)


def window_sizes(reader: StepReader, spec: WindowSpec, *, weighted: bool) -> dict[str, ArraySize]:
    """dtype and shape of one sample's arrays by name, in the batch's order. weighted: with
    importance weights. Raises ConfigError if a key is not recorded, or nothing is yet."""
    observations: dict[str, ArraySize] = {}
    for key in spec.observation_keys:
        feature = reader.feature(key)
        observations[key] = ArraySize(np.dtype(feature.dtype), (spec.n_obs_steps, *feature.shape))
    action, ahead = reader.feature("action"), (spec.horizon,)
    observations |= {GOAL + key: observations[key] for key in spec.goal_keys}
    if spec.task_bytes:
        observations[TASK] = ArraySize(_UINT8, (spec.n_obs_steps, spec.task_bytes))
    sizes = dict(observations)
    sizes["action"] = ArraySize(np.dtype(action.dtype), (*ahead, *action.shape))
    sizes["action_is_pad"] = ArraySize(_BOOL, ahead)
    sizes["reward"] = ArraySize(_FLOAT32, ahead)
    sizes |= {name: ArraySize(_BOOL, ahead) for name in ("terminated", "truncated")}
    if spec.n_step:
        sizes |= {name: ArraySize(_FLOAT32, ()) for name in ("return", "discount")}
        sizes |= {NEXT + key: size for key, size in observations.items()}
    if spec.return_to_go:
        sizes[RETURN_TO_GO] = ArraySize(_FLOAT32, ())
    if spec.episode_success:
        sizes[EPISODE_SUCCESS] = ArraySize(_BOOL, ())
    if spec.future:
        for key in spec.future_keys:
            feature = reader.feature(key)
            shape = (len(spec.future), *feature.shape)
            sizes[FUTURE + key] = ArraySize(np.dtype(feature.dtype), shape)
        sizes[FUTURE_IS_PAD] = ArraySize(_BOOL, (len(spec.future),))
    sizes |= {name: ArraySize(_METADATA.get(name, _BOOL), ()) for name in spec.metadata}
    if weighted:
        sizes["weight"] = ArraySize(_FLOAT32, ())
    return sizes


def prefetch_windows(reader: StepReader, spec: WindowSpec, draw: Draw) -> None:
    """Start reading the observations of a draw; returns at once."""
    parts = [draw.rows.observed]
    if draw.rows.backup is not None:
        parts.append(draw.rows.backup.observed)
    reader.prefetch(spec.observation_keys, np.concatenate([part.ravel() for part in parts]))
    if spec.goal_keys:
        reader.prefetch(spec.goal_keys, draw.rows.last)
    if spec.future:
        reader.prefetch(spec.future_keys, draw.rows.later.ravel())


def fetch_windows(reader: StepReader, spec: WindowSpec, draw: Draw, batch: Arrays) -> None:
    """Read a draw into the arrays of a batch, which have the sizes of window_sizes."""
    rows, keys = draw.rows, spec.observation_keys
    reader.gather(keys, rows.observed, {key: batch[key] for key in keys})
    if spec.goal_keys:
        _fetch_goals(reader, spec, rows.last, batch)
    if spec.future:
        later = {key: batch[FUTURE + key] for key in spec.future_keys}
        reader.gather(spec.future_keys, rows.later, later)
        batch[FUTURE_IS_PAD][...] = rows.past_end
    ahead, pad = {name: batch[name] for name in _AHEAD}, batch["action_is_pad"]
    reader.gather((*_AHEAD, "held"), rows.future, {**ahead, "held": pad})
    np.logical_or(pad, rows.beyond, out=pad)
    np.logical_or(pad, ~rows.selected, out=pad)
    if spec.rewards != "recorded":
        batch["reward"][...] = rewards_of(spec, reader.gather(("success",), rows.future))
    np.copyto(batch["reward"], np.float32(0), where=rows.beyond)
    if rows.backup is not None:
        _fetch_backup(reader, spec, rows.backup, batch)
    if rows.returns is not None:
        batch[RETURN_TO_GO][...] = rows.returns
    if spec.episode_success:
        batch[EPISODE_SUCCESS][...] = rows.successes
    if spec.metadata:
        metadata = {name: batch[name] for name in spec.metadata}
        reader.gather(spec.metadata, rows.observed[:, -1], metadata)
    if draw.weights is not None:
        batch["weight"][...] = draw.weights


def _fetch_goals(reader: StepReader, spec: WindowSpec, last: np.ndarray, batch: Arrays) -> None:
    at = np.repeat(last[:, None], spec.n_obs_steps, axis=1)
    reader.gather(spec.goal_keys, at, {key: batch[GOAL + key] for key in spec.goal_keys})
    for key in spec.goal_keys if spec.n_step else ():
        batch[NEXT + GOAL + key][...] = batch[GOAL + key]


def _fetch_backup(reader: StepReader, spec: WindowSpec, backup: Backup, batch: Arrays) -> None:
    keys = spec.observation_keys
    reader.gather(keys, backup.observed, {key: batch[NEXT + key] for key in keys})
    found = reader.gather((reward_column(spec), "terminated"), backup.rows)
    rewards = np.where(backup.beyond, 0.0, rewards_of(spec, found))
    returns = rewards @ spec.discount ** np.arange(spec.n_step)
    # Behind the end the last step is repeated, which is one of the m steps.
    terminated = found["terminated"].any(axis=1)
    discount = spec.discount**backup.taken
    if spec.rewards == "cost":
        failed = terminated & ~found["success"].any(axis=1)
        returns -= np.where(failed, discount / (1 - spec.discount), 0.0)
    batch["return"][...] = returns
    batch["discount"][...] = np.where(terminated, 0.0, discount)


def batch_arrays(sizes: Mapping[str, ArraySize], out: Mapping[str, np.ndarray] | None) -> Arrays:
    """Arrays of these sizes: new ones, or those of out. Raises ConfigError if one of out is
    missing or has another dtype or shape."""
    if out is None:
        return {name: np.empty(size.shape, size.dtype) for name, size in sizes.items()}
    for name, size in sizes.items():
        found = out.get(name)
        if found is None or (found.dtype, found.shape) != size:
            there = "missing" if found is None else f"{found.dtype} {found.shape}"
            raise ConfigError(f"out['{name}'] is {there}; {size.dtype} {size.shape} is right")
    return {name: out[name] for name in sizes}
