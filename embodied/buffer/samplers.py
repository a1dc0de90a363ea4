"""Samplers: batches of windows drawn from a replay."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np

from embodied.buffer.replay import EpisodeInfo, ReplayReader
from embodied.buffer.statistics import FeatureStats, feature_stats
from embodied.buffer.windows import WindowIndex, WindowSpec
from embodied.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StepFlags:
    """Columns of one episode's steps [L], in order of index."""

    intervention: np.ndarray
    held: np.ndarray
    success: np.ndarray
    reward: np.ndarray
    policy_version: np.ndarray


Select = Callable[[EpisodeInfo, StepFlags], np.ndarray]
"""Which steps of a closed episode to learn from: bool [L]. Asked once, when it closes."""


def select_all(episode: EpisodeInfo, flags: StepFlags) -> np.ndarray:
    """Every step."""
    return np.ones(len(episode.rows), np.bool_)


class WindowSampler:
    """Draws windows around selected steps of closed episodes, uniformly, with replacement."""

    def __init__(self, reader: ReplayReader, spec: WindowSpec, select: Select = select_all) -> None:
        self._reader = reader
        self._spec = spec
        self._select = select
        self._index = WindowIndex()
        self._num_episodes = 0
        self.refresh()

    @property
    def num_candidates(self) -> int:
        """Steps that can be drawn."""
        return len(self._index.candidates)

    def refresh(self) -> int:
        """Take over episodes that closed since the last call; returns how many.

        It does not refresh the reader: call that before.
        """
        new = self._reader.closed_episodes(self._num_episodes)
        columns = self._reader.columns
        for episode in new:
            if columns is None:
                raise ConfigError("the reader has closed episodes but no columns")
            self._check_keys(self._spec.observation_keys)
            flags = StepFlags(*(columns[field.name][episode.rows] for field in fields(StepFlags)))
            selected = np.asarray(self._select(episode, flags))
            if selected.dtype != np.bool_ or selected.shape != episode.rows.shape:
                raise ConfigError(
                    f"select returned {selected.dtype} {selected.shape} for an episode of "
                    f"{len(episode.rows)} steps; a bool for each step is right"
                )
            self._index.add(episode.rows, selected)
            self._num_episodes += 1
        return len(new)

    def _check_keys(self, keys: Iterable[str]) -> None:
        schema = self._reader.schema
        known = {feature.name for feature in schema.observation} if schema else set()
        if missing := set(keys) - known:
            raise ConfigError(
                f"observation keys {sorted(missing)} are not recorded; known: {sorted(known)}"
            )

    def sample(self, batch_size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw a batch: each observation key [B, To, ...], and for the steps t..t+H-1:

        action [B, H, D] and terminated, truncated [B, H], repeating the episode's last step
        behind its end; reward [B, H], 0 behind the end; action_is_pad [B, H]: behind the end,
        held, or not selected, so no label. Raises ConfigError while there is no candidate.
        """
        columns, candidates = self._reader.columns, self._index.candidates
        if columns is None or len(candidates) == 0:
            raise ConfigError(
                f"nothing to sample: {self._num_episodes} episodes are closed and none of their "
                "steps is selected"
            )
        positions = candidates[rng.integers(len(candidates), size=batch_size)]
        past = self._index.history(positions, self._spec.n_obs_steps)
        batch = {key: columns[key].take(past, axis=0) for key in self._spec.observation_keys}
        rows, beyond, selected = self._index.future(positions, self._spec.horizon)
        batch["action"] = columns["action"].take(rows, axis=0)
        batch["action_is_pad"] = beyond | columns["held"][rows] | ~selected
        batch["reward"] = np.where(beyond, np.float32(0), columns["reward"][rows])
        batch["terminated"] = columns["terminated"][rows]
        batch["truncated"] = columns["truncated"][rows]
        return batch

    def statistics(self, keys: Iterable[str] | None = None) -> dict[str, FeatureStats]:
        """Exact statistics over the selected steps of observation keys and "action" (all of the
        spec's by default); of the action only where the step was not held."""
        keys = (*self._spec.observation_keys, "action") if keys is None else tuple(keys)
        columns = self._reader.columns
        self._check_keys(set(keys) - {"action"})
        rows = self._index.rows
        if columns is None or rows.size == 0:
            raise ConfigError("statistics of no steps: no closed episode has a selected step")
        labelled = rows[~columns["held"][rows]]
        return {
            key: feature_stats(columns[key], labelled if key == "action" else rows) for key in keys
        }
