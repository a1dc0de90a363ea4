"""Denoising diffusion. Shapes: B batch, H chunk, D action, C conditioning, N training steps."""

import copy
from typing import Annotated, Any, Literal

import msgspec
import torch

from embodied.core.errors import ConfigError, MissingDependencyError
from embodied.core.protocols import Parameterisation, Prediction
from embodied.core.specs import PolicySpec
from policies.base import GenerativePolicy, Generators, PolicyConfig

PARAMETERISATIONS: dict[str, Parameterisation] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v",
}

MIN_LOG_ALPHA_OVER_SIGMA = -5.1
"""Where DPM-Solver++ starts on a cosine schedule, which ends at practically no signal."""


class DiffusionConfig(PolicyConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the diffusion policy.

    num_train_steps: N of the squared-cosine schedule (Nichol and Dhariwal 2021, equation 17).
    num_steps: sampler steps; None means 10, or N for ddpm. timestep_spacing: "trailing" starts
    where x is pure noise (Lin et al. 2023, table 2); "leading" starts up to a stride earlier, at
    a signal-to-noise ratio that the starting noise does not have, which biases the mean (for
    N(.8, .05²) in 10 steps: .7963 instead of .8). With "epsilon", trailing relies on clip_sample:
    at the first step errors of the network are divided by √ᾱ = 5e-4. clip_sample: keep the
    estimate of the clean chunk within ±1 while sampling.
    """

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    scheduler: Literal["ddim", "ddpm", "dpmsolver++"] = "ddim"
    num_train_steps: Annotated[int, msgspec.Meta(ge=2, le=10_000)] = 100
    num_steps: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    clip_sample: bool = True

    def __post_init__(self) -> None:
        """Raise ConfigError for options that contradict each other."""
        if self.num_steps is not None and self.num_steps > self.num_train_steps:
            raise ConfigError(
                f"num_steps is {self.num_steps}; it must not exceed "
                f"num_train_steps={self.num_train_steps}"
            )
        if self.clip_sample and self.action_normalization == "gaussian":
            raise ConfigError(
                "clip_sample keeps actions within ±1, which gaussian normalisation exceeds; "
                "set clip_sample: false, or action_normalization: spec or limits"
            )


class DiffusionPolicy(GenerativePolicy[DiffusionConfig]):
    """Learns to predict noise, clean chunk or v from x_t = √ᾱ_t x₀ + √(1−ᾱ_t) ε.

    DDPM (Ho et al. 2020, equation 14), v as in Salimans and Ho 2022; the network's time is t / N.
    """

    name = "diffusion"
    Config = DiffusionConfig

    alpha_bar_N: torch.Tensor
    rising_log_snr_N: torch.Tensor

    def __init__(self, spec: PolicySpec, config: DiffusionConfig) -> None:
        """Also makes the scheduler that every sampling call copies."""
        super().__init__(spec, config)
        self.stochastic = config.scheduler == "ddpm"
        default = config.num_train_steps if self.stochastic else 10
        self.num_steps = config.num_steps or min(default, config.num_train_steps)
        try:
            with torch.device("cpu"):
                self._scheduler = _scheduler(config)
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"diffusion policies need the package '{error.name}', which is not installed; "
                "pip install 'embodied-stack[policy]' brings it"
            ) from error
        alpha_bar_N = self._scheduler.alphas_cumprod
        self.register_buffer("alpha_bar_N", alpha_bar_N.clone(), persistent=False)
        rising_N = torch.logit(alpha_bar_N.double()).flip(0).float()
        self.register_buffer("rising_log_snr_N", rising_N, persistent=False)

    def integrate(
        self, x_BHD: torch.Tensor, cond_BC: torch.Tensor, generators: Generators
    ) -> torch.Tensor:
        """Run the scheduler from t = N − 1 to 0."""
        # A scheduler keeps its place and history: a shallow copy per call is re-entrant, because
        # set_timesteps replaces, and never changes, what the copies share.
        scheduler = copy.copy(self._scheduler)
        scheduler.set_timesteps(self.num_steps)
        extra = {"generator": generators} if self.stochastic else {}
        n = self.config.num_train_steps
        for t in scheduler.timesteps.tolist():
            time_B = x_BHD.new_full((len(x_BHD),), t / n)
            out_BHD = self.network(x_BHD, time_B, cond_BC).to(x_BHD)
            x_BHD = scheduler.step(out_BHD, t, x_BHD, return_dict=False, **extra)[0]
        return x_BHD

    def objective(
        self, action_BHD: torch.Tensor, cond_BC: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """Squared error of the predicted quantity per element."""
        noise_BHD = torch.randn(action_BHD.shape, generator=rng).to(action_BHD)
        n = self.config.num_train_steps
        t_B = torch.randint(n, (len(action_BHD),), generator=rng).to(action_BHD.device)
        alpha_bar_B11 = self.alpha_bar_N[t_B][:, None, None]
        signal, spread = alpha_bar_B11.sqrt(), (1 - alpha_bar_B11).sqrt()
        x_BHD = signal * action_BHD + spread * noise_BHD
        out_BHD = self.network(x_BHD, t_B.to(action_BHD) / n, cond_BC)
        match self.config.prediction_type:
            case "epsilon":
                target_BHD = noise_BHD
            case "sample":
                target_BHD = action_BHD
            case "v_prediction":
                target_BHD = signal * noise_BHD - spread * action_BHD
        return (out_BHD - target_BHD).square()

    def denoise(self, x_t: torch.Tensor, log_snr: torch.Tensor, cond: torch.Tensor) -> Prediction:
        """The network's output at the time whose log-SNR is `log_snr`, interpolated in between."""
        value = self.network(x_t, self._time(log_snr).to(x_t), cond)
        return Prediction(value, PARAMETERISATIONS[self.config.prediction_type])

    def _time(self, log_snr_B: torch.Tensor) -> torch.Tensor:
        grid_N = self.rising_log_snr_N
        right_B = torch.searchsorted(grid_N, log_snr_B.to(grid_N)).clamp(1, len(grid_N) - 1)
        low_B, high_B = grid_N[right_B - 1], grid_N[right_B]
        part_B = ((log_snr_B - low_B) / (high_B - low_B)).clamp(0, 1)
        return (len(grid_N) - right_B - part_B) / len(grid_N)


def _scheduler(config: DiffusionConfig) -> Any:
    # Each import takes seconds: only the one that is used, and before the first decision.
    common: dict[str, Any] = {
        "num_train_timesteps": config.num_train_steps,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": config.prediction_type,
        "timestep_spacing": config.timestep_spacing,
    }
    match config.scheduler:
        case "ddim":
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler

            return DDIMScheduler(clip_sample=config.clip_sample, **common)
        case "ddpm":
            from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

            return DDPMScheduler(
                variance_type="fixed_small", clip_sample=config.clip_sample, **common
            )
        case "dpmsolver++":
            from diffusers.schedulers.scheduling_dpmsolver_multistep import (
                DPMSolverMultistepScheduler,
            )

            # Thresholding at a largest value of 1 is clipping to ±1.
            return DPMSolverMultistepScheduler(
                algorithm_type="dpmsolver++",
                lambda_min_clipped=MIN_LOG_ALPHA_OVER_SIGMA,
                thresholding=config.clip_sample,
                sample_max_value=1.0,
                **common,
            )
