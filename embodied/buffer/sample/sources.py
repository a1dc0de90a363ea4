"""Batches mixed from several named sources, each of its own replay, in exact ratios.

For example demonstrations and what robots record now, half and half (RLPD, Ball et al. 2023).
Legend: B batch, S sources.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from embodied.buffer.sample.batches import DRAW_AGAIN, Arrays, ArraySize, Draw, batch_arrays
from embodied.buffer.sample.samplers import WindowSampler
from embodied.buffer.sample.statistics import FeatureStats, feature_stats, merged
from embodied.core.errors import ConfigError

_WEIGHT = "weight"


class Quotas:
    """How many of each batch come from each source, exactly in the long run and at any time.

    With shares r_i, Σ r_i = 1, source i has after N samples its floor(r_i N) or ceil(r_i N):
    within 1 of r_i N. The k-th sample of a source may come as soon as r_i N > k - 1 and is due
    when r_i N = k; of those that may come, the ones due first do (Tijdeman 1980). The largest
    remainder with carried remainders gives the same for two sources, but can be off by more
    than 1 for five.
    """

    def __init__(self, shares: np.ndarray) -> None:
        self._shares = np.asarray(shares, np.float64) / np.sum(shares)
        self._taken = np.zeros(len(self._shares), np.int64)

    def next(self, n: int) -> np.ndarray:
        """Counts of the next n samples: int64 [S]. They are not noted before take."""
        allowed = np.ceil(self._shares * (self._taken.sum() + n)).astype(np.int64) - self._taken
        sources = np.repeat(np.arange(len(allowed)), np.maximum(allowed, 0))
        firsts = np.searchsorted(sources, sources)
        due = (self._taken[sources] + 1 + np.arange(len(sources)) - firsts) / self._shares[sources]
        chosen = sources[np.argsort(due, kind="stable")[:n]]
        return np.bincount(chosen, minlength=len(allowed))

    @property
    def taken(self) -> list[int]:
        """How many samples came from each source so far [S]."""
        return self._taken.tolist()

    def take(self, counts: np.ndarray) -> None:
        """Note that so many came from each source [S]."""
        self._taken += counts


@dataclass(frozen=True, slots=True)
class MixtureDraw:
    """A mixed batch drawn but not read: a draw from each source, None where it gives nothing."""

    parts: tuple[Draw | None, ...]

    @property
    def counts(self) -> np.ndarray:
        """Samples of each source: int64 [S]."""
        return np.array([0 if part is None else len(part) for part in self.parts], np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())


class MixtureSampler:
    """Draws batches from named sources, each in its ratio: see Quotas. Used as a WindowSampler.

    ratios: positive, relative to each other. Batches hold one source after the other, in the
    order of sources, and "source" [B] (int64): which one, counted in that order. Where only some
    sources have importance weights, "weight" is 1 for the others. optional: sources that may have
    nothing to draw; the others' ratios hold among themselves meanwhile.
    """

    def __init__(
        self,
        sources: Mapping[str, WindowSampler],
        ratios: Mapping[str, float],
        optional: Collection[str] = (),
    ) -> None:
        if not sources or sources.keys() != ratios.keys():
            raise ConfigError(
                f"sources are {sorted(sources)} and ratios are given for {sorted(ratios)}; every "
                "source needs a ratio, and there must be one"
            )
        for name, ratio in ratios.items():
            if not 0 < ratio < math.inf:
                raise ConfigError(
                    f"ratio of source '{name}' is {ratio}; it must be positive and finite (leave "
                    "a source out to draw nothing from it)"
                )
        self.names = tuple(sources)
        self._samplers = tuple(sources.values())
        self._ratios = np.array([ratios[name] for name in self.names])
        self._optional = np.array([name in optional for name in self.names])
        self._quotas: dict[bytes, Quotas] = {}
        self._sizes: dict[str, ArraySize] = {}
        for name, sampler in sources.items():
            if sampler.spec != self._samplers[0].spec:
                raise ConfigError(
                    f"sources '{self.names[0]}' and '{name}' differ: their windows are "
                    f"{self._samplers[0].spec} and {sampler.spec}; the same are right"
                )

    @property
    def num_candidates(self) -> int:
        """Steps that can be drawn from all sources together; 0 while one of them has none that is
        not optional, or all."""
        counts = self._candidates()
        return int(counts.sum()) if (self._optional | (counts > 0)).all() else 0

    def _candidates(self) -> np.ndarray:
        return np.array([sampler.num_candidates for sampler in self._samplers], np.int64)

    def refresh(self) -> int:
        """Refresh all sources' samplers; returns how many episodes were added."""
        return sum(sampler.refresh() for sampler in self._samplers)

    def draw(self, batch_size: int, rng: np.random.Generator) -> MixtureDraw:
        """Draw B steps, from each source its due. Raises ConfigError while a source has no
        candidate, or if two sources' arrays differ."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        present = ~self._optional | (self._candidates() > 0)
        if not present.any():
            raise ConfigError(f"no source has anything to sample: {', '.join(self.names)}")
        quotas = self._quotas_of(present)
        counts = np.zeros(len(self.names), np.int64)
        counts[present] = quotas.next(batch_size)
        found = self._draw(counts, rng)
        quotas.take(counts[present])
        return found

    def _quotas_of(self, present: np.ndarray) -> Quotas:
        """Each set of sources keeps its own ratios, so that none catches up what it missed."""
        return self._quotas.setdefault(present.tobytes(), Quotas(self._ratios[present]))

    def redraw(self, draw: MixtureDraw, rng: np.random.Generator) -> MixtureDraw:
        """Draw again in place of one that fetch refused: as much from each source, if all have
        something left."""
        if ((draw.counts > 0) & self._optional & (self._candidates() == 0)).any():
            return self.draw(len(draw), rng)
        return self._draw(draw.counts, rng)

    def _draw(self, counts: np.ndarray, rng: np.random.Generator) -> MixtureDraw:
        candidates = self._candidates()
        for index, name in enumerate(self.names):
            if candidates[index] == 0 and not self._optional[index]:
                raise ConfigError(
                    f"source '{name}' has nothing to sample: none of its episodes is closed and "
                    "has a selected step"
                )
        self._common_sizes()
        sources = zip(self._samplers, counts.tolist(), strict=True)
        return MixtureDraw(tuple(s.draw(count, rng) if count else None for s, count in sources))

    def update(self, draw: MixtureDraw, priorities: np.ndarray) -> None:
        """Set the priorities [B] of drawn steps in the sources that draw by them."""
        if np.shape(priorities) != (len(draw),):
            raise ConfigError(
                f"priorities have shape {np.shape(priorities)}; one for each of the {len(draw)} "
                "drawn steps is right"
            )
        for sampler, part, where in self._parts(draw):
            if sampler.weighted:
                sampler.update(part, np.asarray(priorities)[where])

    def _parts(self, draw: MixtureDraw) -> list[tuple[WindowSampler, Draw, slice]]:
        ends = np.cumsum(draw.counts).tolist()
        return [
            (sampler, part, slice(end - len(part), end))
            for sampler, part, end in zip(self._samplers, draw.parts, ends, strict=True)
            if part is not None
        ]

    def prefetch(self, draw: MixtureDraw) -> None:
        """Start reading what fetch will need; returns at once."""
        for sampler, part, _ in self._parts(draw):
            sampler.prefetch(part)

    def fetch(self, draw: MixtureDraw, out: Mapping[str, np.ndarray] | None = None) -> Arrays:
        """Read a batch as WindowSampler.fetch does, with "source" [B] (int64) besides."""
        batch = batch_arrays(self.batch_spec(len(draw)), out)
        for sampler, part, where in self._parts(draw):
            arrays = {name: array[where] for name, array in batch.items()}
            sampler.fetch(part, arrays)
            if _WEIGHT in arrays and not sampler.weighted:
                arrays[_WEIGHT][...] = 1
        batch["source"][...] = np.repeat(np.arange(len(self.names)), draw.counts)
        return batch

    def sample(self, batch_size: int, rng: np.random.Generator) -> Arrays:
        """fetch(draw(batch_size, rng)), drawn again if it meets damaged episodes."""
        draw = self.draw(batch_size, rng)
        while True:
            try:
                return self.fetch(draw)
            except DRAW_AGAIN:
                draw = self.redraw(draw, rng)

    def statistics(self, keys: Iterable[str] | None = None) -> dict[str, FeatureStats]:
        """As WindowSampler's, over the steps of all sources alike, whatever the ratios."""
        spec = self._samplers[0].spec
        keys = (*spec.observation_keys, "action") if keys is None else tuple(keys)
        self._common_sizes()
        return {key: self._statistics(key) for key in keys}

    def _statistics(self, key: str) -> FeatureStats:
        drawn = zip(self._samplers, self._optional, strict=True)
        columns = [s.column(key) for s, optional in drawn if not optional or s.num_candidates]
        ends = np.cumsum([len(rows) for _, rows in columns])

        def take(places: np.ndarray) -> np.ndarray:
            source = np.searchsorted(ends, places, side="right")
            return np.concatenate(
                [
                    read(rows[places[source == i] - (ends[i] - len(rows))])
                    for i, (read, rows) in enumerate(columns)
                    if (source == i).any()
                ]
            )

        return feature_stats(take, np.arange(ends[-1]))

    def save(self) -> dict[str, Any]:
        """How many samples came from each source so far, for each set of sources that had any."""
        kept: list[dict[str, int]] = []
        for mask, quotas in self._quotas.items():
            names = [n for n, there in zip(self.names, mask, strict=True) if there]
            kept.append(dict(zip(names, quotas.taken, strict=True)))
        return {"names": list(self.names), "taken": kept}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue where save left off; with other sources than then, the ratios begin anew."""
        if state.get("names") != list(self.names):
            return
        for taken in state["taken"]:
            present = np.array([name in taken for name in self.names])
            counts = [taken[name] for name in self.names if name in taken]
            self._quotas_of(present).take(np.array(counts, np.int64))

    def tracked_statistics(self) -> dict[str, FeatureStats]:
        """As WindowSampler's, of the keys that all sources track, over all their steps alike,
        whatever the ratios."""
        found = [sampler.tracked_statistics() for sampler in self._samplers]
        running = [sampler.running for sampler in self._samplers]
        keys = [key for key in found[0] if all(key in part for part in found)]
        return {key: merged([part[key] for part in running]).result() for key in keys}

    def batch_spec(self, batch_size: int) -> dict[str, ArraySize]:
        """dtype and shape of every array of a batch, by name. Raises ConfigError if a key is not
        recorded in a source, or two sources' arrays differ."""
        return {
            name: ArraySize(size.dtype, (batch_size, *size.shape[1:]))
            for name, size in self._common_sizes().items()
        }

    def _common_sizes(self) -> dict[str, ArraySize]:
        if self._sizes:
            return self._sizes
        first, *others = (sampler.batch_spec(1) for sampler in self._samplers)
        sizes = dict(first)
        for name, found in zip(self.names[1:], others, strict=True):
            for key in first.keys() & found.keys():
                if found[key] != first[key]:
                    raise ConfigError(
                        f"sources '{self.names[0]}' and '{name}' cannot be mixed: {key} is "
                        f"{_described(first[key])} in the one and {_described(found[key])} in the "
                        "other"
                    )
            sizes |= found
        weight = sizes.pop(_WEIGHT, None)
        sizes["source"] = ArraySize(np.dtype(np.int64), (1,))
        self._sizes = sizes if weight is None else {**sizes, _WEIGHT: weight}
        return self._sizes


def _described(size: ArraySize) -> str:
    return f"{size.dtype} {list(size.shape[1:])}"
