"""How long hosts take to get their weights, as the side that sends them sees it."""

import threading
import time

import msgspec

from embodied.weights.manifests import Version


class Delivery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last update that a host has. num_bytes: of its patch. seconds: from the offer until the
    host said that it has it, its own work and the wait for its next question included."""

    version: Version
    num_bytes: int
    seconds: float


class Deliveries:
    """Times updates by what hosts ask; any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[str, tuple[int, int, float]] = {}
        self._done: dict[str, Delivery] = {}

    def offered(self, host: str, version: int, num_bytes: int) -> None:
        """A host was offered an update."""
        with self._lock:
            self._begun[host] = version, num_bytes, time.monotonic()

    def has(self, host: str, version: int | None) -> None:
        """A host said what it has."""
        with self._lock:
            begun = self._begun.get(host)
            if begun is not None and begun[0] == version:
                del self._begun[host]
                seconds = max(1e-6, time.monotonic() - begun[2])
                self._done[host] = Delivery(begun[0], begun[1], seconds)

    def last(self, host: str) -> Delivery | None:
        """The last update that reached the host; None before one did."""
        with self._lock:
            return self._done.get(host)
