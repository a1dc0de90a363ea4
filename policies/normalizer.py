"""Linear normalisers x → (x − offset) / scale that travel with the weights."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import nn

from embodied.core.errors import ConfigError
from embodied.core.specs import ArraySpec

Statistics = Literal["limits", "gaussian"]

FLAT = 1e-4
"""Spread, in the data's own unit, below which an element counts as constant."""


class FeatureStats(Protocol):
    """Statistics of one key over a data set, one value per element in flattened order."""

    @property
    def mean(self) -> Sequence[float]:
        """Means."""
        ...

    @property
    def std(self) -> Sequence[float]:
        """Standard deviations."""
        ...

    @property
    def min(self) -> Sequence[float]:
        """Smallest values."""
        ...

    @property
    def max(self) -> Sequence[float]:
        """Largest values."""
        ...


class LinearNormalizer(nn.Module):
    """Element-wise x → (x − offset) / scale; both are buffers, hence part of a checkpoint."""

    offset: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Start as the identity for arrays whose last axes are `shape`."""
        super().__init__()
        self.register_buffer("offset", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """From the data's unit to about [−1, 1]; the result has the buffers' dtype."""
        return (x.to(self.offset.dtype) - self.offset) / self.scale

    def unnormalize(self, x: torch.Tensor) -> torch.Tensor:
        """Back to the data's unit."""
        return x * self.scale + self.offset

    def set_limits(self, low: np.ndarray, high: np.ndarray) -> None:
        """Map [low, high] to [−1, 1]; elements that do not vary are only shifted."""
        self._set((low + high) / 2, (high - low) / 2, np.maximum(np.abs(low), np.abs(high)))

    def set_gaussian(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Map to mean 0 and standard deviation 1; elements that do not vary are only shifted."""
        self._set(mean, std, np.abs(mean))

    def set_bounds(self, spec: ArraySpec, where: str) -> None:
        """Map the bounds of a spec to [−1, 1]; ConfigError unless every element is bounded."""
        low, high = spec.bounds()
        if not spec.bounded:
            loose = np.flatnonzero(~(np.isfinite(low) & np.isfinite(high)))
            raise ConfigError(
                f"{where}: elements {loose.tolist()} have no finite bounds in the device's spec; "
                "bound them there, or normalise from data (action_normalization: limits)"
            )
        self.set_limits(low, high)

    def set_statistics(self, stats: FeatureStats, mode: Statistics, where: str) -> None:
        """Fit to data; ConfigError that names `where` if the statistics do not fit."""
        names = ("min", "max") if mode == "limits" else ("mean", "std")
        first, second = (self._read(getattr(stats, name), f"{where}.{name}") for name in names)
        if mode == "limits":
            self.set_limits(first, second)
        else:
            self.set_gaussian(first, second)

    def _read(self, values: Sequence[float], where: str) -> np.ndarray:
        array = np.asarray(values, np.float64)
        if array.size != self.offset.numel():
            raise ConfigError(
                f"{where} has {array.size} values; shape {tuple(self.offset.shape)} needs "
                f"{self.offset.numel()}: were the statistics made from another data set?"
            )
        if not np.isfinite(array).all():
            raise ConfigError(f"{where} is not finite; recompute the data set's statistics")
        return array.reshape(tuple(self.offset.shape))

    def _set(self, offset: np.ndarray, scale: np.ndarray, magnitude: np.ndarray) -> None:
        flat = scale < np.maximum(FLAT / 2, 1e-6 * magnitude)
        for buffer, values in ((self.offset, offset), (self.scale, np.where(flat, 1.0, scale))):
            buffer.copy_(torch.as_tensor(values, dtype=buffer.dtype))


def is_image(key: str, spec: ArraySpec) -> bool:
    """Whether an observation is a picture by its key or by its dtype and shape."""
    return key.startswith("observation.images.") or (spec.dtype == "uint8" and len(spec.shape) > 2)
