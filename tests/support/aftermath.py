"""Whether what a crash has left of a replay agrees with the story of what was done to it."""

import random
from collections import Counter
from pathlib import Path

from disk import RecordingStorage
from story import Key, Story, check_steps, make_episode, steps_in_log, steps_in_reader

from embodied.buffer.log.segments import SegmentFile, Walk, list_segments, segment_path
from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.steps.blocks import Block
from embodied.buffer.steps.chunks import Covered, load_chunks
from embodied.core.episodes import Step


def read(path: Path) -> tuple[dict[Key, Step], set[tuple[str, int]]]:
    """Steps, and keys of closed episodes, that a reader finds."""
    with ReplayReader(path) as reader:
        reader.refresh()
        steps = steps_in_reader(reader)
        assert reader.num_steps == sum(not step.final for step in steps.values())
        return steps, {info.key for info in reader.finished()}


def open_segment_by_chunks(path: Path) -> Covered | None:
    """How far the chunks of the open segment go; what is found with them is what is found without.

    None if there is no open segment.
    """
    numbers = [number for number, sealed in list_segments(path).items() if not sealed]
    if not numbers:
        return None
    whole = segment_path(path, numbers[-1], sealed=False)
    scanned = Block.read(whole, numbers[-1])
    with SegmentFile(whole, numbers[-1]) as file:
        block, covered = load_chunks(path, file)
        block.extend(Walk(file, covered.end, covered.last_seq))
    for name in ("segment", "episodes", "controls", "damaged", "next_seq"):
        assert getattr(block, name) == getattr(scanned, name), name
    assert list(block.rows) == list(scanned.rows)
    for number, rows in scanned.rows.items():
        assert block.rows[number].schema == rows.schema
        assert block.rows[number].bytes.tobytes() == rows.bytes.tobytes()
    return covered


def check(path: Path, story: Story, at: int, rng: random.Random, counts: Counter) -> Story:
    """Everything that must hold of a directory that a crash after `at` operations has left.

    Returns the story of how it was opened again and written to.
    """
    required, deleted = story.required(at), story.deleted(at)
    covered = open_segment_by_chunks(path)
    counts["steps from chunks"] += sum(covered.rows) if covered else 0
    logged = steps_in_log(path)
    check_steps(logged, story.steps)
    found, closed = read(path)
    check_steps(found, story.steps)
    assert found.keys() >= required, f"lost {sorted(required - found.keys())[:3]}"
    assert not deleted & {key[:2] for key in found}, "a deleted episode is back"
    counts["acknowledged"] += len(required)
    counts["unacknowledged found"] += len(found.keys() - required)
    counts["torn or missing"] += len(story.begun(at)) - len(found)

    storage = RecordingStorage(path)
    again = Story(path, storage, **_without_retention(story))
    again.open()
    # A live reader waits where a record is torn; only now is it certain what follows.
    after, closed_after = read(path)
    again.inherit(story, at, found.keys() & after.keys(), after.keys())
    maybe_deleted = story.maybe_deleted(at)
    assert {key[:2] for key in found.keys() - after.keys()} <= maybe_deleted
    assert closed - closed_after <= maybe_deleted
    assert again.writer.counts().steps == sum(not step.final for step in after.values())
    for step in story.begun(at):  # as a client does that was told of nothing
        again.append(step)
    new = [make_episode(s, again.writer.next_episode(s), 2, 0)[0] for s in ("new", "newer")]
    for step in new:
        assert again.append(step) is not None
        if rng.random() < 0.5:
            again.flush()
    again.flush()
    again.close()

    wanted = {step.key for step in story.begun(at) if step.key[:2] not in maybe_deleted}
    final, closed = read(path)
    check_steps(final, again.steps)
    assert final.keys() >= wanted | {step.key for step in new} | required
    assert not deleted & {key[:2] for key in final}
    steps_in_log(path)
    assert again.writer.counts().steps == sum(not step.final for step in final.values())
    assert again.writer.counts().episodes == len(closed)
    return again


def _without_retention(story: Story) -> dict:
    return {name: value for name, value in story.options.items() if name != "retention"}
