"""A limit on bytes per second."""

import time
from collections.abc import Callable
from typing import Protocol

from embodied.core.errors import ConfigError


class Budget(Protocol):
    """Says when to send; may be shared by several senders."""

    def ready(self) -> bool:
        """Whether a message may be sent now."""
        ...

    def spend(self, nbytes: int) -> None:
        """Note a message that was sent."""
        ...


class TokenBucket:
    """At most bytes_per_s on average; after a pause burst_bytes at once.

    A message may be larger than what is left: what it takes too much is waited for afterwards.
    """

    def __init__(
        self,
        bytes_per_s: float,
        burst_bytes: float = 1 << 18,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if bytes_per_s <= 0 or burst_bytes <= 0:
            raise ConfigError(
                f"a limit of {bytes_per_s} bytes/s with bursts of {burst_bytes} bytes; both must "
                "be positive"
            )
        self._bytes_per_s = bytes_per_s
        self._burst_bytes = burst_bytes
        self._clock = clock
        self._left = float(burst_bytes)
        self._filled_s = clock()

    def ready(self) -> bool:
        """Whether a message may be sent now."""
        now_s = self._clock()
        self._left += (now_s - self._filled_s) * self._bytes_per_s
        self._left = min(self._left, self._burst_bytes)
        self._filled_s = now_s
        return self._left > 0

    def spend(self, nbytes: int) -> None:
        """Note a message that was sent."""
        self._left -= nbytes


class Unlimited:
    """No limit."""

    def ready(self) -> bool:
        """Always."""
        return True

    def spend(self, nbytes: int) -> None:
        """Nothing to note."""
