"""Searches over the simplex on functions whose best point is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied.core.config import component
from embodied.run.simplex_search import lattice


def make_search(name, **options):
    cls, config = component("searches", {"name": name, **options}, "search")
    return cls(config)


class Scores:
    """Noisy concave scores with their top at `best`; the same noise per episode for all points."""

    def __init__(self, best, noise=0.2, seed=0):
        self.best = np.array(best)
        self.noise = noise * np.random.default_rng(seed).normal(size=10_000)
        self.own = noise * np.random.default_rng(seed + 1).normal(size=10_000)
        self.asked = []

    def __call__(self, weights, episodes):
        assert weights.min() >= -1e-12 and weights.sum() == pytest.approx(1)
        self.asked.append((tuple(weights), episodes))
        shift = int(1000 * weights @ np.arange(1, len(weights) + 1))
        distance = np.square(weights - self.best).sum()
        return 1 - distance + self.noise[:episodes] + 0.3 * self.own[shift : shift + episodes]


@given(st.integers(1, 4), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_the_lattice_is_every_point_once(n, steps):
    points = lattice(n, steps)
    assert len(points) == math.comb(steps + n - 1, n - 1) == len(np.unique(points, axis=0))
    np.testing.assert_allclose(points.sum(1), 1)
    assert points.min() >= 0
    np.testing.assert_array_equal(points[0], np.eye(n)[0])
    np.testing.assert_array_equal(points[-1], np.eye(n)[-1])


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("grid", {"steps": 10, "episodes": 40}, 0.11),
        ("bandit", {"steps": 10, "first_episodes": 10}, 0.11),
        ("bayes", {"trials": 14, "episodes": 40}, 0.11),
    ],
)
@pytest.mark.parametrize("best", [(0.3, 0.7), (0.2, 0.5, 0.3)])
def test_searches_find_the_top(name, options, tolerance, best):
    found = []
    for seed in range(5):
        scores = Scores(best, seed=seed)
        search = make_search(name, **options)
        w = search.run(len(best), scores, [], np.random.default_rng(seed))
        asked = {}
        for point, episodes in scores.asked:
            asked[point] = max(asked.get(point, 0), episodes)
        assert sum(asked.values()) <= search.episodes(len(best), 0)
        assert tuple(w) in asked
        found.append(np.abs(w - best).max())
    assert np.median(found) <= tolerance


def test_the_bandit_lets_bad_weights_die_early_on_the_same_episodes():
    scores = Scores((0.0, 1.0), noise=0.0)
    search = make_search("bandit", steps=8, first_episodes=4)
    np.testing.assert_array_equal(search.run(2, scores, [], np.random.default_rng(0)), [0.0, 1.0])
    played = {}
    for point, episodes in scores.asked:
        played[point] = max(played.get(point, 0), episodes)
    assert played[(1.0, 0.0)] == 4 and played[(0.0, 1.0)] == max(played.values()) == 16
    counts = [episodes for _, episodes in scores.asked]
    assert [counts.count(e) for e in (4, 8, 16)] == [9, 4, 2]
    assert sum(played.values()) == search.episodes(2, 0)


def test_bayes_asks_where_the_model_promises_most():
    """With a quiet function it closes in on the top, which lies on no first point."""
    scores = Scores((0.15, 0.85), noise=0.0)
    w = make_search("bayes", trials=12, episodes=2).run(2, scores, [], np.random.default_rng(0))
    assert abs(w[0] - 0.15) < 0.05
    assert len({point for point, _ in scores.asked}) == 12


@pytest.mark.parametrize("name", ["grid", "bandit", "bayes", "analytic"])
def test_the_start_is_tried(name):
    start = np.array([0.123, 0.877])
    scores = Scores(start, noise=0.0)
    options = {} if name == "analytic" else {"steps": 5} if name != "bayes" else {"trials": 5}
    w = make_search(name, **options).run(2, scores, [start], np.random.default_rng(0))
    np.testing.assert_array_equal(w, start)
    assert (tuple(start) in {point for point, _ in scores.asked}) == (name != "analytic")


def test_ties_are_broken_by_lot():
    """Where nothing ever succeeds, no member is preferred."""
    search = make_search("bandit", steps=4, first_episodes=2)
    ends = [
        tuple(search.run(2, lambda w, n: np.zeros(n), [], np.random.default_rng(seed)))
        for seed in range(40)
    ]
    counts = [ends.count(point) for point in set(ends)]
    assert len(counts) == 5 and max(counts) < 20
