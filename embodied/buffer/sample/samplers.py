"""Samplers: batches of windows drawn from a replay.

Legend: B batch, To history, H horizon, D action, n steps of a backup.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import numpy as np

from embodied.buffer.read.episodes import EpisodeInfo
from embodied.buffer.read.gather import DamagedRowsError
from embodied.buffer.sample.batches import (
    Arrays,
    ArraySize,
    Draw,
    StaleDrawError,
    StepReader,
    batch_arrays,
    fetch_windows,
    prefetch_windows,
    window_sizes,
)
from embodied.buffer.sample.draws import DrawStrategy, NewSteps, Uniform
from embodied.buffer.sample.returns import returns_to_go, reward_column
from embodied.buffer.sample.statistics import (
    FeatureStats,
    RunningStats,
    Take,
    feature_stats,
    rows_per_chunk,
)
from embodied.buffer.sample.texts import EpisodeTexts
from embodied.buffer.sample.windows import NEXT, WindowIndex, WindowSpec
from embodied.core.errors import ConfigError
from embodied.core.instructions import TASK

__all__ = [
    "ArraySize",
    "Draw",
    "Sampler",
    "Select",
    "StepFlags",
    "StepReader",
    "WindowSampler",
    "WindowSpec",
    "select_all",
]

T = TypeVar("T")
D = TypeVar("D")

_CHUNK_STEPS = 1 << 18


@dataclass(frozen=True, slots=True)
class StepFlags:
    """Columns of one episode's steps [L], in order of index."""

    intervention: np.ndarray
    held: np.ndarray
    success: np.ndarray
    reward: np.ndarray
    policy_version: np.ndarray


_FLAGS = tuple(field.name for field in fields(StepFlags))

Select = Callable[[EpisodeInfo, StepFlags], np.ndarray]
"""Which steps of a closed episode to learn from: bool [L]. Asked once, when it closes."""


def select_all(episode: EpisodeInfo, flags: StepFlags) -> np.ndarray:
    """Every step."""
    return np.ones(len(episode.rows), np.bool_)


class Sampler(Protocol[D]):
    """What draws batches D and reads them: WindowSampler, or MixtureSampler over several."""

    @property
    def num_candidates(self) -> int:
        """Steps that can be drawn now; 0 while there can be no batch."""
        ...

    def refresh(self) -> int:
        """Take over episodes that closed or were removed; returns how many were added."""
        ...

    def draw(self, batch_size: int, rng: np.random.Generator) -> D:
        """Draw B steps."""
        ...

    def prefetch(self, draw: D) -> None:
        """Start reading what fetch will need."""
        ...

    def fetch(self, draw: D, out: Mapping[str, np.ndarray] | None = None) -> Arrays:
        """Read a batch."""
        ...

    def sample(self, batch_size: int, rng: np.random.Generator) -> Arrays:
        """Draw and read a batch."""
        ...

    def update(self, draw: D, priorities: np.ndarray) -> None:
        """Set the priorities [B] of drawn steps."""
        ...

    def batch_spec(self, batch_size: int) -> dict[str, ArraySize]:
        """dtype and shape of every array of a batch."""
        ...

    def statistics(self, keys: Iterable[str] | None = None) -> dict[str, FeatureStats]:
        """Exact statistics over the selected steps."""
        ...

    def save(self) -> dict[str, Any]:
        """State that neither the data nor the random generator holds, as plain values."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what save returned, over the same data."""
        ...


class WindowSampler:
    """Draws windows around selected steps of closed episodes, with replacement.

    strategy: uniform by default. tracked: observation keys or "action" of which statistics are
    kept in `running` on every refresh (of images, each is then read once). instruction: from the
    name of a recorded task to its words, if the spec wants them. For one thread, the reader's.
    """

    def __init__(
        self,
        reader: StepReader,
        spec: WindowSpec,
        select: Select = select_all,
        strategy: DrawStrategy | None = None,
        tracked: Iterable[str] = (),
        instruction: Callable[[str], str] = str,
    ) -> None:
        self.spec = spec
        self._instruction = instruction
        self._texts = EpisodeTexts(spec.task_bytes)
        self._reader = reader
        self._select = select
        self._strategy = Uniform() if strategy is None else strategy
        self._tracked = tuple(tracked)
        self.running: dict[str, RunningStats] = {}
        self._index = WindowIndex()
        self._keys: list[tuple[str, int]] = []
        self._gone: set[tuple[str, int]] = set()
        self._num_closed = 0
        self._num_removed = 0
        self._sizes: dict[str, ArraySize] = {}
        self.refresh()

    @property
    def num_candidates(self) -> int:
        """Steps that can be drawn now."""
        self._drop_removed()
        return len(self._index.candidates)

    @property
    def weighted(self) -> bool:
        """Whether batches have importance weights, from priorities that update sets."""
        return self._strategy.has_weights

    def refresh(self) -> int:
        """Take over episodes that closed or were removed since the last call; returns how many
        were added. It does not refresh the reader: call that before."""
        self._drop_removed()
        added = 0
        for closed in _chunks(self._reader.closed_episodes(self._num_closed)):
            added += self._readable(lambda closed=closed: self._add(closed))
            self._num_closed += len(closed)
        return added

    def _drop_removed(self) -> None:
        """Rows of a removed episode may be another one's soon, so this comes before any use."""
        removed = self._reader.removed_episodes(self._num_removed)
        if not removed:
            return
        self._num_removed += len(removed)
        self._gone.update(removed)
        mask = np.array([key in self._gone for key in self._keys], np.bool_)
        if mask.any():
            self._strategy.keep(self._index.remove(mask))
            self._keys = [key for key in self._keys if key not in self._gone]

    def _readable(self, read: Callable[[], T]) -> T:
        """What read returns, once what it met of damaged episodes is out."""
        while True:
            try:
                return read()
            except DamagedRowsError:
                before = self._num_removed
                self._drop_removed()
                if self._num_removed == before:
                    raise

    def _add(self, closed: list[EpisodeInfo]) -> int:
        episodes = [episode for episode in closed if episode.key not in self._gone]
        if not episodes:
            return 0
        for key in self.spec.observation_keys:
            self._reader.feature(key)
        rows = np.concatenate([episode.rows for episode in episodes])
        lengths = np.array([len(episode.rows) for episode in episodes], np.int64)
        needed = {*self._strategy.columns, *(("held",) if "action" in self._tracked else ())}
        if self._select is not select_all:
            needed.update(_FLAGS)
        if self.spec.return_to_go:
            needed.add(reward_column(self.spec))
        columns = self._reader.gather(sorted(needed), rows) if needed else {}
        selected = self._selected(episodes, columns, len(rows))
        to_go = returns_to_go(self.spec, columns, lengths) if self.spec.return_to_go else None
        fresh: dict[str, RunningStats] = {}
        for key in self._tracked:
            wanted = selected & ~columns["held"] if key == "action" else selected
            fresh[key] = self._seen(key, rows[wanted], episodes[0])
        described = episodes if self.spec.task_bytes else []
        tasks = [self._instruction(episode.task) for episode in described]
        self._texts.check(tasks)
        # From here on nothing can fail: an episode is taken over as a whole or not at all.
        final_rows = np.array([episode.final_row for episode in episodes], np.int64)
        successes = np.array([episode.success for episode in episodes], np.bool_)
        numbers = self._index.add(rows, lengths, final_rows, selected, successes, to_go)
        if tasks:
            self._texts.add(numbers, tasks)
        self._keys += [episode.key for episode in episodes]
        below, ends = np.concatenate(([0], np.cumsum(selected))), np.cumsum(lengths)
        counts = below[ends] - below[ends - lengths]
        chosen = {name: columns[name][selected] for name in self._strategy.columns}
        self._strategy.extend(NewSteps(episodes, counts, chosen))
        for key, new in fresh.items():
            if key in self.running:
                self.running[key].merge(new)
            else:
                self.running[key] = new
        return len(episodes)

    def _selected(self, episodes: list[EpisodeInfo], columns: Arrays, n_steps: int) -> np.ndarray:
        if self._select is select_all:
            return np.ones(n_steps, np.bool_)
        parts: list[np.ndarray] = []
        start = 0
        for episode in episodes:
            part = slice(start, start + len(episode.rows))
            flags = StepFlags(*(columns[name][part] for name in _FLAGS))
            selected = np.asarray(self._select(episode, flags))
            if selected.dtype != np.bool_ or selected.shape != episode.rows.shape:
                raise ConfigError(
                    f"select returned {selected.dtype} {selected.shape} for an episode of "
                    f"{len(episode.rows)} steps; a bool for each step is right"
                )
            parts.append(selected)
            start = part.stop
        return np.concatenate(parts)

    def _seen(self, key: str, rows: np.ndarray, first: EpisodeInfo) -> RunningStats:
        feature = self._reader.feature(key)
        seed = zlib.crc32(first.stream.encode()), first.episode
        stats = RunningStats(np.dtype(feature.dtype), feature.shape, seed)
        step = rows_per_chunk(feature.shape)
        for start in range(0, len(rows), step):
            stats.update(self._reader.take(key, rows[start : start + step]))
        return stats

    def draw(self, batch_size: int, rng: np.random.Generator) -> Draw:
        """Draw B steps. Raises ConfigError while there is no candidate."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        if self.num_candidates == 0:
            raise ConfigError(
                f"nothing to sample: {len(self._keys)} episodes are closed and none of their "
                "steps is selected"
            )
        ordinals, weights = self._strategy.draw(batch_size, rng)
        positions = self._index.candidates[ordinals]
        rows = self._index.windows(positions, self.spec)
        return Draw(self._index.numbers(positions), rows, weights, self._num_removed)

    def redraw(self, draw: Draw, rng: np.random.Generator) -> Draw:
        """Draw again in place of one that fetch refused."""
        return self.draw(len(draw), rng)

    def update(self, draw: Draw, priorities: np.ndarray) -> None:
        """Set the priorities [B] of drawn steps; those removed since are left out. Raises
        ConfigError if the strategy has none."""
        if np.shape(priorities) != (len(draw),):
            raise ConfigError(
                f"priorities have shape {np.shape(priorities)}; one for each of the {len(draw)} "
                "drawn steps is right"
            )
        self._drop_removed()
        ordinals, there = self._index.ordinals(draw.numbers)
        self._strategy.update(ordinals, np.asarray(priorities)[there])

    def _lost(self, draw: Draw) -> int:
        """How many of the drawn steps have been removed."""
        self._drop_removed()
        if draw.removed == self._num_removed:
            return 0
        return int((~self._index.ordinals(draw.numbers)[1]).sum())

    def prefetch(self, draw: Draw) -> None:
        """Start reading what fetch will need, unless it would refuse; returns at once."""
        if not self._lost(draw):
            prefetch_windows(self._reader, self.spec, draw)

    def fetch(self, draw: Draw, out: Mapping[str, np.ndarray] | None = None) -> Arrays:
        """Read a batch; into the arrays of out, which are as batch_spec says, if it is given.

        Each observation key [B, To, ...], and for the steps t..t+H-1: action [B, H, D] and
        terminated, truncated [B, H], repeating the episode's last step behind its end; reward
        [B, H], 0 behind the end; action_is_pad [B, H]: behind the end, held, or not selected, so
        no label. With an n-step backup: return, discount [B] (float32) and each "next." + key
        [B, To, ...]; with S offsets in `future` each "future." + key [B, S, ...] and future_is_pad
        [B, S]; see WindowSpec. return_to_go [B] (float32) and task [B, To, L] (uint8) if the
        spec wants them. The spec's metadata [B] of step t. weight [B] if the strategy has
        importance weights. Raises one of DRAW_AGAIN for a draw of which episodes have been removed,
        or turn out to be damaged; the arrays are undefined then.
        """
        if lost := self._lost(draw):
            raise StaleDrawError(f"{lost} of {len(draw)} drawn steps have been removed")
        batch = batch_arrays(self.batch_spec(len(draw)), out)
        fetch_windows(self._reader, self.spec, draw, batch)
        for name in batch.keys() & {TASK, NEXT + TASK}:
            batch[name][...] = self._texts.of(draw.numbers)[:, None]
        return batch

    def sample(self, batch_size: int, rng: np.random.Generator) -> Arrays:
        """fetch(draw(batch_size, rng)), drawn again if it meets damaged episodes."""
        return self._readable(lambda: self.fetch(self.draw(batch_size, rng)))

    def batch_spec(self, batch_size: int) -> dict[str, ArraySize]:
        """dtype and shape of every array of a batch, by name. Raises ConfigError if a key is not
        recorded, or nothing is yet."""
        if not self._sizes:
            self._sizes = window_sizes(self._reader, self.spec, weighted=self.weighted)
        return {
            name: ArraySize(size.dtype, (batch_size, *size.shape))
            for name, size in self._sizes.items()
        }

    def statistics(self, keys: Iterable[str] | None = None) -> dict[str, FeatureStats]:
        """Exact statistics over the selected steps of observation keys and "action" (all of the
        spec's by default); of the action only where the step was not held. Reads every step."""
        keys = (*self.spec.observation_keys, "action") if keys is None else tuple(keys)
        self._drop_removed()
        return self._readable(lambda: self._statistics(keys))

    def _statistics(self, keys: Iterable[str]) -> dict[str, FeatureStats]:
        return {key: feature_stats(*self.column(key)) for key in keys}

    def column(self, key: str) -> tuple[Take, np.ndarray]:
        """What reads a column at row ids, and those of the selected steps; of the action, only
        where the step was not held. Raises ConfigError if there are no selected steps."""
        rows = self._index.rows
        if rows.size == 0:
            raise ConfigError("statistics of no steps: no closed episode has a selected step")
        self._reader.feature(key)
        if key == "action":
            rows = rows[~self._reader.take("held", rows)]
        return lambda part: self._reader.take(key, part), rows

    def save(self) -> dict[str, Any]:
        """Nothing: what is drawn depends on the data and the random generator. Priorities are not
        kept: after a restart every step has the greatest one again."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Inverse of save."""

    def tracked_statistics(self) -> dict[str, FeatureStats]:
        """Results of `running`: statistics of the tracked keys over the same steps as statistics,
        without reading any again; steps removed since stay in them."""
        if missing := set(self._tracked) - self.running.keys():
            raise ConfigError(f"statistics of {sorted(missing)}: no episode is closed yet")
        return {key: self.running[key].result() for key in self._tracked}


def _chunks(episodes: list[EpisodeInfo]) -> list[list[EpisodeInfo]]:
    """The episodes in groups of about _CHUNK_STEPS steps."""
    chunks: list[list[EpisodeInfo]] = []
    size = _CHUNK_STEPS
    for episode in episodes:
        if size >= _CHUNK_STEPS:
            chunks.append([])
            size = 0
        chunks[-1].append(episode)
        size += len(episode.rows)
    return chunks
