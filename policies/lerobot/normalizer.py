"""LeRobot's normalisation. D: elements of an array, as its last axes."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from embodied.core.errors import ConfigError
from policies.lerobot.export import STATISTICS, Mode
from policies.normalizer import FeatureStats


class LeRobotNormalizer(nn.Module):
    """x → (x − shift) / scale + bias, to the bit what LeRobot 0.4 does with its statistics.

    MEAN_STD: (x − mean) / (std + eps). The others: 2 (x − low) / (high − low) − 1, an element that
    does not vary having eps in the place of its range. The inverse differs from LeRobot's, which
    leaves eps out there, by less than eps.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shape: tuple[int, ...], mode: Mode, eps: float) -> None:
        """Start with mean 0 and deviation 1, or with −1 and 1."""
        super().__init__()
        self._mode: Mode = mode
        self._eps = eps
        self._bias = 0.0 if mode == "MEAN_STD" else -1.0
        self.register_buffer("shift", torch.full(shape, self._bias))
        self.register_buffer("scale", torch.ones(shape))

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """From the data's unit."""
        return (x.to(self.shift.dtype) - self.shift) / self.scale + self._bias

    def unnormalize(self, x: torch.Tensor) -> torch.Tensor:
        """Back to the data's unit."""
        return (x - self._bias) * self.scale + self.shift

    def set_exported(self, key: str, statistics: Mapping[str, np.ndarray]) -> None:
        """Take over LeRobot's statistics by "KEY.NAME"; ConfigError if the key's are missing."""
        names = [f"{key}.{name}" for name in STATISTICS[self._mode]]
        if not all(name in statistics for name in names):
            raise ConfigError(
                f"the exported processors lack {' or '.join(names)}, by which the policy "
                "normalises; policy.statistics=data takes those of the demonstrations"
            )
        self._set(key, *(statistics[name] for name in names))

    def set_statistics(self, key: str, stats: FeatureStats) -> None:
        """Fit to data; ConfigError if the statistics do not fit."""
        first, second = (np.asarray(getattr(stats, name)) for name in STATISTICS[self._mode])
        self._set(key, first, second)

    def _set(self, key: str, first: np.ndarray, second: np.ndarray) -> None:
        pair: list[torch.Tensor] = []
        for value in (first, second):
            if value.size != self.shift.numel() or not np.isfinite(value).all():
                raise ConfigError(
                    f"statistics of {key} hold {value.size} values; {self.shift.numel()} finite "
                    "ones are right"
                )
            pair.append(torch.as_tensor(value, dtype=torch.float32).reshape(self.shift.shape))
        low, high = pair
        if self._mode == "MEAN_STD":
            scale = high + self._eps
        else:
            spread = high - low
            scale = torch.where(spread == 0, torch.full_like(spread, self._eps), spread) / 2
        self.shift.copy_(low)
        self.scale.copy_(scale)
