"""Real-time chunking: a chunk that goes on from actions that are committed already.

Black, Galliker and Levine 2025 (arXiv:2506.07339). H chunk, s executed, d committed, D action.

In flow time τ, with the chunk A on its way from noise to data and Â¹ = A + (1−τ) v:

    v′ = v + w (Y − Â¹)ᵀ diag(W) ∂Â¹/∂A,   w = min(β, (1−τ) / (τ r²)),   r² = (1−τ)² / (τ² + (1−τ)²)

A diffusion's x_t = √ᾱ x₀ + √(1−ᾱ) ε is that A in another scale: with s = √ᾱ, n = √(1−ᾱ) and the
time of equal signal-to-noise ratio, τ = s / (s+n), A = x_t / (s+n) and Â¹ = x̂₀. Then r² = n², the
variance that ΠGDM (Song et al. 2023) gives x₀ under x_t, and (1−τ) / (τ r²) = 1 / (s n). A change
Δ of the velocity at a fixed x_t changes x̂₀ by (1−τ) Δ and ε̂ by −τ Δ; without β that is

    x̂₀′ = x̂₀ + (Y − x̂₀)ᵀ diag(W) (∂x̂₀/∂x_t) / s,

ΠGDM's posterior mean. So one rule serves every denoiser and every solver, and DDIM under it goes
where Euler goes under it at the same levels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from embodied.core.errors import SpecError
from embodied.core.protocols import Prediction
from policies.acting import RtcConfig
from policies.conversions import flow_time, sample_at, signal_noise
from policies.solvers.base import Denoise


@dataclass(frozen=True, slots=True)
class Goal:
    """Y [B, H, D], normalised, and the diagonal of W [B, H, 1]."""

    wanted_BHD: torch.Tensor
    weight_BH1: torch.Tensor


def check_delay(horizon: int, executed: int, committed: int) -> None:
    """SpecError unless d ≤ H − s: later actions would come too late to be decided."""
    if committed > horizon - executed:
        raise SpecError(
            f"{committed} actions are committed; a chunk of {horizon} of which {executed} are "
            f"executed can follow at most {horizon - executed}: lower n_action_steps"
        )


def soft_mask(
    horizon: int, executed: int, committed: int, schedule: str = "exponential"
) -> torch.Tensor:
    """W [H]: 1 for i < d, falling for d ≤ i < H − s, 0 after (equation 5 of the paper).

    With c = (H−s−i) / (H−s−d+1): c (eᶜ − 1) / (e − 1), or c for "linear", 0 for "hard".
    """
    check_delay(horizon, executed, committed)
    end = horizon - executed
    weights = [1.0] * committed + [0.0] * (horizon - committed)
    for i in range(committed, end):
        c = (end - i) / (end - committed + 1)
        falling = {"exponential": c * math.expm1(c) / (math.e - 1), "linear": c, "hard": 0.0}
        weights[i] = falling[schedule]
    return torch.tensor(weights)


def guided(
    denoise: Denoise,
    goal: Goal,
    config: RtcConfig,
    *,
    clip: float = 0.0,
    levels: Sequence[float] = (),
) -> Denoise:
    """`denoise` with the guidance of the module's docstring; where W is 0 nothing changes.

    clip: x̂₀ counts as the nearest one within ±clip, as in the solver that is to use it, and is that
    where W > 0: at the noisiest levels the push would be nothing beside the network's error.
    levels: log-SNRs at which a solver's steps begin, rising. In a step of the length Δτ it then
    holds that w ≤ 1/Δτ, which reaches Y: more would go beyond it.
    """
    ends = pairwise([*(flow_time(level) for level in levels), 1.0])
    most = {level: 1 / (end - begin) for level, (begin, end) in zip(levels, ends, strict=True)}

    def estimate(x_BHD: torch.Tensor, log_snr: float) -> tuple[Prediction, torch.Tensor]:
        p = denoise(x_BHD, log_snr)
        return p, sample_at(p, x_BHD, *signal_noise(log_snr))

    def error_of(clean_BHD: torch.Tensor) -> torch.Tensor:
        return goal.weight_BH1 * (goal.wanted_BHD - clean_BHD)

    def with_guidance(x_BHD: torch.Tensor, log_snr: float) -> Prediction:
        signal, noise = _floats(log_snr)
        weight = min(config.beta, 1 / max(signal * noise, 1e-12), most.get(log_snr, math.inf))
        if config.mode == "full":
            with torch.enable_grad():
                x_BHD = x_BHD.detach().requires_grad_()
                p, free_BHD = estimate(x_BHD, log_snr)
                clean_BHD = free_BHD.clamp(-clip, clip) if clip else free_BHD
                error_BHD = error_of(clean_BHD.detach())
                (back_BHD,) = torch.autograd.grad(clean_BHD, x_BHD, error_BHD)
            free_BHD, clean_BHD = free_BHD.detach(), clean_BHD.detach()
            p = Prediction(p.value.detach(), p.parameterisation)
            change_BHD = weight * (signal + noise) * back_BHD
        else:
            p, free_BHD = estimate(x_BHD, log_snr)
            clean_BHD = free_BHD.clamp(-clip, clip) if clip else free_BHD
            change_BHD = weight * error_of(clean_BHD)
        if clip and noise:
            cut_BHD = (clean_BHD - free_BHD) * ((signal + noise) / noise)
            change_BHD = change_BHD + torch.where(goal.weight_BH1 > 0, cut_BHD, 0.0)
        # The velocity changes by Δ; what each parameterisation makes of that at the same x_t:
        slope = {
            "epsilon": -signal / (signal + noise),
            "sample": noise / (signal + noise),
            "v": -1 / (signal + noise),
            "flow": 1.0,
        }[p.parameterisation]
        return Prediction(p.value + slope * change_BHD, p.parameterisation)

    return with_guidance


def _floats(log_snr: float) -> tuple[float, float]:
    signal, noise = signal_noise(log_snr)
    assert isinstance(signal, float) and isinstance(noise, float)
    return signal, noise
