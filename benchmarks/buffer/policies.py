"""Part 6: hit rates of cache policies, by simulation over traces of the real samplers.

An item is a record; capacities are shares of all records at the end; hits are counted in the
second half of a trace. `optimum` knows the future (Belady 1966) and only says what is possible.
"""

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable

import numpy as np

from benchmarks.buffer.measure import Options, Row
from benchmarks.buffer.traces import TRACES

_STEPS = 20_000
_BATCHES = 1500
_CAPACITIES = (0.10, 0.25, 0.50)

Policy = Callable[[list[int], int, int], int]
"""(trace, capacity, where to begin to count) → hits."""


def lru(trace: list[int], capacity: int, since: int) -> int:
    """The one whose last use is longest ago leaves."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for i, item in enumerate(trace):
        if item in held:
            hits += i >= since
            held.move_to_end(item)
        else:
            if len(held) >= capacity:
                held.popitem(last=False)
            held[item] = None
    return hits


def fifo(trace: list[int], capacity: int, since: int) -> int:
    """The one that came first leaves."""
    held: dict[int, None] = {}
    hits = 0
    for i, item in enumerate(trace):
        if item in held:
            hits += i >= since
        else:
            if len(held) >= capacity:
                del held[next(iter(held))]
            held[item] = None
    return hits


def clock(trace: list[int], capacity: int, since: int) -> int:
    """As FIFO, but who was used since it was last looked at gets a second turn: as cache.py."""
    used: dict[int, bool] = {}
    ring: deque[int] = deque()
    hits = 0
    for i, item in enumerate(trace):
        if item in used:
            hits += i >= since
            used[item] = True
            continue
        while len(used) >= capacity:
            oldest = ring.popleft()
            if used[oldest]:
                used[oldest] = False
                ring.append(oldest)
            else:
                del used[oldest]
        used[item] = False
        ring.append(item)
    return hits


def sieve(trace: list[int], capacity: int, since: int) -> int:
    """As CLOCK, but who gets a second turn keeps its place (Zhang et al. 2024)."""
    used: dict[int, bool] = {}
    newer: dict[int, int] = {}
    older: dict[int, int] = {}
    oldest = newest = hand = -1
    hits = 0
    for i, item in enumerate(trace):
        if item in used:
            hits += i >= since
            used[item] = True
            continue
        if len(used) >= capacity:
            at = oldest if hand < 0 else hand
            while used[at]:
                used[at] = False
                at = newer[at] if newer[at] >= 0 else oldest
            after, before = newer.pop(at), older.pop(at)
            hand = after
            newest, oldest = (before if after < 0 else newest), (after if before < 0 else oldest)
            if after >= 0:
                older[after] = before
            if before >= 0:
                newer[before] = after
            del used[at]
        used[item] = False
        older[item], newer[item] = newest, -1
        if newest >= 0:
            newer[newest] = item
        else:
            oldest = item
        newest = item
    return hits


def chance(trace: list[int], capacity: int, since: int) -> int:
    """Any leaves."""
    generator = random.Random(10)
    held: dict[int, int] = {}
    items: list[int] = []
    hits = 0
    for i, item in enumerate(trace):
        if item in held:
            hits += i >= since
        elif len(items) < capacity:
            held[item] = len(items)
            items.append(item)
        else:
            place = int(generator.random() * capacity)
            del held[items[place]]
            items[place] = item
            held[item] = place
    return hits


def keep_first(trace: list[int], capacity: int, since: int) -> int:
    """None leaves, and what comes later is not admitted."""
    held: set[int] = set()
    hits = 0
    for i, item in enumerate(trace):
        if item in held:
            hits += i >= since
        elif len(held) < capacity:
            held.add(item)
    return hits


def reluctant_clock(trace: list[int], capacity: int, since: int) -> int:
    """As CLOCK, but when it is full, only one miss in four is admitted."""
    generator = random.Random(11)
    used: dict[int, bool] = {}
    ring: deque[int] = deque()
    hits = 0
    for i, item in enumerate(trace):
        if item in used:
            hits += i >= since
            used[item] = True
            continue
        if len(used) >= capacity:
            if generator.random() >= 0.25:
                continue
            while len(used) >= capacity:
                oldest = ring.popleft()
                if used[oldest]:
                    used[oldest] = False
                    ring.append(oldest)
                else:
                    del used[oldest]
        used[item] = False
        ring.append(item)
    return hits


def optimum(trace: list[int], capacity: int, since: int) -> int:
    """The one whose next use is farthest leaves, or is not admitted."""
    following = [len(trace)] * len(trace)
    seen: dict[int, int] = {}
    for i in range(len(trace) - 1, -1, -1):
        following[i] = seen.get(trace[i], len(trace))
        seen[trace[i]] = i
    held: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    hits = 0
    for i, item in enumerate(trace):
        hits += item in held and i >= since
        held[item] = following[i]
        heapq.heappush(heap, (-following[i], item))
        while len(held) > capacity:
            use, farthest = heapq.heappop(heap)
            if held.get(farthest) == -use:
                del held[farthest]
    return hits


POLICIES: dict[str, Policy] = {
    "CLOCK": clock,
    "LRU": lru,
    "SIEVE": sieve,
    "FIFO": fifo,
    "random": chance,
    "no eviction": keep_first,
    "CLOCK admitting 1 in 4": reluctant_clock,
}


def run(options: Options) -> list[Row]:
    """Rows of this part."""
    scale = 10 if options.quick else 1
    rows: list[Row] = []
    for name, batches in TRACES.items():
        trace = np.concatenate(list(batches(_STEPS // scale, _BATCHES // scale))).tolist()
        since = len(trace) // 2
        counted = len(trace) - since
        for share in _CAPACITIES:
            capacity = int(share * _STEPS / scale)
            hits = {n: policy(trace, capacity, since) for n, policy in POLICIES.items()}
            percent = {n: f"{100 * count / counted:.1f}" for n, count in hits.items()}
            best = optimum(trace, capacity, since)
            others = max(count for n, count in hits.items() if n != "CLOCK")
            note = ", ".join(f"{n} {text}" for n, text in percent.items() if n != "CLOCK")
            note += f"; optimum {100 * best / counted:.1f}"
            case = f"{name}; room for {100 * share:.0f} %; ratio to the best other"
            rows.append(
                Row(case, "CLOCK", f"{percent['CLOCK']} %", "", hits["CLOCK"] / others, note=note)
            )
    return rows
