"""Returns to go of episodes that succeed, run out of time, or still go on."""

import msgspec
import numpy as np
import pytest
from memory import MemoryReader
from windowing import STATE, key_of

from embodied.buffer.sample.samplers import WindowSampler
from embodied.buffer.sample.windows import RETURN_TO_GO, WindowSpec
from embodied.core.episodes import Step


def record(reader, episode, successes, rewards=None, ends=True, terminated=False):
    """An episode by which of its steps succeed; its last observation only if it ends."""
    length = len(successes)
    for index in range(length + ends):
        last = index == length - 1
        reader.add(
            Step(
                "s0",
                episode,
                index,
                {STATE: np.array([0, episode, index], np.float32)},
                np.zeros(2, np.float32),
                reward=float(rewards[index]) if rewards and index < length else 0.0,
                terminated=last and terminated,
                truncated=last and not terminated,
                success=index < length and successes[index],
                final=index == length,
            )
        )


def found(sampler):
    """Return to go by (episode, index)."""
    batch = sampler.sample(400, np.random.default_rng(0))
    keys = [key_of(batch, b)[1:] for b in range(400)]
    return dict(zip(keys, batch[RETURN_TO_GO].tolist(), strict=True))


def spec_of(rewards):
    return WindowSpec(1, 1, (STATE,), n_step=1, discount=0.5, rewards=rewards, return_to_go=True)


def test_what_failed_would_have_gone_on_costing_and_a_time_out_is_not_bootstrapped():
    reader = MemoryReader()
    record(reader, 0, [False, False, True], terminated=True)
    record(reader, 1, [False, False])
    record(reader, 2, [False, True, False])
    record(reader, 3, [False], terminated=True)
    cost = found(WindowSampler(reader, spec_of("cost")))
    assert [cost[0, t] for t in range(3)] == [-1.5, -1.0, 0.0]
    assert [cost[1, t] for t in range(2)] == [-2.0, -2.0]
    assert [cost[2, t] for t in range(3)] == [-1.25, -0.5, -1.0]
    assert cost[3, 0] == -2.0
    sparse = found(WindowSampler(reader, spec_of("sparse")))
    assert [sparse[0, t] for t in range(3)] == [0.25, 0.5, 1.0]
    assert [sparse[1, t] for t in range(2)] == [0.0, 0.0]


@pytest.mark.parametrize("n_step", [1, 2, 7])
def test_a_failure_that_ends_the_episode_is_never_cheaper_than_going_on(n_step):
    """Whatever the horizon of the backup, what bootstraps nothing costs what is still to come."""
    reader = MemoryReader()
    record(reader, 0, [False] * 4, terminated=True)
    record(reader, 1, [False] * 3 + [True], terminated=True)
    spec = msgspec.structs.replace(spec_of("cost"), n_step=n_step, discount=0.9)
    batch = WindowSampler(reader, spec).sample(400, np.random.default_rng(0))
    ended = batch["discount"] == 0
    np.testing.assert_allclose(batch["return"][ended], batch[RETURN_TO_GO][ended], rtol=1e-5)
    failed = batch[STATE][:, 0, 1] == 0
    assert {key_of(batch, b)[1:] for b in np.flatnonzero(ended & failed)} >= {(0, 3)}
    np.testing.assert_allclose(batch["return"][ended & failed], -10, rtol=1e-5)


def test_recorded_rewards_are_summed_as_they_are():
    reader = MemoryReader()
    record(reader, 0, [False, False, False], rewards=[4.0, -2.0, 8.0])
    assert found(WindowSampler(reader, spec_of("recorded"))) == {
        (0, 0): 5.0, (0, 1): 2.0, (0, 2): 8.0,
    }  # fmt: skip


def test_an_episode_is_drawn_from_only_when_all_of_it_is_known():
    reader = MemoryReader()
    record(reader, 0, [False, True], terminated=True)
    record(reader, 1, [False, False], ends=False)
    sampler = WindowSampler(reader, spec_of("cost"))
    assert found(sampler) == {(0, 0): -1.0, (0, 1): 0.0}


def test_returns_stay_with_their_steps_when_episodes_come_and_go():
    reader = MemoryReader()
    for episode in range(4):
        record(reader, episode, [False] * episode + [True], terminated=True)
    sampler = WindowSampler(reader, spec_of("cost"))
    reader.remove("s0", 1)
    record(reader, 4, [False] * 3)
    sampler.refresh()
    expected = {
        (episode, t): -2 * (1 - 0.5 ** (episode - t))
        for episode in (0, 2, 3)
        for t in range(episode + 1)
    }
    assert found(sampler) == pytest.approx(expected | {(4, t): -2.0 for t in range(3)})
