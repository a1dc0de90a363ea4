"""How fast a learner may sample, given how fast actors insert."""

import math
from typing import Any

from embodied.core.errors import ConfigError, CorruptDataError


class RateLimiter:
    """Keeps the ratio of sampled to inserted steps within a band.

    With i steps inserted and s sampled, the balance is

        D = samples_per_insert · (i - min_inserted) - s

    n steps may be sampled if i ≥ min_inserted and D - n ≥ -slack; n steps may be inserted if
    i < min_inserted or D + samples_per_insert · n ≤ slack. Hence s stays within `slack` of
    samples_per_insert · (i - min_inserted), but for one first insertion across min_inserted.
    Neither side can starve the other if slack ≥ (batch + samples_per_insert · insertion) / 2.
    samples_per_insert None: nothing but min_inserted limits. Pure logic: the caller waits.
    """

    def __init__(
        self, samples_per_insert: float | None, min_inserted: int = 1, slack: float = 0.0
    ) -> None:
        if min_inserted < 0:
            raise ConfigError(f"min_inserted is {min_inserted}; it must be at least 0")
        if samples_per_insert is not None:
            if not (math.isfinite(samples_per_insert) and samples_per_insert > 0):
                raise ConfigError(
                    f"samples_per_insert is {samples_per_insert}; it must be positive and finite, "
                    "or None for no limit"
                )
            if not slack >= (1 + samples_per_insert) / 2:
                raise ConfigError(
                    f"slack is {slack}; with samples_per_insert={samples_per_insert} it must be "
                    f"at least {(1 + samples_per_insert) / 2:g}, or neither side could go on"
                )
        self._ratio = samples_per_insert
        self._min_inserted = min_inserted
        self._slack = slack
        self._inserted = 0
        self._sampled = 0

    @property
    def balance(self) -> float:
        """D: how many more steps may be sampled before the ratio is met exactly."""
        return (self._ratio or 0.0) * (self._inserted - self._min_inserted) - self._sampled

    def can_sample(self, n: int) -> bool:
        """Whether n steps may be sampled now."""
        if self._inserted < self._min_inserted:
            return False
        return self._ratio is None or self.balance - n >= -self._slack

    def can_insert(self, n: int) -> bool:
        """Whether n steps may be inserted now."""
        if self._ratio is None or self._inserted < self._min_inserted:
            return True
        return self.balance + self._ratio * n <= self._slack

    def sampled(self, n: int) -> None:
        """Count n sampled steps."""
        self._sampled += n

    def inserted(self, n: int) -> None:
        """Count n inserted steps."""
        self._inserted += n

    def save(self) -> dict[str, int]:
        """Both counters."""
        return {"inserted": self._inserted, "sampled": self._sampled}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what save returned."""
        inserted, sampled = state.get("inserted"), state.get("sampled")
        if not (isinstance(inserted, int) and isinstance(sampled, int)):
            raise CorruptDataError(f"rate limiter state {state}; two integers are right")
        if inserted < 0 or sampled < 0:
            raise CorruptDataError(f"rate limiter state {state}; counters cannot be negative")
        self._inserted, self._sampled = inserted, sampled
