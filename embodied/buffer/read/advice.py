"""madvise for many stretches of this process's memory in one system call, without the GIL."""

import ctypes
import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from embodied.core.errors import EmbodiedError

_LIBC = ctypes.CDLL(None, use_errno=True)
_PROCESS_MADVISE = 440
"""System call number, the same on every architecture (Linux 5.10)."""
_MOST = 1024
_PAGE = mmap.PAGESIZE
_NOT_KNOWN = {errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EBADF}


class Advisor:
    """Tells the kernel what will be read and what can go.

    Stretches are addresses starts, ends: int64 [n]; their pages must be mapped until the call, or
    `wait`, has returned. Where the kernel lacks process_madvise, or allows it only other advice,
    each stretch is a call of its own. Raises EmbodiedError if even that is refused.
    """

    def __init__(self) -> None:
        self._alone: set[int] = set()
        self._thread = ThreadPoolExecutor(1, "readahead")
        self._under_way: Future[None] | None = None
        self._process = -1

    def begin_reading(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Begin to read stretches, in a thread of its own."""
        self.wait()
        self._under_way = self._thread.submit(self._advise, mmap.MADV_WILLNEED, starts, ends)

    def wait(self) -> None:
        """Return when the kernel has taken over what was begun."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def give_back(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Take pages out of this process; they come back when they are read."""
        self._advise(mmap.MADV_DONTNEED, starts, ends)

    def close(self) -> None:
        """End the thread; safe to call twice."""
        self.wait()
        self._thread.shutdown()
        if self._process >= 0:
            os.close(self._process)
            self._process = -1

    def _advise(self, advice: int, starts: np.ndarray, ends: np.ndarray) -> None:
        first = starts // _PAGE * _PAGE
        vector = np.stack([first, -(-ends // _PAGE) * _PAGE - first], axis=1).astype(np.uint64)
        for i in range(0, len(vector), _MOST):
            self._advise_part(advice, vector[i : i + _MOST])

    def _advise_part(self, advice: int, vector: np.ndarray) -> None:
        """vector: address and length, uint64 [n, 2], contiguous."""
        if advice not in self._alone:
            done = self._together(advice, vector)
            if done == int(vector[:, 1].sum()):
                return
            if done < 0 and ctypes.get_errno() in _NOT_KNOWN:
                self._alone.add(advice)
        for address, length in vector.tolist():
            if _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice) < 0:
                reason = os.strerror(ctypes.get_errno())
                raise EmbodiedError(f"madvise({advice}) of {length} mapped bytes failed: {reason}")

    def _together(self, advice: int, vector: np.ndarray) -> int:
        """Bytes that were advised, or −1 and errno."""
        if self._process < 0:
            try:
                self._process = os.pidfd_open(os.getpid())
            except OSError as error:
                ctypes.set_errno(error.errno or errno.ENOSYS)
                return -1
        return _LIBC.syscall(
            ctypes.c_long(_PROCESS_MADVISE),
            ctypes.c_int(self._process),
            ctypes.c_void_p(vector.ctypes.data),
            ctypes.c_size_t(len(vector)),
            ctypes.c_int(advice),
            ctypes.c_uint(0),
        )
