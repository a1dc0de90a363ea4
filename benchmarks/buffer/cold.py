"""Part 2: batches of which a share m of the rows is on the disk only.

A pass reads every row once, in random order, in batches; the next batch is drawn and prefetched
before the present one is fetched. How the page cache is bounded before a pass:

  bounded  The reader's budget is 1 - m of the data. Everything that it does not hold mapped is
           dropped (posix_fadvise DONTNEED on whole files spares mapped pages), so the kernel
           keeps no more than the budget.
  robbed   The budget is larger than the data, and a random share m of the records is dropped
           behind the reader's back, after its mapping was given back by madvise DONTNEED.
  memmap   For contrast, np.memmap: everything but a share 1 - m of the rows, which another
           mapping holds, is dropped before every batch, what the kernel read ahead included.

The bytes that the disk really gave (/proc/self/io) are the share in the remarks. The disk's limit:
records of the same size in a file of their own, dropped before, read at random by pread with 1..64
threads, with and without O_DIRECT: the best median. Each contender has its own thread, because
the reader counts its thread's page faults.
"""

import functools
import itertools
import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.buffer.contenders import write_ours
from benchmarks.buffer.data import Source, record_bytes
from benchmarks.buffer.disk import DEPTHS, RecordFile
from benchmarks.buffer.measure import Options, Rates, Row, spread, take_turns
from benchmarks.buffer.passes import MemmapBatches, Pass

_RECORDS = {84: 25_600, 224: 5_120}
_SHARES = (0.5, 0.9)
_TARGET = 0.7
_WARM = "all cached"


def run(options: Options) -> list[Row]:
    """Rows of this part."""
    return [row for side in _RECORDS for row in _side(options, side)]


def _side(options: Options, side: int) -> list[Row]:
    count = _RECORDS[side] // (5 if options.quick else 1)
    root = options.root / f"cold{side}"
    shutil.rmtree(root, ignore_errors=True)
    passes: dict[str, Pass] = {}
    try:
        write_ours(root / _WARM, Source(side), count)
        for name in [f"bounded {share}" for share in _SHARES] + ["robbed"]:
            shutil.copytree(root / _WARM, root / name)
        passes[_WARM] = Pass(root / _WARM, 2.0)
        for share in _SHARES:
            passes[f"bounded {share}"] = Pass(root / f"bounded {share}", 1 - share)
        passes["robbed"] = Pass(root / "robbed", 2.0)
        memmap = MemmapBatches(root / "memmap", Source(side), count)
        disk = RecordFile(root / "disk", record_bytes(side), count)
        rates = _measure(options, passes, memmap, disk)
    finally:
        for each in passes.values():
            each.reader.close()
        shutil.rmtree(root, ignore_errors=True)
    return _rows(side, rates, passes)


def _measure(
    options: Options, passes: dict[str, Pass], memmap: MemmapBatches, disk: RecordFile
) -> Rates:
    threads = {name: ThreadPoolExecutor(1) for name in (*passes, "memmap")}

    def turn(thread: str, work: Callable[..., float], *arguments: float) -> Callable[[], float]:
        return lambda: threads[thread].submit(work, *arguments).result()

    for name, each in passes.items():
        turn(name, each.run)()  # checksums are verified here
        each.real_shares.clear()
    turns = {_WARM: turn(_WARM, passes[_WARM].run_warm)}
    for share in _SHARES:
        name = f"bounded {share}"
        turns[name] = turn(name, passes[name].run_bounded)
        turns[f"robbed {share}"] = turn("robbed", passes["robbed"].run_robbed, share)
        turns[f"memmap {share}"] = turn("memmap", memmap.run, share, options.seconds)
    for depth, direct in itertools.product(DEPTHS, (False, True)):
        name = f"disk limit: pread, {depth} threads{', O_DIRECT' * direct}"
        turns[name] = functools.partial(disk.rate, depth, options.seconds / 2, direct=direct)
    return take_turns(turns, options.rounds)


def _rows(side: int, rates: Rates, passes: dict[str, Pass]) -> list[Row]:
    case = f"{side} px"
    disks = {name: values for name, values in rates.items() if name.startswith("disk")}
    best = max(disks, key=lambda name: statistics.median(disks[name]))
    warm, disk = rates[_WARM], rates[best]
    gigabytes = statistics.median(disk) * record_bytes(side) / 1e9
    note = f"{gigabytes:.2f} GB/s; {spread(disk)}"
    rows = [
        Row(case, "ours, all cached", statistics.median(warm), "/s", note=spread(warm)),
        Row(case, best, gigabytes * 1e9 / record_bytes(side), "/s", note=note),
    ]
    for share in _SHARES:
        for kind, words in (
            ("bounded", "ours, budget and page cache bounded"),
            ("robbed", "ours, robbed by the kernel"),
            ("memmap", "np.memmap, page cache bounded"),
        ):
            values = rates[f"{kind} {share}"]
            limits = [min(w, d / share) for w, d in zip(warm, disk, strict=True)]
            part = statistics.median(v / limit for v, limit in zip(values, limits, strict=True))
            note = spread(values)
            if kind == "bounded":
                real = statistics.median(passes[f"bounded {share}"].real_shares)
                note = f"{100 * real:.0f} % of the bytes came from the disk; {note}"
            target = _TARGET if kind == "bounded" else None
            at = f"{case}, m = {share}; ratio to min(all cached, disk / m)"
            rows.append(Row(at, words, statistics.median(values), "/s", part, target, note=note))
    return rows
