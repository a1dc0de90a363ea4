"""Flow's solvers of dx = v du. Shapes: B batch, H chunk, D action."""

from itertools import pairwise
from typing import Annotated

import msgspec
import torch

from embodied.core.errors import ConfigError
from embodied.core.protocols import Prediction
from policies.conversions import flow_log_snr, velocity_at
from policies.noise import Generators
from policies.solvers.base import Denoise, Solver


class FlowSolverConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of a flow's solver.

    num_steps: on a uniform grid from u = first_u to 1. grid: where each step begins instead,
    rising. first_u: 0 is pure noise; an "epsilon" denoiser knows nothing of the data there, so
    that it needs a first u above 0. clip_sample: keep the estimate of the clean chunk within ±1.
    """

    num_steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 10
    grid: tuple[float, ...] | None = None
    first_u: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    clip_sample: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError for a grid that does not lead from noise to data."""
        if self.grid is not None and (
            not self.grid or any(not a < b for a, b in pairwise([*self.grid, 1.0]))
        ):
            raise ConfigError(f"grid is {list(self.grid)}; it must rise within [0, 1)")
        if self.grid and self.grid[0] < 0:
            raise ConfigError(f"grid begins at {self.grid[0]}; it must rise within [0, 1)")


class Euler(Solver):
    """x += v Δu (Liu et al. 2022, section 2.2) in the flow's own scale x_u = x_t / (√ᾱ + √(1−ᾱ)).

    In exact arithmetic this is DDIM at the same levels.
    """

    Config = FlowSolverConfig

    def __init__(self, config: FlowSolverConfig) -> None:
        """One step from each point of the grid to the next; the last one is 1."""
        n, first = config.num_steps, config.first_u
        self.grid = config.grid or tuple(first + (1 - first) * k / n for k in range(n))
        self.clip = float(config.clip_sample)
        self.log_snrs = tuple(flow_log_snr(u) for u in self.grid)

    def __call__(
        self,
        denoise: Denoise,
        x_BHD: torch.Tensor,
        generators: Generators = None,
        *,
        start: int = 0,
    ) -> torch.Tensor:
        """See Solver."""
        x_BHD = x_BHD / _scale(self.grid[start])
        for u, ahead in pairwise([*self.grid[start:], 1.0]):
            x_BHD = self._step(denoise, x_BHD, u, ahead)
        return x_BHD

    def _step(self, denoise: Denoise, x_BHD: torch.Tensor, u: float, ahead: float) -> torch.Tensor:
        return x_BHD + self._velocity(denoise, x_BHD, u)[0] * (ahead - u)

    def _velocity(
        self, denoise: Denoise, x_BHD: torch.Tensor, u: float
    ) -> tuple[torch.Tensor, Prediction]:
        scale = _scale(u)
        vp_BHD = x_BHD * scale
        p = denoise(vp_BHD, flow_log_snr(u))
        if u == 0 and p.parameterisation == "epsilon":
            raise ConfigError("an 'epsilon' denoiser has no velocity at u = 0: set first_u above 0")
        v_BHD = velocity_at(p, vp_BHD, u * scale, (1 - u) * scale)
        if self.clip and u < 1:
            clean_BHD = (x_BHD + (1 - u) * v_BHD).clamp(-self.clip, self.clip)
            v_BHD = (clean_BHD - x_BHD) / (1 - u)
        return v_BHD, p


class Heun(Euler):
    """The trapezoidal rule, two evaluations a step.

    A "sample" denoiser and a clipped estimate have no velocity at u = 1: the last step is Euler's
    (as in Karras et al. 2022, algorithm 1).
    """

    def _step(self, denoise: Denoise, x_BHD: torch.Tensor, u: float, ahead: float) -> torch.Tensor:
        v_BHD, p = self._velocity(denoise, x_BHD, u)
        euler_BHD = x_BHD + v_BHD * (ahead - u)
        if ahead == 1 and (self.clip or p.parameterisation == "sample"):
            return euler_BHD
        ahead_BHD, _ = self._velocity(denoise, euler_BHD, ahead)
        return x_BHD + (v_BHD + ahead_BHD) * ((ahead - u) / 2)


def _scale(u: float) -> float:
    """√ᾱ + √(1−ᾱ) = 1 / √(u² + (1−u)²): x_t for an x_u of 1."""
    return (u * u + (1 - u) ** 2) ** -0.5
