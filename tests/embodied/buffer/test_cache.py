import os
import subprocess
import sys

import numpy as np
import pytest

from embodied.buffer.log.segments import segment_path
from embodied.buffer.read.gather import DamagedRowsError
from embodied.buffer.read.replay import ReplayReader
from embodied.core.errors import ConfigError, SpecError
from tests.support.picture_buffer import SIDE, picture, write_pictures

FRONT = "observation.images.front"


def opened(path, **options):
    reader = ReplayReader(path, **options)
    reader.refresh()
    return reader


@pytest.fixture
def pictures(tmp_path):
    write_pictures(tmp_path / "buffer", range(30))
    return tmp_path / "buffer"


@pytest.mark.parametrize("ram_bytes", [1 << 30, 1 << 20])
def test_pictures_come_back_bit_for_bit_within_any_budget(pictures, ram_bytes):
    reader = opened(pictures, ram_bytes=ram_bytes)
    rng = np.random.default_rng(0)
    episodes = reader.finished()
    assert len(episodes) == 30
    for _ in range(20):
        chosen = [(episodes[e], i) for e, i in rng.integers((30, 10), size=(16, 2))]
        rows = np.array([e.rows[i] for e, i in chosen])
        found = reader.gather((FRONT, "observation.state", "action", "t_ns"), rows.reshape(4, 4))
        assert found[FRONT].shape == (4, 4, SIDE, SIDE, 3)
        for (episode, index), image, action, t_ns in zip(
            chosen,
            found[FRONT].reshape(16, SIDE, SIDE, 3),
            found["action"].reshape(16),
            found["t_ns"].reshape(16),
            strict=True,
        ):
            np.testing.assert_array_equal(image, picture(episode.episode, index))
            assert action == episode.episode * 1000 + index and t_ns == index * 20_000_000
    stats = reader.cache_stats
    assert stats.hits + stats.misses == 20 * 16
    if ram_bytes == 1 << 20:
        assert stats.evicted_bytes > 0 and stats.resident_bytes <= 1 << 20
    else:
        # Once the kernel has taken a page back, everything is asked for again for a while.
        assert stats.misses <= 300 or stats.major_faults
        assert stats.evicted_bytes == 0


def test_what_is_prefetched_is_not_asked_for_again(pictures):
    reader = opened(pictures)
    rows = reader.finished()[3].rows
    reader.prefetch((FRONT, "action"), rows)
    assert reader.cache_stats.misses == len(rows)
    reader.take(FRONT, rows)
    assert reader.cache_stats.misses == len(rows) and reader.cache_stats.hits == 0
    reader.take(FRONT, rows)
    assert reader.cache_stats.misses == len(rows) and reader.cache_stats.hits == len(rows)


def test_arrays_to_fill_are_filled_or_refused(pictures):
    reader = opened(pictures)
    rows = reader.finished()[0].rows[:4]
    out = {FRONT: np.zeros((4, SIDE, SIDE, 3), np.uint8)}
    assert reader.gather((FRONT,), rows, out)[FRONT] is out[FRONT]
    np.testing.assert_array_equal(out[FRONT][2], picture(0, 2))
    for wrong in (np.zeros((4, SIDE, SIDE, 3), np.float32), np.zeros((3, SIDE, SIDE, 3), np.uint8)):
        with pytest.raises(SpecError, match=f"out\\['{FRONT}'\\]"):
            reader.gather((FRONT,), rows, {FRONT: wrong})
    with pytest.raises(ConfigError, match=r"'observation\.nothing' is not recorded"):
        reader.take("observation.nothing", rows)
    with pytest.raises(ConfigError, match="missing"):
        reader.take(FRONT, np.array([-1]))


def test_a_flipped_byte_is_found_at_the_first_touch_and_costs_its_episode(pictures):
    reader = opened(pictures)
    path = segment_path(pictures, 2, sealed=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    bad = 0
    for episode in reader.finished():
        try:
            images = reader.take(FRONT, np.append(episode.rows, episode.final_row))
        except DamagedRowsError as error:
            assert "00000002.seg" in str(error)
            bad += 1
            continue
        for index, image in enumerate(images):
            np.testing.assert_array_equal(image, picture(episode.episode, index))
    assert bad == 1 and reader.num_closed == 29
    assert len(reader.removed_episodes()) == 1 and reader.damaged[0][0] == 2


def test_index_and_small_features_beyond_the_budget_are_an_error(pictures):
    with pytest.raises(ConfigError, match=r"buffer\.ram_mib"):
        opened(pictures, ram_bytes=10_000)


_RESIDENT = """
import sys, numpy as np
from pathlib import Path
from embodied.buffer.read.replay import ReplayReader

def resident():
    # status counts per processor, and is off by some of its batches once there are threads.
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))

budget = int(sys.argv[2])
reader = ReplayReader(Path(sys.argv[1]), ram_bytes=budget)
reader.refresh()
rows = np.concatenate([episode.rows for episode in reader.finished()])
rng, out = np.random.default_rng(0), None
names = ("observation.images.front", "action")
out = reader.gather(names, rng.choice(rows, 32))
before, peak = resident() - reader.cache_stats.resident_bytes, 0
for _ in range(150):
    reader.gather(names, rng.choice(rows, 32), out)
    peak = max(peak, resident() - before)
print(peak)
"""


def test_memory_stays_within_the_budget_with_ten_times_the_data(tmp_path):
    budget = 6 << 20
    write_pictures(tmp_path / "buffer", range(66), length=8, segment_bytes=8 << 20, side=192)
    size = sum(path.stat().st_size for path in (tmp_path / "buffer").glob("*.seg"))
    assert size > 10 * budget
    result = subprocess.run(
        [sys.executable, "-c", _RESIDENT, str(tmp_path / "buffer"), str(budget)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(result.stdout) < 1.1 * budget
