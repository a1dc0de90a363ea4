"""Part 3: durable writes, 64 steps a commit; then 50 Hz with a commit a step over the service."""

import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.buffer.data import EPISODE_RECORDS, Source, record_bytes
from benchmarks.buffer.disk import append_rate, fdatasync_times
from benchmarks.buffer.measure import (
    Options,
    Rates,
    Row,
    percentile,
    ratio,
    spread,
    take_turns,
)
from embodied.buffer.serve.client import BufferClient
from embodied.buffer.serve.service import BufferService
from embodied.buffer.serve.sink import LocalBuffer
from embodied.core.episodes import Step

_RECORDS = {84: 6400, 224: 1600}
_COMMIT = 64
_TARGETS = {224: 0.25}
_PERIOD_S = 0.02
_MOST_P99_MS = 10.0
_DISK = "disk limit (append, preallocated, one fdatasync at the end)"
_OURS = "ours, 64 steps a commit"


def run(options: Options) -> list[Row]:
    """Rows of this part."""
    rows = [row for side in _RECORDS for row in _throughput(options, side)]
    return rows + _control(options)


def _throughput(options: Options, side: int) -> list[Row]:
    count = _RECORDS[side] // (4 if options.quick else 1)
    root = options.root / f"writes{side}"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    record = bytes(Source(side).transitions(0, 1)["camera0"].tobytes())
    record = (record * 3)[: record_bytes(side)]
    steps = list(Source(side).steps(count))
    turns: dict[str, Callable[[], float]] = {
        _DISK: lambda: append_rate(root / "disk", record, count),
        _OURS: lambda: _write(root / "ours", steps),
    }
    try:
        rates: Rates = take_turns(turns, options.rounds)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    rows: list[Row] = []
    for name, values in rates.items():
        middle = statistics.median(values)
        target = _TARGETS.get(side) if name == _OURS else None
        note = f"{middle * record_bytes(side) / 1e9:.2f} GB/s; {spread(values)}"
        part = ratio(rates, name, _DISK)
        rows.append(
            Row(f"{side} px, {count:,} records", name, middle, "/s", part, target, note=note)
        )
    return rows


def _write(path: Path, steps: list[Step]) -> float:
    """Steps a second, the last commit included, sealing not."""
    with LocalBuffer(path) as buffer:
        started_s = time.perf_counter()
        for number, step in enumerate(steps, 1):
            buffer.add(step)
            if number % _COMMIT == 0:
                buffer.flush()
        buffer.flush()
        taken_s = time.perf_counter() - started_s
    shutil.rmtree(path)
    return len(steps) / taken_s


def _control(options: Options) -> list[Row]:
    seconds = 3 if options.quick else 20
    rows: list[Row] = []
    for side, what in ((0, "state only"), (224, "two 224 px images")):
        root = options.root / "control"
        shutil.rmtree(root, ignore_errors=True)
        steps = list(Source(side).steps(round(seconds / _PERIOD_S)))
        try:
            times_ms = _commit_each(root / "buffer", steps)
            payload = bytes(max(512, 2 * side * side * 3))
            limit_ms = [1e3 * s for s in fdatasync_times(root / "disk", payload, len(steps))]
        finally:
            shutil.rmtree(root, ignore_errors=True)
        case = f"50 Hz, a commit a step, {seconds} s, {what}"
        for name, values in (
            ("append and ack over the service", times_ms),
            ("pwrite and fdatasync alone", limit_ms),
        ):
            p50, p99 = percentile(values, 0.5), percentile(values, 0.99)
            ours = values is times_ms
            note = f"p50 {p50:.2f}, max {max(values):.1f} ms"
            target = _MOST_P99_MS if ours else None
            rows.append(Row(case, f"{name}: p99", p99, "ms", None, target, True, note))
    return rows


def _commit_each(path: Path, steps: list[Step]) -> list[float]:
    """Milliseconds from add to acknowledgement, one step each 20 ms."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    times_ms: list[float] = []
    with tempfile.TemporaryDirectory() as sockets:
        address = f"ipc://{sockets}/buffer"
        service = context.Process(target=_serve, args=(path, address, stop))
        service.start()
        try:
            with BufferClient(address, "robot") as client:
                client.next_episode(timeout_s=30.0)
                next_s = time.perf_counter()
                for step in steps:
                    time.sleep(max(0.0, next_s - time.perf_counter()))
                    next_s = max(next_s, time.perf_counter()) + _PERIOD_S
                    started_s = time.perf_counter()
                    client.add(step)
                    client.flush()
                    times_ms.append(1e3 * (time.perf_counter() - started_s))
                found = client.stats().steps
        finally:
            stop.set()
            service.join(30.0)
    assert found == len(steps) - len(steps) // EPISODE_RECORDS, found
    return times_ms


def _serve(path: Path, address: str, stop) -> None:
    with BufferService(path, address) as service:
        service.serve(stop.is_set, poll_s=0.05)
