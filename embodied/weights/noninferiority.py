"""When is a version shown to be no worse than another, from episodes that succeeded or failed?

Rule. With p the true success rates, m the margin, ε the error, and K looks, at which the new
version has n₁ < … < n_K episodes: at each look take Newcombe's interval for p_new − p_old (his
hybrid of two Wilson score intervals; Newcombe 1998, method 10), one-sided at level ε/K on either
side. Its lower end above −m: promote. Its upper end below −m: reject. Otherwise go on, and at the
last look reject, since no worse was not shown.

Errors. A version that is worse by m or more is promoted with probability at most ε: at most ε/K at
each look (union bound), as far as Newcombe's coverage holds at these counts; simulated, also where
the old rate is 0.95, it stays below ε. A version within the margin is rejected early, as worse,
with probability at most ε by the same argument, and at the last look with a probability that
depends on the counts: for m 0.15, ε 0.1, looks at 25, 50, 75 and 100 episodes, and 100 episodes of
the old version, an equal version is promoted in 94, 72 and 65 of 100 trials where the rates are
0.9, 0.7 and 0.5, and one that is worse by twice the margin in fewer than 1 of 100.
"""

import math
from statistics import NormalDist
from typing import Literal

import msgspec

Verdict = Literal["promote", "reject", "undecided"]


class Count(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Episodes and how many of them succeeded."""

    episodes: int = 0
    successes: int = 0

    def plus(self, success: bool) -> "Count":
        """With one more."""
        return Count(self.episodes + 1, self.successes + success)


def judge(
    new: Count, old: Count, *, margin: float, error: float, looks: int, last: bool
) -> Verdict:
    """What the rule says at one of `looks` looks. Both counts must have episodes."""
    lower, upper = difference_interval(new, old, level=error / looks)
    if lower > -margin:
        return "promote"
    if upper < -margin or last:
        return "reject"
    return "undecided"


def difference_interval(new: Count, old: Count, *, level: float) -> tuple[float, float]:
    """Newcombe's interval for the difference of success rates, new − old.

    level: probability, about, that the difference is below it, and that it is above it.
    """
    z = NormalDist().inv_cdf(1 - level)
    p1, low1, high1 = _wilson(new, z)
    p0, low0, high0 = _wilson(old, z)
    difference = p1 - p0
    return (
        difference - math.hypot(p1 - low1, high0 - p0),
        difference + math.hypot(high1 - p1, p0 - low0),
    )


def _wilson(count: Count, z: float) -> tuple[float, float, float]:
    """The rate and its Wilson score interval."""
    n, p = count.episodes, count.successes / count.episodes
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, centre - half, centre + half
