"""Exact statistics of features, in bounded memory: what observation normalisers are made from."""

import msgspec
import numpy as np

from embodied.core.errors import ConfigError

_CHUNK_ELEMENTS = 1 << 22
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


def feature_stats(column: np.ndarray, rows: np.ndarray) -> FeatureStats:
    """Statistics of column[rows], shape [n, ...]. Raises ConfigError if there are no rows."""
    if rows.size == 0:
        raise ConfigError("statistics of no steps: nothing is recorded or selected yet")
    if column.dtype == np.uint8 and column.ndim == 4:
        return _image_stats(column, rows)
    flat = column.reshape(len(column), -1)
    width = max(1, _CHUNK_ELEMENTS // rows.size)
    found: list[list[np.ndarray]] = [[] for _ in range(6)]
    for first in range(0, flat.shape[1], width):
        values = flat[rows, first : first + width].astype(np.float64)
        low, high = np.quantile(values, _QUANTILES, axis=0)
        parts = (values.mean(0), values.std(0), values.min(0), values.max(0), low, high)
        for whole, part in zip(found, parts, strict=True):
            whole.append(part)
    lists = [np.concatenate(parts).tolist() if parts else [] for parts in found]
    return FeatureStats(*lists, count=int(rows.size))


def _image_stats(column: np.ndarray, rows: np.ndarray) -> FeatureStats:
    channels = column.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    step = max(1, _CHUNK_ELEMENTS // max(1, column[0].size))
    for first in range(0, rows.size, step):
        pixels = column[rows[first : first + step]]
        for channel in range(channels):
            counts[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
    total = int(counts[0].sum()) if channels else 0
    if total == 0:
        raise ConfigError(f"statistics of images of shape {column.shape[1:]}: they are empty")
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
