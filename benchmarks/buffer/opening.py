"""Part 5: how long it takes to open a buffer, after a clean close and after SIGKILL of its writer.

Files are in the page cache unless the case says otherwise. Every opening is in a fresh process.
"""

import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.buffer.data import Source
from benchmarks.buffer.measure import Options, Row, drop_pages, spread

_STEPS = 1_000_000
_MOST_S = 2.0
_LEAST_GBS = 1.0
_COMMIT = 64
_SMALL_RECORD = 232


def run(options: Options) -> list[Row]:
    """Rows of this part."""
    return _clean(options) + [
        row
        for side, what in ((0, "small steps"), (84, "84 px steps"), (224, "224 px steps"))
        for row in _killed(options, side, what)
    ]


def _fill(path: Path, side: int, steps: int, *, die: bool) -> None:
    """Write so many steps; die by SIGKILL then, or close."""
    from embodied.buffer.write.writer import ReplayWriter

    with ReplayWriter(path) as writer:
        for number, step in enumerate(Source(side).steps(steps), 1):
            writer.append(step)
            if number % _COMMIT == 0:
                writer.flush()
        writer.flush()
        if die:
            os.kill(os.getpid(), signal.SIGKILL)


def _in_process(*arguments: object, **options: object) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_fill, args=arguments, kwargs=options
    )
    process.start()
    process.join()


def _open(kind: str, path: Path) -> dict[str, float]:
    """Open in a new process; seconds without the start of Python."""
    command = [sys.executable, "-m", "benchmarks.buffer.opening", kind, str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _clean(options: Options) -> list[Row]:
    steps = _STEPS // (20 if options.quick else 1)
    root = options.root / "opening"
    shutil.rmtree(root, ignore_errors=True)
    try:
        _in_process(root, 0, steps + steps // 199, die=False)
        rows: list[Row] = []
        case = f"{steps:,} small steps, cleanly closed"
        for kind, name in (("reader", "ReplayReader and refresh"), ("writer", "ReplayWriter")):
            for cold in (False, True):
                found: list[dict[str, float]] = []
                for _ in range(options.rounds):
                    if cold:
                        drop_pages(root.iterdir())
                    found.append(_open(kind, root))
                seconds = [each["seconds"] for each in found]
                name_here = name + ", files dropped from the page cache" * cold
                note = f"{spread(seconds)}; {found[0]['steps']:,} steps"
                middle = statistics.median(seconds)
                rows.append(Row(case, name_here, middle, "s", None, _MOST_S, True, note))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return rows


def _killed(options: Options, side: int, what: str) -> list[Row]:
    root, copy = options.root / "killed", options.root / "killed_copy"
    for path in (root, copy):
        shutil.rmtree(path, ignore_errors=True)
    nbytes = (8 if options.quick else 120) << 20
    kinds = {"writer": "ReplayWriter", "reader": "ReplayReader and refresh"}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    try:
        _in_process(root, side, nbytes // (_SMALL_RECORD + 6 * side * side), die=True)
        used = _used_bytes(next(root.glob("*.seg.open")))
        for _ in range(options.rounds):
            for kind in ("reader", "writer"):
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(root, copy)
                os.sync()
                found = _open(kind, copy)
                seconds[kind].append(found["seconds"])
    finally:
        for path in (root, copy):
            shutil.rmtree(path, ignore_errors=True)
    rows: list[Row] = []
    for kind, name in kinds.items():
        rates = [used / 1e9 / each for each in seconds[kind]]
        middle = statistics.median(rates)
        target = _LEAST_GBS if kind == "writer" else None
        note = f"{used >> 20} MiB, {found['steps']:,} steps, {used / 1e9 / middle:.2f} s"
        case = f"writer killed, {what}; bytes of the open segment over the time to open"
        rows.append(Row(case, name, middle, "GB/s", None, target, note=f"{note}; {spread(rates)}"))
    return rows


def _used_bytes(path: Path) -> int:
    """Bytes of a preallocated file up to the last one that is not zero."""
    data = path.read_bytes()
    return len(data.rstrip(b"\0"))


def _child(kind: str, path: Path) -> None:
    from embodied.buffer.read.replay import ReplayReader
    from embodied.buffer.write.writer import ReplayWriter

    started_s = time.perf_counter()
    if kind == "reader":
        reader = ReplayReader(path)
        reader.refresh()
        found = {"seconds": time.perf_counter() - started_s, "steps": reader.num_steps}
    else:
        writer = ReplayWriter(path)
        found = {"seconds": time.perf_counter() - started_s, "steps": writer.counts().steps}
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    _child(sys.argv[1], Path(sys.argv[2]))
