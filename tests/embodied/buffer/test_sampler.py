import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.buffer.replay import ReplayReader, ReplayWriter
from embodied.buffer.samplers import WindowSampler, select_all
from embodied.buffer.windows import WindowSpec
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError

STATE = "observation.state"
IMAGE = "observation.image"


def select_interventions(episode, flags):
    return flags.intervention


def step(stream, episode, index, rng, final):
    return Step(
        stream,
        episode,
        index,
        {
            STATE: np.array([int(stream[1:]), episode, index], np.float32),
            IMAGE: rng.integers(0, 256, (2, 3, 3), dtype=np.uint8),
        },
        rng.normal(size=2).astype(np.float32),
        reward=float(np.float32(rng.normal())),
        terminated=bool(rng.random() < 0.2),
        truncated=bool(rng.random() < 0.2),
        intervention=bool(rng.random() < 0.6),
        held=bool(rng.random() < 0.2),
        final=final,
    )


def record(path, lengths_by_stream, rng, reader=None, sampler=None):
    """Write episodes of the given lengths (negative: left open), streams interleaved at random;
    returns episode key → steps."""
    queues = {}
    episodes = {}
    for number, lengths in enumerate(lengths_by_stream):
        stream = f"s{number}"
        queue = queues.setdefault(stream, [])
        for episode, length in enumerate(lengths):
            steps = [step(stream, episode, i, rng, False) for i in range(abs(length))]
            episodes[stream, episode] = steps if length >= 0 else []
            queue += steps
            if length >= 0:
                queue.append(step(stream, episode, length, rng, True))
    with ReplayWriter(path, 1 << 16) as writer:
        while any(queues.values()):
            stream = rng.choice([s for s, queue in queues.items() if queue])
            for _ in range(int(rng.integers(1, 4))):
                if queues[stream]:
                    writer.append(queues[stream].pop(0))
            if reader is not None and rng.random() < 0.2:
                reader.refresh()
                sampler.refresh()
    return episodes


def reference(steps, t, spec, labels_selected):
    """One sample, written down as the specification says it."""
    n, last = len(steps), steps[-1]
    future = [steps[k] if k < n else None for k in range(t, t + spec.horizon)]
    sample = {
        key: np.stack(
            [steps[max(0, k)].observation[key] for k in range(t - spec.n_obs_steps + 1, t + 1)]
        )
        for key in spec.observation_keys
    }
    sample["action"] = np.stack([(s or last).action for s in future])
    sample["action_is_pad"] = np.array(
        [s is None or s.held or not labels_selected(s) for s in future]
    )
    sample["reward"] = np.array([0 if s is None else s.reward for s in future], np.float32)
    sample["terminated"] = np.array([(s or last).terminated for s in future])
    sample["truncated"] = np.array([(s or last).truncated for s in future])
    return sample


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(-4, 9), max_size=4), min_size=1, max_size=3),
    n_obs_steps=st.integers(1, 4),
    horizon=st.integers(1, 6),
    dagger=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_samples_equal_the_reference(lengths, n_obs_steps, horizon, dagger, seed):
    rng = np.random.default_rng(seed)
    spec = WindowSpec(n_obs_steps, horizon, (STATE, IMAGE))
    select = select_interventions if dagger else select_all

    def labels_selected(s):
        return s.intervention or not dagger

    with tempfile.TemporaryDirectory() as directory:
        reader = ReplayReader(Path(directory))
        sampler = WindowSampler(reader, spec, select)
        # -k: of an episode left open; only the last of a stream may be that in practice
        episodes = record(Path(directory), lengths, rng, reader, sampler)
        reader.refresh()
        sampler.refresh()
        candidates = {
            (stream, episode, s.index)
            for (stream, episode), steps in episodes.items()
            for s in steps
            if labels_selected(s)
        }
        assert sampler.num_candidates == len(candidates)
        if not candidates:
            with pytest.raises(ConfigError, match="nothing to sample"):
                sampler.sample(4, rng)
            return
        batch = sampler.sample(64, rng)
        seen = set()
        for b in range(64):
            number, episode, t = batch[STATE][b, -1].astype(int)
            key = f"s{number}", int(episode), int(t)
            assert key in candidates
            seen.add(key)
            wanted = reference(episodes[key[0], key[1]], key[2], spec, labels_selected)
            assert wanted.keys() == batch.keys()
            for name, value in wanted.items():
                assert batch[name][b].dtype == value.dtype, name
                np.testing.assert_array_equal(batch[name][b], value, name)
        if len(candidates) < 5:
            assert seen == candidates


def filled(tmp_path, lengths=((12, 5, 30), (9, 1, 0, 20)), select=select_all, **spec):
    episodes = record(tmp_path, lengths, np.random.default_rng(3))
    reader = ReplayReader(tmp_path)
    reader.refresh()
    window = WindowSpec(spec.get("n_obs_steps", 2), spec.get("horizon", 4), (STATE, IMAGE))
    return reader, WindowSampler(reader, window, select), episodes


def test_sampling_is_uniform(tmp_path):
    _, sampler, episodes = filled(tmp_path)
    n = sum(map(len, episodes.values()))
    assert sampler.num_candidates == n == 77
    draws = 77 * 400
    batch = sampler.sample(draws, np.random.default_rng(0))
    _, counts = np.unique(batch[STATE][:, -1], axis=0, return_counts=True)
    assert len(counts) == n
    chi2 = ((counts - draws / n) ** 2 / (draws / n)).sum()
    # 76 degrees of freedom: the 0.001 and 0.999 quantiles are 41 and 120.
    assert 41 < chi2 < 120


def test_same_seed_same_batch(tmp_path):
    _, sampler, _ = filled(tmp_path)
    first, second = (sampler.sample(50, np.random.default_rng(9)) for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)


def test_select_is_asked_once_per_episode(tmp_path):
    asked = []

    def select(episode, flags):
        asked.append((episode.stream, episode.episode))
        assert flags.reward.shape == flags.held.shape == episode.rows.shape
        return np.zeros(len(episode.rows), bool)

    reader, sampler, episodes = filled(tmp_path, select=select)
    assert sampler.refresh() == 0 and sampler.num_candidates == 0
    assert sorted(asked) == sorted(episodes)
    with pytest.raises(ConfigError, match="no closed episode has"):
        sampler.statistics()
    with pytest.raises(ConfigError, match="a bool for each step"):
        WindowSampler(reader, WindowSpec(1, 1, (STATE,)), lambda e, f: np.ones(3))


def test_unknown_keys_are_named(tmp_path):
    reader, _, _ = filled(tmp_path)
    with pytest.raises(ConfigError, match=r"\['observation.nope'\] are not recorded; known"):
        WindowSampler(reader, WindowSpec(1, 1, ("observation.nope",)))
    with pytest.raises(ConfigError, match="at least 1"):
        WindowSpec(0, 1, (STATE,))


def test_statistics_are_exact(tmp_path, monkeypatch):
    monkeypatch.setattr("embodied.buffer.statistics._CHUNK_ELEMENTS", 100)
    _, sampler, episodes = filled(tmp_path, select=select_interventions)
    steps = [s for steps in episodes.values() for s in steps if s.intervention]
    stats = sampler.statistics()
    assert stats.keys() == {STATE, IMAGE, "action"}
    data = {
        STATE: np.stack([s.observation[STATE] for s in steps]),
        IMAGE: np.concatenate([s.observation[IMAGE].reshape(-1, 3) for s in steps]),
        "action": np.stack([s.action for s in steps if not s.held]),
    }
    for key, values in data.items():
        found, values = stats[key], values.astype(np.float64)
        assert found.count == len(values)
        for name, wanted in {
            "mean": values.mean(0),
            "std": values.std(0),
            "min": values.min(0),
            "max": values.max(0),
            "q01": np.quantile(values, 0.01, axis=0),
            "q99": np.quantile(values, 0.99, axis=0),
        }.items():
            np.testing.assert_allclose(getattr(found, name), wanted, rtol=1e-9, atol=1e-12)
