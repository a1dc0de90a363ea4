import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import MemoryReader
from windowing import IMAGE, STATE, assert_batch_is, interleave, key_of, make_steps

from embodied.buffer.sample.batches import StaleDrawError
from embodied.buffer.sample.growing import GrowingArray
from embodied.buffer.sample.samplers import WindowSampler, select_all
from embodied.buffer.sample.windows import METADATA, WindowIndex, WindowSpec
from embodied.core.errors import ConfigError

SPECS = st.builds(
    lambda to, h, n, discount, metadata, rewards, to_go, success, future: WindowSpec(
        to,
        h,
        (STATE, IMAGE),
        n,
        min(discount, 0.9 if rewards == "cost" else 1.0) if n else 1.0,
        metadata,
        rewards=rewards,
        return_to_go=to_go and (rewards != "cost" or n > 0),
        episode_success=success,
        future=future,
        future_keys=(IMAGE, STATE)[: len(future)],
    ),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 7),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from([(), METADATA, ("t_ns",)]),
    st.sampled_from(["recorded", "sparse", "cost"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), (3,), (1, 4)]),
)
SELECTIONS = {
    "all": (select_all, lambda s: True),
    "interventions": (lambda e, f: f.intervention, lambda s: s.intervention),
    "rewarded": (lambda e, f: (f.reward > 0) & ~f.held, lambda s: s.reward > 0 and not s.held),
    "odd episodes": (lambda e, f: f.held | bool(e.episode % 2), lambda s: s.held or s.episode % 2),
}


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(-3, 9), max_size=5), min_size=1, max_size=3),
    spec=SPECS,
    selection=st.sampled_from(sorted(SELECTIONS)),
    seed=st.integers(0, 1 << 30),
)
def test_batches_equal_the_plain_model(lengths, spec, selection, seed):
    # A negative length: an episode that stays open.
    rng = np.random.default_rng(seed)
    select, is_selected = SELECTIONS[selection]
    reader = MemoryReader(seed)
    sampler = WindowSampler(reader, spec, select)
    every = {
        (f"s{stream}", number): make_steps(stream, number, abs(length), rng)
        for stream, numbers in enumerate(lengths)
        for number, length in enumerate(numbers)
    }
    arriving = [
        steps if lengths[int(stream[1:])][number] >= 0 else steps[:-1]
        for (stream, number), steps in every.items()
    ]
    closed = set()

    def check():
        there = {
            (s, e, step.index) for s, e in closed for step in every[s, e][:-1] if is_selected(step)
        }
        assert sampler.num_candidates == len(there)
        if not there:
            with pytest.raises(ConfigError, match="nothing to sample"):
                sampler.draw(4, rng)
            return
        draw = sampler.draw(24, rng)
        late = rng.random() < 0.3 and remove()
        try:
            batch = sampler.fetch(draw)
        except StaleDrawError:
            assert late
            return
        keys = {key_of(batch, b) for b in range(24)}
        assert keys <= there and not any(key[:2] == late for key in keys)
        assert_batch_is(batch, every, spec, is_selected)

    def remove():
        victim = sorted(closed)[int(rng.integers(len(closed)))]
        reader.remove(*victim)
        closed.discard(victim)
        return victim

    for step in interleave(arriving, rng):
        reader.add(step)
        if step.final:
            closed.add((step.stream, step.episode))
        if closed and rng.random() < 0.1:
            remove()
        if rng.random() < 0.15:
            sampler.refresh()
            check()
    sampler.refresh()
    check()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    removed=st.lists(st.booleans(), min_size=12, max_size=12),
    seed=st.integers(0, 1 << 30),
)
def test_numbers_survive_removals(lengths, removed, seed):
    rng = np.random.default_rng(seed)
    index = WindowIndex()
    alive: list[list[int]] = []  # selected rows of each episode
    numbered: dict[int, int] = {}
    for first in range(0, len(lengths), 4):
        sizes = np.array(lengths[first : first + 4])
        rows = rng.permutation(1000)[: sizes.sum()] + 1000 * first
        selected = rng.random(len(rows)) < 0.7
        index.add(rows, sizes, np.arange(len(sizes)) - 10 - first, selected, sizes % 2 == 0)
        cuts = np.cumsum(sizes)[:-1]
        parts = zip(np.split(rows, cuts), np.split(selected, cuts), strict=True)
        alive += [part[chosen].tolist() for part, chosen in parts]
        numbered |= dict(zip(index.numbers(index.candidates).tolist(), index.rows, strict=True))
        mask = np.array(removed[: len(alive)])
        before = index.rows.tolist()
        left = index.remove(mask)
        assert index.rows.tolist() == [row for row, kept in zip(before, left, strict=True) if kept]
        alive = [episode for episode, gone in zip(alive, mask, strict=True) if not gone]
        wanted = [row for rows in alive for row in rows]
        assert index.rows.tolist() == wanted
        numbers = np.array(sorted(numbered), np.int64)
        ordinals, there = index.ordinals(numbers)
        assert [numbered[n] for n in numbers[there].tolist()] == index.rows[ordinals].tolist()
        assert set(wanted) == {numbered[n] for n in numbers[there].tolist()}


@given(st.lists(st.lists(st.integers(-(2**40), 2**40), max_size=200), max_size=8))
def test_growing_array(parts):
    array = GrowingArray(np.int64)
    for part in parts:
        array.extend(np.array(part, np.int64))
    whole = [value for part in parts for value in part]
    assert array.view.tolist() == whole and len(array) == len(whole)
    array.replace(np.array(whole[::2], np.int64))
    array.extend(np.array([7]))
    assert array.view.tolist() == [*whole[::2], 7]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_obs_steps": 0}, "n_obs_steps is 0 and horizon 1; both must be at least 1"),
        ({"horizon": 0}, "horizon 0"),
        ({"n_step": -1}, "n_step is -1"),
        ({"n_step": 2, "discount": 1.01}, "discount between 0 and 1"),
        ({"n_step": 2, "discount": float("nan")}, "discount nan"),
        ({"discount": 0.9}, "nothing is discounted"),
        ({"return_to_go": True, "rewards": "cost"}, "no bound with rewards=cost and discount=1"),
        ({"n_step": 2, "rewards": "cost"}, "no bound with rewards=cost and discount=1"),
        ({"observation_keys": ("return_to_go",)}, "names of other arrays"),
        ({"metadata": ("seed",)}, r"metadata \['seed'\] is unknown; known: intervention"),
        ({"observation_keys": ("a", "b", "a")}, "name one twice"),
        ({"observation_keys": ("next.a",)}, r"\['next.a'\] are names of other arrays"),
        ({"observation_keys": ("weight",)}, "names of other arrays"),
        ({"observation_keys": ("future.a",)}, "names of other arrays"),
        ({"future": (1,)}, "give both or neither"),
        ({"future": (0,), "future_keys": (STATE,)}, "offsets of at least 1"),
        ({"future": (1,), "future_keys": ("a",)}, r"future_keys \['a'\] are not among"),
    ],
)
def test_unusable_specs(fields, message):
    with pytest.raises(ConfigError, match=message):
        WindowSpec(**{"n_obs_steps": 1, "horizon": 1, "observation_keys": (STATE,), **fields})
