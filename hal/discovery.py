"""Enumerate what there is to lease: simulated robots, robots of running runs, GPUs."""

import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from embodied.core import registry
from embodied.core.errors import EmbodiedError
from embodied.core.rundir import RunDir

_TIMEOUT_S = 10.0


class DeviceRow(msgspec.Struct, frozen=True):
    """One line of the device table. holder: the run and role that use the device, if any."""

    id: str
    kind: str
    host: str
    health: str
    detail: str = ""
    holder: str = ""
    rate_hz: float = 0.0
    tick_hz: float = 0.0


class _Status(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    kind: str
    host: str
    health: str
    rate_hz: float
    tick_hz: float
    stream: str
    role: str


def devices(runs: str | Path = "runs") -> list[DeviceRow]:
    """Every simulator that can be opened here, every robot of a running run, every GPU.

    runs: folder whose run directories are looked at.
    """
    host = socket.gethostname()
    rows: list[DeviceRow] = []
    for name in registry.names("enumerators"):
        found: list[dict[str, Any]] = registry.resolve("enumerators", name)()
        for row in found:
            health = "absent" if row.get("fault") else "ready"
            detail = str(row.get("fault") or row.get("detail", ""))
            rows.append(DeviceRow(row["id"], row["kind"], host, health, detail))
    for path in sorted(Path(runs).glob("*/devices/*.json")):
        run = RunDir(path.parent.parent)
        if run.in_use():
            rows.extend(_acting(path, run, host))
    return rows


def _acting(path: Path, run: RunDir, host: str) -> list[DeviceRow]:
    try:
        statuses = msgspec.json.decode(path.read_bytes(), type=list[_Status])
    except (msgspec.DecodeError, OSError) as error:
        raise EmbodiedError(f"{path} cannot be read: {error}") from error
    return [
        DeviceRow(
            id=status.id,
            kind="robot (simulated)",
            host=host,
            health=status.health,
            detail=status.stream,
            holder=f"{run.path.name}/{status.role}",
            rate_hz=status.rate_hz,
            tick_hz=status.tick_hz,
        )
        for status in statuses
    ]


def enumerate_gpus() -> list[dict[str, Any]]:
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
        return [{"id": "gpu", "kind": "gpu", "fault": f"nvidia-smi is silent for {_TIMEOUT_S} s"}]
    if result.returncode:
        return [
            {"id": "gpu", "kind": "gpu", "fault": result.stderr.strip() or result.stdout.strip()}
        ]
    rows: list[dict[str, Any]] = []
    for line in result.stdout.splitlines():
        index, name, used, total, load, celsius = (part.strip() for part in line.split(","))
        detail = f"{name}, {used}/{total} MiB, {load} %, {celsius} °C"
        rows.append({"id": f"gpu:{index}", "kind": "gpu", "detail": detail})
    return rows
