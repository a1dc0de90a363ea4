"""What a writer of a replay was told to do, and whether what is found afterwards agrees with it."""

import os
import random
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from disk import RecordingStorage

from embodied.buffer.log.segments import list_segments
from embodied.buffer.log.tail import LogReader
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.steps.records import decode_step
from embodied.buffer.steps.schema import FLAGS, Schema, decode_schema, schema_id
from embodied.buffer.write.writer import ReplayWriter
from embodied.core.episodes import Step

STATE, IMAGE, FORCE = "observation.state", "observation.images.front", "observation.force"
SIDE = 40  # pictures above 4 KiB stay in the records
CODECS = {"observation.images.small*": "zstd"}
SMALL_IMAGE = "observation.images.small"
_NEVER = 1 << 62

Key = tuple[str, int, int]


def make_step(stream: str, episode: int, index: int, final: bool = False, side: int = SIDE) -> Step:
    """A step all of which follows from its key; streams that begin with "f" have another schema."""
    rng = np.random.default_rng([len(stream), ord(stream[0]), ord(stream[-1]), episode, index])
    observation = {
        STATE: rng.normal(size=5).astype(np.float32),
        SMALL_IMAGE: rng.integers(0, 256, (6, 6, 3), np.uint8),
    }
    if side:
        observation[IMAGE] = rng.integers(0, 256, (side, side, 3), np.uint8)
    if stream.startswith("f"):
        observation[FORCE] = rng.normal(size=(2, 3))
    return Step(
        stream,
        episode,
        index,
        observation,
        rng.normal(size=2).astype(np.float32),
        reward=float(np.float32(rng.normal())),
        success=bool(rng.random() < 0.2),
        intervention=bool(rng.random() < 0.2),
        held=bool(rng.random() < 0.2),
        policy_version=int(rng.integers(-1, 1000)),
        task=f"task {episode % 2}",
        seed=episode,
        final=final,
        t_ns=index * 20_000_000 + int(rng.integers(1000)),
    )


def make_episode(stream: str, episode: int, length: int, side: int = SIDE) -> list[Step]:
    """A closed episode."""
    return [make_step(stream, episode, i, i == length, side) for i in range(length + 1)]


def same(a: Step, b: Step) -> bool:
    """Whether two steps are the same bit for bit."""
    plain = [name for name in Step.__slots__ if name not in ("observation", "action")]
    if any(getattr(a, name) != getattr(b, name) for name in plain):
        return False
    if a.observation.keys() != b.observation.keys():
        return False
    pairs = [(a.observation[key], b.observation[key]) for key in a.observation]
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in (*pairs, (a.action, b.action))
    )


def steps_in_log(path: Path) -> dict[Key, Step]:
    """Every whole step record of the log, read without any index; a key only once."""
    found: dict[Key, Step] = {}
    schemas: dict[tuple[int, int], Schema] = {}
    reader = LogReader(path)
    for record in reader.poll():
        if record.schema == 0:
            schemas[record.segment, schema_id(record.payload)] = decode_schema(record.payload)
        elif (record.segment, record.schema) in schemas:
            step = decode_step(record.payload, schemas[record.segment, record.schema])
            assert step.key not in found, f"{step.key} is there twice"
            found[step.key] = step
    reader.close()
    return found


def steps_in_reader(reader: ReplayReader) -> dict[Key, Step]:
    """Every step that a reader has, open episodes' too; of columns that all streams have."""
    plain = ("reward", "policy_version", "t_ns", *FLAGS)
    wanted = [key for key in (STATE, SMALL_IMAGE, IMAGE) if _everywhere(reader, key)]
    rows = [np.append(info.rows, info.final_row) for info in reader.episodes]
    there = [np.flatnonzero(found >= 0) for found in rows]
    if not rows:
        return {}
    where = np.concatenate([found[index] for found, index in zip(rows, there, strict=True)])
    columns = reader.gather((*wanted, "action", *plain), where)
    values = zip(*(columns[name].tolist() for name in plain), strict=True)
    owners = [
        (i, n) for i, index in zip(reader.episodes, there, strict=True) for n in index.tolist()
    ]
    steps = (
        Step(
            info.stream,
            info.episode,
            index,
            {key: columns[key][at] for key in wanted},
            columns["action"][at],
            task=info.task,
            seed=info.seed,
            **dict(zip(plain, fields, strict=True)),
        )
        for at, ((info, index), fields) in enumerate(zip(owners, values, strict=True))
    )
    return {step.key: step for step in steps}


def _everywhere(reader: ReplayReader, key: str) -> bool:
    return bool(reader.schemas) and all(schema.feature(key) for schema in reader.schemas)


def check_steps(found: dict[Key, Step], known: dict[Key, Step]) -> None:
    """Each step is one that was appended, whole; of a reader's, what all streams have."""
    for key, step in found.items():
        assert key in known, f"{key} was never appended"
        wanted = known[key]
        if step.observation.keys() != wanted.observation.keys():
            there = {name: wanted.observation[name] for name in step.observation}
            wanted = Step(
                **{n: getattr(wanted, n) for n in Step.__slots__} | {"observation": there}
            )
        assert same(step, wanted), f"{key} differs"


class Story:
    """Drives a writer over a recording storage and notes at which operation what was certain."""

    def __init__(self, path: Path, storage: RecordingStorage, **options) -> None:
        self.path, self.storage, self.options = path, storage, options
        self.steps: dict[Key, Step] = {}
        self._appended: list[tuple[int, int, Key]] = []
        self._flushed: list[tuple[int, int]] = []
        self._deleted: list[tuple[int, int, tuple[str, int]]] = []
        self._spared: list[tuple[int, tuple[str, int]]] = []
        self._segments: dict[tuple[str, int], set[int]] = {}
        self.writer: ReplayWriter | None = None

    def open(self) -> None:
        """Open the writer (again)."""
        self.writer = None
        with self._noting_retention():
            self.writer = ReplayWriter(
                self.path, codecs=CODECS, storage=self.storage, **self.options
            )

    def inherit(self, story: "Story", at: int, durable: Set[Key], recovered: Set[Key]) -> None:
        """Go on after another story's `at` operations. recovered: durable with the first flush."""
        for step in story.begun(at):
            self.steps[step.key] = step
            first = -1 if step.key in durable else 0 if step.key in recovered else _NEVER
            self._appended.append((-1, first, step.key))
        for key in story.maybe_deleted(at):
            self._deleted.append((-1, -1 if key in story.deleted(at) else _NEVER, key))

    def append(self, step: Step) -> int | None:
        """Append a step."""
        self.steps[step.key] = step
        with self._noting_retention() as start:
            seq = self.writer.append(step)
        if seq is not None:
            self._appended.append((start, seq, step.key))
            self._segments.setdefault(step.key[:2], set()).add(self.writer._log.segment)
        return seq

    def flush(self) -> None:
        """Flush, and note what is durable."""
        seq = self.writer.flush()
        self._flushed.append((self.storage.position, seq))

    def delete(self, stream: str, episode: int) -> None:
        """Delete an episode."""
        end = _NEVER
        try:
            with self._noting_retention() as start:
                self.writer.delete(stream, episode)
            end = self.storage.position
        finally:
            self._deleted.append((start, end, (stream, episode)))

    @contextmanager
    def _noting_retention(self) -> Iterator[int]:
        start = self.storage.position
        try:
            yield start
        except BaseException:
            if "retention" in self.options:  # whatever it was about to delete
                there = set.union(set(), *self._segments.values()) & set(list_segments(self.path))
                for number in [*self._unlinked(start), *sorted(there)[:4]]:
                    self._note_deleted(number, start, _NEVER)
            raise
        for number in self._unlinked(start):
            self._note_deleted(number, start, self.storage.position)

    def _unlinked(self, start: int) -> list[int]:
        ops = self.storage.ops[start:]
        return [int(op.name[:8]) for op in ops if op.kind == "unlink" and op.name.endswith(".seg")]

    def _note_deleted(self, number: int, start: int, end: int) -> None:
        for key, found in self._segments.items():
            if number in found:
                self._deleted.append((start, end, key))
            elif min(found) < number < max(found):
                self._spared.append((start, key))

    def close(self) -> None:
        """Close the writer."""
        self.writer.close()

    def kill(self) -> None:
        """The process dies, the machine does not."""
        if self.writer is not None:
            abandon(self.writer)

    def required(self, at: int) -> set[Key]:
        """Steps that must be there after `at` operations."""
        acknowledged = max((seq for position, seq in self._flushed if position <= at), default=-1)
        there = {key for start, seq, key in self._appended if start < at and seq <= acknowledged}
        gone = self.maybe_deleted(at)
        return {key for key in there if key[:2] not in gone}

    def deleted(self, at: int) -> set[tuple[str, int]]:
        """Episodes that must not be there after `at` operations."""
        return {key for _, end, key in self._deleted if end <= at}

    def maybe_deleted(self, at: int) -> set[tuple[str, int]]:
        """Episodes that may not be there."""
        spared = {key for start, key in self._spared if start < at}
        return spared | {key for start, _, key in self._deleted if start < at}

    def begun(self, at: int) -> list[Step]:
        """Steps of which something may have been written, in order."""
        return [self.steps[key] for start, _, key in self._appended if start < at]


def tell(story: Story, seed: int, n_episodes: int = 14) -> Story:
    """A random story: streams side by side, commits of several steps, deletions, kills, closing."""
    rng = random.Random(seed)
    side = SIDE if story.options["segment_bytes"] > 8192 else 0
    story.open()
    queues: dict[str, list[Step]] = {stream: [] for stream in ("a", "b", "demo", "force")}
    for _ in range(n_episodes):
        for stream in rng.sample(sorted(queues), 2):
            number = sum(step.final for step in story.steps.values() if step.stream == stream)
            number += sum(step.final for step in queues[stream])
            queues[stream] += make_episode(stream, number, rng.randint(1, 5), side)
        _write(story, queues, rng, leave=6)
        _disturb(story, rng)
    _write(story, queues, rng, leave=0)
    story.flush()
    story.close()
    return story


def _write(story: Story, queues: dict[str, list[Step]], rng: random.Random, leave: int) -> None:
    while sum(map(len, queues.values())) > leave:
        queue = rng.choice([queue for queue in queues.values() if queue])
        for _ in range(min(len(queue), rng.randint(1, 3))):
            story.append(queue.pop(0))
        if rng.random() < 0.5:
            story.flush()


def _disturb(story: Story, rng: random.Random) -> None:
    fate = rng.random()
    gone = story.maybe_deleted(story.storage.position)
    closed = sorted({key[:2] for key, step in story.steps.items() if step.final} - gone)
    if fate < 0.25 and closed:
        story.delete(*rng.choice(closed))
    elif fate < 0.4:
        story.close()
        story.open()
    elif fate < 0.55:
        story.kill()
        story.open()
        story.flush()


def abandon(writer: ReplayWriter) -> None:
    """Give the writer's files up as a process that dies does."""
    log = writer._log
    for fd in (log._lock, log._fd):
        if fd is not None:
            with suppress(OSError):
                os.close(fd)
    log._lock = log._fd = None
    writer._catalogue.close()
