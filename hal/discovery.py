"""Enumerate what there is: robots of this host's agents and runs, loose hardware, GPUs."""

import shutil
import socket
import subprocess
from typing import Any

import msgspec

from embodied.core import registry
from hal.listing import DeviceRow, devices_of_hosts
from hal.pool.leases import DeviceRecord, DeviceStatus
from hal.pool.pool import Pool
from hal.pool.state import pool_path

_TIMEOUT_S = 10.0


def devices() -> list[DeviceRow]:
    """Every device in this host's pool, and what could be one: simulators, serial ports, cameras;
    then the devices of hosts that joined a run here, which only those hosts lease."""
    rows = own_devices()
    known = {row.id for row in rows}
    host = socket.gethostname()
    for name in registry.names("enumerators"):
        found: list[dict[str, Any]] = registry.resolve("enumerators", name)()
        for row in found:
            fault = str(row.get("fault", ""))
            if row["id"] not in known:
                health = "absent" if fault else "ready"
                detail = str(row.get("detail", ""))
                rows.append(DeviceRow(row["id"], row["kind"], host, health, fault, detail=detail))
    return rows + devices_of_hosts()


def own_devices() -> list[DeviceRow]:
    """The devices of this host's pool alone: what it tells to others."""
    with Pool(pool_path()) as pool:
        return [_pooled(status) for status in pool.devices()]


def _pooled(status: DeviceStatus) -> DeviceRow:
    return DeviceRow(
        status.id,
        status.kind,
        status.host,
        status.health,
        status.reason,
        status.holder,
        status.rate_hz,
        status.tick_hz,
        status.load,
        status.temperature_c,
        status.detail,
    )


class Gpu(msgspec.Struct, frozen=True):
    """A GPU of this host. fault: why it cannot be used, "" if it can."""

    id: str
    detail: str
    load: float | None = None
    temperature_c: float | None = None
    fault: str = ""


def gpus() -> list[Gpu]:
    """NVIDIA GPUs by name, memory and load; [] where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=index,name,memory.used,memory.total,utilization.gpu,temperature.gpu"
    try:
        result = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [Gpu("gpu", "", fault=f"nvidia-smi is silent for {_TIMEOUT_S} s")]
    if result.returncode:
        return [Gpu("gpu", "", fault=result.stderr.strip() or result.stdout.strip())]
    found: list[Gpu] = []
    for line in result.stdout.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 6:
            return [Gpu("gpu", "", fault=f"nvidia-smi says '{line[:80]}'")]
        index, name, used, total, load, celsius = parts
        percent = _number(load)
        share = None if percent is None else percent / 100
        found.append(Gpu(f"gpu:{index}", f"{name}, {used}/{total} MiB", share, _number(celsius)))
    return found


def gpu_records() -> list[tuple[DeviceRecord, Gpu]]:
    """This host's usable GPUs as they are offered: under its own name, whoever offers them."""
    host = socket.gethostname()
    return [
        (DeviceRecord(id=f"{host}/{gpu.id}", kind="gpu", host=host), gpu)
        for gpu in gpus()
        if not gpu.fault
    ]


def enumerate_gpus() -> list[dict[str, Any]]:
    """GPUs of this host, by the ids under which they are offered."""
    host = socket.gethostname()
    return [
        {
            "kind": "gpu",
            "id": g.id if g.fault else f"{host}/{g.id}",
            "detail": g.detail,
            "fault": g.fault,
        }
        for g in gpus()
    ]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
