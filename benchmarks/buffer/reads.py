"""Part 1: random batches out of the page cache, against a gather in RAM and other buffers."""

import shutil
import statistics

from benchmarks.buffer.contenders import (
    GatherLimit,
    LeRobot,
    Memmap,
    Ours,
    OursFresh,
    OursNext,
    TorchRL,
    is_installed,
)
from benchmarks.buffer.data import Source
from benchmarks.buffer.measure import Options, Row, rate_of, ratio, spread, take_turns

_RECORDS = {84: 6400, 224: 1600}
_TARGETS = {84: 0.40, 224: 0.35}
_TIMES = {TorchRL: 4.0, LeRobot: 10.0}


def run(options: Options) -> list[Row]:
    """Rows of this part."""
    return [row for side in (84, 224) for row in _side(options, side)]


def _side(options: Options, side: int) -> list[Row]:
    count = _RECORDS[side] // (4 if options.quick else 1)
    root = options.root / f"reads{side}"
    shutil.rmtree(root, ignore_errors=True)
    kinds = [GatherLimit, Ours, OursFresh, OursNext, Memmap, TorchRL, LeRobot]
    missing = [kind for kind in (TorchRL, LeRobot) if not is_installed(kind)]
    try:
        contenders = {}
        for kind in kinds:
            if kind not in missing:
                folder = "ours" if issubclass(kind, Ours) else kind.__name__
                contenders[kind.name] = kind(root / folder, Source(side), count)
        for contender in contenders.values():
            rate_of(contender.read, 4 * options.seconds)
        turns = {
            name: lambda read=contender.read: rate_of(read, options.seconds)
            for name, contender in contenders.items()
        }
        rates = take_turns(turns, options.rounds)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return _rows(side, count, rates, missing)


def _rows(side: int, count: int, rates: dict[str, list[float]], missing: list[type]) -> list[Row]:
    limit = GatherLimit.name
    case = f"{side} px, {count:,} records"
    rows: list[Row] = []
    for name, values in rates.items():
        target = _TARGETS[side] if name == Ours.name else None
        middle, part = statistics.median(values), ratio(rates, name, limit)
        note = "noise of the machine: " * (name == limit) + spread(values)
        rows.append(Row(case, name, middle, "/s", part, target, note=note))
    for kind, times in _TIMES.items():
        if kind in missing:
            note = f"not installed: {kind.remark}"
            rows.append(Row(case, f"ours to {kind.name}", "–", note=note))
            continue
        mine = statistics.median(rates[Ours.name])
        part = ratio(rates, Ours.name, kind.name)
        rows.append(Row(case, f"ours to {kind.name}", mine, "/s", part, times))
        if kind is LeRobot:
            both = ratio(rates, OursNext.name, kind.name)
            mine = statistics.median(rates[OursNext.name])
            name = f"ours with next observations to {kind.name}"
            rows.append(Row(case, name, mine, "/s", both, note="it always gives both"))
    return rows
