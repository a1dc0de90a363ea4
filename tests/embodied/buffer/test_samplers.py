import tempfile
from pathlib import Path

import numpy as np
import pytest
from chi_square import deviates
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import MemoryReader
from windowing import IMAGE, STATE, assert_batch_is, interleave, key_of, make_steps

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.batches import DRAW_AGAIN, StaleDrawError
from embodied.buffer.sample.priorities import Prioritised
from embodied.buffer.sample.samplers import WindowSampler, select_all
from embodied.buffer.sample.windows import WindowSpec
from embodied.buffer.write.writer import ReplayWriter
from embodied.core.errors import ConfigError, SpecError

SPEC = WindowSpec(2, 4, (STATE, IMAGE))
BACKUP = WindowSpec(2, 4, (STATE, IMAGE), n_step=3, discount=0.9, metadata=("policy_version",))


def select_interventions(episode, flags):
    return flags.intervention


def filled(lengths=((12, 5, 30), (9, 1, 0, 20)), spec=SPEC, **options):
    """Reader, sampler, and key → steps of episodes of these lengths, by stream."""
    rng = np.random.default_rng(3)
    episodes = {
        (f"s{stream}", number): make_steps(stream, number, length, rng)
        for stream, numbers in enumerate(lengths)
        for number, length in enumerate(numbers)
    }
    reader = MemoryReader()
    for step in interleave(episodes.values(), rng):
        reader.add(step)
    return reader, WindowSampler(reader, spec, **options), episodes


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=3),
    n_step=st.integers(0, 4),
    dagger=st.booleans(),
    rewards=st.sampled_from(["recorded", "sparse", "cost"]),
    seed=st.integers(0, 1 << 30),
)
def test_windows_of_a_replay_on_disk(lengths, n_step, dagger, rewards, seed):
    rng = np.random.default_rng(seed)
    discount = 0.8 if n_step else 1.0
    to_go = n_step > 0
    spec = WindowSpec(2, 3, (STATE, IMAGE), n_step, discount, rewards=rewards, return_to_go=to_go)
    episodes = {
        (f"s{stream}", number): make_steps(stream, number, length, rng)
        for stream, numbers in enumerate(lengths)
        for number, length in enumerate(numbers)
    }
    with tempfile.TemporaryDirectory() as directory, ReplayReader(Path(directory)) as reader:
        sampler = WindowSampler(reader, spec, select_interventions if dagger else select_all)
        deleted = set()
        with ReplayWriter(Path(directory), 1 << 13) as writer:
            for step in interleave(episodes.values(), rng):
                writer.append(step)
                if step.final and rng.random() < 0.2:
                    deleted.add((step.stream, step.episode))
                    writer.delete(step.stream, step.episode)
                if rng.random() < 0.1:
                    writer.flush()
                    reader.refresh()
                    sampler.refresh()
        reader.refresh()
        sampler.refresh()
        steps = [s for key, steps in episodes.items() if key not in deleted for s in steps[:-1]]
        there = {s.key for s in steps if s.intervention or not dagger}
        assert sampler.num_candidates == len(there)
        if there:
            draw = sampler.draw(32, rng)
            sampler.prefetch(draw)
            batch = sampler.fetch(draw, empty(sampler, 32))
            assert {key_of(batch, b) for b in range(32)} <= there
            assert_batch_is(batch, episodes, spec, lambda s: s.intervention or not dagger)


def test_a_flipped_bit_on_disk_costs_its_episode(tmp_path):
    rng = np.random.default_rng(0)
    with ReplayWriter(tmp_path, 1 << 17) as writer:
        for number in range(12):
            for step in make_steps(0, number, 6, rng, image_shape=(40, 40, 3)):
                writer.append(step)
            if number == 4:
                picture = step.observation[IMAGE].tobytes()  # the last, at the episode's end
    for path in sorted(tmp_path.glob("*.seg*")):
        data = bytearray(path.read_bytes())
        at = data.find(picture)
        if at >= 0:
            data[at + 2000] ^= 1
            path.write_bytes(data)
    spec = WindowSpec(2, 4, (STATE, IMAGE), n_step=3)
    with ReplayReader(tmp_path) as reader:
        reader.refresh()
        sampler = WindowSampler(reader, spec)
        assert sampler.num_candidates == 72
        for _ in range(40):
            sampler.sample(64, rng)
        assert sampler.num_candidates == 66 and len(reader.damaged) == 1
        later = sampler.sample(500, rng)
        assert {key_of(later, b)[1] for b in range(500)} == set(range(12)) - {4}


def empty(sampler, batch_size):
    return {
        name: np.empty(size.shape, size.dtype)
        for name, size in sampler.batch_spec(batch_size).items()
    }


def test_sampling_is_uniform():
    _, sampler, episodes = filled()
    steps = [s.key for steps in episodes.values() for s in steps[:-1]]
    assert sampler.num_candidates == len(steps) == 77
    draw = sampler.draw(77 * 400, np.random.default_rng(0))
    _, counts = np.unique(draw.numbers, return_counts=True)
    assert len(counts) == 77 and not deviates(counts, np.ones(77), two_sided=True)
    batch = sampler.sample(2000, np.random.default_rng(0))
    assert {key_of(batch, b) for b in range(2000)} == set(steps)


def test_uniform_draws_are_the_same_as_ever():
    # Runs are reproducible across releases: one call of integers(n), steps in order of closing.
    reader, sampler, _ = filled()
    order = [(e.key, i) for e in reader.closed_episodes() for i in range(len(e.rows))]
    batch = sampler.sample(50, np.random.default_rng(9))
    picked = np.random.default_rng(9).integers(len(order), size=50)
    keys = [key_of(batch, b) for b in range(50)]
    assert keys == [(*order[i][0], order[i][1]) for i in picked]


@pytest.mark.parametrize("spec", [SPEC, BACKUP])
@pytest.mark.parametrize("strategy", [None, Prioritised])
def test_fetch_fills_given_arrays(spec, strategy):
    _, sampler, _ = filled(spec=spec, strategy=strategy and strategy())
    draw = sampler.draw(7, np.random.default_rng(0))
    sizes = sampler.batch_spec(7)
    batch = sampler.fetch(draw)
    assert list(sizes) == list(batch)
    assert {k: (v.dtype, v.shape) for k, v in batch.items()} == sizes
    out = empty(sampler, 7)
    for array in out.values():
        array.view(np.uint8)[...] = 0xA5  # nothing of this may be left
    filled_batch = sampler.fetch(draw, {**out, "more": np.empty(0)})
    assert filled_batch.keys() == batch.keys()
    for name, array in batch.items():
        assert filled_batch[name] is out[name]
        np.testing.assert_array_equal(filled_batch[name], array, name)
    with pytest.raises(ConfigError, match=r"out\['reward'\] is float64 \(7, 4\); float32 \(7, 4\)"):
        sampler.fetch(draw, {**out, "reward": np.empty((7, 4))})
    del out["action"]
    with pytest.raises(ConfigError, match=r"out\['action'\] is missing"):
        sampler.fetch(draw, out)


def test_prefetch_names_what_fetch_reads():
    reader, sampler, _ = filled(spec=BACKUP)
    draw = sampler.draw(5, np.random.default_rng(0))
    sampler.prefetch(draw)
    ((names, rows),) = reader.prefetched
    wanted = np.concatenate([draw.rows.observed.ravel(), draw.rows.backup.observed.ravel()])
    assert names == (STATE, IMAGE) and rows.tolist() == wanted.tolist()


def test_select_is_asked_once_per_episode():
    asked = []

    def select(episode, flags):
        asked.append(episode.key)
        assert flags.reward.shape == flags.held.shape == episode.rows.shape
        return np.zeros(len(episode.rows), bool)

    reader, sampler, episodes = filled(select=select)
    assert sampler.refresh() == 0 and sampler.num_candidates == 0
    assert sorted(asked) == sorted(episodes)
    with pytest.raises(ConfigError, match="no closed episode has"):
        sampler.statistics()
    with pytest.raises(ConfigError, match="nothing to sample: 7 episodes are closed and none"):
        sampler.draw(1, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="a bool for each step"):
        WindowSampler(reader, SPEC, lambda e, f: np.ones(3))


def test_wrong_input_is_named():
    reader, sampler, _ = filled()
    with pytest.raises(ConfigError, match=r"'observation\.nope' is not recorded"):
        WindowSampler(reader, WindowSpec(1, 1, ("observation.nope",)))
    draw = sampler.draw(3, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="uniform draws have no priorities"):
        sampler.update(draw, np.ones(3))
    with pytest.raises(ConfigError, match=r"priorities have shape \(2,\); one for each of the 3"):
        sampler.update(draw, np.ones(2))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        sampler.draw(0, np.random.default_rng(0))


def test_episodes_of_many_chunks(monkeypatch):
    monkeypatch.setattr("embodied.buffer.sample.samplers._CHUNK_STEPS", 10)
    _, sampler, episodes = filled(spec=BACKUP)
    batch = sampler.sample(300, np.random.default_rng(1))
    assert sampler.num_candidates == 77
    assert_batch_is(batch, episodes, BACKUP, lambda s: True)


def test_a_draw_outlives_others_removals_but_not_its_own():
    reader, sampler, _ = filled(((6, 6, 6),), strategy=Prioritised())
    rng = np.random.default_rng(0)
    draws = [sampler.draw(2, rng) for _ in range(40)]
    kept = [sampler.fetch(draw) for draw in draws]
    reader.remove("s0", 1)
    for step in make_steps(5, 0, 6, rng):  # takes the rows of the removed one
        reader.add(step)
    stale = 0
    for draw, before in zip(draws, kept, strict=True):
        touched = any(key_of(before, b)[1] == 1 for b in range(2))
        stale += touched
        if touched:
            with pytest.raises(StaleDrawError, match="of 2 drawn steps have been removed"):
                sampler.fetch(draw)
            assert issubclass(StaleDrawError, DRAW_AGAIN)
            sampler.prefetch(draw)
            assert not reader.prefetched
            assert len(sampler.redraw(draw, rng)) == 2
        else:
            after = sampler.fetch(draw)
            assert all((after[name] == before[name]).all() for name in before)
        sampler.update(draw, np.ones(2))  # whatever is left of it
    assert 0 < stale < 40
    assert sampler.refresh() == 1 and sampler.num_candidates == 18


def test_removed_before_they_were_taken_over():
    reader, sampler, _ = filled(((6, 6),))
    for step in make_steps(0, 2, 4, np.random.default_rng(0)):
        reader.add(step)
    reader.remove("s0", 2)
    reader.remove("s0", 0)
    sampler.draw(2, np.random.default_rng(0))  # sees the removals first
    assert sampler.num_candidates == 6
    assert sampler.refresh() == 0 and sampler.num_candidates == 6


def test_damaged_episodes_are_drawn_around():
    reader, sampler, _ = filled(tracked=("action",))
    reader.damaged = {("s0", 2), ("s1", 3)}
    batch = sampler.sample(200, np.random.default_rng(0))
    assert sampler.num_candidates == 27 == sum((12, 5, 9, 1))
    assert not {("s0", 2), ("s1", 3)} & {key_of(batch, b)[:2] for b in range(200)}
    reader.damaged = {("s1", 0)}
    assert sampler.statistics([IMAGE])[IMAGE].count == 18 * 6
    late = (
        make_steps(2, 0, 5, np.random.default_rng(0)),
        make_steps(2, 1, 3, np.random.default_rng(0)),
    )
    for step in late[0] + late[1]:
        reader.add(step)
    reader.damaged = {("s2", 0)}
    images = WindowSampler(reader, SPEC, tracked=(IMAGE,))
    assert images.num_candidates == 21 and images.tracked_statistics()[IMAGE].count == 21 * 6


def test_statistics_are_exact(monkeypatch):
    for name in ("_CHUNK_ELEMENTS", "_HELD_ELEMENTS"):
        monkeypatch.setattr(f"embodied.buffer.sample.statistics.{name}", 100)
    _, sampler, episodes = filled(select=select_interventions, tracked=(STATE, IMAGE, "action"))
    steps = [s for steps in episodes.values() for s in steps[:-1] if s.intervention]
    data = {
        STATE: np.stack([s.observation[STATE] for s in steps]),
        IMAGE: np.concatenate([s.observation[IMAGE].reshape(-1, 3) for s in steps]),
        "action": np.stack([s.action for s in steps if not s.held]),
    }
    exact, tracked = sampler.statistics(), sampler.tracked_statistics()
    assert exact.keys() == tracked.keys() == data.keys()
    for key, values in data.items():
        values = values.astype(np.float64)
        assert exact[key].count == tracked[key].count == len(values)
        for name, wanted in {
            "mean": values.mean(0),
            "std": values.std(0),
            "min": values.min(0),
            "max": values.max(0),
            "q01": np.quantile(values, 0.01, axis=0),
            "q99": np.quantile(values, 0.99, axis=0),
        }.items():
            for found in (exact, tracked):
                np.testing.assert_allclose(getattr(found[key], name), wanted, rtol=1e-9, atol=1e-12)


def test_tracked_statistics_follow_refreshes():
    reader, sampler, _ = filled(tracked=(STATE,))
    for number in range(3):
        for step in make_steps(4, number, 10, np.random.default_rng(number)):
            reader.add(step)
        sampler.refresh()
    exact, tracked = sampler.statistics([STATE])[STATE], sampler.tracked_statistics()[STATE]
    assert tracked.count == exact.count == 107
    np.testing.assert_allclose(tracked.mean, exact.mean, rtol=1e-12)
    np.testing.assert_allclose(tracked.q99, exact.q99, rtol=1e-12)
    with pytest.raises(ConfigError, match=r"statistics of \['action'\]: no episode is closed yet"):
        WindowSampler(MemoryReader(), SPEC, tracked=("action",)).tracked_statistics()


def test_priorities_move_draws():
    _, sampler, _ = filled(((10, 10),), strategy=Prioritised(Prioritised.Config(alpha=1.0)))
    rng = np.random.default_rng(0)
    first = sampler.draw(500, rng)
    sampler.update(first, np.where(first.numbers == first.numbers[3], 5.0, 0.0))
    batch = sampler.sample(300, rng)
    assert len({key_of(batch, b) for b in range(300)}) == 1
    assert batch["weight"].tolist() == [1.0] * 300


def test_a_batch_says_each_episodes_task_in_words():
    rng = np.random.default_rng(5)
    reader = MemoryReader()
    tasks = {"lift": "lift the cube", "push": "push", "идти": "идти"}
    names = {number: list(tasks)[number % 3] for number in range(12)}

    def record(numbers):
        for number in numbers:
            for step in make_steps(0, number, 4, rng, task=names[number]):
                reader.add(step)

    record(range(6))
    spec = WindowSpec(2, 3, (STATE,), n_step=2, task_bytes=16)
    sampler = WindowSampler(reader, spec, instruction=lambda task: tasks[task])
    assert sampler.batch_spec(7)["task"] == (np.dtype(np.uint8), (7, 2, 16))

    def check():
        batch = sampler.sample(64, rng)
        assert np.array_equal(batch["task"], batch["next.task"])
        for b in range(64):
            said = {bytes(row).rstrip(b"\0").decode() for row in batch["task"][b]}
            assert said == {tasks[names[key_of(batch, b)[1]]]}

    check()
    reader.remove("s0", 0)
    reader.remove("s0", 3)
    record(range(6, 12))
    sampler.refresh()
    check()
    with pytest.raises(SpecError, match=r"'lift the cube.*13 bytes.*reads 8"):
        WindowSampler(reader, WindowSpec(2, 3, (STATE,), task_bytes=8), instruction=tasks.get)
    with pytest.raises(ConfigError, match=r"'task'.*names of other arrays"):
        WindowSpec(2, 3, ("task",), task_bytes=8)


def test_a_goal_is_the_episodes_last_observation():
    spec = WindowSpec(2, 3, (STATE, IMAGE), n_step=2, goal_keys=(IMAGE, STATE))
    reader, sampler, episodes = filled(spec=spec)
    rng = np.random.default_rng(1)

    def check():
        draw = sampler.draw(64, rng)
        sampler.prefetch(draw)
        batch = sampler.fetch(draw)
        for b in range(64):
            stream, number, _ = key_of(batch, b)
            last = episodes[stream, number][-1].observation
            for key in (STATE, IMAGE):
                for name in ("goal." + key, "next.goal." + key):
                    assert np.array_equal(batch[name][b], np.stack([last[key]] * 2))

    check()
    reader.remove("s0", 0)
    check()
    with pytest.raises(ConfigError, match=r"goal_keys.*observation.state.*not among"):
        WindowSpec(2, 3, (IMAGE,), goal_keys=(STATE,))
