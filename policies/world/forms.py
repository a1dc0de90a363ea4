"""Two ways from noise to data, for a value of any shape. B batch, N numbers of a value."""

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import msgspec
import torch
from torch import nn

from embodied.core.protocols import Parameterisation
from policies.conversions import Scalar, flow_time, signal_noise
from policies.schedule import Schedule
from policies.solvers.base import Solver, StepSolver
from policies.solvers.diffusion import DDIM, DDPM
from policies.solvers.flow import Euler, FlowSolverConfig
from policies.world.configs import WorldConfig


class Form(nn.Module):
    """What is learned of a value at which times.

    kind: what predictions stand for. clean: the network's time of the value itself. last: of pure
    noise.
    """

    kind: ClassVar[Parameterisation]
    clean: float
    last: float

    @abstractmethod
    def draw_times(self, batch: int, rng: torch.Generator) -> torch.Tensor:
        """Times to learn at, [B] on the CPU."""

    @abstractmethod
    def noised(
        self, clean_BN: torch.Tensor, noise_BN: torch.Tensor, time_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The noisy value at these times, and what is to be predicted there, both [B, N]."""

    @abstractmethod
    def time_of(self, log_snr: Scalar) -> Scalar:
        """The network's time of a log-SNR, in its shape (float or [B])."""

    @abstractmethod
    def scaled(self, x_t: torch.Tensor, log_snr: Scalar) -> torch.Tensor:
        """The network's input for a variance-preserving x_t, [B, …] with two further axes."""

    @abstractmethod
    def solver(self, num_steps: int | None) -> Solver:
        """What samples, in so many steps or as configured."""


class DiffusionForm(Form):
    """Predicts the noise in √ᾱ x₀ + √(1−ᾱ) ε on a squared-cosine schedule; its time is t / N."""

    kind = "epsilon"

    def __init__(self, config: WorldConfig) -> None:
        """Levels of the configured solver."""
        super().__init__()
        self._options = config.solver_config()
        self._sampler = DDPM if config.sampler == "ddpm" else DDIM
        self._temperature = config.temperature
        self.schedule = Schedule(DDIM(self._options).alpha_bar_N)
        self.clean = 0.0
        self.last = (len(self.schedule) - 1) / len(self.schedule)

    def draw_times(self, batch: int, rng: torch.Generator) -> torch.Tensor:
        """Uniform over the training steps."""
        n = len(self.schedule)
        return torch.randint(n, (batch,), generator=rng) / n

    def noised(
        self, clean_BN: torch.Tensor, noise_BN: torch.Tensor, time_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t and ε."""
        t_B = (time_B * len(self.schedule)).round().long()
        alpha_bar_B1 = self.schedule.alpha_bar_N[t_B][:, None]
        return alpha_bar_B1.sqrt() * clean_BN + (1 - alpha_bar_B1).sqrt() * noise_BN, noise_BN

    def time_of(self, log_snr: Scalar) -> Scalar:
        """Interpolated between the training steps."""
        return self.schedule.time_of(log_snr)

    def scaled(self, x_t: torch.Tensor, log_snr: Scalar) -> torch.Tensor:
        """As it is."""
        return x_t

    def solver(self, num_steps: int | None) -> Solver:
        """DDIM, or DDPM with the noise of its steps times the temperature."""
        steps = num_steps or self._options.num_steps
        made = self._sampler(msgspec.structs.replace(self._options, num_steps=steps))
        if self._temperature == 1:
            return made
        table = [replace(step, spread=self._temperature * step.spread) for step in made.steps]
        return StepSolver(table, clip=made.clip)


class FlowForm(Form):
    """Predicts the velocity x₁ − n in u x₁ + (1−u) n; its time is u."""

    kind = "flow"
    clean, last = 1.0, 0.0

    def __init__(self, config: WorldConfig) -> None:
        """Nothing but the solver's options."""
        super().__init__()
        self._options = FlowSolverConfig(num_steps=config.num_steps, clip_sample=config.clip_sample)

    def draw_times(self, batch: int, rng: torch.Generator) -> torch.Tensor:
        """Uniform."""
        return torch.rand(batch, generator=rng)

    def noised(
        self, clean_BN: torch.Tensor, noise_BN: torch.Tensor, time_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_u and the velocity."""
        return torch.lerp(noise_BN, clean_BN, time_B[:, None]), clean_BN - noise_BN

    def time_of(self, log_snr: Scalar) -> Scalar:
        """u of equal signal-to-noise ratio."""
        return flow_time(log_snr)

    def scaled(self, x_t: torch.Tensor, log_snr: Scalar) -> torch.Tensor:
        """x_u of equal signal-to-noise ratio."""
        signal, noise = signal_noise(log_snr)
        return x_t / (signal + noise)

    def solver(self, num_steps: int | None) -> Solver:
        """Euler's method."""
        steps = num_steps or self._options.num_steps
        return Euler(msgspec.structs.replace(self._options, num_steps=steps))


FORMS = {"diffusion": DiffusionForm, "flow": FlowForm}
