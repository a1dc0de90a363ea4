"""Statistics of features in bounded memory, exact or kept incrementally: normalisers' ground."""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from embodied.core.errors import ConfigError

Take = Callable[[np.ndarray], np.ndarray]
"""Row ids [k] → their values [k, ...]."""

RESERVOIR_ROWS = 1 << 14

_HELD_ELEMENTS = 1 << 25
_CHUNK_ELEMENTS = 1 << 22
_RESERVOIR_BYTES = 1 << 26
_QUANTILES = (0.01, 0.99)


class FeatureStats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Statistics of a feature's elements, flattened in C order; of an image (uint8, three axes)
    its channels. q01, q99: quantiles with linear interpolation. std: of the population. count:
    values behind each number."""

    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]
    q01: list[float]
    q99: list[float]
    count: int


def is_image(dtype: np.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a feature is an image, so that its statistics are those of its channels."""
    return dtype == np.uint8 and len(shape) == 3


def rows_per_chunk(shape: tuple[int, ...]) -> int:
    """How many rows of a feature to handle at a time, so that memory stays bounded."""
    return max(1, _CHUNK_ELEMENTS // max(1, int(np.prod(shape))))


def feature_stats(take: Take, rows: np.ndarray) -> FeatureStats:
    """Exact statistics of take(rows), in bounded memory: a feature that is too large for one pass
    over the rows is read once for every group of its elements that fits. Raises ConfigError if
    there are no rows."""
    if rows.size == 0:
        raise ConfigError("statistics of no steps: nothing is recorded or selected yet")
    probe = take(rows[:1])
    step = rows_per_chunk(probe.shape[1:])
    chunks = [slice(first, first + step) for first in range(0, rows.size, step)]
    if is_image(probe.dtype, probe.shape[1:]):
        counts = np.zeros((probe.shape[-1], 256), np.int64)
        for chunk in chunks:
            counts += _histograms(take(rows[chunk]))
        return _image_stats(counts, probe.shape[1:])
    found: list[list[np.ndarray]] = [[] for _ in range(6)]
    width = max(1, _HELD_ELEMENTS // rows.size)
    for first in range(0, probe.size, width):
        block = np.empty((rows.size, min(width, probe.size - first)), probe.dtype)
        for chunk in chunks:
            values = take(rows[chunk])
            block[chunk] = values.reshape(len(values), -1)[:, first : first + width]
        _add_columns(found, block)
    lists = [np.concatenate(parts).tolist() if parts else [] for parts in found]
    return FeatureStats(*lists, count=int(rows.size))


def _add_columns(found: list[list[np.ndarray]], block: np.ndarray) -> None:
    width = max(1, _CHUNK_ELEMENTS // len(block))
    for first in range(0, block.shape[1], width):
        values = block[:, first : first + width].astype(np.float64)
        low, high = np.quantile(values, _QUANTILES, axis=0)
        parts = (values.mean(0), values.std(0), values.min(0), values.max(0), low, high)
        for whole, part in zip(found, parts, strict=True):
            whole.append(part)


class RunningStats:
    """Statistics of a feature, updated with its new values and merged with others'.

    mean, std, min, max, count and everything of images (by histograms) are exact up to float64
    rounding (Chan, Golub and LeVeque 1979). q01 and q99 of other features are those of a uniform
    sample of R = 16,384 rows (fewer if these were more than 64 MiB), exact up to R rows; beyond,
    the quantile's rank has the standard error √(q(1-q)/R): 0.08 % for R = 16,384.

    The sample is the R rows with the smallest random keys, so that merging is exact too, provided
    that the seeds differ. Same seed and same updates: same result.
    """

    def __init__(
        self, dtype: np.dtype, shape: tuple[int, ...], seed: int | Sequence[int] = 0
    ) -> None:
        self._dtype, self._shape = np.dtype(dtype), tuple(shape)
        self._is_image = is_image(self._dtype, self._shape)
        self.count = 0
        if self._is_image:
            self._counts = np.zeros((shape[-1], 256), np.int64)
            return
        size = int(np.prod(shape))
        self._rng = np.random.default_rng(seed)
        row_bytes = max(1, size * self._dtype.itemsize)
        self._reservoir_rows = max(1, min(RESERVOIR_ROWS, _RESERVOIR_BYTES // row_bytes))
        self._mean, self._squares = np.zeros(size), np.zeros(size)
        self._min, self._max = np.full(size, np.inf), np.full(size, -np.inf)
        self._keys, self._sample = np.empty(0), np.empty((0, size), self._dtype)

    def empty(self) -> "RunningStats":
        """Statistics of nothing, of the same dtype and shape."""
        return RunningStats(self._dtype, self._shape)

    def update(self, values: np.ndarray) -> None:
        """Take over new values [k, *shape]. Raises ConfigError for another dtype or shape."""
        if values.dtype != self._dtype or values.shape[1:] != self._shape:
            raise ConfigError(
                f"values are {values.dtype} {values.shape}; statistics of {self._dtype} "
                f"{('k', *self._shape)} take k rows of these"
            )
        step = rows_per_chunk(self._shape)
        for first in range(0, len(values), step):
            part = values[first : first + step]
            if self._is_image:
                self._counts += _histograms(part)
                self.count = int(self._counts[:1].sum())
            else:
                self._update(part.reshape(len(part), -1))

    def _update(self, rows: np.ndarray) -> None:
        values = rows.astype(np.float64)
        mean = values.mean(0)
        squares = np.square(values - mean).sum(0)
        self._merge_moments(len(rows), mean, squares, values.min(0), values.max(0))
        self._merge_sample(self._rng.random(len(rows)), rows)

    def _merge_moments(self, count: int, mean: np.ndarray, squares: np.ndarray, low, high) -> None:
        total = self.count + count
        delta = mean - self._mean
        self._squares += squares + np.square(delta) * (self.count * count / total)
        self._mean += delta * (count / total)
        np.minimum(self._min, low, out=self._min)
        np.maximum(self._max, high, out=self._max)
        self.count = total

    def _merge_sample(self, keys: np.ndarray, rows: np.ndarray) -> None:
        if len(self._keys) == self._reservoir_rows:
            good = keys < self._keys.max()
            keys, rows = keys[good], rows[good]
        if len(keys) == 0:
            return
        keys, rows = np.concatenate((self._keys, keys)), np.concatenate((self._sample, rows))
        if len(keys) > self._reservoir_rows:
            least = np.argpartition(keys, self._reservoir_rows - 1)[: self._reservoir_rows]
            keys, rows = keys[least], rows[least]
        self._keys, self._sample = keys, rows

    def merge(self, other: "RunningStats") -> None:
        """Take over what the other has seen, which must be of the same dtype and shape."""
        mine, theirs = (self._dtype, self._shape), (other._dtype, other._shape)
        if mine != theirs:
            raise ConfigError(f"statistics of {mine} cannot be merged with those of {theirs}")
        if self._is_image:
            self._counts += other._counts
            self.count += other.count
        elif other.count:
            self._merge_moments(other.count, other._mean, other._squares, other._min, other._max)
            self._merge_sample(other._keys, other._sample)

    def result(self) -> FeatureStats:
        """Statistics of everything seen so far. Raises ConfigError if that is nothing."""
        if self.count == 0:
            raise ConfigError("statistics of no steps: nothing is recorded or selected yet")
        if self._is_image:
            return _image_stats(self._counts, self._shape)
        std = np.sqrt(self._squares / self.count)
        low, high = np.quantile(self._sample.astype(np.float64), _QUANTILES, axis=0)
        parts = (self._mean, std, self._min, self._max, low, high)
        return FeatureStats(*(part.tolist() for part in parts), count=self.count)


def merged(parts: Sequence[RunningStats]) -> RunningStats:
    """What several of the same dtype and shape, one at least, have seen together; these stay."""
    whole = parts[0].empty()
    for part in parts:
        whole.merge(part)
    return whole


def _histograms(images: np.ndarray) -> np.ndarray:
    """Pixels of each value by channel: int64 [C, 256] of uint8 [k, H, W, C]."""
    channels = range(images.shape[-1])
    parts = [np.bincount(images[..., channel].ravel(), minlength=256) for channel in channels]
    return np.array(parts, np.int64).reshape(-1, 256)


def _image_stats(counts: np.ndarray, shape: tuple[int, ...]) -> FeatureStats:
    total = int(counts[:1].sum())
    if total == 0:
        raise ConfigError(f"statistics of images of shape {shape}: they are empty")
    values = np.arange(256, dtype=np.float64)
    mean = counts @ values / total
    variance = np.einsum("cv,cv->c", counts, (values - mean[:, None]) ** 2) / total
    below = counts.cumsum(1)
    # The k-th smallest pixel (from 0) is the first value with more than k pixels at or below it.
    low, high = (_interpolated(below, q * (total - 1)) for q in _QUANTILES)
    return FeatureStats(
        mean.tolist(),
        np.sqrt(variance).tolist(),
        _ranked(below, 0),
        _ranked(below, total - 1),
        low,
        high,
        total,
    )


def _ranked(below: np.ndarray, rank: int) -> list[float]:
    return [float(np.searchsorted(channel, rank, side="right")) for channel in below]


def _interpolated(below: np.ndarray, position: float) -> list[float]:
    rank = int(position)
    pairs = zip(_ranked(below, rank), _ranked(below, rank + (position > rank)), strict=True)
    return [low + (high - low) * (position - rank) for low, high in pairs]
