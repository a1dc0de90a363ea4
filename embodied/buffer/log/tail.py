"""Follows the log while another process writes it."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from embodied.buffer.log.segments import (
    FIRST_OFFSET,
    Record,
    SegmentFile,
    end_of,
    list_segments,
    segment_path,
)


class LogReader:
    """Reads records in order, following a live writer. Needs no lock and never blocks.

    skip: asked for each sealed segment before it is read; True if its records are not wanted.
    resume: asked for each open one; where to begin in it, and the sequence number before that.
    damaged: (segment, offset) of each stretch of a sealed segment that could not be read.
    """

    def __init__(
        self,
        path: Path,
        skip: Callable[[int], bool] | None = None,
        resume: Callable[[SegmentFile], tuple[int, int]] | None = None,
    ) -> None:
        self._path = Path(path)
        self._skip = skip
        self._resume = resume
        self._file: SegmentFile | None = None
        self._number = 0
        self._offset = FIRST_OFFSET
        self._last_seq = -1
        self.damaged: list[tuple[int, int]] = []

    def poll(self) -> Iterator[Record]:
        """New whole records since the last call. It may also yield what is not flushed yet."""
        while self._file is not None or self._open_next():
            assert self._file is not None
            if self._file.deleted:  # if it was empty, its number may be in use again
                self._number -= 1
                self.close()
                continue
            # Asked before reading: once it is sealed, what is read below is all there will be.
            sealed = not segment_path(self._path, self._number, sealed=False).exists()
            while True:
                record = self._file.record_at(self._offset)
                if record is not None and record.seq > self._last_seq:
                    self._offset, self._last_seq = end_of(record), record.seq
                    yield record
                elif not sealed or not self._skip_damage():
                    break
            if not sealed:
                return
            self.close()

    def _open_next(self) -> bool:
        for number, sealed in self._ahead().items():
            if sealed and self._skip is not None and self._skip(number):
                self._number = number
                continue
            try:
                path = segment_path(self._path, number, sealed=sealed)
                self._file = SegmentFile(path, number)
            except FileNotFoundError:  # sealed or deleted between listing and opening
                try:
                    self._file = SegmentFile(segment_path(self._path, number, sealed=True), number)
                except FileNotFoundError:
                    continue
            self._number, self._offset, self._last_seq = number, FIRST_OFFSET, -1
            if self._resume is not None and not self._file.sealed:
                self._offset, self._last_seq = self._resume(self._file)
            if self._file.base_seq() is None and sealed:
                self.damaged.append((number, 0))
            return True
        return False

    def _ahead(self) -> dict[int, bool]:
        """Segments behind the present one. A listing may miss a name that changes meanwhile; where
        a number is missing there is another one, as no name changes twice."""
        found = list_segments(self._path)
        numbers = [self._number, *(number for number in found if number > self._number)]
        if any(b != a + 1 for a, b in pairwise(numbers)):
            found = dict(sorted((found | list_segments(self._path)).items()))
        return {number: sealed for number, sealed in found.items() if number > self._number}

    def _skip_damage(self) -> bool:
        """Go to the next whole record of a sealed segment; False if there is none."""
        assert self._file is not None
        if self._offset >= self._file.size:
            return False
        self.damaged.append((self._number, self._offset))
        found = self._file.find_after(self._offset + 8, self._last_seq)
        if found is None:
            return False
        self._offset = found
        return True

    def close(self) -> None:
        """Close the segment file; safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
