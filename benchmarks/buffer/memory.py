"""Part 4: resident memory of a reader whose data are ten times its budget, in its own process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.buffer.contenders import write_ours
from benchmarks.buffer.data import (
    BATCH,
    CAMERAS,
    HORIZON,
    STATE,
    Source,
    record_bytes,
    segment_files,
)
from benchmarks.buffer.measure import Options, Row, resident_share

_BUDGET = 64 << 20
_TIMES = 10
_MOST = 1.10


def run(options: Options) -> list[Row]:
    """Rows of this part."""
    rows: list[Row] = []
    for side in (84, 224):
        root = options.root / f"memory{side}"
        shutil.rmtree(root, ignore_errors=True)
        try:
            write_ours(root, Source(side), _TIMES * _BUDGET // record_bytes(side) + 1)
            batches = 50 if options.quick else 400
            command = [sys.executable, "-m", "benchmarks.buffer.memory", str(root), str(batches)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            cached = resident_share(segment_files(root))
        finally:
            shutil.rmtree(root, ignore_errors=True)
        case = f"{side} px, {_TIMES * _BUDGET >> 20} MiB, budget {_BUDGET >> 20} MiB"
        growth = found["peak"] - found["before"]
        note = (
            f"{batches} uniform batches of {BATCH}; {found['evicted'] >> 20:,} MiB evicted; then "
            f"{100 * cached:.0f} % of the data in the page cache, which the kernel takes back"
        )
        part = growth / _BUDGET
        name = "growth of peak resident memory; ratio to the budget"
        rows.append(Row(case, name, growth / 2**20, "MiB", part, _MOST, True, note))
    return rows


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def _sample(path: Path, batches: int) -> None:
    """Sample uniformly; print resident memory before the reader was made and the peak since."""
    import numpy as np

    from embodied.buffer.read.replay import ReplayReader
    from embodied.buffer.sample.samplers import WindowSampler, WindowSpec

    spec = WindowSpec(1, HORIZON, (*CAMERAS, STATE))
    rng = np.random.default_rng(7)
    with ReplayReader(path) as first:  # what any batch needs: modules, the allocator's memory
        first.refresh()
        sampler = WindowSampler(first, spec)
        sizes = sampler.batch_spec(BATCH)
        out = {name: np.ones(size.shape, size.dtype) for name, size in sizes.items()}
        sampler.fetch(sampler.draw(BATCH, rng), out)
    del first, sampler
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    with ReplayReader(path, ram_bytes=_BUDGET) as reader:
        reader.refresh()
        sampler = WindowSampler(reader, spec)
        for _ in range(batches):
            sampler.fetch(sampler.draw(BATCH, rng), out)
        evicted = reader.cache_stats.evicted_bytes
        print(json.dumps({"before": before, "peak": _status("VmHWM"), "evicted": evicted}))


if __name__ == "__main__":
    _sample(Path(sys.argv[1]), int(sys.argv[2]))
