"""OR and AND of densities along the path. Shapes: B batch, H chunk, D action, n members.

SuperDiff's superposition (Skreta et al. 2024; methods.md C1). For any diffusion
dx = (−f + g²ŝ) dτ + g dW in reverse time τ, Itô's formula gives each member's density on the path:
d log q_i = ⟨dx, s_i⟩ + (∇·f + ⟨f − (g²/2) s_i, s_i⟩) dτ.

Discretisation: y = x / √ᾱ has f = 0 and g²dτ = −dσ² with σ = √(1−ᾱ) / √ᾱ, so that the drift is
exact. A step of the ancestral solver from σ to σ′ is dy = Δ ŝ + √(Δ σ′²/σ²) z with Δ = σ² − σ′²
(DDPM's posterior mean and "fixed_small" variance); g²dτ := Δ and g dW := √(Δ σ′²/σ²) z. With
s_i = −ε̂_i / σ and ρ = Δ/σ² the estimator is d log q_i = −⟨dy, ε̂_i⟩/σ − (ρ/2) ‖ε̂_i‖². Its error
goes to 0 with the step. Factors that are the same for all members (the Jacobian of y) are left out.

Inner products run over the part of the chunk that all members have; on a tail that only some
have, these count equally.
"""

from abc import abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated

import msgspec
import torch

from embodied.core.errors import ConfigError
from embodied.core.protocols import Prediction
from policies.compose.operators import Level, Operator, weighted_sum
from policies.noise import Generators
from policies.solvers.base import Solver, StepSolver

_SAME = 1e-12
"""Squared distance of two members' ε̂, relative to their own, below which they are one."""

_FLAT = 1e-4
"""The same for a combination of three or more, relative to the greatest: it is left as it is."""


class Superposition(Operator):
    """Weights κ [B, n] that sum to 1 and depend on the path so far and on the step's noise."""

    @abstractmethod
    def kappa(
        self, epsilon_BnK: torch.Tensor, log_q_Bn: torch.Tensor, pull_Bn: torch.Tensor
    ) -> torch.Tensor:
        """κ [B, n]. pull: ⟨g dW, ε̂_i⟩ / (σρ) = √(1/ρ − 1) ⟨z, ε̂_i⟩."""

    def combine(self, level: Level) -> Prediction:
        """At a point that no path led to: nothing accumulated, no noise."""
        epsilons = level.epsilons()
        zero_Bn = level.x_BHD.new_zeros(len(level.x_BHD), len(self.labels))
        kappa_Bn = self.kappa(self._flat(epsilons), zero_Bn, zero_Bn)
        return self._mixed(epsilons, kappa_Bn)

    def integrate(
        self,
        solver: Solver,
        level: Callable[[torch.Tensor, float], Level],
        x_BHD: torch.Tensor,
        generators: Generators,
        on_step: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Carry noise to clean chunks; on_step hears of κ [B, n] and log q̂ [B, n] (float64)."""
        table = ancestral(solver)
        log_q_Bn = x_BHD.new_zeros(len(x_BHD), len(self.labels), dtype=torch.float64)
        for step, ahead in pairwise([*table.steps, None]):
            assert step is not None
            z_BHD = step.draw(x_BHD, generators)
            epsilons = level(x_BHD, step.log_snr).epsilons()
            epsilon_BnK = self._flat(epsilons)
            sigma = step.noise / step.signal
            signal = ahead.signal if ahead else 1.0
            rho = step.sample / signal
            # dy for ε̂ = 0: the noise, and what rounding leaves of a drift that is 0.
            drift = step.keep / signal + step.sample / (step.signal * signal) - 1 / step.signal
            still_BHD = drift * x_BHD.double()
            if z_BHD is not None:
                still_BHD = still_BHD + step.spread / signal * z_BHD.double()
            pull_Bn = self._along(still_BHD, epsilon_BnK) / (sigma * rho)
            kappa_Bn = self.kappa(epsilon_BnK, log_q_Bn, pull_Bn)
            p = self._mixed(epsilons, kappa_Bn)
            next_BHD, _ = step.advance(x_BHD, p, clip=table.clip, before_BHD=None, z_BHD=z_BHD)
            dy_BHD = next_BHD.double() / signal - x_BHD.double() / step.signal
            work_Bn = self._along(dy_BHD, epsilon_BnK) / sigma
            log_q_Bn = log_q_Bn - work_Bn - rho / 2 * epsilon_BnK.square().sum(-1)
            if on_step is not None:
                on_step(kappa_Bn, log_q_Bn)
            x_BHD = next_BHD
        return x_BHD

    def _flat(self, epsilons: dict[int, torch.Tensor]) -> torch.Tensor:
        head = min(value.shape[1] for value in epsilons.values())
        return torch.stack([e[:, :head].flatten(1).double() for e in epsilons.values()], dim=1)

    def _along(self, v_BHD: torch.Tensor, epsilon_BnK: torch.Tensor) -> torch.Tensor:
        v_BK = v_BHD.flatten(1)[:, : epsilon_BnK.shape[2]].double()
        return torch.einsum("bk,bnk->bn", v_BK, epsilon_BnK)

    def _mixed(self, epsilons: dict[int, torch.Tensor], kappa_Bn: torch.Tensor) -> Prediction:
        weights = {i: kappa_Bn[:, i, None, None].to(epsilons[i]) for i in epsilons}
        return Prediction(weighted_sum(epsilons, weights, equal_tail=True), "epsilon")


def ancestral(solver: Solver) -> StepSolver:
    """The same solver; ConfigError unless it draws noise in every step but the last."""
    if not isinstance(solver, StepSolver) or not all(step.spread for step in solver.steps[:-1]):
        raise ConfigError(
            "operators 'or' and 'and' follow a path with noise in every step: "
            "set solver={name: ddpm}"
        )
    return solver


class OrConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """κ = softmax(temperature·log q̂ + offsets); offsets are ℓ, by default all 0."""

    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    offsets: tuple[float, ...] = ()


class Or(Superposition):
    """Mixture: κ = softmax(T log q̂_i + ℓ_i), ŝ = Σ κ_i s_i (methods.md C1).

    With T = 1 and ℓ = log π this is the score of Σ π_i q_i.
    """

    Config = OrConfig

    def __init__(self, config: OrConfig, labels: tuple[str, ...], action_dim: int) -> None:
        """ConfigError unless there is one offset for each member, or none."""
        super().__init__(labels, action_dim)
        if config.offsets and len(config.offsets) != len(labels):
            raise ConfigError(
                f"operator.offsets has {len(config.offsets)} values; it needs {len(labels)}, for "
                + ", ".join(f"'{label}'" for label in labels)
            )
        self.config = config

    def kappa(
        self, epsilon_BnK: torch.Tensor, log_q_Bn: torch.Tensor, pull_Bn: torch.Tensor
    ) -> torch.Tensor:
        """See Superposition; noise has no part in it."""
        offsets_n = log_q_Bn.new_tensor(self.config.offsets or [0.0] * len(self.labels))
        return torch.softmax(self.config.temperature * log_q_Bn + offsets_n, dim=1)


class AndConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """No options."""


class And(Superposition):
    """Equal densities: κ, Σκ = 1, that makes all d log q_i of a step equal (methods.md C1).

    For two members κ₁ = ½ − ⟨dW, s₁ − s₂⟩ / (g dτ ‖s₁ − s₂‖²), where dW is drawn first; for n the
    linear system G κ = ½ diag(G) + pull with G_ij = ⟨δ_i, δ_j⟩ and δ_i = ε̂_i − ε̂_n. κ may leave
    [0, 1]. Two members that agree count equally. Exact without clipping only, and for three or
    more only where their differences are not close to linearly dependent (as if n − 1 exceeded
    the chunk's dimensions): there it is the solution of least squares and least norm.
    """

    Config = AndConfig

    def __init__(self, config: AndConfig, labels: tuple[str, ...], action_dim: int) -> None:
        """At least two members."""
        super().__init__(labels, action_dim)
        if len(labels) < 2:
            raise ConfigError("operator=and needs at least two members")

    def kappa(
        self, epsilon_BnK: torch.Tensor, log_q_Bn: torch.Tensor, pull_Bn: torch.Tensor
    ) -> torch.Tensor:
        """See Superposition."""
        n = len(self.labels)
        delta_BmK = epsilon_BnK[:, :-1] - epsilon_BnK[:, -1:]
        gram_Bmm = delta_BmK @ delta_BmK.transpose(1, 2)
        size_Bm = gram_Bmm.diagonal(dim1=1, dim2=2)
        right_Bm = size_Bm / 2 + pull_Bn[:, :-1] - pull_Bn[:, -1:]
        head_Bm = _solve(gram_Bmm, right_Bm)
        kappa_Bn = torch.cat([head_Bm, 1 - head_Bm.sum(1, keepdim=True)], dim=1)
        scale_B1 = epsilon_BnK.square().sum(-1).mean(1, keepdim=True)
        same_B1 = size_Bm.amax(1, keepdim=True) < _SAME * scale_B1.clamp(min=1e-300)
        return torch.where(same_B1, 1.0 / n, kappa_Bn)


def _solve(gram_Bmm: torch.Tensor, right_Bm: torch.Tensor) -> torch.Tensor:
    """Least-norm solution, in double precision."""
    if gram_Bmm.shape[1] == 1:
        return right_Bm / gram_Bmm[:, 0].clamp(min=1e-300)
    inverse_Bmm = torch.linalg.pinv(gram_Bmm, hermitian=True, rtol=_FLAT)
    return (inverse_Bmm @ right_Bm[..., None])[..., 0]
