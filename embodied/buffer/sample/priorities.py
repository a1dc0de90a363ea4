"""Prioritised draws (Schaul et al. 2016, the proportional variant) from a sum tree in NumPy."""

import math

import msgspec
import numpy as np

from embodied.buffer.sample.draws import Chosen, DrawStrategy, NewSteps
from embodied.core.errors import ConfigError


class SumTree:
    """Weights ≥ 0 of leaves 0..n-1 and the sums above them; every operation is over a batch.

    A complete binary tree in one array: node i has the children 2i and 2i+1, the root is 1. Sums
    are recomputed, never corrected by differences, so that rounding errors do not pile up.
    """

    def __init__(self) -> None:
        self._capacity = 1024
        self._nodes = np.zeros(2 * self._capacity)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def leaves(self) -> np.ndarray:
        """All weights: float64 [n]; not to be kept while the tree grows."""
        return self._nodes[self._capacity : self._capacity + self._size]

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._nodes[1])

    def extend(self, weights: np.ndarray) -> None:
        """Append leaves [k]: O(k + log n), but O(n) when the capacity doubles."""
        first, self._size = self._size, self._size + len(weights)
        if self._size > self._capacity:
            old = self._nodes[self._capacity : self._capacity + first]
            self._capacity = 1 << (self._size - 1).bit_length()
            self._nodes = np.zeros(2 * self._capacity)
            self._nodes[self._capacity : self._capacity + first] = old
            first, weights = 0, np.concatenate((old, weights))
        low, high = self._capacity + first, self._capacity + self._size
        self._nodes[low:high] = weights
        while low > 1:
            low, high = low >> 1, (high + 1) >> 1
            children = self._nodes[2 * low : 2 * high]
            self._nodes[low:high] = children[0::2] + children[1::2]

    def set(self, leaves: np.ndarray, weights: np.ndarray) -> None:
        """Set weights [k] of leaves [k]; of a leaf that is there twice, the last: O(k log n)."""
        nodes = leaves + self._capacity
        self._nodes[nodes] = weights
        for _ in range(self._capacity.bit_length() - 1):
            nodes = nodes >> 1
            left = 2 * nodes
            self._nodes[nodes] = self._nodes[left] + self._nodes[left + 1]

    def find(self, masses: np.ndarray) -> np.ndarray:
        """Leaf at which the running sum of weights first exceeds each mass (float64 [k] in
        [0, total)): int64 [k]; never one of weight 0. The total must be positive."""
        nodes = np.ones(len(masses), np.int64)
        masses = masses.copy()
        for _ in range(self._capacity.bit_length() - 1):
            left = 2 * nodes
            below = self._nodes[left]
            right = (masses >= below) & (self._nodes[left + 1] > 0)
            masses -= np.where(right, below, 0.0)
            nodes = left + right
        return nodes - self._capacity


class Prioritised(DrawStrategy):
    """P(i) = p_i^alpha / Σ_k p_k^alpha; of a batch, one draw from each B-th of the total.

    Importance weights are w_i = (n · P(i))^-beta, divided by the batch's greatest. A step that has
    come gets the greatest priority that any has had so far (1 at first). Priorities given to
    update are |TD error| or the like, ≥ 0; epsilon is added, so that no step is lost for good.
    beta may be set at any time (the paper lets it rise to 1).
    """

    has_weights = True

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """alpha: 0 is uniform, 1 proportional. beta: 0 corrects nothing, 1 the whole bias."""

        alpha: float = 0.6
        beta: float = 0.4
        epsilon: float = 1e-6

        def __post_init__(self) -> None:
            for name, value in (("alpha", self.alpha), ("beta", self.beta)):
                if not 0 <= value <= 1:
                    raise ConfigError(f"{name} is {value}; it must be between 0 and 1")
            if not 0 < self.epsilon < math.inf:
                raise ConfigError(f"epsilon is {self.epsilon}; it must be positive and finite")

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self._config = config or self.Config()
        self._tree = SumTree()
        self._greatest = 1.0
        self.beta = self._config.beta

    def extend(self, steps: NewSteps) -> None:
        """Candidates have come."""
        super().extend(steps)
        self._tree.extend(np.full(len(steps), self._greatest**self._config.alpha))

    def keep(self, left: np.ndarray) -> None:
        """Only these candidates are left."""
        super().keep(left)
        weights = self._tree.leaves[left]
        self._tree = SumTree()
        self._tree.extend(weights)

    def draw(self, batch_size: int, rng: np.random.Generator) -> Chosen:
        """Draw B candidates, with importance weights."""
        tree = self._tree
        masses = (np.arange(batch_size) + rng.random(batch_size)) * (tree.total / batch_size)
        ordinals = tree.find(masses)
        weights = (len(tree) * tree.leaves[ordinals] / tree.total) ** -self.beta
        return Chosen(ordinals, (weights / weights.max(initial=0.0)).astype(np.float32))

    def update(self, ordinals: np.ndarray, priorities: np.ndarray) -> None:
        """Set the priorities of candidates."""
        priorities = np.asarray(priorities, np.float64)
        unusable = int((~np.isfinite(priorities)).sum())
        if priorities.shape != ordinals.shape or unusable:
            raise ConfigError(
                f"priorities have shape {priorities.shape} and {unusable} are not finite; finite "
                f"ones of shape {ordinals.shape} are right"
            )
        if (priorities < 0).any():
            raise ConfigError(f"a priority is {priorities.min()}; it must be at least 0")
        priorities = priorities + self._config.epsilon
        self._greatest = max(self._greatest, float(priorities.max(initial=0.0)))
        self._tree.set(ordinals, priorities**self._config.alpha)
