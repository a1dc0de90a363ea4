"""GPUs as devices of the host's pool: offered by agents and by runs, leased by runs."""

import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

import msgspec

from embodied.core.errors import ConfigError, EmbodiedError, LeaseError, StorageFullError
from hal.discovery import Gpu, gpu_records, gpus
from hal.pool.holding import Holding
from hal.pool.leases import DeviceRecord
from hal.pool.pool import Pool
from hal.pool.selectors import Selector, parse
from hal.pool.state import pool_path

_LOOK_S = 5.0
_REPORT_S = 1.0
_JOIN_S = 2.0
_TTL_S = 10.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def offer_gpus(pool: Pool, closing: threading.Event) -> None:
    """Offer this host's GPUs until closing is set; one that another process offers when it ends.

    A lease on one goes on when its owner ends and another process offers it.
    """
    looked_s, records = -_LOOK_S, gpu_records()
    while not closing.is_set():
        if time.monotonic() - looked_s >= _LOOK_S:
            looked_s, records = time.monotonic(), gpu_records()
        _report(pool, records)
        closing.wait(_REPORT_S)
    for record, _ in records:
        with suppress(EmbodiedError):
            pool.withdraw(record.id)


def _report(pool: Pool, records: Sequence[tuple[DeviceRecord, Gpu]]) -> None:
    for record, gpu in records:
        with suppress(LeaseError, StorageFullError):
            pool.register(record)
            pool.update(
                record.id,
                health="ready",
                load=gpu.load,
                temperature_c=gpu.temperature_c,
                detail=gpu.detail,
            )


def one_gpu(selector: str) -> Selector:
    """A selector of one GPU of this host, such as "gpu"; ConfigError if it asks for more."""
    wanted = parse(selector)
    if len(wanted) != 1 or wanted[0].count != 1:
        raise ConfigError(f"'{selector}' asks for several devices; ask for one GPU, such as 'gpu'")
    if wanted[0].id is not None or wanted[0].host is not None:
        return wanted[0]
    return msgspec.structs.replace(wanted[0], host=socket.gethostname())


class LeasedGpu:
    """One GPU of this host, leased and offered from `open` to `close`.

    holder: as the pool shows it. selector: see one_gpu. wait_s: longest wait for it. `open` raises
    ConfigError where there is no GPU, LeaseError, which says who holds them, if none is free.
    """

    def __init__(self, holder: str, selector: str, wait_s: float) -> None:
        self._holder, self._selector, self._wait_s = holder, one_gpu(selector), wait_s
        self._pool: Pool | None = None
        self._holding: Holding | None = None
        self._closing = threading.Event()
        self._offering: threading.Thread | None = None

    def open(self) -> Self:
        """Offer this host's GPUs, lease one."""
        if _VISIBLE in os.environ:
            raise ConfigError(
                f"{_VISIBLE} is '{os.environ[_VISIBLE]}', and the lease decides that: unset it, "
                f"and name a GPU by its id, such as id={socket.gethostname()}/gpu:0"
            )
        records = _usable()
        self._pool = Pool(pool_path())
        _report(self._pool, records)
        self._closing.clear()
        self._offering = threading.Thread(
            target=offer_gpus, args=(self._pool, self._closing), name="gpus", daemon=True
        )
        self._offering.start()
        try:
            leased = self._pool.acquire(
                self._holder, (self._selector,), ttl_s=_TTL_S, timeout_s=self._wait_s
            )
            self._holding = Holding.of(self._pool, leased)
            [gpu] = leased.devices
            if gpu.kind != "gpu" or gpu.host != socket.gethostname():
                raise ConfigError(
                    f"{gpu.id} is a device of kind '{gpu.kind}' of host {gpu.host}; "
                    f"a GPU of {socket.gethostname()} is needed"
                )
        except BaseException:
            self.close()
            raise
        return self

    @property
    def id(self) -> str:
        """Its id in the pool."""
        return self._held.devices[0].id

    @property
    def lost(self) -> str:
        """Why it may no longer be used; "" while it is held."""
        return self._held.lost

    @property
    def environment(self) -> dict[str, str]:
        """What the process that uses it must have in its environment before it loads CUDA."""
        index = self.id.rpartition(":")[2]
        # nvidia-smi counts by bus; CUDA by itself would count the fastest first.
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", _VISIBLE: index}

    def close(self) -> None:
        """Give it back; safe to call twice."""
        if self._holding is not None:
            self._holding.close()
        self._closing.set()
        if self._offering is not None:
            self._offering.join(timeout=_JOIN_S)
        if self._pool is not None:
            self._pool.close()
        self._holding = self._offering = self._pool = None

    @property
    def _held(self) -> Holding:
        if self._holding is None:
            raise LeaseError(f"{self._holder} holds no GPU: open() comes first")
        return self._holding

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()


def _usable() -> list[tuple[DeviceRecord, Gpu]]:
    records = gpu_records()
    if not records:
        faults = [gpu.fault for gpu in gpus()] or ["nvidia-smi is not there, or lists none"]
        raise ConfigError(f"{socket.gethostname()} has no GPU that can be used: {faults[0]}")
    return records
