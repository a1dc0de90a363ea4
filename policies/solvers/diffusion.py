"""Diffusion's solvers, as tables made from diffusers' schedulers.

The schedulers say which levels are visited; their own `step` costs several times a small network.
Shapes: N training steps.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar

import torch

from embodied.core.errors import MissingDependencyError
from policies.configs import DiffusionSolverConfig
from policies.solvers.base import Step, StepSolver

MIN_LOG_ALPHA_OVER_SIGMA = -5.1
"""Where DPM-Solver++ starts on a cosine schedule, which ends at practically no signal."""


class DiffusionSolver(StepSolver):
    """Levels of a squared-cosine schedule; a subclass says how each step is taken."""

    Config = DiffusionSolverConfig
    default_steps: ClassVar[int | None] = 10

    alpha_bar_N: torch.Tensor
    """The schedule's ᾱ, in single precision as the schedulers have it."""

    def __init__(self, config: DiffusionSolverConfig) -> None:
        """MissingDependencyError without diffusers."""
        n = config.num_train_steps
        options = {
            "num_train_timesteps": n,
            "beta_schedule": "squaredcos_cap_v2",
            "timestep_spacing": config.timestep_spacing,
        }
        try:
            with torch.device("cpu"):
                scheduler = self._scheduler(options)
                scheduler.set_timesteps(config.num_steps or min(self.default_steps or n, n))
                self.alpha_bar_N = scheduler.alphas_cumprod
                steps = list(self._steps(scheduler))
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"diffusion needs the package '{error.name}', which is not installed; "
                "pip install 'embodied-stack[policy]' brings it"
            ) from error
        super().__init__(steps, clip=float(config.clip_sample))

    @abstractmethod
    def _scheduler(self, options: dict[str, Any]) -> Any:
        """The scheduler; its import takes seconds, so only the one that is used."""

    @abstractmethod
    def _steps(self, scheduler: Any) -> Iterator[Step]:
        """The table."""


class DDIM(DiffusionSolver):
    """Deterministic: x′ = √ᾱ′ x̂₀ + √(1−ᾱ′) ε̂ (Song et al. 2021, equation 12 with σ = 0).

    ᾱ′ belongs to the next level that is visited, also where the stride does not divide N.
    """

    def _scheduler(self, options: dict[str, Any]) -> Any:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        return DDIMScheduler(**options)

    def _steps(self, scheduler: Any) -> Iterator[Step]:
        for _, b, level in _levels(scheduler):
            yield Step(*level, sample=b.sqrt().item(), epsilon=(1 - b).sqrt().item())


class DDPM(DiffusionSolver):
    """Ancestral, with the posterior's variance (Ho et al. 2020, equation 7; "fixed_small").

    Its coefficients are worked out in double precision: in single precision, as diffusers does,
    1 − ᾱ/ᾱ′ has three digits at 1000 steps, and the variance of the chunks is .05 % too small.
    """

    default_steps = None

    def _scheduler(self, options: dict[str, Any]) -> Any:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        return DDPMScheduler(**options)

    def _steps(self, scheduler: Any) -> Iterator[Step]:
        scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
        for a, b, level in _levels(scheduler):
            alpha = a / b
            yield Step(
                *level,
                sample=(b.sqrt() * (1 - alpha) / (1 - a)).item(),
                keep=(alpha.sqrt() * (1 - b) / (1 - a)).item(),
                spread=((1 - b) / (1 - a) * (1 - alpha)).sqrt().item(),
            )


class DPMSolver(DiffusionSolver):
    """DPM-Solver++(2M), midpoint; first and last step of first order (Lu et al. 2022, alg. 2)."""

    def _scheduler(self, options: dict[str, Any]) -> Any:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(lambda_min_clipped=MIN_LOG_ALPHA_OVER_SIGMA, **options)

    def _steps(self, scheduler: Any) -> Iterator[Step]:
        ratios: list[float] = scheduler.sigmas.double().tolist()  # √(1−ᾱ) / √ᾱ, 0 at the end
        last_h = None
        for ratio, ahead in pairwise(ratios):
            signal, signal_ahead = 1 / math.hypot(1, ratio), 1 / math.hypot(1, ahead)
            h = math.log(ratio / ahead) if ahead else math.inf
            sample = -signal_ahead * math.expm1(-h)
            yield Step(
                -2 * math.log(ratio),
                signal,
                ratio * signal,
                keep=ahead * signal_ahead / (ratio * signal),
                sample=sample,
                change=sample * h / last_h / 2 if last_h and ahead else 0.0,
            )
            last_h = h


def _levels(
    scheduler: Any,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, tuple[float, float, float]]]:
    """ᾱ of each visited level and of the one after it, 0-D; log-SNR, signal and noise of it."""
    visited = [scheduler.alphas_cumprod[t] for t in scheduler.timesteps.tolist()]
    for a, b in pairwise([*visited, torch.ones(())]):
        level = torch.logit(a.double()).item(), a.sqrt().item(), (1 - a).sqrt().item()
        yield a, b, level
