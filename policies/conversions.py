"""From any denoiser's output to noise, sample and score. Shapes: B batch, H chunk, D action.

Variance-preserving x_t = √ᾱ x₀ + √(1−ᾱ) ε and log_snr = log(ᾱ / (1−ᾱ)). A flow's
x_u = u x₁ + (1−u) n has the same signal-to-noise ratio at u = √ᾱ / (√ᾱ + √(1−ᾱ)), and there
x_u = x_t / (√ᾱ + √(1−ᾱ)) with n = ε and x₁ = x₀. A level, given as a log_snr or as
(signal, noise) = (√ᾱ, √(1−ᾱ)), is one float for all rows, which costs no tensor operation, or a
tensor with one value for each.
"""

import math

import torch

from embodied.core.errors import ConfigError
from embodied.core.protocols import Prediction

Scalar = float | torch.Tensor


def signal_noise(log_snr: Scalar) -> tuple[Scalar, Scalar]:
    """√ᾱ and √(1−ᾱ): floats for a float, [B, 1, 1] for [B]."""
    if isinstance(log_snr, torch.Tensor):
        log_snr_B11 = log_snr[:, None, None]
        return torch.sigmoid(log_snr_B11).sqrt(), torch.sigmoid(-log_snr_B11).sqrt()
    return math.sqrt(_sigmoid(log_snr)), math.sqrt(_sigmoid(-log_snr))


def flow_time(log_snr: Scalar) -> Scalar:
    """The flow's u with the same signal-to-noise ratio, in the shape of log_snr."""
    if isinstance(log_snr, torch.Tensor):
        return torch.sigmoid(log_snr / 2)
    return _sigmoid(log_snr / 2)


def flow_log_snr(u: float) -> float:
    """Inverse of flow_time; infinite at 0 and 1."""
    if u in (0.0, 1.0):
        return math.inf if u else -math.inf
    return 2 * math.log(u / (1 - u))


def epsilon_at(p: Prediction, x_t: torch.Tensor, signal: Scalar, noise: Scalar) -> torch.Tensor:
    """Noise estimate ε̂ [B, H, D] for x_t in variance-preserving scale."""
    match p.parameterisation:
        case "epsilon":
            return p.value
        case "sample":
            return (x_t - signal * p.value) / noise
        case "v":
            return signal * p.value + noise * x_t
        case "flow":
            return (x_t - signal * p.value) / (signal + noise)
        case _:
            raise _unknown(p)


def sample_at(p: Prediction, x_t: torch.Tensor, signal: Scalar, noise: Scalar) -> torch.Tensor:
    """Estimate of the clean chunk x̂₀ [B, H, D]."""
    match p.parameterisation:
        case "epsilon":
            return (x_t - noise * p.value) / signal
        case "sample":
            return p.value
        case "v":
            return signal * x_t - noise * p.value
        case "flow":
            return (x_t + noise * p.value) / (signal + noise)
        case _:
            raise _unknown(p)


def velocity_at(p: Prediction, x_t: torch.Tensor, signal: Scalar, noise: Scalar) -> torch.Tensor:
    """Velocity x̂₁ − n̂ [B, H, D] of the flow at the same level, for x_t still in this scale.

    "epsilon" has none without signal, "sample" none without noise: the result is not finite.
    """
    match p.parameterisation:
        case "epsilon":
            return (x_t - (signal + noise) * p.value) / signal
        case "sample":
            return ((signal + noise) * p.value - x_t) / noise
        case "v":
            return (signal - noise) * x_t - (signal + noise) * p.value
        case "flow":
            return p.value
        case _:
            raise _unknown(p)


def epsilon_of(p: Prediction, x_t: torch.Tensor, log_snr: Scalar) -> torch.Tensor:
    """`epsilon_at` at a log-SNR, a float or [B]."""
    return epsilon_at(p, x_t, *signal_noise(log_snr))


def sample_of(p: Prediction, x_t: torch.Tensor, log_snr: Scalar) -> torch.Tensor:
    """`sample_at` at a log-SNR, a float or [B]."""
    return sample_at(p, x_t, *signal_noise(log_snr))


def score_of(p: Prediction, x_t: torch.Tensor, log_snr: Scalar) -> torch.Tensor:
    """∇ log p_t(x_t) = −ε̂ / √(1−ᾱ), [B, H, D]."""
    signal, noise = signal_noise(log_snr)
    return -epsilon_at(p, x_t, signal, noise) / noise


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    odds = math.exp(x)
    return odds / (1 + odds)


def _unknown(p: Prediction) -> ConfigError:
    return ConfigError(f"unknown parameterisation '{p.parameterisation}'")
