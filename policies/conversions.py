"""From any denoiser's output to noise, sample and score. Shapes: B batch, H chunk, D action.

Variance-preserving x_t = √ᾱ x₀ + √(1−ᾱ) ε and log_snr = log(ᾱ / (1−ᾱ)). A flow's
x_u = u x₁ + (1−u) n has the same signal-to-noise ratio at u = √ᾱ / (√ᾱ + √(1−ᾱ)), and there
x_u = x_t / (√ᾱ + √(1−ᾱ)) with n = ε and x₁ = x₀.
"""

import torch

from embodied.core.errors import ConfigError
from embodied.core.protocols import Prediction


def signal_noise(log_snr_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """√ᾱ and √(1−ᾱ), each [B, 1, 1]."""
    log_snr_B11 = log_snr_B[:, None, None]
    return torch.sigmoid(log_snr_B11).sqrt(), torch.sigmoid(-log_snr_B11).sqrt()


def flow_time(log_snr_B: torch.Tensor) -> torch.Tensor:
    """The flow's u in (0, 1), [B], with the same signal-to-noise ratio."""
    return torch.sigmoid(log_snr_B / 2)


def flow_log_snr(u_B: torch.Tensor) -> torch.Tensor:
    """Inverse of flow_time; infinite at 0 and 1."""
    return 2 * torch.logit(u_B)


def epsilon_of(p: Prediction, x_t: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    """Noise estimate ε̂ [B, H, D] for x_t in variance-preserving scale and log_snr [B]."""
    signal, noise = signal_noise(log_snr)
    match p.parameterisation:
        case "epsilon":
            return p.value
        case "sample":
            return (x_t - signal * p.value) / noise
        case "v":
            return signal * p.value + noise * x_t
        case "flow":
            return x_t / (signal + noise) - flow_time(log_snr)[:, None, None] * p.value
        case _:
            raise ConfigError(f"unknown parameterisation '{p.parameterisation}'")


def sample_of(p: Prediction, x_t: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    """Estimate of the clean chunk x̂₀ [B, H, D]."""
    signal, noise = signal_noise(log_snr)
    match p.parameterisation:
        case "epsilon":
            return (x_t - noise * p.value) / signal
        case "sample":
            return p.value
        case "v":
            return signal * x_t - noise * p.value
        case "flow":
            return x_t / (signal + noise) + (1 - flow_time(log_snr))[:, None, None] * p.value
        case _:
            raise ConfigError(f"unknown parameterisation '{p.parameterisation}'")


def score_of(p: Prediction, x_t: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    """∇ log p_t(x_t) = −ε̂ / √(1−ᾱ), [B, H, D]."""
    return -epsilon_of(p, x_t, log_snr) / signal_noise(log_snr)[1]
