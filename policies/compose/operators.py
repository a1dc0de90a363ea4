"""How the members' scores become one. Shapes: B batch, H chunk, D action, n members.

Everything is said of noise estimates ε̂ = −√(1−ᾱ) s, which differ from scores by a factor that is
common to all members; a flow's n̂ is its ε̂ (conversions.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch

from embodied.core.errors import ConfigError
from embodied.core.protocols import Prediction
from policies.conversions import Scalar, epsilon_of

Weight = float | tuple[float, ...]
"""One for all dimensions of the action, or one for each."""

TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Level:
    """What an operator is given at one level of the way from noise to data.

    predict(indices): these members' predictions, each for its share x_BHD[:, :lengths[i]].
    fraction(log_snr): share of the solver's steps that lie behind, 0 to 1. obs: for critics.
    """

    x_BHD: torch.Tensor
    log_snr: Scalar
    fraction: Callable[[float], float]
    lengths: tuple[int, ...]
    obs: Any
    predict: Callable[[Sequence[int]], dict[int, Prediction]]

    def epsilons(self) -> dict[int, torch.Tensor]:
        """All members' ε̂ [B, H_i, D]."""
        return {
            i: epsilon_of(p, self.x_BHD[:, : self.lengths[i]], self.log_snr)
            for i, p in self.predict(range(len(self.lengths))).items()
        }


class Operator(ABC):
    """Combines members.

    affine: whether predictions of one parameterisation stay in it, for weights that sum to 1; if
    not, the result is an ε̂, which says nothing of the data at pure noise.
    """

    Config: Any
    affine = False

    def __init__(self, labels: tuple[str, ...], action_dim: int) -> None:
        """labels: the members' names, for messages."""
        self.labels = labels
        self.action_dim = action_dim

    def active(self) -> tuple[int, ...]:
        """The members that are ever evaluated."""
        return tuple(range(len(self.labels)))

    @abstractmethod
    def combine(self, level: Level) -> Prediction:
        """The composition's prediction [B, H, D]."""


def weighted_sum(
    values: Mapping[int, torch.Tensor], weights: Mapping[int, Any], *, equal_tail: bool = False
) -> torch.Tensor:
    """Σ w_i v_i over chunks of unequal length (methods.md C1.5), as long as the longest.

    Where not all chunks reach, the weights of those that do are scaled up to the same sum, or
    (`equal_tail`, and where their sum is 0) are equal.
    """
    lengths = sorted({value.shape[1] for value in values.values()})
    if len(lengths) == 1:
        return _sum([weights[i] * value for i, value in values.items()])
    total = _sum([weights[i] for i in values])
    parts: list[torch.Tensor] = []
    start = 0
    for end in lengths:
        reach = [i for i, value in values.items() if value.shape[1] >= end]
        share = _sum([weights[i] for i in reach])
        rows = {i: values[i][:, start:end] for i in reach}
        if len(reach) == len(values):
            parts.append(_sum([weights[i] * row for i, row in rows.items()]))
        elif equal_tail:
            parts.append(_sum(list(rows.values())) / len(reach))
        else:
            parts.append(
                _sum([_scaled(weights[i], total, share, len(reach)) * rows[i] for i in reach])
            )
        start = end
    return torch.cat(parts, dim=1)


def _scaled(weight: Any, total: Any, share: Any, count: int) -> Any:
    if isinstance(share, torch.Tensor):
        return torch.where(share != 0, weight * total / share, total / count)
    return weight * total / share if share else total / count


def _sum(terms: Sequence[Any]) -> Any:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights from `begin` on: a share of the steps, or a log-SNR."""

    begin: float
    weights: tuple[Weight, ...]


class LinearConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the operators with given weights.

    weights: one for each member, in their order, a number or one for each action dimension.
    stages: weights that take their place later on, by ascending begin; stage_axis: what begin is.
    """

    weights: tuple[Weight, ...]
    stages: tuple[Stage, ...] = ()
    stage_axis: Literal["fraction", "log_snr"] = "fraction"


class Linear(Operator):
    """ε̂ = Σ w_i ε̂_i."""

    Config = LinearConfig

    def __init__(self, config: LinearConfig, labels: tuple[str, ...], action_dim: int) -> None:
        """ConfigError for weights that the members do not fit."""
        super().__init__(labels, action_dim)
        self.config = config
        begins = [stage.begin for stage in config.stages]
        if begins != sorted(set(begins)):
            raise ConfigError(f"operator.stages begin at {begins}; they must rise")
        self._begins = begins
        rows = [config.weights, *(stage.weights for stage in config.stages)]
        self.rows = [self._complete(self._checked(row)) for row in rows]
        self.affine = all(_sums_to_one(row) for row in self.rows)

    def active(self) -> tuple[int, ...]:
        """Members with a weight in some stage."""
        return tuple(i for i in range(len(self.labels)) if any(any(_each(r[i])) for r in self.rows))

    def combine(self, level: Level) -> Prediction:
        """A member alone with weight 1 passes unchanged; predictions of one kind mix as they are.

        The latter is exact for weights that sum to 1, because every parameterisation is affine in
        ε̂ at one x and level.
        """
        row = self._row(level)
        used = [i for i in self.active() if any(_each(row[i]))]
        longest = max(level.lengths[i] for i in self.active())
        if not used or max(level.lengths[i] for i in used) < longest:
            used += [i for i in self.active() if level.lengths[i] == longest and i not in used]
        predictions = level.predict(used)
        if len(used) == 1 and row[used[0]] == 1.0:
            return predictions[used[0]]
        kind = predictions[used[0]].parameterisation
        alike = all(p.parameterisation == kind for p in predictions.values())
        weights = {i: _tensor(row[i], level.x_BHD) for i in used}
        if self.affine and alike:
            values = {i: p.value for i, p in predictions.items()}
            return Prediction(weighted_sum(values, weights), kind)
        values = {
            i: epsilon_of(p, level.x_BHD[:, : level.lengths[i]], level.log_snr)
            for i, p in predictions.items()
        }
        return Prediction(weighted_sum(values, weights), "epsilon")

    def _row(self, level: Level) -> tuple[Weight, ...]:
        if not self._begins:
            return self.rows[0]
        log_snr = one_level(level.log_snr)
        if log_snr is None:
            raise ConfigError("weights that change on the way need one level for all rows")
        at = log_snr if self.config.stage_axis == "log_snr" else level.fraction(log_snr)
        return self.rows[sum(begin <= at for begin in self._begins)]

    def _checked(self, row: tuple[Weight, ...]) -> tuple[Weight, ...]:
        names = self._weighted()
        if len(row) != len(names):
            raise ConfigError(
                f"operator.weights has {len(row)} values; it needs {len(names)}, for "
                + ", ".join(f"'{name}'" for name in names)
            )
        for name, weight in zip(names, row, strict=True):
            if isinstance(weight, tuple) and len(weight) != self.action_dim:
                raise ConfigError(
                    f"the weight of '{name}' has {len(weight)} values; "
                    f"the action has {self.action_dim} dimensions"
                )
            if any(not -1e6 < value < 1e6 for value in _each(weight)):
                raise ConfigError(f"the weight of '{name}' is {weight}; it must be a finite number")
        return row

    def _weighted(self) -> tuple[str, ...]:
        """Members that have a weight in the configuration."""
        return self.labels

    def _complete(self, row: tuple[Weight, ...]) -> tuple[Weight, ...]:
        """Weights of all members."""
        return row


class Mix(Linear):
    """Convex mixing, Σ w_i = 1, w_i ≥ 0 (methods.md C1.2).

    Of Gaussians with one variance this is exactly the Gaussian at the mixed mean; otherwise it is
    no density's score, the geometric product's in particular (C4.2).
    """

    def _checked(self, row: tuple[Weight, ...]) -> tuple[Weight, ...]:
        super()._checked(row)
        for name, weight in zip(self.labels, row, strict=True):
            if any(value < 0 for value in _each(weight)):
                raise ConfigError(
                    f"the weight of '{name}' is {weight}; operator=mix needs weights of at least "
                    "0 (operator=product takes any)"
                )
        if not _sums_to_one(row):
            total = [sum(column) for column in zip(*_columns(row), strict=True)]
            listed = ", ".join(f"'{n}': {w}" for n, w in zip(self.labels, row, strict=True))
            raise ConfigError(
                f"operator.weights ({listed}) sum to {total if len(total) > 1 else total[0]}; "
                "operator=mix needs 1 (operator=product takes any sum)"
            )
        return row


class Product(Linear):
    """Product of experts ∏ q_i^{w_i} at each level: any weights, whatever they sum to."""


class GuidanceConfig(LinearConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """unconditional: label of the member without condition; the weights are the others'."""

    unconditional: str


class ClassifierFree(Linear):
    """ε̂ = ε̂(τ) + Σ w_i (ε̂(τ, c_i) − ε̂(τ)) (methods.md C1.2, CFG form)."""

    Config = GuidanceConfig

    def __init__(self, config: GuidanceConfig, labels: tuple[str, ...], action_dim: int) -> None:
        """ConfigError if no member has that label."""
        if config.unconditional not in labels:
            raise ConfigError(
                f"operator.unconditional is '{config.unconditional}', which is no member; "
                f"members: {', '.join(labels)}"
            )
        self._base = labels.index(config.unconditional)
        super().__init__(config, labels, action_dim)

    def _weighted(self) -> tuple[str, ...]:
        return tuple(label for i, label in enumerate(self.labels) if i != self._base)

    def _complete(self, row: tuple[Weight, ...]) -> tuple[Weight, ...]:
        rests = [1.0 - sum(column) for column in zip(*_columns(row), strict=True)]
        rest = tuple(rests) if len(rests) > 1 else rests[0]
        return (*row[: self._base], rest, *row[self._base :])


def one_level(log_snr: Scalar) -> float | None:
    """The level of all rows; None if they differ."""
    if not isinstance(log_snr, torch.Tensor):
        return log_snr
    low, high = log_snr.min().item(), log_snr.max().item()
    return low if low == high else None


def _each(weight: Weight) -> tuple[float, ...]:
    return weight if isinstance(weight, tuple) else (weight,)


def _columns(row: Sequence[Weight]) -> list[tuple[float, ...]]:
    width = max(len(_each(weight)) for weight in row)
    return [w if isinstance(w, tuple) else (w,) * width for w in row]


def _sums_to_one(row: Sequence[Weight]) -> bool:
    return all(abs(sum(column) - 1) < TOLERANCE for column in zip(*_columns(row), strict=True))


def _tensor(weight: Weight, like: torch.Tensor) -> float | torch.Tensor:
    return like.new_tensor(weight) if isinstance(weight, tuple) else weight
