"""When the next piece may go: a cap on bandwidth, and a bound on what queues below the link.

Pure arithmetic on a clock that the caller reads; times are seconds of one monotonic clock.
"""

from collections import deque

from embodied.core.errors import ConfigError

_BURST_S = 0.05
_DEBT_S = 1.0


class Cap:
    """A token bucket: on average at most bytes_per_s, at once what 50 ms bring."""

    def __init__(self, bytes_per_s: float, now_s: float) -> None:
        if not bytes_per_s > 0:
            raise ConfigError(f"a bandwidth cap of {bytes_per_s:g} bytes/s; it must be above 0")
        self._rate = bytes_per_s
        self._tokens = bytes_per_s * _BURST_S
        self._now_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Time until something may be sent; 0 if it may now."""
        self._fill(now_s)
        return max(0.0, -self._tokens / self._rate)

    def spend(self, nbytes: int, now_s: float) -> None:
        """Count bytes that are sent, also those that did not wait: up to a second's worth is
        made up for later."""
        self._fill(now_s)
        self._tokens = max(self._tokens - nbytes, -self._rate * _DEBT_S)

    def _fill(self, now_s: float) -> None:
        gained = (now_s - self._now_s) * self._rate
        self._tokens = min(self._tokens + gained, self._rate * _BURST_S)
        self._now_s = now_s


class Window:
    """Bytes that may be under way without an acknowledgement.

    gRPC and the kernel would queue megabytes before a slow link, and an urgent message behind
    them. After every window's worth of acknowledgements the window grows by a quarter if the
    fastest of the latest four came about as fast as any of late, and halves if it took `slack_s`
    longer: the queue takes a small multiple of `slack_s` to drain, and the link stays busy.
    """

    MIN_BYTES = 32 << 10
    FIRST_BYTES = 256 << 10
    MAX_BYTES = 16 << 20

    def __init__(self, slack_s: float = 0.05) -> None:
        self.size = self.FIRST_BYTES
        self.sent = 0
        self.acknowledged = 0
        self._slack_s = slack_s
        self._flying: deque[tuple[int, float]] = deque()
        self._fastest_s: deque[float] = deque(maxlen=64)
        self._latest_s: deque[float] = deque(maxlen=4)
        self._round_end = 0

    @property
    def open(self) -> bool:
        """Whether another piece may follow."""
        return self.sent - self.acknowledged < self.size

    def piece_bytes(self, most: int) -> int:
        """Size of the next piece: at least four of them fit into the window."""
        return min(most, self.size // 4)

    def send(self, nbytes: int, now_s: float) -> None:
        """Count a piece that was handed on."""
        self.sent += nbytes
        self._flying.append((self.sent, now_s))

    def acknowledge(self, total: int, now_s: float) -> bool:
        """Take in that `total` bytes have arrived since the beginning; False if that is less than
        before or more than was sent."""
        if not self.acknowledged <= total <= self.sent:
            return False
        self.acknowledged = total
        while self._flying and self._flying[0][0] <= total:
            self._latest_s.append(now_s - self._flying.popleft()[1])
        if total > self._round_end and self._latest_s:
            fastest_s = min(self._latest_s)
            self._fastest_s.append(fastest_s)
            slow = fastest_s > min(self._fastest_s) + self._slack_s
            size = self.size // 2 if slow else self.size * 5 // 4
            self.size = min(max(size, self.MIN_BYTES), self.MAX_BYTES)
            self._round_end = self.sent
        return True
