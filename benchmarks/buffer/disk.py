"""What the disk itself does: random reads of records at every queue depth, and appending."""

import mmap
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
_BLOCK = mmap.PAGESIZE


class RecordFile:
    """A file of equal records, read at random by pread; not in the page cache when it begins."""

    def __init__(self, path: Path, record_bytes: int, count: int) -> None:
        self._path = path
        self._size = record_bytes
        self._rng = np.random.default_rng(6)
        self._count = count
        self._left = np.empty(0, np.int64)
        block = self._rng.bytes(record_bytes)
        with path.open("wb") as file:
            for _ in range(count):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def _next(self, count: int) -> np.ndarray:
        """Records that were not read since the file was dropped from the page cache."""
        if len(self._left) < count:
            fd = os.open(self._path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
            self._left = self._rng.permutation(self._count)
        found, self._left = self._left[:count], self._left[count:]
        return found

    def rate(self, threads: int, seconds: float, *, direct: bool) -> float:
        """Records a second, read by so many threads for about so many seconds."""
        most = self._count // 2
        rows = self._next(most)
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        fd = os.open(self._path, flags)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        deadline = time.perf_counter() + seconds
        done = [0] * threads

        def work(number: int) -> None:
            memory = mmap.mmap(-1, self._size + 2 * _BLOCK)
            for row in rows[number::threads].tolist():
                start, end = row * self._size, (row + 1) * self._size
                if direct:
                    start, end = start // _BLOCK * _BLOCK, end + -end % _BLOCK
                os.preadv(fd, [memoryview(memory)[: end - start]], start)
                done[number] += 1
                if time.perf_counter() > deadline:
                    return

        started_s = time.perf_counter()
        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        taken_s = time.perf_counter() - started_s
        os.close(fd)
        return sum(done) / taken_s


def append_rate(path: Path, record: bytes, count: int) -> float:
    """Records a second, appended to a preallocated file, made durable once at the end."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.posix_fallocate(fd, 0, count * len(record))
        os.fsync(fd)
        started_s = time.perf_counter()
        for number in range(count):
            os.pwrite(fd, record, number * len(record))
        os.fdatasync(fd)
        return count / (time.perf_counter() - started_s)
    finally:
        os.close(fd)
        path.unlink()


def fdatasync_times(path: Path, record: bytes, count: int) -> Sequence[float]:
    """Seconds of each write and fdatasync of a record, to a preallocated file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.posix_fallocate(fd, 0, count * len(record))
        os.fsync(fd)
        times_s: list[float] = []
        for number in range(count):
            started_s = time.perf_counter()
            os.pwrite(fd, record, number * len(record))
            os.fdatasync(fd)
            times_s.append(time.perf_counter() - started_s)
        return times_s
    finally:
        os.close(fd)
        path.unlink()
