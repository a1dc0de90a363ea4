"""What every solver is. Shapes: B batch, H chunk, D action."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from embodied.core.protocols import Prediction
from policies.conversions import epsilon_at, sample_at, signal_noise
from policies.noise import Generators, normal_like

Denoise = Callable[[torch.Tensor, float], Prediction]
"""(x_t [B, H, D] in variance-preserving scale, log_snr of all rows) → prediction there."""


class Solver(ABC):
    """Carries standard normal noise to a clean chunk along falling noise levels.

    Any denoiser runs under any solver: a prediction is converted from whatever parameterisation it
    names. To change predictions on the way (guidance), wrap the `denoise` that is given.
    log_snrs: the levels at which `denoise` is called first in each step, rising.
    """

    log_snrs: tuple[float, ...]
    stochastic = False
    """Whether noise is drawn after the start."""

    clip: float = 0.0
    """The estimate of the clean chunk is kept within ± this; 0 leaves it."""

    @abstractmethod
    def __call__(
        self,
        denoise: Denoise,
        x_BHD: torch.Tensor,
        generators: Generators = None,
        *,
        start: int = 0,
    ) -> torch.Tensor:
        """Clean chunks [B, H, D] from x_BHD, noisy as at log_snrs[start], variance-preserving.

        generators: where a stochastic solver's noise comes from, one for all rows or one for each.
        """

    def noised(self, clean_BHD: torch.Tensor, noise_BHD: torch.Tensor, start: int) -> torch.Tensor:
        """Where to start from a guess of the clean chunk: x_t at log_snrs[start]."""
        signal, noise = signal_noise(self.log_snrs[start])
        return signal * clean_BHD + noise * noise_BHD


@dataclass(frozen=True, slots=True)
class Step:
    """x′ = keep·x + sample·x̂₀ + epsilon·ε̂ + change·(x̂₀ − x̂₀ of the step before) + spread·z.

    log_snr, signal, noise: level of x. z is standard normal.
    """

    log_snr: float
    signal: float
    noise: float
    keep: float = 0.0
    sample: float = 0.0
    epsilon: float = 0.0
    change: float = 0.0
    spread: float = 0.0

    def advance(
        self,
        x_BHD: torch.Tensor,
        p: Prediction,
        *,
        clip: float,
        before_BHD: torch.Tensor | None,
        z_BHD: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x′ and x̂₀, within ±clip unless that is 0; ε̂ is not clipped."""
        x0_BHD = sample_at(p, x_BHD, self.signal, self.noise)
        if clip:
            x0_BHD = x0_BHD.clamp(-clip, clip)
        next_BHD = self.sample * x0_BHD
        if self.epsilon:
            next_BHD = next_BHD + self.epsilon * epsilon_at(p, x_BHD, self.signal, self.noise)
        if self.keep:
            next_BHD = next_BHD + self.keep * x_BHD
        if self.change and before_BHD is not None:
            next_BHD = next_BHD + self.change * (x0_BHD - before_BHD)
        if z_BHD is not None:
            next_BHD = next_BHD + self.spread * z_BHD
        return next_BHD, x0_BHD

    def draw(self, x_BHD: torch.Tensor, generators: Generators) -> torch.Tensor | None:
        """The step's z, None if it has none."""
        return normal_like(x_BHD, generators) if self.spread else None


class StepSolver(Solver):
    """A solver that is a table: every step is linear in x, the prediction and the noise.

    Noise is drawn before the prediction is asked for, so that an operator that composes several
    denoisers can take it into account.
    """

    def __init__(self, steps: Sequence[Step], *, clip: float) -> None:
        """clip: see Solver."""
        self.steps = tuple(steps)
        self.clip = clip
        self.log_snrs = tuple(step.log_snr for step in steps)
        self.stochastic = any(step.spread for step in steps)

    def __call__(
        self,
        denoise: Denoise,
        x_BHD: torch.Tensor,
        generators: Generators = None,
        *,
        start: int = 0,
    ) -> torch.Tensor:
        """See Solver."""
        before_BHD = None
        for step in self.steps[start:]:
            z_BHD = step.draw(x_BHD, generators)
            p = denoise(x_BHD, step.log_snr)
            x_BHD, before_BHD = step.advance(
                x_BHD, p, clip=self.clip, before_BHD=before_BHD, z_BHD=z_BHD
            )
        return x_BHD
