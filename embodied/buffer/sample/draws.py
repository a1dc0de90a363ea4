"""How steps are drawn from those that may be: uniformly, the recent ones, weighted, or by stratum.

A strategy knows steps by their ordinals 0..n-1 among the candidates in order of arrival: episodes
in the order in which they closed, their selected steps in order. Legend: B batch, n candidates.
Prioritised draws are in priorities.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import msgspec
import numpy as np

from embodied.buffer.read.episodes import EpisodeInfo
from embodied.buffer.sample.growing import GrowingArray
from embodied.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class NewSteps:
    """Candidates that have come. episodes: E of them. counts: int64 [E], how many steps of each,
    in order. columns: name → [k] of every column that the strategy asks for."""

    episodes: Sequence[EpisodeInfo]
    counts: np.ndarray
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return int(self.counts.sum())

    def per_step(self, values: Sequence[bool | int]) -> np.ndarray:
        """One value of each episode [E] for each of its steps [k]."""
        return np.repeat(np.asarray(values), self.counts)


class Chosen(NamedTuple):
    """ordinals: int64 [B], drawn with replacement. weights: importance weights, float32 [B], None
    where the strategy has none."""

    ordinals: np.ndarray
    weights: np.ndarray | None


class DrawStrategy(ABC):
    """Decides which candidates are drawn. It belongs to one sampler, which keeps it up to date."""

    columns: tuple[str, ...] = ()
    """Step columns that extend needs."""

    has_weights: ClassVar[bool] = False
    """Whether draw returns importance weights."""

    def __init__(self) -> None:
        self._count = 0

    def extend(self, steps: NewSteps) -> None:
        """Candidates have come behind those that are there."""
        self._count += len(steps)

    def keep(self, left: np.ndarray) -> None:
        """Only these candidates (bool [n]) are left; they close ranks."""
        self._count = int(left.sum())

    @abstractmethod
    def draw(self, batch_size: int, rng: np.random.Generator) -> Chosen:
        """Draw B candidates; there is at least one."""

    def update(self, ordinals: np.ndarray, priorities: np.ndarray) -> None:
        """Set the priorities of candidates. Raises ConfigError where draws do not depend on any."""
        name = type(self).__name__.lower()
        raise ConfigError(f"{name} draws have no priorities to update; draw prioritised")


class Uniform(DrawStrategy):
    """Every candidate with the same probability."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """Nothing to set."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()

    def draw(self, batch_size: int, rng: np.random.Generator) -> Chosen:
        """Draw B candidates."""
        return Chosen(rng.integers(self._count, size=batch_size), None)


class Recency(DrawStrategy):
    """The recent steps: of age a, the number of candidates that came later, either those with
    a < last_steps with equal probabilities, or all with probabilities ∝ 2^(-a/half_life_steps)."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """last_steps or half_life_steps, in steps of the candidates; exactly one of them."""

        last_steps: int | None = None
        half_life_steps: float | None = None

        def __post_init__(self) -> None:
            if (self.last_steps is None) == (self.half_life_steps is None):
                raise ConfigError(
                    f"recency draws with last_steps {self.last_steps} and half_life_steps "
                    f"{self.half_life_steps}; exactly one of them must be set"
                )
            if self.last_steps is not None and self.last_steps < 1:
                raise ConfigError(f"last_steps is {self.last_steps}; it must be at least 1")
            half_life = self.half_life_steps
            if half_life is not None and not (half_life > 0 and math.isfinite(half_life)):
                raise ConfigError(f"half_life_steps is {half_life}; it must be positive and finite")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config

    def draw(self, batch_size: int, rng: np.random.Generator) -> Chosen:
        """Draw B candidates."""
        n, last = self._count, self._config.last_steps
        if last is not None:
            return Chosen(n - 1 - rng.integers(min(last, n), size=batch_size), None)
        half_life = self._config.half_life_steps or 1.0
        # The inverse of the distribution function (1 - 2^(-a/h)) / (1 - 2^(-n/h)), a = 1..n.
        rate = math.log(2) / half_life
        ages = -np.log1p(rng.random(batch_size) * math.expm1(-n * rate)) / rate
        return Chosen(n - 1 - np.minimum(ages.astype(np.int64), n - 1), None)


class Weighted(DrawStrategy):
    """Probabilities proportional to a weight per step: the product of two factors, one for the
    episode's outcome, one for who chose the action."""

    columns = ("intervention",)

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """Factors of steps of successful and failed episodes, and of steps whose action an expert
        or a person chose (intervention) or the policy (autonomous). 0: never drawn."""

        success: float = 1.0
        failure: float = 1.0
        intervention: float = 1.0
        autonomous: float = 1.0

        def __post_init__(self) -> None:
            factors = {name: getattr(self, name) for name in self.__struct_fields__}
            for name, factor in factors.items():
                if not 0 <= factor < math.inf:
                    raise ConfigError(f"{name} is {factor}; a factor must be finite and at least 0")
            for pair in (("success", "failure"), ("intervention", "autonomous")):
                if not any(factors[name] for name in pair):
                    raise ConfigError(
                        f"{pair[0]} and {pair[1]} are both 0, so no step can ever be drawn; one of "
                        "them must be positive"
                    )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config
        self._weights = GrowingArray(np.float64)
        self._sums = GrowingArray(np.float64)

    def extend(self, steps: NewSteps) -> None:
        """Candidates have come."""
        super().extend(steps)
        factors = self._config
        success = steps.per_step([episode.success for episode in steps.episodes])
        outcome = np.where(success.astype(np.bool_), factors.success, factors.failure)
        who = np.where(steps.columns["intervention"], factors.intervention, factors.autonomous)
        self._append(outcome * who)

    def _append(self, weights: np.ndarray) -> None:
        self._weights.extend(weights)
        self._sums.extend(np.cumsum(weights) + (self._sums.view[-1] if len(self._sums) else 0.0))

    def keep(self, left: np.ndarray) -> None:
        """Only these candidates are left."""
        super().keep(left)
        weights = self._weights.view[left]
        self._weights, self._sums = GrowingArray(np.float64), GrowingArray(np.float64)
        self._append(weights)

    def draw(self, batch_size: int, rng: np.random.Generator) -> Chosen:
        """Draw B candidates. Raises ConfigError while the weight of each is 0."""
        sums = self._sums.view
        if sums[-1] <= 0:
            raise ConfigError(
                f"weighted draws: each of the {len(sums)} steps has weight 0 "
                f"({msgspec.structs.asdict(self._config)}); wait for others or raise a factor"
            )
        found = np.searchsorted(sums, rng.random(batch_size) * sums[-1], side="right")
        return Chosen(np.minimum(found, np.searchsorted(sums, sums[-1])), None)


class Stratified(DrawStrategy):
    """Every stratum has its share of each batch, whatever it holds; uniform within a stratum.

    A stratum is what was recorded of one task, by one stream (robot), or with one policy version.
    Strata that hold no candidate are left out, and the others' shares grow in proportion. How many
    of a batch come from a stratum is share · B, rounded up or down at random such that this is its
    mean (systematic sampling, Madow 1949). The batch is in the order of strata.
    """

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """by: what makes a stratum. shares: name of a stratum (a policy version in digits) → its
        share, relative to the others'; strata that are not named are never drawn. None: every
        stratum gets the same."""

        by: Literal["task", "stream", "policy_version"]
        shares: dict[str, float] | None = None

        def __post_init__(self) -> None:
            if self.by not in ("task", "stream", "policy_version"):
                raise ConfigError(f"by is '{self.by}'; task, stream or policy_version is right")
            if self.shares is None:
                return
            for name, share in self.shares.items():
                if not 0 < share < math.inf:
                    raise ConfigError(
                        f"shares: {self.by} '{name}' has {share}; a share must be positive and "
                        "finite (leave a stratum out to never draw it)"
                    )
            if not self.shares:
                raise ConfigError(f"shares: no {self.by} is named; name one, or leave shares out")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config
        self.columns = ("policy_version",) if config.by == "policy_version" else ()
        self._strata: dict[str, GrowingArray] = {}

    def extend(self, steps: NewSteps) -> None:
        """Candidates have come."""
        by = self._config.by
        if by == "policy_version":
            names, codes = np.unique(steps.columns[by], return_inverse=True)
            names = [str(name) for name in names.tolist()]
        else:
            found = [getattr(episode, by) for episode in steps.episodes]
            number = {name: code for code, name in enumerate(dict.fromkeys(found))}
            names, codes = list(number), steps.per_step([number[name] for name in found])
        order = np.argsort(codes, kind="stable")
        bounds = np.searchsorted(codes[order], np.arange(len(names) + 1))
        for code, name in enumerate(names):
            ordinals = order[bounds[code] : bounds[code + 1]]
            if len(ordinals):
                stratum = self._strata.setdefault(name, GrowingArray(np.int64))
                stratum.extend(self._count + ordinals)
        super().extend(steps)

    def keep(self, left: np.ndarray) -> None:
        """Only these candidates are left."""
        super().keep(left)
        moved = np.cumsum(left) - 1
        for name, stratum in list(self._strata.items()):
            ordinals = stratum.view[left[stratum.view]]
            stratum.replace(moved[ordinals])
            if len(ordinals) == 0:
                del self._strata[name]

    def draw(self, batch_size: int, rng: np.random.Generator) -> Chosen:
        """Draw B candidates. Raises ConfigError while no stratum with a share holds one."""
        wanted = self._config.shares
        names = [name for name in self._strata if wanted is None or name in wanted]
        if not names:
            raise ConfigError(
                f"shares name {self._config.by} {sorted(wanted or ())}, of which there is no step; "
                f"there are steps of {sorted(self._strata)}"
            )
        sums = np.cumsum([1.0 if wanted is None else wanted[name] for name in names])
        points = (np.arange(batch_size) + rng.random()) * (sums[-1] / batch_size)
        ends = np.searchsorted(points, sums)
        ends[-1] = batch_size
        starts = np.concatenate(([0], ends[:-1]))
        ordinals = np.empty(batch_size, np.int64)
        uniform = rng.random(batch_size)
        for name, start, end in zip(names, starts.tolist(), ends.tolist(), strict=True):
            if end > start:
                stratum = self._strata[name].view
                picked = (uniform[start:end] * len(stratum)).astype(np.int64)
                ordinals[start:end] = stratum[picked]
        return Chosen(ordinals, None)
