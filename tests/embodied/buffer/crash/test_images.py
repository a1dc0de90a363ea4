"""A power cut at any moment: what the disk may then hold is recovered ⊇ acknowledged."""

import random
import shutil
from collections import Counter

import pytest
from aftermath import check
from disk import RecordingStorage, restore, whole_files_through
from sizes import size
from story import Story, tell

from embodied.buffer.write.retention import Retention

STORIES = (
    {"segment_bytes": 4096, "chunk_rows": 2},
    {"segment_bytes": 16384, "chunk_rows": 1},
    {"segment_bytes": 6000, "retention": Retention(max_bytes=20_000, pinned=("demo",))},
    {"segment_bytes": 2600, "chunk_rows": 1, "retention": Retention(max_bytes=8000)},
)


def run(path, count, report, seed=0):
    counts = Counter()
    stories = []
    for number, options in enumerate(STORIES):
        storage = RecordingStorage(path / f"story{number}")
        with whole_files_through(storage):
            story = Story(path / f"story{number}", storage, **options)
            stories.append(tell(story, seed + number))
        counts["operations"] += storage.position
        shutil.rmtree(path / f"story{number}")
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        story = stories[number % len(stories)]
        at = rng.randint(0, story.storage.position)
        place = path / "image"
        for cut in range(1 + (rng.random() < 0.25)):  # the power goes again while recovering
            restore(place, story.storage.image(at, rng))
            try:
                story = check(place, story, at, rng, counts)
            except BaseException as error:
                error.add_note(f"image {number} of seed {seed}, cut {cut}, after {at} operations")
                raise
            shutil.rmtree(place)
            counts["images"] += 1
            at = rng.randint(0, story.storage.position)
    report("disk images: " + ", ".join(f"{value} {name}" for name, value in counts.items()))


def test_images(ram_path, report):
    run(ram_path, 50, report)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_images(ram_path, report):
    for seed in range(1, size(4, 2)):
        run(ram_path, 500, report, 1000 * seed)
