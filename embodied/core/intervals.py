"""Confidence intervals for evaluations over seeds."""

import math
from collections.abc import Sequence

import numpy as np

from embodied.core.seeds import make_rng

_Z95 = 1.959963984540054


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a success rate (Wilson 1927); (0, 1) without trials."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if not trials:
        return 0.0, 1.0
    rate, z2 = successes / trials, _Z95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = _Z95 * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    spread /= 1 + z2 / trials
    return max(0.0, centre - spread), min(1.0, centre + spread)


def bootstrap_mean(values: Sequence[float], *, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; the resampling is seeded."""
    data = np.asarray(values, np.float64)
    if not data.size:
        raise ValueError("a mean needs at least one value")
    rng = make_rng(0, "bootstrap", data.size)
    means = data[rng.integers(0, data.size, (resamples, data.size))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def paired_bootstrap(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Mean of a − b on the same initial states, and its 95 % bootstrap interval."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return float(difference.mean()), *bootstrap_mean(list(difference))
