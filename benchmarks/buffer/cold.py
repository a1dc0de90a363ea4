"""Part 2: batches of which a share m of the rows is on the disk only.

A pass reads every row once, in random order, in batches; the next batch is drawn and prefetched
before the present one is fetched. How the page cache is bounded before a pass:

  bounded  The reader's budget is 1 - m of the data. Everything that it does not hold mapped is
           dropped (posix_fadvise DONTNEED on whole files spares mapped pages), so the kernel
           keeps no more than the budget.
  robbed   The budget is larger than the data, and a random share m of the records is dropped
           behind the reader's back, after its mapping was given back by madvise DONTNEED. Of
           np.memmap, the same.

The bytes that the disk really gave (/proc/self/io) are the share in the remarks. The disk's limit:
records of the same size in a file of their own, dropped before, read at random by pread with 1..64
threads, with and without O_DIRECT: the best median. Each contender has its own thread, because
the reader counts its thread's page faults.
"""

import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.buffer.contenders import write_ours
from benchmarks.buffer.data import Source, record_bytes
from benchmarks.buffer.disk import THREADS, RecordFile
from benchmarks.buffer.measure import Options, Rates, Row, spread, take_turns
from benchmarks.buffer.passes import MemmapPass, Pass

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
        memmap = MemmapPass(root / "memmap", Source(side), count)
        disk = RecordFile(root / "disk", record_bytes(side), count)
        rates = _measure(options, passes, memmap, disk)
    finally:
        for each in passes.values():
            each.reader.close()
        shutil.rmtree(root, ignore_errors=True)
    return _rows(side, rates, passes)


def _measure(
    options: Options, passes: dict[str, Pass], memmap: MemmapPass, disk: RecordFile
) -> Rates:
    turns: dict[str, Callable[[], float]] = {_WARM: passes[_WARM].run_warm}
    for share in _SHARES:
        turns[f"bounded {share}"] = passes[f"bounded {share}"].run_bounded
        turns[f"robbed {share}"] = lambda share=share: passes["robbed"].run_robbed(share)
        turns[f"memmap {share}"] = lambda share=share: memmap.run_robbed(share)
    for name, turn in turns.items():
        turns[name] = _in_own_thread(turn)
    for name, each in passes.items():
        _in_own_thread(each.run)()  # checksums are verified here
        each.real_shares.clear()
        del name
    for threads in THREADS:
        for direct in (False, True):
            name = f"disk: {threads} threads{', O_DIRECT' * direct}"
            turns[name] = lambda threads=threads, direct=direct: disk.rate(
                threads, options.seconds / 2, direct=direct
            )
    return take_turns(turns, options.rounds)


def _in_own_thread(work: Callable[[], float]) -> Callable[[], float]:
    pool = ThreadPoolExecutor(1)
    return lambda: pool.submit(work).result()


def _rows(side: int, rates: Rates, passes: dict[str, Pass]) -> list[Row]:
    case = f"{side} px"
    disks = {name: values for name, values in rates.items() if name.startswith("disk")}
    best = max(disks, key=lambda name: statistics.median(disks[name]))
    warm, disk = rates[_WARM], rates[best]
    gigabytes = statistics.median(disk) * record_bytes(side) / 1e9
    rows = [
        Row(case, "ours, all cached", statistics.median(warm), "/s", note=spread(warm)),
        Row(case, best, statistics.median(disk), "/s", note=f"{gigabytes:.2f} GB/s; {spread(disk)}"),
    ]
    for share in _SHARES:
        for kind, words in (
            ("bounded", "ours, budget and page cache bounded"),
            ("robbed", "ours, robbed by the kernel"),
            ("memmap", "np.memmap, robbed by the kernel"),
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
