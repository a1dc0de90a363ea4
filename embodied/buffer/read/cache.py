"""Records of large features in memory: read-only maps of the segments, kept within a budget.

What is mapped and has been touched counts; it is counted, and given back, in windows of 64 KiB,
because that is what the kernel maps around a fault. Reads of what is not there yet are begun
together, so that the disk sees a deep queue, and only then waited for.

A window is counted as of one tick, a record is asked for at another: a record is in memory if all
of its windows have been there since before it was asked for. (A window that is there says nothing
of a record that was never read: only the pages that somebody read are.)
"""

import mmap
import os
import resource
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embodied.buffer.log.segments import segment_path
from embodied.buffer.read.advice import Advisor

_WINDOW_BITS = 16
_WINDOW = 1 << _WINDOW_BITS
_PAGE = mmap.PAGESIZE
_MOST_DISTRUST = 4096
_FEW_FAULTS = 8
"""Major faults in one batch that count for nothing: a page table or code may have caused them."""
_SOON = 8
"""Batches between asking for a record and reading it, at most."""
_SPARE_FILES = 64


@dataclass(slots=True)
class CacheStats:
    """hits, misses: records found in memory and not. read_bytes: asked from the disk.
    evicted_bytes: given back. resident_bytes: now in memory. major_faults: reads that were waited
    for although the record counted as there: the kernel had taken pages back."""

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    evicted_bytes: int = 0
    resident_bytes: int = 0
    major_faults: int = 0


class _Map:
    """One mapped segment. base: number of its first window. shift: of its address in a window."""

    __slots__ = ("address", "base", "map", "shift", "size", "view")

    def __init__(self, path: Path, base: int) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # As long as it is at that instant: the writer cuts what it reserved when it seals.
            self.map = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.size = len(self.map)
        self.map.madvise(mmap.MADV_RANDOM)
        self.view = memoryview(self.map)
        self.address = np.frombuffer(self.map, np.uint8).__array_interface__["data"][0]
        self.shift = self.address & (_WINDOW - 1)
        self.base = base

    @property
    def num_windows(self) -> int:
        return ((self.size + self.shift) >> _WINDOW_BITS) + 1

    def stretch(self, window: int) -> tuple[int, int]:
        """Addresses of a window's first byte and of the one after its last."""
        start = ((window - self.base) << _WINDOW_BITS) - self.shift
        return self.address + max(0, start), self.address + min(start + _WINDOW, self.size)


class SegmentCache:
    """Maps of segments and which of their windows are in memory.

    budget_bytes: most of mapped segments that stays in memory. While all segments together are
    smaller, nothing is counted and nothing given back. Victims are chosen by CLOCK (second chance).
    """

    def __init__(self, directory: Path, budget_bytes: int) -> None:
        self._directory = directory
        self.budget_bytes = budget_bytes
        self._maps: dict[int, _Map] = {}
        self._total = 0
        self._next_base = 0
        self._born = np.zeros(1024, np.int64)
        self._visited = np.zeros(1024, np.bool_)
        self._held = np.zeros(1024, np.int64)
        self._portion = 0
        self._ring: deque[tuple[int, int]] = deque()
        self._advisor = Advisor()
        self._tick = 1
        self._begun = 0
        self._distrust = 0
        self._next_distrust = 64
        self.stats = CacheStats()

    def open(self, number: int, *, sealed: bool) -> None:
        """Map a segment (again), which may be deleted afterwards. Raises FileNotFoundError."""
        self.close(number)
        self._allow_files()
        try:
            mapped = _Map(segment_path(self._directory, number, sealed=sealed), self._next_base)
        except FileNotFoundError:
            mapped = _Map(segment_path(self._directory, number, sealed=True), self._next_base)
        self._maps[number] = mapped
        self._total += mapped.size
        self._next_base += mapped.num_windows
        if self._next_base > len(self._born):
            size = max(self._next_base, 2 * len(self._born))
            self._born = _grown(self._born, size)
            self._visited = _grown(self._visited, size)
            self._held = _grown(self._held, size)

    def close(self, number: int) -> None:
        """Unmap a segment if it is mapped."""
        mapped = self._maps.pop(number, None)
        if mapped is None:
            return
        self._advisor.wait()
        windows = slice(mapped.base, mapped.base + mapped.num_windows)
        self.stats.resident_bytes -= int(np.count_nonzero(self._born[windows])) * _WINDOW
        self._born[windows] = 0
        self._total -= mapped.size
        with suppress(BufferError):  # somebody still looks at it: unmapped with the last view
            mapped.view.release()
            mapped.map.close()

    def covers(self, number: int) -> bool:
        """Whether a segment is mapped up to its present end: one that a dead writer left open may
        have been made larger by the next."""
        mapped = self._maps.get(number)
        return mapped is not None and mapped.map.size() <= mapped.size

    def view(self, number: int) -> memoryview:
        """The bytes of a mapped segment."""
        return self._maps[number].view

    @property
    def bounded(self) -> bool:
        """Whether the segments are larger than the budget, so that use must be counted."""
        return self._total > self.budget_bytes

    def request(
        self, segments: np.ndarray, starts: np.ndarray, ends: np.ndarray, asked: np.ndarray
    ) -> np.ndarray:
        """Begin to read stretches that are not in memory; all arrays [n].

        starts, ends: offsets in the segments. asked: what this, or `admit`, returned for the
        records last, 0 for those that were never asked for. Returns the same for this time.
        """
        self._tick += 1
        soon = (asked < 0) & (asked < _SOON - self._tick)
        if self._distrust > 0:
            self._distrust -= 1
            known = soon
        elif self.bounded:
            known = soon | self._found(*self._windows(segments, starts, ends), asked)
        else:
            known = asked != 0
        missing = np.flatnonzero(~known)
        self.stats.hits += int(np.count_nonzero(known & ~soon))
        self.stats.misses += len(missing)
        if len(missing):
            base = self._per_map(segments[missing], lambda mapped: mapped.address)
            first, last = base + starts[missing], base + ends[missing]
            self.stats.read_bytes += int((last - first).sum())
            self._advisor.begin_reading(first, last)
            self._begun = self._tick
        return np.where(soon, asked, -self._tick)

    def settled(self, asked: np.ndarray) -> bool:
        """Whether nothing need be asked for: everything fits, and these records [n] were."""
        return self._distrust == 0 and not self.bounded and bool(asked.all())

    def wait(self, asked: np.ndarray) -> None:
        """Return when the kernel knows of all that was asked for [n]."""
        if (asked == -self._begun).any():
            self._advisor.wait()

    def admit(
        self, segments: np.ndarray, starts: np.ndarray, ends: np.ndarray, asked: np.ndarray
    ) -> np.ndarray:
        """Count stretches [n] as in memory, because they are about to be read, and give others
        back until the budget holds again. Arguments and result are those of `request`."""
        if self.bounded:
            self._portion += 1
            first, last = self._windows(segments, starts, ends)
            found = self._found(first, last, np.abs(asked))
            for step in range(int((last - first).max(initial=0)) + 1):
                window = np.minimum(first + step, last)
                self._held[window] = self._portion
                self._visited[window[found]] = True
            new = np.flatnonzero(~found)
            for number, begin, end in zip(
                segments[new].tolist(), first[new].tolist(), last[new].tolist(), strict=True
            ):
                for window in range(begin, end + 1):
                    if not self._born[window]:
                        self._born[window] = self._tick
                        self._ring.append((number, window))
                        self.stats.resident_bytes += _WINDOW
            self._evict()
        return np.full(len(asked), self._tick)

    def _windows(
        self, segments: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """First and last window of each stretch [n]."""
        base = self._per_map(segments, lambda mapped: (mapped.base << _WINDOW_BITS) + mapped.shift)
        return (base + starts) >> _WINDOW_BITS, (base + ends - 1) >> _WINDOW_BITS

    def _per_map(self, segments: np.ndarray, value: Callable[[_Map], int]) -> np.ndarray:
        """A number of each record's map, int64 [n]."""
        numbers, inverse = np.unique(segments, return_inverse=True)
        return np.array([value(self._maps[n]) for n in numbers.tolist()], np.int64)[inverse]

    def _found(self, first: np.ndarray, last: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """Whether each stretch has been in memory since before it was asked for [n]."""
        found = np.ones(len(first), np.bool_)
        for step in range(int((last - first).max(initial=0)) + 1):
            born = self._born[np.minimum(first + step, last)]
            found &= (born > 0) & (born <= asked)
        return found

    def _evict(self) -> None:
        """CLOCK: a window that was found there again since the hand passed stays once more, and
        one that is about to be read stays."""
        victims: list[tuple[int, int]] = []
        for _ in range(2 * len(self._ring)):
            if self.stats.resident_bytes <= self.budget_bytes:
                break
            number, window = self._ring.popleft()
            mapped = self._maps.get(number)
            if mapped is None or not self._born[window]:
                continue
            if self._visited[window] or self._held[window] == self._portion:
                self._visited[window] = False
                self._ring.append((number, window))
                continue
            self._born[window] = 0
            victims.append(mapped.stretch(window))
            self.stats.resident_bytes -= _WINDOW
            self.stats.evicted_bytes += _WINDOW
        if victims:
            starts, ends = np.array(victims).T
            self._advisor.give_back(starts, ends)

    def shut(self) -> None:
        """Unmap everything; safe to call twice."""
        for number in list(self._maps):
            self.close(number)
        self._advisor.close()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around reads of what should be there: if the kernel has taken it back, then ask for
        everything again for a while."""
        before = _major_faults()
        yield
        faults = _major_faults() - before
        if faults >= _FEW_FAULTS and self._distrust == 0:
            self.stats.major_faults += faults
            self._distrust = self._next_distrust
            self._next_distrust = min(2 * self._next_distrust, _MOST_DISTRUST)

    def _allow_files(self) -> None:
        """Raise the limit of open files: each map holds one."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = len(self._maps) + 4 * _SPARE_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = hard if hard != resource.RLIM_INFINITY else 1 << 20
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(2 * soft, wanted), most), hard))


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    grown = np.zeros(size, array.dtype)
    grown[: len(array)] = array
    return grown
