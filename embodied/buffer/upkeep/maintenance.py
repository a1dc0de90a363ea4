"""Checking, joining, dividing and tidying buffer folders. Records are copied as they are: what was
stored lossily is not encoded again."""

import ctypes
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from embodied.buffer.log.append import SEGMENT_BYTES
from embodied.buffer.log.lock import lock_directory
from embodied.buffer.steps.schema import Schema
from embodied.buffer.upkeep.contents import Contents, Episode, Key, merged_controls
from embodied.buffer.upkeep.verification import Finding, Report, foreign_files, verify
from embodied.buffer.write.writer import ReplayWriter
from embodied.core.errors import ConfigError, EmbodiedError
from embodied.core.files import fsync_directory, full_disk_named

__all__ = [
    "Copied",
    "Finding",
    "Report",
    "Selection",
    "appearing",
    "compact",
    "merge",
    "split",
    "verify",
]

OnStep = Callable[[], None]

_NAMED = 5
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Copied(msgspec.Struct, frozen=True):
    """What was written. dropped: damaged episodes that were left out."""

    episodes: int
    steps: int
    nbytes: int
    duplicates: int = 0
    dropped: tuple[str, ...] = ()


class Selection(msgspec.Struct, frozen=True):
    """Which episodes: of these streams, of these tasks, and of these numbers; empty: of all."""

    streams: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    episodes: tuple[int, ...] = ()

    def __contains__(self, episode: Episode) -> bool:
        stream, number = episode.key
        return (
            (not self.streams or stream in self.streams)
            and (not self.tasks or episode.task in self.tasks)
            and (not self.episodes or number in self.episodes)
        )

    def check(self, contents: Contents) -> None:
        """Raise ConfigError for a stream, task or number that is nowhere in the folder."""
        there = contents.episodes.values()
        for what, wanted, known in (
            ("stream", self.streams, {episode.key[0] for episode in there}),
            ("task", self.tasks, {episode.task for episode in there}),
            ("episode", self.episodes, {episode.key[1] for episode in there}),
        ):
            if unknown := sorted(set(wanted) - known):
                raise ConfigError(
                    f"{contents.path} has no {what} {', '.join(map(str, unknown))}"
                    + (
                        ""
                        if what == "episode"
                        else f"; it has {', '.join(sorted(map(str, known)))}"
                    )
                )


def merge(
    sources: Sequence[Path],
    target: Path,
    *,
    drop_damaged: bool = False,
    segment_bytes: int = SEGMENT_BYTES,
    on_step: OnStep = lambda: None,
) -> Copied:
    """Put all episodes of the sources into one folder, under their own streams and numbers.

    The same episode in several sources is taken once, from where most of it is. A target that
    exists is added to; a new one appears whole. Raises ConfigError, before anything is written,
    if two sources hold different steps under one name, or if one has lost steps to damage (unless
    drop_damaged leaves such episodes out); RunInUseError while a process writes the target.
    """
    if not sources:
        raise ConfigError("there is nothing to merge: give at least one source")
    names = [Path(source).resolve() for source in sources]
    if target.resolve() in names or len(set(names)) != len(names):
        raise ConfigError("a folder is given twice: every source and the target must be another")
    found = [Contents(source, thorough=True) for source in sources]
    there = target.exists() and any(target.iterdir())
    everything = [Contents(target, thorough=True), *found] if there else found
    best, duplicates = _best(everything)
    if there:  # what it has best stays as it is, and what was deleted from it does not come back
        best = {k: found for k, found in best.items() if found[0] is not everything[0]}
        gone = {key for key in best if everything[0].was_deleted(key)}
        duplicates += len(gone)
        best = {key: found for key, found in best.items() if key not in gone}
    dropped = _dropped(best, drop_damaged)
    plan = [
        (contents, {key for key, (owner, _) in best.items() if owner is contents} - dropped)
        for contents in found
    ]
    with _existing(target) if there else appearing(target) as folder:
        copied = _write(folder, plan, everything, segment_bytes, on_step)
    return msgspec.structs.replace(copied, duplicates=duplicates, dropped=_names(best, dropped))


def split(
    source: Path,
    target: Path,
    selection: Selection,
    *,
    rest: Path | None = None,
    drop_damaged: bool = False,
    segment_bytes: int = SEGMENT_BYTES,
    on_step: OnStep = lambda: None,
) -> tuple[Copied, Copied | None]:
    """Copy the selected episodes to a new folder, and all others to another one if `rest` is
    given; the source is left as it is. Errors as merge."""
    contents = Contents(source, thorough=True)
    selection.check(contents)
    best, _ = _best([contents])
    dropped = _dropped(best, drop_damaged)
    chosen = {key for key, episode in contents.episodes.items() if episode in selection}
    if not chosen:
        raise ConfigError(f"no episode of {contents.path} is of all that was selected")
    results: list[Copied | None] = []
    folders = [(target, chosen), (rest, contents.episodes.keys() - chosen)]
    for folder, _ in folders:
        if folder is not None and folder.exists():
            raise ConfigError(f"{folder} is already there; choose another folder")
    for folder, keys in folders:
        if folder is None:
            results.append(None)
            continue
        with appearing(folder) as partial:
            plan = [(contents, set(keys) - dropped)]
            copied = _write(partial, plan, [contents], segment_bytes, on_step)
        left_out = _names(best, dropped & set(keys))
        results.append(msgspec.structs.replace(copied, dropped=left_out))
    first = results[0]
    assert first is not None
    return first, results[1]


def compact(
    path: Path,
    *,
    drop_damaged: bool = False,
    segment_bytes: int = SEGMENT_BYTES,
    on_step: OnStep = lambda: None,
) -> Copied:
    """Write a folder anew without deleted episodes and with full segments; their numbers stay
    taken, and sequence numbers begin anew.

    The new folder is built beside the old one and the two change places at once: a crash leaves
    one of them whole, and `.NAME.compacting` for the next compaction to remove. Readers must be
    opened anew afterwards. Errors as merge; RunInUseError while a process writes here.
    """
    path = path.resolve()
    if not path.is_dir():
        raise ConfigError(f"there is no buffer folder {path}")
    if foreign := foreign_files(path):
        raise ConfigError(
            f"{path} holds files that are not the buffer's: {', '.join(foreign[:_NAMED])}. "
            "Move them elsewhere first: compaction would lose them"
        )
    lock = lock_directory(path)
    partial = path.with_name(f".{path.name}.compacting")
    try:
        contents = Contents(path, thorough=True)
        best, _ = _best([contents])
        dropped = _dropped(best, drop_damaged)
        shutil.rmtree(partial, ignore_errors=True)
        with full_disk_named(partial):
            plan = [(contents, contents.episodes.keys() - dropped)]
            copied = _write(partial, plan, [contents], segment_bytes, on_step)
            shutil.copymode(path, partial)
            _exchange(partial, path)
        return msgspec.structs.replace(copied, dropped=_names(best, dropped))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _best(
    everything: Sequence[Contents],
) -> tuple[dict[Key, tuple[Contents, Episode]], int]:
    """For every episode the folder that holds most of it, and how many were there again."""
    _check_schemas(everything)
    best: dict[Key, tuple[Contents, Episode]] = {}
    duplicates = 0
    clashes: list[str] = []
    for contents in everything:
        for key, episode in contents.episodes.items():
            if key not in best:
                best[key] = contents, episode
                continue
            duplicates += 1
            other, known = best[key]
            if (index := _difference(other, known, contents, episode)) is not None:
                clashes.append(f"{episode}, step {index} ({other.path} and {contents.path})")
            elif (episode.whole, len(episode.index)) > (known.whole, len(known.index)):
                best[key] = contents, episode
    if clashes:
        more = f" and {len(clashes) - _NAMED} more" if len(clashes) > _NAMED else ""
        raise ConfigError(
            f"the same name stands for different steps: {'; '.join(clashes[:_NAMED])}{more}. "
            "Nothing was written. Import one of the folders as a data set instead (embodied buffer "
            "import format=recorded), which gives its streams names of their own"
        )
    return best, duplicates


def _check_schemas(everything: Sequence[Contents]) -> None:
    """Raise SpecError if a stream has other arrays in one folder than in another."""
    known: dict[str, tuple[Contents, Schema]] = {}
    for contents in everything:
        for stream, schemas in contents.stream_schemas().items():
            owner, first = known.setdefault(stream, (contents, schemas[0]))
            for schema in schemas:
                first.check_same_arrays(
                    schema, f"stream '{stream}' in {contents.path}", f"'{stream}' in {owner.path}"
                )


def _difference(one: Contents, a: Episode, two: Contents, b: Episode) -> int | None:
    """The first index at which two episodes that both have it differ."""
    others = two.of_episode(b)
    other = next(others, None)
    for step in one.of_episode(a):
        while other is not None and other.header.index < step.header.index:
            other = next(others, None)
        if other is None:
            return None
        if other.header.index == step.header.index and (
            other.schema != step.schema or other.payload != step.payload
        ):
            return step.header.index
    return None


def _dropped(best: dict[Key, tuple[Contents, Episode]], drop: bool) -> set[Key]:
    """Episodes that have lost steps. Raises ConfigError unless they are to be left out."""
    lost = {key for key, (_, episode) in best.items() if not episode.whole}
    if lost and not drop:
        raise ConfigError(
            f"{len(lost)} episodes have lost steps to damage: {'; '.join(_names(best, lost))}. "
            "`embodied buffer verify` names it all; drop_damaged=true leaves these episodes out"
        )
    return lost


def _names(best: dict[Key, tuple[Contents, Episode]], keys: set[Key]) -> tuple[str, ...]:
    return tuple(str(best[key][1]) for key in sorted(keys))


def _write(
    folder: Path,
    plan: Sequence[tuple[Contents, Collection[Key]]],
    everything: Sequence[Contents],
    segment_bytes: int,
    on_step: OnStep,
) -> Copied:
    """Append these episodes' records, and what everything says of deleted ones."""
    keys: set[Key] = set()
    with ReplayWriter(folder, segment_bytes) as writer:
        for contents, chosen in plan:
            keys.update(chosen)
            for stored in contents.records(chosen):
                writer.append_encoded(stored.payload, stored.schema)
                on_step()
        control = merged_controls(everything, keys)
        if control.deleted or control.retired:
            writer.append_control(control)
        writer.flush()
    episodes = [contents.episodes[key] for contents, chosen in plan for key in chosen]
    nbytes = sum(file.stat().st_size for file in folder.glob("*.seg*"))
    return Copied(len(episodes), sum(episode.steps for episode in episodes), nbytes)


@contextmanager
def _existing(target: Path) -> Iterator[Path]:
    yield target


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Name of a folder beside the target, to be made; it takes the target's name at the end, or is
    removed."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with full_disk_named(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.rename(partial, target)
            fsync_directory(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(one: Path, two: Path) -> None:
    """Let two folders change names, at once and durably."""
    fsync_directory(one)
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(two)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        error = ctypes.get_errno()
        raise EmbodiedError(
            f"the file system of {two} cannot exchange two folders ({os.strerror(error)}): merge "
            "the buffer into a new folder instead, which leaves out deleted episodes as well"
        )
    fsync_directory(two.parent)
