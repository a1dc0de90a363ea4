"""Pearson's test that counts come from a distribution, without SciPy."""

import numpy as np

_Z = 3.09  # of the 0.999 quantile of the normal distribution


def quantile(degrees, z):
    """Of the chi-square distribution, by Wilson and Hilferty (1931); z: the normal's."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + z * spread**0.5) ** 3


def deviates(counts, probabilities, two_sided=False):
    """Whether counts [k] are not as probabilities [k] would make them: one time in 1,000 wrongly.
    two_sided: also if they are too even."""
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    expected = probabilities / probabilities.sum() * counts.sum()
    possible = expected > 0
    if counts[~possible].any():
        return True
    assert expected[possible].min() > 5, "too few draws for this test"
    found = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    degrees = possible.sum() - 1
    low = quantile(degrees, -_Z) if two_sided else 0
    return not low <= found <= quantile(degrees, _Z)
