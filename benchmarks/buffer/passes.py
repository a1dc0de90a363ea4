"""Passes over data of which a share is on the disk only: every row once, in random order."""

import itertools
import mmap
import time
from pathlib import Path

import numpy as np

from benchmarks.buffer.contenders import write_memmaps
from benchmarks.buffer.data import BATCH, CAMERAS, HORIZON, STATE, Source, segment_files
from benchmarks.buffer.measure import disk_read_bytes, drop_pages, keep_only, unmap_pages
from embodied.buffer.log.segments import FIRST_OFFSET, SegmentFile, end_of
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.draws import Chosen, DrawStrategy
from embodied.buffer.sample.samplers import WindowSampler, WindowSpec

_POPULATE_READ = 22


class Shuffled(DrawStrategy):
    """Every candidate once, in random order, then again."""

    def __init__(self) -> None:
        super().__init__()
        self._order = np.empty(0, np.int64)

    def draw(self, batch_size: int, rng: np.random.Generator) -> Chosen:
        """The next B candidates."""
        if len(self._order) < batch_size:
            self._order = rng.permutation(self._count)
        found, self._order = self._order[:batch_size], self._order[batch_size:]
        return Chosen(found, None)

    def restart(self) -> None:
        """Begin a new pass."""
        self._order = np.empty(0, np.int64)


class Pass:
    """Passes of our reader. budget: in parts of the data's bytes."""

    def __init__(self, path: Path, budget: float) -> None:
        self.path = path
        self.nbytes = sum(file.stat().st_size for file in segment_files(path))
        self.reader = ReplayReader(path, ram_bytes=int(budget * self.nbytes))
        self.reader.refresh()
        self.strategy = Shuffled()
        spec = WindowSpec(1, HORIZON, (*CAMERAS, STATE))
        self.sampler = WindowSampler(self.reader, spec, strategy=self.strategy)
        sizes = self.sampler.batch_spec(BATCH)
        self._out = {name: np.empty(size.shape, size.dtype) for name, size in sizes.items()}
        self._rng = np.random.default_rng(4)
        self.batches = self.sampler.num_candidates // BATCH
        self._row_bytes = self.nbytes / self.reader.num_steps
        self.real_shares: list[float] = []

    def run(self) -> float:
        """Rows a second of one pass: draw and prefetch the next batch, fetch the present one."""
        self.strategy.restart()
        before, started_s = disk_read_bytes(), time.perf_counter()
        following = self.sampler.draw(BATCH, self._rng)
        self.sampler.prefetch(following)
        for left in range(self.batches - 1, -1, -1):
            present = following
            if left:
                following = self.sampler.draw(BATCH, self._rng)
                self.sampler.prefetch(following)
            self.sampler.fetch(present, self._out)
        taken_s = time.perf_counter() - started_s
        rows = self.batches * BATCH
        self.real_shares.append((disk_read_bytes() - before) / (rows * self._row_bytes))
        return rows / taken_s

    def run_warm(self) -> float:
        """A pass over data that are all in memory, and mapped."""
        for path in segment_files(self.path):
            path.read_bytes()
        self.run()
        return self.run()

    def run_bounded(self) -> float:
        """A pass before which the page cache lost all that the reader does not hold mapped."""
        drop_pages(segment_files(self.path))
        return self.run()

    def run_robbed(self, share: float) -> float:
        """A pass before which the kernel took a share of the records back, mapped or not."""
        unmap_pages(self.path)
        for path, stretches in record_stretches(self.path).items():
            kept = self._rng.random(len(stretches)) >= share
            keep_only(path, itertools.compress(stretches, kept.tolist()))
        return self.run()


def record_stretches(path: Path) -> dict[Path, list[tuple[int, int]]]:
    """Offset and length of every record, by segment."""
    found: dict[Path, list[tuple[int, int]]] = {}
    for segment in segment_files(path):
        with SegmentFile(segment, int(segment.name[:8])) as file:
            records = file.records(FIRST_OFFSET, -1)
            found[segment] = [(r.offset, end_of(r) - r.offset) for r in records]
    return found


class MemmapBatches:
    """Random batches out of one np.memmap a field: what the kernel's own paging does.

    A share of the rows stays in memory, because a second mapping holds it; after every batch all
    else is dropped again, also what the kernel read around the rows that were asked for.
    """

    def __init__(self, path: Path, source: Source, count: int) -> None:
        self._path = path
        self._links = path.with_name(f"{path.name} held")
        self._links.mkdir()
        maps = write_memmaps(path, source, count)
        for name in maps:
            (self._links / name).hardlink_to(path / name)
        self._maps = {name: np.asarray(array) for name, array in maps.items()}
        self._out = {n: np.empty((BATCH, *a.shape[1:]), a.dtype) for n, a in self._maps.items()}
        self._rng = np.random.default_rng(5)
        self._count = count

    def run(self, share: float, seconds: float) -> float:
        """Rows a second if a share of them is on the disk only."""
        held = self._hold(np.flatnonzero(self._rng.random(self._count) >= share).tolist())
        done, taken_s = 0, 0.0
        while taken_s < seconds:
            unmap_pages(self._path)
            drop_pages(self._path.iterdir())
            rows = self._rng.integers(self._count, size=BATCH)
            started_s = time.perf_counter()
            for name, array in self._maps.items():
                np.take(array, rows, axis=0, out=self._out[name], mode="clip")
            taken_s += time.perf_counter() - started_s
            done += BATCH
        for mapped in held:
            mapped.close()
        return done / taken_s

    def _hold(self, rows: list[int]) -> list[mmap.mmap]:
        """Bring these rows into memory and map them, so that they are not dropped."""
        unmap_pages(self._path)
        held: list[mmap.mmap] = []
        for name, array in self._maps.items():
            size = array[0].nbytes
            keep_only(self._path / name, [(row * size, size) for row in rows])
            with (self._links / name).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            for row in rows:
                start = row * size // mmap.PAGESIZE * mmap.PAGESIZE
                mapped.madvise(_POPULATE_READ, start, (row + 1) * size - start)
            held.append(mapped)
        return held
