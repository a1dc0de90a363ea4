"""What a network does to bytes: profiles, and when bytes leave a link and arrive."""

import math
import threading
from random import Random

import msgspec

from embodied.core.errors import ConfigError
from embodied.core.registry import unknown

SEGMENT_BYTES = 1448


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network. delay_s: one way; jitter_s: at most so much more; rate_bit_s: of each direction,
    None for no limit; loss: share of segments; cut_every_s: mean time between cuts of cut_s."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    rate_bit_s: float | None = None
    loss: float = 0.0
    cut_every_s: float | None = None
    cut_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.delay_s, self.jitter_s, self.cut_s) < 0 or not 0 <= self.loss < 1:
            raise ConfigError(f"{self}: times must be at least 0, loss at least 0 and below 1")
        if any(value is not None and value <= 0 for value in (self.rate_bit_s, self.cut_every_s)):
            raise ConfigError(f"{self}: rate_bit_s and cut_every_s must be more than 0, or None")


PROFILES = {
    "lan": Profile(delay_s=0.000_2, rate_bit_s=1e9),
    "metro": Profile(delay_s=0.004, jitter_s=0.000_5, rate_bit_s=200e6),
    "cross-city": Profile(delay_s=0.020, jitter_s=0.001, rate_bit_s=50e6),
    "bad-4g": Profile(
        delay_s=0.100, jitter_s=0.020, rate_bit_s=20e6, loss=0.02, cut_every_s=60.0, cut_s=3.0
    ),
}


def profile_named(name: str) -> Profile:
    """One of PROFILES; ConfigError with the nearest name if there is none."""
    if name not in PROFILES:
        raise unknown("network profile", name, PROFILES)
    return PROFILES[name]


class Link:
    """One direction, shared by all connections: when bytes leave it, in seconds of any clock."""

    def __init__(self, rate_bit_s: float | None) -> None:
        self._byte_s = 0.0 if rate_bit_s is None else 8 / rate_bit_s
        self._free_s = -math.inf
        self._lock = threading.Lock()

    def depart(self, now_s: float, num_bytes: int) -> float:
        """When the last of these bytes has left, if the first may leave now."""
        with self._lock:
            self._free_s = max(now_s, self._free_s) + num_bytes * self._byte_s
            return self._free_s


class Stream:
    """One direction of one connection: when its bytes arrive, in order.

    The losses follow from the seed and the bytes' places in the stream.
    """

    def __init__(self, profile: Profile, link: Link, seed: str) -> None:
        self._profile = profile
        self._link = link
        self._jitter = Random(f"{seed}/jitter")
        self._losses = Random(f"{seed}/loss")
        self._offset = 0
        self._next_lost = self._segments_until(1 - profile.loss)
        self._arrival_s = -math.inf

    def send(self, now_s: float, num_bytes: int) -> tuple[float, float]:
        """When these bytes have left, and when they arrive."""
        profile = self._profile
        left_s = self._link.depart(now_s, num_bytes)
        stall_s = 0.0
        self._offset += num_bytes
        while self._next_lost * SEGMENT_BYTES < self._offset:
            tries = 1 + self._segments_until(profile.loss)
            stall_s = max(stall_s, tries * 2 * profile.delay_s)
            self._next_lost += 1 + self._segments_until(1 - profile.loss)
        arrival_s = left_s + profile.delay_s + self._jitter.uniform(0, profile.jitter_s) + stall_s
        self._arrival_s = max(self._arrival_s, arrival_s)
        return left_s, self._arrival_s

    def _segments_until(self, kept: float) -> float:
        """Segments with the fate of probability `kept` before the first without: geometric."""
        if kept in (0.0, 1.0):
            return math.inf if kept else 0
        return int(math.log(1 - self._losses.random()) / math.log(kept))
