import numpy as np
import pytest
from chi_square import deviates
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.buffer.read.episodes import EpisodeInfo
from embodied.buffer.sample.draws import NewSteps, Recency, Stratified, Uniform, Weighted
from embodied.buffer.sample.priorities import Prioritised, SumTree
from embodied.core.errors import ConfigError

DRAWS = 40_000


def make_episodes(rng, first=0, count=6):
    """Episodes with what strategies look at, and of each step: episode, intervention, version."""
    episodes = [
        EpisodeInfo(
            stream=f"r{number % 3}",
            episode=number,
            task=("push", "lift")[number % 5 == 0],
            seed=0,
            rows=np.arange(5),
            final_row=0,
            closed=True,
            success=number % 2 == 0,
            interventions=0,
            policy_versions=(0, 0),
        )
        for number in range(first, first + count)
    ]
    counts = rng.integers(2, 6, count)
    counts[1] = 0  # nothing of it is selected
    steps = [
        {"episode": episode, "intervention": bool(rng.random() < 0.4), "policy_version": version}
        for episode, size in zip(episodes, counts.tolist(), strict=True)
        for version in rng.integers(-1, 3, size).tolist()
    ]
    return NewSteps(
        episodes,
        counts,
        {
            name: np.array([step[name] for step in steps])
            for name in ("intervention", "policy_version")
        },
    ), steps


def weigh_nothing(steps):
    return [1.0] * len(steps)


def weigh_last(steps):
    return [float(i >= len(steps) - 9) for i in range(len(steps))]


def weigh_half_life(steps):
    return [0.5 ** ((len(steps) - 1 - i) / 12.5) for i in range(len(steps))]


def weigh_outcome(steps):
    success = [3.0 if step["episode"].success else 0.5 for step in steps]
    return [
        w * (2.0 if step["intervention"] else 1.0) for w, step in zip(success, steps, strict=True)
    ]


def weigh_interventions_alone(steps):
    return [float(step["intervention"]) for step in steps]


def weigh_strata(name_of, shares=None):
    def weigh(steps):
        names = [name_of(step) for step in steps]
        share = {name: 1.0 for name in names} if shares is None else shares
        return [share.get(name, 0.0) / names.count(name) for name in names]

    return weigh


SHARES = {"r0": 3.0, "r2": 1.0, "r9": 5.0}
CASES = {
    "uniform": (lambda: Uniform(), weigh_nothing),
    "last steps": (lambda: Recency(Recency.Config(last_steps=9)), weigh_last),
    "half life": (lambda: Recency(Recency.Config(half_life_steps=12.5)), weigh_half_life),
    "weighted": (
        lambda: Weighted(Weighted.Config(success=3, failure=0.5, intervention=2)),
        weigh_outcome,
    ),
    "interventions": (lambda: Weighted(Weighted.Config(autonomous=0)), weigh_interventions_alone),
    "tasks": (
        lambda: Stratified(Stratified.Config(by="task")),
        weigh_strata(lambda s: s["episode"].task),
    ),
    "streams": (
        lambda: Stratified(Stratified.Config(by="stream", shares=SHARES)),
        weigh_strata(lambda s: s["episode"].stream, SHARES),
    ),
    "versions": (
        lambda: Stratified(Stratified.Config(by="policy_version", shares={"-1": 1, "2": 2.5})),
        weigh_strata(lambda s: str(s["policy_version"]), {"-1": 1, "2": 2.5}),
    ),
    "new priorities": (lambda: Prioritised(), weigh_nothing),
}


@pytest.mark.parametrize("name", CASES)
def test_distribution(name):
    make, weigh = CASES[name]
    strategy, rng = make(), np.random.default_rng(7)
    steps = []
    for first in (0, 6):
        new, more = make_episodes(rng, first)
        strategy.extend(new)
        steps += more
        check(strategy, weigh(steps), rng)
    left = rng.random(len(steps)) < 0.7
    strategy.keep(left)
    steps = [step for step, kept in zip(steps, left, strict=True) if kept]
    check(strategy, weigh(steps), rng)
    new, more = make_episodes(rng, 12, 4)
    strategy.extend(new)
    check(strategy, weigh(steps + more), rng)


def check(strategy, weights, rng):
    """Draws go by these weights, and the test would notice one that is wrong."""
    drawn = np.concatenate([strategy.draw(DRAWS // 8, rng).ordinals for _ in range(8)])
    counts = np.bincount(drawn, minlength=len(weights))
    assert len(counts) == len(weights) and drawn.min() >= 0
    assert not deviates(counts, weights)
    wrong = np.array(weights)
    most = int(np.argmax(wrong))
    wrong[most] *= 1.5
    assert deviates(counts, wrong)
    swapped = np.array(weights)
    swapped[most] = 0.0
    assert deviates(counts, swapped)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_priorities(alpha):
    strategy = Prioritised(Prioritised.Config(alpha=alpha, beta=0.5))
    rng = np.random.default_rng(1)
    first, _ = make_episodes(rng)
    strategy.extend(first)
    n = len(first)
    priorities = rng.uniform(0.2, 4.0, n)
    strategy.update(np.arange(n), priorities)
    check(strategy, (priorities + 1e-6) ** alpha, rng)
    strategy.update(np.array([3, 5, 3]), np.array([1.0, 0.0, 9.0]))
    priorities[3], priorities[5] = 9.0, 0.0  # the last of two holds
    new, _ = make_episodes(rng, 6)
    strategy.extend(new)
    priorities = np.concatenate((priorities, np.full(len(new), 9.0)))  # the greatest so far
    left = rng.random(len(priorities)) < 0.8
    left[5] = False
    strategy.keep(left)
    expected = (priorities[left] + 1e-6) ** alpha
    check(strategy, expected, rng)
    ordinals, weights = strategy.draw(64, rng)
    share = expected[ordinals] / expected.sum()
    wanted = (len(expected) * share) ** -0.5
    assert weights is not None and weights.dtype == np.float32
    np.testing.assert_allclose(weights, wanted / wanted.max(), rtol=1e-4)
    strategy.beta = 0.0
    assert set(strategy.draw(64, rng).weights) == {1.0}  # type: ignore[arg-type]


def test_importance_weights_undo_the_bias():
    strategy = Prioritised(Prioritised.Config(alpha=1.0, beta=1.0))
    rng = np.random.default_rng(2)
    new, steps = make_episodes(rng)
    strategy.extend(new)
    strategy.update(np.arange(len(steps)), rng.uniform(0.5, 3, len(steps)))
    values = rng.normal(size=len(steps))
    ordinals, weights = strategy.draw(200_000, rng)
    assert np.average(values[ordinals], weights=weights) == pytest.approx(values.mean(), abs=0.01)
    assert values[ordinals].mean() != pytest.approx(values.mean(), abs=0.02)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=4),
    seed=st.integers(0, 1 << 30),
)
def test_sum_tree(sizes, seed):
    rng = np.random.default_rng(seed)
    tree, plain = SumTree(), np.empty(0)
    for size in sizes:
        new = rng.integers(0, 5, size).astype(float)
        tree.extend(new)
        plain = np.concatenate((plain, new))
        if len(plain):
            leaves = rng.integers(0, len(plain), 50)
            weights = rng.integers(0, 9, 50).astype(float)
            tree.set(leaves, weights)
            for leaf, weight in zip(leaves, weights, strict=True):
                plain[leaf] = weight
        assert len(tree) == len(plain) and tree.leaves.tolist() == plain.tolist()
        assert tree.total == plain.sum()
        if tree.total:
            masses = np.concatenate((np.arange(tree.total), rng.random(100) * tree.total))
            found = tree.find(masses)
            assert found.tolist() == np.searchsorted(plain.cumsum(), masses, "right").tolist()
            assert plain[tree.find(np.array([tree.total]))[0]] > 0  # as rounding may have it


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(st.floats(0.01, 100), min_size=1, max_size=12),
    batch_size=st.integers(1, 300),
    seed=st.integers(0, 1 << 30),
)
def test_strata_have_their_shares_in_every_batch(shares, batch_size, seed):
    rng = np.random.default_rng(seed)
    names = [str(number) for number in range(len(shares))]
    config = Stratified.Config(by="policy_version", shares=dict(zip(names, shares, strict=True)))
    strategy = Stratified(config)
    new, _ = make_episodes(rng)
    versions = rng.integers(0, len(shares) + 3, len(new))
    strategy.extend(NewSteps(new.episodes, new.counts, {"policy_version": versions}))
    there = sorted({v for v in versions.tolist() if v < len(shares)})
    if not there:
        with pytest.raises(ConfigError, match="of which there is no step; there are steps of"):
            strategy.draw(batch_size, rng)
        return
    total = sum(shares[v] for v in there)
    drawn = versions[strategy.draw(batch_size, rng).ordinals]
    for version in there:
        wanted = shares[version] / total * batch_size
        assert abs((drawn == version).sum() - wanted) < 1 + 1e-6
    assert set(drawn.tolist()) <= set(there)


def test_a_half_life_of_any_length():
    new, steps = make_episodes(np.random.default_rng(0))
    for half_life in (1e-300, 1e-3, 1e9, 1e300):
        strategy = Recency(Recency.Config(half_life_steps=half_life))
        strategy.extend(new)
        ordinals = strategy.draw(1000, np.random.default_rng(0)).ordinals
        assert ordinals.min() >= 0 and ordinals.max() == len(steps) - 1
        assert (len(set(ordinals.tolist())) == 1) == (half_life < 1)


def test_weights_of_nothing():
    strategy = Weighted(Weighted.Config(intervention=1, autonomous=0))
    new, _ = make_episodes(np.random.default_rng(0))
    columns = {"intervention": np.zeros(len(new), np.bool_)}
    strategy.extend(NewSteps(new.episodes, new.counts, columns))
    with pytest.raises(ConfigError, match=r"steps has weight 0 .*'autonomous': 0"):
        strategy.draw(1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recency.Config(), "exactly one of them must be set"),
        (lambda: Recency.Config(last_steps=1, half_life_steps=1.0), "exactly one of them"),
        (lambda: Recency.Config(last_steps=0), "last_steps is 0; it must be at least 1"),
        (lambda: Recency.Config(half_life_steps=float("nan")), "must be positive and finite"),
        (lambda: Weighted.Config(success=-1.0), "success is -1.0; a factor must be finite and"),
        (lambda: Weighted.Config(intervention=float("inf")), "intervention is inf"),
        (lambda: Weighted.Config(success=0, failure=0), "success and failure are both 0"),
        (lambda: Stratified.Config(by="robot"), "by is 'robot'; task, stream or policy_version"),  # type: ignore[arg-type]
        (lambda: Stratified.Config(by="task", shares={}), "no task is named"),
        (lambda: Stratified.Config(by="task", shares={"a": 0.0}), "shares: task 'a' has 0.0"),
        (lambda: Prioritised.Config(alpha=-0.1), "alpha is -0.1; it must be between 0 and 1"),
        (lambda: Prioritised.Config(beta=1.5), "beta is 1.5; it must be between 0 and 1"),
        (lambda: Prioritised.Config(epsilon=0.0), "epsilon is 0.0; it must be positive"),
    ],
)
def test_unusable_configs(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("priorities", "message"),
    [
        (np.array([1.0, np.nan]), "1 are not finite"),
        (np.array([1.0, -2.0]), "a priority is -2.0"),
        (np.array([1.0]), r"shape \(1,\)"),
    ],
)
def test_unusable_priorities(priorities, message):
    strategy = Prioritised()
    strategy.extend(make_episodes(np.random.default_rng(0))[0])
    with pytest.raises(ConfigError, match=message):
        strategy.update(np.array([0, 1]), priorities)
