"""Searches over weights that sum to one. Shapes: n weights, M candidates, K evaluated points."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

Evaluate = Callable[[np.ndarray, int], np.ndarray]
"""(weights [n], episodes) → scores [episodes] on the same initial states for all weights."""

Few = Annotated[int, msgspec.Meta(ge=1, le=10_000)]


def lattice(n: int, steps: int) -> np.ndarray:
    """All weights [M, n] that are multiples of 1/steps, from the first corner to the last."""
    rows = [
        np.diff([-1, *bars, steps + n - 1]) - 1
        for bars in itertools.combinations(range(steps + n - 1), n - 1)
    ]
    return np.array(rows[::-1], np.float64) / steps


class Search(ABC):
    """Finds good weights by scoring some of them; `start` are weights to try in any case."""

    Config: Any

    @abstractmethod
    def episodes(self, n: int, n_start: int) -> int:
        """How many episodes it asks for at most."""

    @abstractmethod
    def run(
        self, n: int, evaluate: Evaluate, start: Sequence[np.ndarray], rng: np.random.Generator
    ) -> np.ndarray:
        """The chosen weights [n]."""


class GridConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """steps: weights are multiples of 1/steps. episodes: of each."""

    steps: Few = 10
    episodes: Few = 20


class Grid(Search):
    """Every point of a lattice on the same episodes; the greatest mean wins."""

    Config = GridConfig

    def __init__(self, config: GridConfig) -> None:
        self.config = config

    def episodes(self, n: int, n_start: int) -> int:
        """See Search."""
        return (len(lattice(n, self.config.steps)) + n_start) * self.config.episodes

    def run(
        self, n: int, evaluate: Evaluate, start: Sequence[np.ndarray], rng: np.random.Generator
    ) -> np.ndarray:
        """See Search."""
        points = [*start, *lattice(n, self.config.steps)]
        means = [evaluate(point, self.config.episodes).mean() for point in points]
        return points[int(np.argmax(means))]


class BanditConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """steps: candidates are the multiples of 1/steps. first_episodes: of each in the first round.

    keep: share of the candidates that go on; each round has 1/keep times the episodes.
    """

    steps: Few = 10
    first_episodes: Few = 8
    keep: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5


class Bandit(Search):
    """Successive halving (Jamieson and Talwalkar 2016): bad weights die early.

    All that are left in a round have played the same initial states, earlier rounds' included.
    """

    Config = BanditConfig

    def __init__(self, config: BanditConfig) -> None:
        self.config = config

    def episodes(self, n: int, n_start: int) -> int:
        """See Search."""
        rounds = self._rounds(len(lattice(n, self.config.steps)) + n_start)
        played, total = 0, 0
        for count, episodes in rounds:
            total += count * (episodes - played)
            played = episodes
        return total

    def run(
        self, n: int, evaluate: Evaluate, start: Sequence[np.ndarray], rng: np.random.Generator
    ) -> np.ndarray:
        """See Search."""
        points = [*start, *lattice(n, self.config.steps)]
        means = np.zeros(len(points))
        for count, episodes in self._rounds(len(points)):
            order = np.lexsort((rng.permutation(len(points)), -means))[:count]  # ties by lot
            points = [points[i] for i in sorted(order)]
            means = np.array([evaluate(point, episodes).mean() for point in points])
        best = np.flatnonzero(means == means.max())
        return points[int(rng.choice(best))]

    def _rounds(self, count: int) -> list[tuple[int, int]]:
        """(candidates, episodes of each so far) of every round, down to two candidates."""
        rounds: list[tuple[int, int]] = []
        episodes = float(self.config.first_episodes)
        while True:
            rounds.append((count, round(episodes)))
            fewer = max(2, round(count * self.config.keep))
            if fewer >= count:
                return rounds
            count, episodes = fewer, episodes / self.config.keep


class BayesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """trials: weights tried. episodes: of each. length: of the Gaussian process's kernel.

    explore: standard deviations that a point's mean is raised by when the next one is chosen.
    """

    trials: Few = 12
    episodes: Few = 20
    length: Annotated[float, msgspec.Meta(gt=0)] = 0.3
    explore: Annotated[float, msgspec.Meta(ge=0)] = 1.5


class Bayes(Search):
    """A Gaussian process over the simplex and upper confidence bounds (Srinivas et al. 2010).

    It begins with the corners and the centre; the choice is the evaluated point with the greatest
    posterior mean, which smooths the noise of single points.
    """

    Config = BayesConfig

    def __init__(self, config: BayesConfig) -> None:
        self.config = config

    def episodes(self, n: int, n_start: int) -> int:
        """See Search."""
        return max(self.config.trials, n + 1 + n_start) * self.config.episodes

    def run(
        self, n: int, evaluate: Evaluate, start: Sequence[np.ndarray], rng: np.random.Generator
    ) -> np.ndarray:
        """See Search."""
        points = [*start, np.full(n, 1 / n), *np.eye(n)]
        scores = [evaluate(point, self.config.episodes) for point in points]
        fine = lattice(n, 40) if n < 4 else rng.dirichlet(np.ones(n), 2000)
        while len(points) < self.config.trials:
            mean_M, std_M = self._posterior(points, scores, fine)
            known = np.abs(fine[:, None] - np.array(points)[None]).max(-1).min(1) < 1e-9
            bound_M = np.where(known, -np.inf, mean_M + self.config.explore * std_M)
            points.append(fine[int(np.argmax(bound_M))])
            scores.append(evaluate(points[-1], self.config.episodes))
        mean_K, _ = self._posterior(points, scores, np.array(points))
        return points[int(np.argmax(mean_K))]

    def _posterior(
        self, points: list[np.ndarray], scores: list[np.ndarray], at: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation at points `at` (Rasmussen and Williams 2006, alg. 2.1)."""
        known_Kn = np.array(points)
        mean_K = np.array([score.mean() for score in scores])
        # One noise for all: few episodes that agree say little about their own spread.
        noise = max(float(np.mean([s.var() / len(s) for s in scores])), 1e-6)
        signal = max(float(mean_K.var()), noise)
        gram_KK = self._kernel(known_Kn, known_Kn) * signal + noise * np.eye(len(known_Kn))
        cross_MK = self._kernel(at, known_Kn) * signal
        centre = mean_K.mean()
        mean_M = centre + cross_MK @ np.linalg.solve(gram_KK, mean_K - centre)
        variance_M = signal - (cross_MK * np.linalg.solve(gram_KK, cross_MK.T).T).sum(1)
        return mean_M, np.sqrt(np.maximum(variance_M, 0.0))

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        square = np.square(a[:, None] - b[None]).sum(-1)
        return np.exp(-square / (2 * self.config.length**2))


class AnalyticConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """No options."""


class Analytic(Search):
    """Takes the first start, Proposition 4.1's weights, without a rollout."""

    Config = AnalyticConfig

    def __init__(self, config: AnalyticConfig) -> None:
        self.config = config

    def episodes(self, n: int, n_start: int) -> int:
        """None."""
        return 0

    def run(
        self, n: int, evaluate: Evaluate, start: Sequence[np.ndarray], rng: np.random.Generator
    ) -> np.ndarray:
        """See Search."""
        return start[0]
