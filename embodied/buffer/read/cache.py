"""Records of large features in memory: read-only maps of the segments, kept within a budget.

What is mapped and has been touched counts; it is counted, and given back, in windows of 64 KiB,
because that is what the kernel maps around a fault. Reads of what is not there yet are begun
together, so that the disk sees a deep queue, and only then waited for.
"""

import mmap
import os
import resource
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embodied.buffer.log.segments import segment_path

_WINDOW_BITS = 16
_WINDOW = 1 << _WINDOW_BITS
_PAGE = mmap.PAGESIZE
_MOST_DISTRUST = 4096
_SPARE_FILES = 64


@dataclass(slots=True)
class CacheStats:
    """hits, misses: records found in memory and not. read_bytes: asked from the disk.
    evicted_bytes: given back. resident_bytes: now in memory. major_faults: reads that nobody had
    asked for: the kernel had taken pages back."""

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    evicted_bytes: int = 0
    resident_bytes: int = 0
    major_faults: int = 0


class _Map:
    """One mapped segment. base: number of its first window. shift: of its address in a window."""

    __slots__ = ("base", "data", "map", "shift", "size", "view")

    def __init__(self, path: Path, base: int) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size = os.fstat(fd).st_size
            self.map = mmap.mmap(fd, self.size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.map.madvise(mmap.MADV_RANDOM)
        self.view = memoryview(self.map)
        address = np.frombuffer(self.map, np.uint8).__array_interface__["data"][0]
        self.shift = address & (_WINDOW - 1)
        self.base = base

    @property
    def num_windows(self) -> int:
        return ((self.size + self.shift) >> _WINDOW_BITS) + 1

    def advise(self, option: int, start: int, end: int) -> None:
        start = max(0, start) // _PAGE * _PAGE
        end = min(end, self.size)
        if end > start:
            self.map.madvise(option, start, end - start)


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
        self._resident = np.zeros(1024, np.bool_)
        self._visited = np.zeros(1024, np.bool_)
        self._asked = np.zeros(1024, np.bool_)
        self._ring: deque[tuple[int, int]] = deque()
        self._distrust = 0
        self._next_distrust = 64
        self._faults = _major_faults()
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
        if self._next_base > len(self._resident):
            size = max(self._next_base, 2 * len(self._resident))
            self._resident = _grown(self._resident, size)
            self._visited = _grown(self._visited, size)
            self._asked = _grown(self._asked, size)

    def close(self, number: int) -> None:
        """Unmap a segment if it is mapped."""
        mapped = self._maps.pop(number, None)
        if mapped is None:
            return
        windows = slice(mapped.base, mapped.base + mapped.num_windows)
        self.stats.resident_bytes -= int(self._resident[windows].sum()) * _WINDOW
        self._resident[windows] = False
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
        self, segments: np.ndarray, starts: np.ndarray, ends: np.ndarray, known: np.ndarray
    ) -> None:
        """Begin to read stretches that are not in memory; all arrays [n].

        starts, ends: offsets in the segments. known: whether it was read before, so that it may
        still be there.
        """
        self._note_faults()
        if self._distrust > 0:
            self._distrust -= 1
            known = np.zeros_like(known)
        if self.bounded:
            first, last = self._windows(segments, starts, ends)
            known = known & self._expected(first, last)
            _set_all(self._asked, first[~known], last[~known])
        missing = np.flatnonzero(~known)
        self.stats.hits += len(known) - len(missing)
        self.stats.misses += len(missing)
        if not len(missing):
            return
        will_need = mmap.MADV_WILLNEED
        for number, start, end in zip(
            segments[missing].tolist(),
            starts[missing].tolist(),
            ends[missing].tolist(),
            strict=True,
        ):
            self._maps[number].advise(will_need, start, end)
            self.stats.read_bytes += end - start

    def _windows(
        self, segments: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """First and last window of each stretch [n]."""
        base = np.empty(len(segments), np.int64)
        for number in np.unique(segments).tolist():
            mapped = self._maps[number]
            base[segments == number] = (mapped.base << _WINDOW_BITS) + mapped.shift
        return (base + starts) >> _WINDOW_BITS, (base + ends - 1) >> _WINDOW_BITS

    def _expected(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Whether each stretch is in memory, or has been asked for [n]."""
        found = np.ones(len(first), np.bool_)
        for step in range(int((last - first).max(initial=0)) + 1):
            window = np.minimum(first + step, last)
            found &= self._resident[window] | self._asked[window]
        return found

    def touch(self, segments: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        """Count stretches [n] as in memory, because they are about to be read, and give others
        back until the budget holds again."""
        first, last = self._windows(segments, starts, ends)
        for i in np.flatnonzero(~_all_set(self._resident, first, last)).tolist():
            number = int(segments[i])
            for window in range(int(first[i]), int(last[i]) + 1):
                if not self._resident[window]:
                    self._resident[window] = True
                    self._ring.append((number, window))
                    self.stats.resident_bytes += _WINDOW
        _set_all(self._visited, first, last)
        _set_all(self._asked, first, last, value=False)
        self._evict()

    def _evict(self) -> None:
        while self.stats.resident_bytes > self.budget_bytes and self._ring:
            number, window = self._ring.popleft()
            mapped = self._maps.get(number)
            if mapped is None or not self._resident[window]:
                continue
            if self._visited[window]:
                self._visited[window] = False
                self._ring.append((number, window))
                continue
            self._resident[window] = False
            start = ((window - mapped.base) << _WINDOW_BITS) - mapped.shift
            mapped.advise(mmap.MADV_DONTNEED, start, start + _WINDOW)
            self.stats.resident_bytes -= _WINDOW
            self.stats.evicted_bytes += _WINDOW

    def _note_faults(self) -> None:
        """Ask for everything again for a while if the kernel has taken pages back."""
        faults = _major_faults()
        if faults > self._faults and self._distrust == 0:
            self.stats.major_faults += faults - self._faults
            self._distrust = self._next_distrust
            self._next_distrust = min(2 * self._next_distrust, _MOST_DISTRUST)
        self._faults = faults

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


def _all_set(bits: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Whether all bits of each range, its last one included, are set [n]."""
    found = np.ones(len(first), np.bool_)
    for step in range(int((last - first).max(initial=0)) + 1):
        found &= bits[np.minimum(first + step, last)]
    return found


def _set_all(bits: np.ndarray, first: np.ndarray, last: np.ndarray, *, value: bool = True) -> None:
    for step in range(int((last - first).max(initial=0)) + 1):
        bits[np.minimum(first + step, last)] = value
