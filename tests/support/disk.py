"""A disk that forgets: what a power cut may leave of a directory that a program was writing.

RecordingStorage does every operation for real and notes it; image() makes the files as they may be
found when the power went after any number of operations. The model is a journalling file system
like ext4 or xfs:

- sync and sync_data make everything done to that file before them durable, its size included;
  sync_directory the names in the directory. Nothing else does, and neither does the other's work:
  a synced file whose name was not synced may be gone.
- Of a file, each write since its last sync is there, or not, or torn, whatever became of writes
  before and after it. Torn: some of its 512-byte sectors, or its beginning up to any byte. A sector
  is written whole or not at all, so that a torn write harms no neighbour. Where a file has grown
  over what is not there, zeros are read. Changes of size by truncate and reserve are there up to
  some moment, in order, and writes follow them.
- Of names, either everything up to some moment is there (a journal; changes of size obey the same
  moment then), or any of the creations, renames and removals that no sync_directory followed, each
  by itself. A rename is there or not as a whole, and brings the file with it.
- Files that were there when recording began are durable.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from embodied.buffer.log.storage import Buffer, Storage

SECTOR = 512
_SIZES = ("truncate", "reserve")


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. file: which one, counted from 0; -1 for the directory's own.

    number: offset of a write, size of truncate and reserve. name, target: of files.
    """

    kind: str
    file: int = -1
    number: int = 0
    data: bytes = b""
    name: str = ""
    target: str = ""


class RecordingStorage(Storage):
    """Notes the operations on files of one directory, and on others only which were synced.

    cheap: leave out real syncs, which matter for nothing here.
    """

    def __init__(self, directory: Path, cheap: bool = True) -> None:
        self.ops: list[Op] = []
        self.synced_elsewhere: list[Path] = []
        self._directory = directory
        self._cheap = cheap
        found = sorted(directory.iterdir()) if directory.is_dir() else []
        self._start = {path.name: path.read_bytes() for path in found if path.is_file()}
        self._names = {name: number for number, name in enumerate(self._start)}
        self._num_files = len(self._names)
        self._open: dict[int, int] = {}

    @property
    def position(self) -> int:
        """How many operations there were."""
        return len(self.ops)

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self._names[path.name] = self._open[fd] = self._num_files
        self._num_files += 1
        self.ops.append(Op("create", self._open[fd], name=path.name))
        return fd

    def open(self, path: Path) -> int:
        fd = super().open(path)
        self._open[fd] = self._names[path.name]
        return fd

    def reserve(self, fd: int, nbytes: int) -> None:
        super().reserve(fd, nbytes)
        self.ops.append(Op("reserve", self._open[fd], nbytes))

    def write(self, fd: int, parts: Sequence[Buffer], offset: int) -> None:
        super().write(fd, parts, offset)
        self.ops.append(Op("write", self._open[fd], offset, b"".join(parts)))

    def truncate(self, fd: int, nbytes: int) -> None:
        super().truncate(fd, nbytes)
        self.ops.append(Op("truncate", self._open[fd], nbytes))

    def sync_data(self, fd: int) -> None:
        if not self._cheap:
            super().sync_data(fd)
        self.ops.append(Op("sync", self._open[fd]))

    def sync(self, fd: int) -> None:
        if not self._cheap:
            super().sync(fd)
        self.ops.append(Op("sync", self._open[fd]))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        file = self._names.pop(source.name)
        self._names[target.name] = file
        self.ops.append(Op("rename", file, name=source.name, target=target.name))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.ops.append(Op("unlink", self._names.pop(path.name), name=path.name))

    def sync_directory(self, path: Path) -> None:
        if not self._cheap:
            super().sync_directory(path)
        if path == self._directory:
            self.ops.append(Op("sync_directory"))
        else:
            self.synced_elsewhere.append(path)

    def image(self, at: int, rng: random.Random) -> dict[str, bytes]:
        """Files by name as they may be found after the first `at` operations."""
        ops = self.ops[:at]
        synced = {op.file: number for number, op in enumerate(ops) if op.kind == "sync"}
        names_synced = max(
            (n for n, op in enumerate(ops) if op.kind == "sync_directory"), default=-1
        )
        journal = rng.randint(0, at) if rng.random() < 0.5 else None
        keep = rng.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        names = {name: number for number, name in enumerate(self._start)}
        files = {number: bytearray(data) for number, data in enumerate(self._start.values())}
        stopped: set[int] = set()  # files of which a change of size is missing: so are later ones
        for number, op in enumerate(ops):
            data = files.setdefault(op.file, bytearray())
            if op.kind in ("create", "rename", "unlink"):
                likely = rng.random() < keep if journal is None else number < journal
                if number < names_synced or likely:
                    _change_names(names, op)
                continue
            durable = number < synced.get(op.file, -1)
            if op.kind == "write":
                _write(data, op, None if durable else rng, keep)
            elif op.kind in _SIZES:
                likely = rng.random() < keep if journal is None else number < journal
                if durable or (likely and op.file not in stopped):
                    _resize(data, op)
                else:
                    stopped.add(op.file)
        return {name: bytes(files[file]) for name, file in names.items()}


class InterruptedStorage(RecordingStorage):
    """Calls `interrupt`, which does not return, in place of the n-th operation and of all later
    ones. torn: if the n-th one is a write, some of it is done before; tore says that it was."""

    CHANGES = (
        *("create", "reserve", "write", "truncate", "sync_data", "sync"),
        *("rename", "unlink", "sync_directory"),
    )

    def __init__(
        self, directory: Path, n: int, torn: bool, interrupt: Callable[[], NoReturn]
    ) -> None:
        super().__init__(directory)
        self.tore = False
        self._left, self._torn, self._interrupt = n, torn, interrupt
        for name in self.CHANGES:
            setattr(self, name, partial(self._change, name, getattr(self, name)))

    def _change(self, name: str, change: Callable[..., Any], *args: Any) -> Any:
        self._left -= 1
        if self._left == 0 and self._torn and name == "write":
            fd, parts, offset = args
            whole = b"".join(parts)
            self.tore = True
            change(fd, [whole[: random.Random(len(whole)).randrange(len(whole))]], offset)
        if self._left <= 0:
            self._interrupt()
        return change(*args)


def _change_names(names: dict[str, int], op: Op) -> None:
    if op.kind != "create" and names.get(op.name) == op.file:
        del names[op.name]
    if op.kind == "create":
        names[op.name] = op.file
    elif op.kind == "rename":
        names[op.target] = op.file


def _resize(data: bytearray, op: Op) -> None:
    if op.kind == "truncate":
        del data[op.number :]
    data.extend(bytes(max(0, op.number - len(data))))


def _write(data: bytearray, op: Op, rng: random.Random | None, keep: float) -> None:
    """Write what of it is there; all if rng is None."""
    end = op.number + len(op.data)
    stretches = [(op.number, end)]
    if rng is not None and rng.random() >= keep:
        stretches = []
        fate = rng.random()
        if fate < 0.25:
            stretches = [(op.number, op.number + rng.randint(0, len(op.data)))]
        elif fate < 0.6:
            cuts = [op.number, *range(op.number - op.number % SECTOR + SECTOR, end, SECTOR), end]
            sectors = pairwise(cuts)
            stretches = [sector for sector in sectors if rng.random() < 0.5]
        if rng.random() < 0.3:
            data.extend(bytes(max(0, end - len(data))))
    for start, stop in stretches:
        data.extend(bytes(max(0, start - len(data))))
        data[start:stop] = op.data[start - op.number : stop - op.number]


def restore(directory: Path, image: Mapping[str, bytes]) -> None:
    """Make the directory, which must not exist, with these files."""
    directory.mkdir()
    for name, data in image.items():
        (directory / name).write_bytes(data)


@contextmanager
def whole_files_through(storage: RecordingStorage) -> Iterator[None]:
    """Let core.files.write_atomic do its operations on this storage meanwhile."""

    def write_atomic(path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.{storage.position}.0.tmp")
        fd = storage.create(temporary)
        try:
            storage.write(fd, [data], 0)
            storage.sync(fd)
        finally:
            storage.close(fd)
        storage.rename(temporary, path)
        storage.sync_directory(path.parent)

    with mock.patch("embodied.core.files.write_atomic", write_atomic):
        yield
