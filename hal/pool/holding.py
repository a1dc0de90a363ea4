"""Devices for as long as a block runs: leased, renewed in the background, given back at its end."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from embodied.core.errors import EmbodiedError, LeaseError, StorageFullError
from hal.pool.leases import Allocation, LeasedDevice
from hal.pool.pool import Pool, PoolBusyError
from hal.pool.selectors import Selector, checked

_RENEWALS_PER_TTL = 3
_RETRIES_PER_TTL = 30


class Holding:
    """A lease as a context manager: entering acquires, a thread renews every third of ttl_s.

    `lost` is checked before devices are commanded; their fencing refuses what comes too late.
    on_lost: called once, from that thread, with the reason.

        with Holding(pool, "run7/actor-0", "2 arm, 1 gpu", timeout_s=60) as held:
            while not held.lost:
                ...
    """

    def __init__(
        self,
        pool: Pool,
        holder: str,
        selectors: str | Sequence[Selector],
        *,
        ttl_s: float = 10.0,
        timeout_s: float = 10.0,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self._pool = pool
        self._holder = holder
        self._selectors = checked(selectors)
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._allocation: Allocation | None = None
        self._reason = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def allocation(self) -> Allocation:
        """The lease as of its last renewal; LeaseError before it is entered."""
        if self._allocation is None:
            raise LeaseError(f"{self._holder} holds nothing yet: enter the Holding with 'with'")
        return self._allocation

    @property
    def devices(self) -> tuple[LeasedDevice, ...]:
        """The devices and their tokens, in the selectors' order, held or lost."""
        return self.allocation.devices

    @property
    def lost(self) -> str:
        """Why the devices may no longer be used; "" while they are held."""
        if self._reason:
            return self._reason
        late_ns = self._pool.clock.now_ns() - self.allocation.expires_ns
        if late_ns >= 0:
            return f"the lease ended {late_ns / 1e9:.1f} s ago and could not be renewed in time"
        return ""

    @classmethod
    def of(cls, pool: Pool, allocation: Allocation) -> Self:
        """Keep up a lease that was granted already; end with `close`."""
        held = cls(pool, allocation.holder, "*", ttl_s=allocation.ttl_s)
        held._keep(allocation)
        return held

    def __enter__(self) -> Self:
        self._keep(self._pool.acquire(self._holder, self._selectors, self._ttl_s, self._timeout_s))
        return self

    def _keep(self, allocation: Allocation) -> None:
        self._allocation = allocation
        self._reason = ""
        self._stop.clear()
        name = f"renew {self._holder}"
        self._thread = threading.Thread(target=self._renew, name=name, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the devices back."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._reason = self._reason or "it was given back"
        with suppress(PoolBusyError, StorageFullError):  # the lease then ends by itself
            self._pool.release(self.allocation)

    def _renew(self) -> None:
        pause_s = self._ttl_s / _RENEWALS_PER_TTL
        while not self._stop.wait(pause_s):
            try:
                self._allocation = self._pool.renew(self.allocation)
                pause_s = self._ttl_s / _RENEWALS_PER_TTL
            except (PoolBusyError, StorageFullError) as error:
                pause_s = self._ttl_s / _RETRIES_PER_TTL
                if self.lost:
                    self._lose(str(error))
                    return
            except EmbodiedError as error:
                self._lose(str(error))
                return

    def _lose(self, reason: str) -> None:
        self._reason = reason
        if self._on_lost is not None:
            self._on_lost(reason)
