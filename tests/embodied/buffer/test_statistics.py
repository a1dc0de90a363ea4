import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.buffer.sample import statistics
from embodied.buffer.sample.statistics import RunningStats, feature_stats, merged
from embodied.core.errors import ConfigError

SHAPES = [((), "float64"), ((3,), "float32"), ((2, 2), "int32"), ((4,), "bool"), ((5,), "uint8")]


def plain(values):
    """What the statistics are, from all values [n, ...] at once."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    low, high = np.quantile(flat, [0.01, 0.99], axis=0)
    return {
        "mean": flat.mean(0),
        "std": flat.std(0),
        "min": flat.min(0),
        "max": flat.max(0),
        "q01": low,
        "q99": high,
    }


def assert_is(stats, wanted, fields=None):
    for name in fields or wanted:
        np.testing.assert_allclose(getattr(stats, name), wanted[name], rtol=1e-9, atol=1e-9)


def random_values(rng, n, shape, dtype):
    return (rng.normal(size=(n, *shape)) * 50 + 1000).astype(dtype)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(SHAPES),
    sizes=st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=1, max_size=4),
    seed=st.integers(0, 1 << 30),
)
def test_running_statistics_equal_those_of_all_values(kind, sizes, seed):
    (shape, dtype), rng = kind, np.random.default_rng(seed)
    parts, every = [], []
    for number, updates in enumerate(sizes):
        part = RunningStats(np.dtype(dtype), shape, seed=number)
        for n in updates:
            values = random_values(rng, n, shape, dtype)
            part.update(values)
            every.append(values)
        parts.append(part)
    whole, values = merged(parts), np.concatenate([np.empty((0, *shape), dtype), *every])
    assert whole.count == len(values) == sum(part.count for part in parts)
    if len(values):
        assert_is(whole.result(), plain(values))
    else:
        with pytest.raises(ConfigError, match="statistics of no steps"):
            whole.result()


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 1 << 30))
def test_running_statistics_of_images(sizes, seed):
    rng = np.random.default_rng(seed)
    parts, every = [], [np.empty((0, 3, 4, 2), np.uint8)]
    for n in sizes:
        part = RunningStats(np.dtype(np.uint8), (3, 4, 2))
        every.append(rng.integers(0, 256, (n, 3, 4, 2), dtype=np.uint8))
        part.update(every[-1])
        parts.append(part)
    whole, pixels = merged(parts), np.concatenate(every).reshape(-1, 2)
    assert whole.count == len(pixels)
    if len(pixels):
        assert_is(whole.result(), plain(pixels))


def test_quantiles_of_many_rows_have_the_stated_error():
    rng, errors = np.random.default_rng(0), []
    for seed in range(20):
        parts = [RunningStats(np.dtype(np.float32), (4,), seed=2 * seed + k) for k in range(2)]
        # Its quantile is its rank, and the first rows are not like the last.
        values = np.sort(rng.random((100_000, 4), dtype=np.float32), axis=0)
        for first in range(0, 70_000, 7_000):
            parts[0].update(values[first : first + 7_000])
        parts[1].update(values[70_000:])
        result = merged(parts).result()
        assert_is(result, plain(values), ("mean", "std", "min", "max"))
        errors += [np.array(result.q01) - 0.01, np.array(result.q99) - 0.99]
    stated = np.sqrt(0.01 * 0.99 / statistics.RESERVOIR_ROWS)
    # 160 estimates; what is drawn without replacement from so few is a little better.
    assert 0.8 * stated < np.sqrt(np.mean(np.square(errors))) < 1.15 * stated
    assert abs(np.mean(errors)) < 3 * stated / np.sqrt(160)


def test_the_same_seed_gives_the_same_quantiles():
    values = np.random.default_rng(0).normal(size=(60_000, 1))
    found = []
    for seed in (1, 1, 2):
        stats = RunningStats(np.dtype(np.float64), (1,), seed)
        for first in range(0, 60_000, 10_000):
            stats.update(values[first : first + 10_000])
        found.append(stats.result())
    assert found[0] == found[1] != found[2]


def test_memory_of_the_sample_is_bounded(monkeypatch):
    monkeypatch.setattr(statistics, "_RESERVOIR_BYTES", 800)
    stats = RunningStats(np.dtype(np.float64), (10,))
    stats.update(np.random.default_rng(0).normal(size=(100, 10)))
    assert stats.count == 100 and stats._sample.shape == (10, 10)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([*SHAPES, ((2, 3, 2), "uint8")]),
    n=st.integers(1, 60),
    held=st.integers(1, 400),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 1 << 30),
)
def test_exact_statistics_in_any_memory(kind, n, held, chunk, seed):
    (shape, dtype), rng = kind, np.random.default_rng(seed)
    column = random_values(rng, 100, shape, dtype)
    if len(shape) == 3:
        column = rng.integers(0, 256, (100, *shape), dtype=np.uint8)
    rows = rng.integers(0, 100, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_HELD_ELEMENTS", held)
        patch.setattr(statistics, "_CHUNK_ELEMENTS", chunk)
        found = feature_stats(column.__getitem__, rows)
    values = column[rows]
    if len(shape) == 3:
        values = values.reshape(-1, shape[-1])
    assert_is(found, plain(values))
    assert found.count == len(values)


def test_wrong_input_is_named():
    stats = RunningStats(np.dtype(np.float32), (3,))
    with pytest.raises(ConfigError, match=r"values are float64 \(2, 3\); statistics of float32"):
        stats.update(np.zeros((2, 3)))
    with pytest.raises(ConfigError, match="cannot be merged"):
        stats.merge(RunningStats(np.dtype(np.float32), (4,)))
    with pytest.raises(ConfigError, match="statistics of no steps"):
        feature_stats(np.zeros((3, 2)).__getitem__, np.empty(0, np.int64))
    with pytest.raises(ConfigError, match="they are empty"):
        feature_stats(np.zeros((3, 0, 2, 3), np.uint8).__getitem__, np.array([0]))
