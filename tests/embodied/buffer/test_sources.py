import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import MemoryReader
from windowing import IMAGE, STATE, assert_batch_is, key_of, make_steps

from embodied.buffer.sample.batches import StaleDrawError
from embodied.buffer.sample.priorities import Prioritised
from embodied.buffer.sample.samplers import WindowSampler
from embodied.buffer.sample.sources import MixtureSampler, Quotas
from embodied.buffer.sample.windows import WindowSpec
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError

SPEC = WindowSpec(2, 3, (STATE, IMAGE), n_step=2, discount=0.9)


def make_source(stream, lengths=(6, 4), spec=SPEC, **options):
    reader = MemoryReader(stream)
    episodes = {}
    for number, length in enumerate(lengths):
        steps = make_steps(stream, number, length, np.random.default_rng(stream * 100 + number))
        episodes[f"s{stream}", number] = steps
        for step in steps:
            reader.add(step)
    return reader, WindowSampler(reader, spec, **options), episodes


@settings(max_examples=150, deadline=None)
@given(
    shares=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=30),
    batches=st.lists(st.integers(1, 300), min_size=1, max_size=30),
)
def test_quotas_are_met_at_any_time(shares, batches):
    quotas = Quotas(np.array(shares))
    ratios = np.array(shares) / np.sum(shares)
    totals = np.zeros(len(shares))
    for size in batches:
        counts = quotas.next(size)
        assert counts.sum() == size and counts.min() >= 0
        assert (quotas.next(size) == counts).all()
        quotas.take(counts)
        totals += counts
        assert (np.abs(totals - ratios * totals.sum()) < 1 + 1e-9).all()


def test_half_and_half_is_exact():
    quotas = Quotas(np.array([2.0, 2.0]))
    for _ in range(5):
        counts = quotas.next(256)
        assert counts.tolist() == [128, 128]
        quotas.take(counts)


def test_quotas_stay_where_largest_remainders_do_not():
    # At the 43rd sample the largest remainders would have to give more than there is.
    shares = 1 / np.array([1.0, 1.0, 7.0, 12.0, 28.0])
    quotas, totals = Quotas(shares), np.zeros(len(shares))
    for _ in range(2000):
        counts = quotas.next(1)
        quotas.take(counts)
        totals += counts
        assert (np.abs(totals - shares / shares.sum() * totals.sum()) < 1).all()


def test_a_batch_is_its_sources_one_after_the_other():
    _, demos, of_demos = make_source(0)
    _, online, of_online = make_source(1)
    mixture = MixtureSampler({"demos": demos, "online": online}, {"demos": 1, "online": 2})
    rng = np.random.default_rng(0)
    assert mixture.names == ("demos", "online") and mixture.num_candidates == 20
    totals = np.zeros(2)
    for k in range(1, 6):
        batch = mixture.sample(10, rng)
        source = batch.pop("source")
        assert source.dtype == np.int64 and (np.diff(source) >= 0).all()
        totals += np.bincount(source, minlength=2)
        assert (np.abs(totals - np.array([1, 2]) / 3 * 10 * k) < 1).all()
        assert [key_of(batch, b)[0] for b in range(10)] == [f"s{number}" for number in source]
        assert_batch_is(batch, of_demos | of_online, SPEC, lambda s: True)


def test_draw_prefetch_and_fetch_into_given_arrays():
    sources = {f"source {n}": make_source(n) for n in range(3)}
    mixture = MixtureSampler(
        {name: sampler for name, (_, sampler, _) in sources.items()}, dict.fromkeys(sources, 1.0)
    )
    draw = mixture.draw(7, np.random.default_rng(0))
    assert len(draw) == 7 and sorted(draw.counts.tolist()) == [2, 2, 3]
    mixture.prefetch(draw)
    assert all(len(reader.prefetched) == 1 for reader, _, _ in sources.values())
    sizes = mixture.batch_spec(7)
    out = {name: np.zeros(size.shape, size.dtype) for name, size in sizes.items()}
    batch, other = mixture.fetch(draw, out), mixture.fetch(draw)
    assert batch.keys() == other.keys() == sizes.keys()
    for name, array in batch.items():
        assert array is out[name] and (array == other[name]).all()
    small = mixture.draw(1, np.random.default_rng(0))
    assert [part is None for part in small.parts].count(False) == 1
    assert len(mixture.fetch(small)["source"]) == 1


def test_priorities_of_one_source():
    _, demos, _ = make_source(0)
    _, online, _ = make_source(1, strategy=Prioritised(Prioritised.Config(alpha=1.0, beta=1.0)))
    mixture = MixtureSampler({"demos": demos, "online": online}, {"demos": 1, "online": 1})
    rng = np.random.default_rng(0)
    draw = mixture.draw(200, rng)
    assert draw.parts[1] is not None
    favourite = draw.parts[1].numbers[0]
    numbers = np.concatenate([part.numbers for part in draw.parts if part is not None])
    mixture.update(draw, np.where(numbers == favourite, 3.0, 1.0))
    batch = mixture.sample(400, rng)
    assert batch["weight"][:200].tolist() == [1.0] * 200
    assert sorted(set(batch["weight"][200:].tolist())) == pytest.approx([1 / 3, 1], rel=1e-5)
    with pytest.raises(ConfigError, match=r"shape \(3,\); one for each of the 200"):
        mixture.update(draw, np.ones(3))


def test_removed_and_damaged_episodes():
    reader, demos, _ = make_source(0)
    _, online, _ = make_source(1)
    mixture = MixtureSampler({"demos": demos, "online": online}, {"demos": 3, "online": 1})
    rng = np.random.default_rng(0)
    draw = mixture.draw(8, rng)
    reader.remove("s0", 0)
    with pytest.raises(StaleDrawError):
        mixture.fetch(draw)
    assert mixture.redraw(draw, rng).counts.tolist() == draw.counts.tolist() == [6, 2]
    for step in make_steps(0, 2, 3, rng):
        reader.add(step)
    assert mixture.refresh() == 1
    reader.damaged = {("s0", 1)}
    batch = mixture.sample(8, rng)
    assert batch["source"].tolist() == [0] * 6 + [1] * 2
    assert {key_of(batch, b)[1] for b in range(6)} == {2}
    reader.remove("s0", 2)
    with pytest.raises(ConfigError, match="source 'demos' has nothing to sample"):
        mixture.sample(8, rng)


def test_statistics_of_all_sources():
    _, demos, _ = make_source(0, tracked=(STATE, "action"))
    _, online, _ = make_source(1, lengths=(9,), tracked=(STATE,))
    mixture = MixtureSampler({"demos": demos, "online": online}, {"demos": 1, "online": 9})
    ((key, stats),) = mixture.tracked_statistics().items()
    assert key == STATE and stats.count == 19
    assert stats.mean[0] == pytest.approx(9 / 19) and stats.max[2] == 8
    exact = mixture.statistics()
    assert exact.keys() == {STATE, IMAGE, "action"} and exact[STATE].count == 19
    assert exact[STATE].mean == pytest.approx(stats.mean)
    assert exact[STATE].q99 == pytest.approx(stats.q99)


def test_ratios_go_on_where_they_were_saved():
    def mixture():
        parts = {"demos": make_source(0)[1], "online": make_source(1)[1]}
        return MixtureSampler(parts, {"demos": 1, "online": 2})

    whole, first, second = mixture(), mixture(), mixture()
    rngs = [np.random.default_rng(0) for _ in range(2)]
    expected = [whole.draw(8, rngs[0]).counts.tolist() for _ in range(4)]
    found = [first.draw(8, rngs[1]).counts.tolist() for _ in range(2)]
    second.load(first.save())
    found += [second.draw(8, rngs[1]).counts.tolist() for _ in range(2)]
    assert found == expected and len({tuple(counts) for counts in found}) > 1
    second.load({"names": ["demos"], "taken": [{"demos": 5}]})
    demos = sum(counts[0] for counts in found)
    assert second.save() == {
        "names": ["demos", "online"],
        "taken": [{"demos": demos, "online": 32 - demos}],
    }


def test_an_optional_source_joins_when_it_has_something_and_catches_up_nothing():
    _, demos, _ = make_source(0)
    reader = MemoryReader()
    for step in make_steps(1, 0, 6, np.random.default_rng(1)):
        reader.add(step)
    reader.remove("s1", 0)
    online = WindowSampler(reader, SPEC)
    ratios = {"demos": 1.0, "online": 1.0}
    mixture = MixtureSampler({"demos": demos, "online": online}, ratios, ["online"])
    rng = np.random.default_rng(0)
    assert mixture.num_candidates == demos.num_candidates
    assert [mixture.draw(4, rng).counts.tolist() for _ in range(3)] == [[4, 0]] * 3
    assert mixture.statistics()[STATE].count == demos.statistics()[STATE].count
    assert (mixture.sample(4, rng)["source"] == 0).all()
    for step in make_steps(1, 1, 5, np.random.default_rng(2)):
        reader.add(step)
    mixture.refresh()
    assert [mixture.draw(4, rng).counts.tolist() for _ in range(3)] == [[2, 2]] * 3
    again = MixtureSampler({"demos": demos, "online": online}, ratios, ["online"])
    again.load(mixture.save())
    assert again.save() == mixture.save()
    drawn = mixture.draw(4, rng)
    reader.remove("s1", 1)
    assert mixture.redraw(drawn, rng).counts.tolist() == [4, 0]
    alone = MixtureSampler({"a": WindowSampler(MemoryReader(), SPEC)}, {"a": 1.0}, ["a"])
    assert alone.num_candidates == 0
    with pytest.raises(ConfigError, match="no source has anything to sample: a"):
        alone.draw(4, rng)


def test_sources_that_cannot_be_mixed():
    _, first, _ = make_source(0)
    reader = MemoryReader()
    for index in range(3):
        observation = {STATE: np.zeros(4, np.float32), IMAGE: np.zeros((2, 3, 3), np.uint8)}
        reader.add(Step("a", 0, index, observation, np.zeros(2, np.float32), final=index == 2))
    mixture = MixtureSampler({"a": first, "b": WindowSampler(reader, SPEC)}, {"a": 1.0, "b": 1.0})
    message = r"'a' and 'b' cannot be mixed: .*state is float32 \[2, 3\] in the one and float32 \[2"
    for use in (lambda: mixture.batch_spec(2), lambda: mixture.sample(2, np.random.default_rng(0))):
        with pytest.raises(ConfigError, match=message):
            use()


def test_unusable_mixtures():
    _, first, _ = make_source(0)
    _, other, _ = make_source(1, spec=WindowSpec(2, 4, (STATE,)))
    empty = WindowSampler(MemoryReader(), SPEC)
    with pytest.raises(ConfigError, match="'a' and 'b' differ: their windows are"):
        MixtureSampler({"a": first, "b": other}, {"a": 1, "b": 1})
    with pytest.raises(ConfigError, match=r"sources are \['a'\] and ratios are given for \['b'\]"):
        MixtureSampler({"a": first}, {"b": 1})
    for ratio in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="ratio of source 'a' is"):
            MixtureSampler({"a": first}, {"a": ratio})
    mixture = MixtureSampler({"a": first, "b": empty}, {"a": 1, "b": 1})
    assert mixture.num_candidates == 0
    with pytest.raises(ConfigError, match="source 'b' has nothing to sample"):
        mixture.draw(4, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        mixture.draw(0, np.random.default_rng(0))
