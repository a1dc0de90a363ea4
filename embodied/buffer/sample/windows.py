"""Windows of history, future actions and n-step backups around a step; the index behind them.

Legend: B batch, To history, H horizon, D action, n steps of a backup, m of them that exist, S later
steps.
"""

from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from embodied.buffer.sample.growing import GrowingArray
from embodied.core.errors import ConfigError
from embodied.core.instructions import GOAL, TASK

METADATA = ("intervention", "success", "policy_version", "t_ns")
"""Columns of the drawn step itself that a batch carries if asked to."""

NEXT = "next."
"""What the name of the observation after n steps begins with."""

RETURN_TO_GO = "return_to_go"

EPISODE_SUCCESS = "episode_success"

FUTURE = "future."
"""What the name of later observations begins with, which are to be predicted."""

FUTURE_IS_PAD = "future_is_pad"

_TAKEN = frozenset(("action", "action_is_pad", "reward", "terminated", "truncated", "return"))
_BATCH_NAMES = _TAKEN | {
    "discount",
    RETURN_TO_GO,
    EPISODE_SUCCESS,
    "weight",
    "source",
    FUTURE_IS_PAD,
    TASK,
    *METADATA,
}


class WindowSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a sample around step t of an episode consists of.

    n_obs_steps: To; the observations t-To+1..t, the episode's first one standing in for those
    before it. horizon: H; the actions t..t+H-1 (the first of them was chosen on observation t).
    observation_keys: which to take.

    n_step: n; 0 for none, else the n-step backup (Sutton and Barto 2018, 7.1; of action chunks,
    n_step = horizon, in Q-chunking, Li et al. 2025): with m = min(n, steps from t to the
    episode's end), `return` = Σ_{k<m} discount^k · reward_{t+k}, the observation after m steps,
    which at the episode's end is its stored last one, and `discount` = discount^m, or 0 if one
    of the m steps terminated. A target is return + discount · value(next observation): an
    episode that was only truncated bootstraps from its last observation (as RLPD, Ball et al.
    2023). discount: per step. rewards: "recorded", or a convention over whether the step succeeded:
    "sparse" is 1 where it did, else 0; "cost" is 0 where it did, else −1, and what terminates
    without success goes on costing: `return` then has −discount^m / (1 − discount) as well, since
    failing early must not be cheaper than succeeding late.

    return_to_go: adds `return_to_go` = Σ_k discount^k · reward_{t+k} over all steps from t to the
    episode's end: what was earned in fact (Monte Carlo). Behind the end nothing is added, be it
    terminated or truncated: a time-out is not bootstrapped. By "cost" an episode without any
    success would go on costing, so all its steps have −1 / (1 − discount), the least there is
    (Mark et al. 2024). Only complete episodes are drawn from, so it is known of every window.
    episode_success: adds `episode_success`, whether the episode succeeded (see EpisodeInfo).

    metadata: columns of step t to add, out of METADATA. task_bytes: L; 0 for none, else the
    episode's task in words, as L bytes, is added to the observations. goal_keys: observation keys
    of which the episode's last observation is added, To times, under "goal." + key: what the
    episode did reach is taken for its goal (hindsight, Andrychowicz et al. 2017).

    future: S offsets k; the observations t+k of future_keys are added under "future." + key, and
    `future_is_pad` where the episode ends before them; there the last observation is repeated.
    """

    n_obs_steps: int
    horizon: int
    observation_keys: tuple[str, ...]
    n_step: int = 0
    discount: float = 1.0
    metadata: tuple[str, ...] = ()
    task_bytes: int = 0
    goal_keys: tuple[str, ...] = ()
    rewards: Literal["recorded", "sparse", "cost"] = "recorded"
    return_to_go: bool = False
    episode_success: bool = False
    future: tuple[int, ...] = ()
    future_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.n_obs_steps < 1 or self.horizon < 1:
            raise ConfigError(
                f"n_obs_steps is {self.n_obs_steps} and horizon {self.horizon}; both must be at "
                "least 1"
            )
        if self.n_step < 0 or not 0 <= self.discount <= 1:
            raise ConfigError(
                f"n_step is {self.n_step} and discount {self.discount}; n_step must be at least "
                "1, or 0 for no backup, and discount between 0 and 1"
            )
        if self.n_step == 0 and self.discount != 1 and not self.return_to_go:
            raise ConfigError(
                f"discount is {self.discount} but n_step 0, so nothing is discounted; set n_step "
                "to at least 1, or leave discount out"
            )
        if (self.return_to_go or self.n_step) and self.rewards == "cost" and self.discount == 1:
            raise ConfigError(
                "what a failure costs has no bound with rewards=cost and discount=1; a discount "
                "below 1 is right"
            )
        if unknown := set(self.metadata) - set(METADATA):
            raise ConfigError(
                f"metadata {sorted(unknown)} is unknown; known: {', '.join(METADATA)}"
            )
        keys = self.observation_keys
        if len(set(keys)) < len(keys):
            raise ConfigError(f"observation_keys {list(keys)} name one twice")
        for name in ("goal_keys", "future_keys"):
            if odd := [key for key in getattr(self, name) if key not in keys]:
                raise ConfigError(f"{name} {odd} are not among observation_keys {list(keys)}")
        if bool(self.future) != bool(self.future_keys) or any(k < 1 for k in self.future):
            raise ConfigError(
                f"future is {list(self.future)} and future_keys {list(self.future_keys)}; give "
                "both or neither, and offsets of at least 1"
            )
        if taken := [k for k in keys if k in _BATCH_NAMES or k.startswith((NEXT, GOAL, FUTURE))]:
            raise ConfigError(f"observation_keys {taken} are names of other arrays of a batch")


@dataclass(frozen=True, slots=True)
class Backup:
    """The n steps of a backup. rows: int64 [B, n], the episode's last step being repeated.
    beyond: bool [B, n], whether behind the end. taken: m, int64 [B]. observed: rows of the
    observations up to the one after m steps, int64 [B, To]."""

    rows: np.ndarray
    beyond: np.ndarray
    taken: np.ndarray
    observed: np.ndarray


@dataclass(frozen=True, slots=True)
class Windows:
    """Row ids of a batch. observed: int64 [B, To]. future: int64 [B, H], the episode's last step
    being repeated. beyond, selected: bool [B, H], whether each is behind the end, and selected.
    last: of the episode's last observation, int64 [B]. later: of the observations at the spec's
    offsets, int64 [B, S], the last one being repeated. past_end: bool [B, S], whether each is
    behind the end. returns: to go, float32 [B], if wanted. successes: of the episodes, bool [B]."""

    observed: np.ndarray
    future: np.ndarray
    beyond: np.ndarray
    selected: np.ndarray
    last: np.ndarray
    later: np.ndarray
    past_end: np.ndarray
    backup: Backup | None
    returns: np.ndarray | None
    successes: np.ndarray


class WindowIndex:
    """The steps of complete episodes, one episode after the other, though streams interleave.

    A position counts steps in that order, each episode's last observation included as one more
    behind its steps. candidates: positions of selected steps. Positions change when episodes are
    removed; a step's number, its position if none ever had been, does not. Memory: 17 bytes a step,
    21 with returns.
    """

    def __init__(self) -> None:
        self._order = GrowingArray(np.int64)
        self._selected = GrowingArray(np.bool_)
        self._candidates = GrowingArray(np.int64)
        self._returns = GrowingArray(np.float32)
        # Of each episode: its first position, that of its last observation, its first number, and
        # whether it succeeded.
        self._starts = GrowingArray(np.int64)
        self._ends = GrowingArray(np.int64)
        self._numbers = GrowingArray(np.int64)
        self._successes = GrowingArray(np.bool_)
        self._next_number = 0

    def add(
        self,
        rows: np.ndarray,
        lengths: np.ndarray,
        final_rows: np.ndarray,
        selected: np.ndarray,
        successes: np.ndarray,
        returns: np.ndarray | None = None,
    ) -> np.ndarray:
        """Add E episodes: their steps' rows one after the other and which of them are selected
        [sum of lengths], their numbers of steps [E], the rows of their last observations [E],
        whether they succeeded, bool [E]; the steps' returns to go, of all episodes or none.
        Returns the numbers of their first steps, int64 [E]."""
        before = len(self._order)
        ends = np.cumsum(lengths + 1) - 1
        size = len(rows) + len(lengths)
        is_step = np.ones(size, np.bool_)
        is_step[ends] = False
        order, chosen = np.empty(size, np.int64), np.zeros(size, np.bool_)
        order[is_step], order[ends] = rows, final_rows
        chosen[is_step] = selected
        self._order.extend(order)
        self._selected.extend(chosen)
        if returns is not None:
            to_go = np.zeros(size, np.float32)
            to_go[is_step] = returns
            self._returns.extend(to_go)
        self._candidates.extend(before + np.flatnonzero(chosen))
        self._starts.extend(before + ends - lengths)
        self._ends.extend(before + ends)
        numbers = self._next_number + ends - lengths
        self._numbers.extend(numbers)
        self._successes.extend(successes)
        self._next_number += size
        return numbers

    def remove(self, removed: np.ndarray) -> np.ndarray:
        """Take episodes out (bool [E], in the order in which they were added); returns which of
        the candidates are left, bool."""
        starts, ends = self._starts.view, self._ends.view
        left = np.repeat(~removed, ends + 1 - starts)
        moved = np.cumsum(left) - 1
        candidates = self.candidates
        left_candidates = left[candidates]
        self._candidates.replace(moved[candidates[left_candidates]])
        self._starts.replace(moved[ends[~removed]] - (ends - starts)[~removed])
        self._ends.replace(moved[ends[~removed]])
        self._numbers.replace(self._numbers.view[~removed])
        self._successes.replace(self._successes.view[~removed])
        self._order.replace(self._order.view[left])
        self._selected.replace(self._selected.view[left])
        if len(self._returns):
            self._returns.replace(self._returns.view[left])
        return left_candidates

    @property
    def candidates(self) -> np.ndarray:
        """Positions of selected steps, ascending: int64 [n]."""
        return self._candidates.view

    @property
    def rows(self) -> np.ndarray:
        """Rows of selected steps: int64 [n]."""
        return self._order.view[self.candidates]

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        """The steps' numbers, which stay when episodes are removed: int64 [B]."""
        episodes = self._episodes(positions)
        return self._numbers.view[episodes] + positions - self._starts.view[episodes]

    def ordinals(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inverse of numbers, as indices of candidates [k], and which of the steps these are:
        those still there, bool [B]."""
        if len(self._numbers) == 0:
            return np.empty(0, np.int64), np.zeros(len(numbers), np.bool_)
        episodes = np.searchsorted(self._numbers.view, numbers, side="right") - 1
        episodes = np.maximum(episodes, 0)
        positions = numbers - self._numbers.view[episodes] + self._starts.view[episodes]
        there = (positions >= self._starts.view[episodes]) & (positions < self._ends.view[episodes])
        return np.searchsorted(self.candidates, positions[there]), there

    def windows(self, positions: np.ndarray, spec: WindowSpec) -> Windows:
        """Rows of the windows around positions [B]."""
        episodes = self._episodes(positions)
        starts, ends = self._starts.view[episodes], self._ends.view[episodes]
        at, beyond = _ahead(positions, ends, spec.horizon)
        backup = None
        if spec.n_step:
            ahead, behind = _ahead(positions, ends, spec.n_step)
            taken = np.minimum(spec.n_step, ends - positions)
            observed = self._history(positions + taken, starts, spec.n_obs_steps)
            backup = Backup(self._order.view[ahead], behind, taken, observed)
        observed = self._history(positions, starts, spec.n_obs_steps)
        future, selected = self._order.view[at], self._selected.view[at]
        later = positions[:, None] + np.array(spec.future, np.int64)
        past_end = later > ends[:, None]
        later = self._order.view[np.minimum(later, ends[:, None])]
        last = self._order.view[ends]
        returns = self._returns.view[positions] if spec.return_to_go else None
        successes = self._successes.view[episodes]
        return Windows(
            observed, future, beyond, selected, last, later, past_end, backup, returns, successes
        )

    def _episodes(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts.view, positions, side="right") - 1

    def _history(self, positions: np.ndarray, starts: np.ndarray, n_steps: int) -> np.ndarray:
        at = positions[:, None] + np.arange(1 - n_steps, 1)
        return self._order.view[np.maximum(at, starts[:, None])]


def _ahead(positions: np.ndarray, ends: np.ndarray, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
    at = positions[:, None] + np.arange(n_steps)
    return np.minimum(at, ends[:, None] - 1), at >= ends[:, None]
