"""What in a buffer folder is damaged: every record is read and checked, and losses are named."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embodied.buffer.log.lock import LOCK_NAME
from embodied.buffer.log.segments import FIRST_OFFSET, SegmentFile, Walk, list_segments
from embodied.buffer.steps.blocks import Block, block_path
from embodied.buffer.upkeep.contents import Contents, Key, Segment
from embodied.buffer.write.acknowledged import NAME as ACKNOWLEDGED
from embodied.buffer.write.catalogue import NAME as CATALOGUE
from embodied.core.errors import CorruptDataError
from embodied.core.files import read_tensors

_OURS = re.compile(
    rf"\d{{8}}\.(seg|seg\.open|cols|cols\.part)|{LOCK_NAME}|{ACKNOWLEDGED}|"
    rf"{CATALOGUE}(-wal|-shm|-journal)?"
)
_COLUMN_FILE = re.compile(r"(\d{8})\.cols(\.part)?")


class Loss(msgspec.Struct, frozen=True):
    """Steps of an episode that cannot be read, by index."""

    stream: str
    episode: int
    steps: tuple[int, ...]

    def __str__(self) -> str:
        return f"stream '{self.stream}', episode {self.episode}, steps {ranges(self.steps)}"


class Finding(msgspec.Struct, frozen=True):
    """Something wrong with a file. kind: "record" (bytes that cannot be read), "gap" (steps that
    no segment has), "columns", "tail", "orphan" or "foreign"; only the first two lose data.
    offset: in bytes; -1 for all of the file."""

    kind: str
    file: str
    offset: int
    message: str
    lost: tuple[Loss, ...] = ()

    @property
    def is_damage(self) -> bool:
        """Whether recorded data are lost."""
        return self.kind in ("record", "gap")

    def __str__(self) -> str:
        place = f" at byte {self.offset}" if self.offset >= 0 else ""
        lost = f"; lost: {'; '.join(map(str, self.lost))}" if self.lost else ""
        return f"{self.file}{place}: {self.message}{lost}"


class Report(msgspec.Struct, frozen=True):
    """What verify found. episodes: those of which something is there; nbytes: of the segments."""

    segments: int
    nbytes: int
    episodes: int
    closed: int
    steps: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no recorded data are lost."""
        return not any(finding.is_damage for finding in self.findings)


def verify(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> Report:
    """Read all of a buffer folder. on_bytes: told the size of each segment that was read.

    Works beside a live writer. Raises ConfigError if there is no such folder.
    """
    contents = Contents(path, thorough=True, on_bytes=on_bytes)
    findings: list[Finding] = []
    for segment in contents.segments:
        findings += _segment(contents, segment)
    findings += _gaps(contents, findings)
    findings += _files(contents)
    return Report(
        segments=len(contents.segments),
        nbytes=contents.nbytes,
        episodes=len(contents.episodes),
        closed=sum(episode.closed for episode in contents.episodes.values()),
        steps=contents.num_steps,
        findings=tuple(findings),
    )


def _segment(contents: Contents, segment: Segment) -> Iterator[Finding]:
    offsets = [offset for number, offset in contents.damaged if number == segment.number]
    good = _good(contents, segment)
    end = _end(segment, int(good.max(initial=FIRST_OFFSET)))
    columns = _columns(segment)
    lost = {} if columns is None else _lost(contents, columns, good)
    known = columns is not None
    cut = segment.sealed and end < max(segment.nbytes, 0 if columns is None else columns.size)
    if cut and (not offsets or offsets[-1] < end):
        offsets.append(end)
    for offset, stop in itertools.pairwise([*offsets, 1 << 32]):
        here = {
            key: tuple(index for index, record in steps if offset <= record < stop)
            for key, steps in lost.items()
        }
        losses = tuple(Loss(*key, steps) for key, steps in here.items() if steps)
        told = "" if known else " (which steps stood there, the gaps below tell)"
        what = "truncated" if cut and offset == end else "damaged"
        what = "the file's header is damaged" if offset == 0 else f"{what}{told}"
        yield Finding("record", segment.path.name, offset, what, losses)
    if segment.sealed and not known:
        yield Finding(
            "columns",
            f"{segment.number:08d}.cols",
            -1,
            "the segment's column file is missing or damaged; the next writer makes it again",
        )
    if not segment.sealed and _torn(segment, end):
        yield Finding(
            "tail",
            segment.path.name,
            end,
            "a record was being written here when the writer ended, or is now; it was never "
            "acknowledged, and the next writer cuts it off",
        )


class _Columns(msgspec.Struct, frozen=True):
    """A sealed segment's column file. size: bytes that the segment had when it was written."""

    block: Block
    size: int


def _columns(segment: Segment) -> _Columns | None:
    """The column file, also if the segment has been truncated since."""
    if not segment.sealed:
        return None
    path = block_path(segment.path.parent, segment.number)
    try:
        size = msgspec.json.decode(read_tensors(path)[1], type=dict[str, Any])["size"]
        return _Columns(Block.load(path, segment.number, size), size)
    except (CorruptDataError, OSError, msgspec.MsgspecError, KeyError):
        return None


def _good(contents: Contents, segment: Segment) -> np.ndarray:
    """Where a segment's steps begin that can be read."""
    there = [
        part.offsets
        for episode in (*contents.episodes.values(), *contents.gone.values())
        for part in episode.parts
        if part.segment == segment.number
    ]
    return np.concatenate([np.empty(0, np.uint32), *there])


def _lost(
    contents: Contents, columns: _Columns, good: np.ndarray
) -> dict[Key, list[tuple[int, int]]]:
    """(index, offset) of each step that the column file knows and the segment has no more, by
    episode."""
    lost: dict[Key, list[tuple[int, int]]] = {}
    for rows in columns.block.rows.values():
        view = rows.view
        for row in view[~np.isin(view[".record"], good)]:
            key = columns.block.episodes[int(row[".episode"])]
            if (key.stream, key.number) not in contents.deleted:
                steps = lost.setdefault((key.stream, key.number), [])
                steps.append((int(row[".index"]), int(row[".record"])))
    return lost


def _end(segment: Segment, last: int) -> int:
    """Where the last whole record of a segment ends, which is not before the one at `last`."""
    try:
        with SegmentFile(segment.path, segment.number) as file:
            walk = Walk(file, last)
            for _ in walk:
                pass
            return walk.end
    except FileNotFoundError:  # sealed meanwhile
        return last


def _torn(segment: Segment, end: int) -> bool:
    """Whether something stands behind the last whole record of an open segment."""
    try:
        with SegmentFile(segment.path, segment.number) as file:
            return not file.blank_from(end)
    except FileNotFoundError:  # sealed meanwhile
        return False


def _gaps(contents: Contents, findings: list[Finding]) -> Iterator[Finding]:
    """Steps that are missing and that no finding has named yet."""
    named: dict[Key, set[int]] = {}
    for finding in findings:
        for loss in finding.lost:
            named.setdefault((loss.stream, loss.episode), set()).update(loss.steps)
    for key, episode in contents.episodes.items():
        missing = set(episode.missing) - named.get(key, set())
        if missing:
            lost = (Loss(*key, tuple(sorted(missing))),)
            message = "steps are missing between others: their segment is damaged, or gone"
            yield Finding("gap", contents.path.name, -1, message, lost)


def _files(contents: Contents) -> Iterator[Finding]:
    names = sorted(contents.path.iterdir())
    found = [(segment.number, segment.sealed) for segment in contents.segments]
    there = {*found, *list_segments(contents.path).items()}
    for path in names:
        if path.name.endswith(".tmp") and path.name.startswith("."):
            yield Finding("orphan", path.name, -1, "left over from a crash; it can be removed")
        elif not _OURS.fullmatch(path.name):
            yield Finding("foreign", path.name, -1, "not a buffer's file")
        elif (match := _COLUMN_FILE.fullmatch(path.name)) and (
            (int(match[1]), match[2] is None) not in there
        ):
            message = "there is no such segment any more; the next writer removes it"
            yield Finding("orphan", path.name, -1, message)


def foreign_files(path: Path) -> list[str]:
    """Names in a buffer folder that are not a buffer's, nor left over from one."""
    return sorted(
        entry.name
        for entry in path.iterdir()
        if not _OURS.fullmatch(entry.name)
        and not (entry.name.startswith(".") and entry.name.endswith(".tmp"))
    )


def ranges(numbers: tuple[int, ...]) -> str:
    """ "0–4, 7" for 0, 1, 2, 3, 4, 7."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in found)
