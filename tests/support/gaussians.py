"""Policies whose exact score is known: each predicts one Gaussian."""

import itertools
import math

import numpy as np
import torch

from policies.conversions import signal_noise

KINDS = {
    "epsilon": ("diffusion", {"prediction_type": "epsilon"}),
    "sample": ("diffusion", {"prediction_type": "sample"}),
    "v": ("diffusion", {"prediction_type": "v_prediction"}),
    "flow": ("flow", {}),
}
HALF = {"name": "mix", "weights": [0.5, 0.5]}
SOLVER = {"name": "ddim", "timestep_spacing": "leading", "clip_sample": False}

PAIRS = {
    "equal": ((-0.5, 0.5), (0.2, 0.2), (0.3, 0.7)),
    "unequal": ((-0.5, 0.5), (0.1, 0.3), (0.5, 0.5)),
}


def ideal(kind, mean, sigma, alpha_bar):
    """The exact network for N(mean, sigma²) in the policy's own parameterisation and time."""

    def diffusion(x, time):
        position = (time * 100).clamp(0, 99)
        below = position.floor().long().clamp(max=98)
        log_snr = torch.lerp(
            torch.logit(alpha_bar)[below], torch.logit(alpha_bar)[below + 1], position - below
        )
        a = torch.sigmoid(log_snr)
        residual = (x - a.sqrt() * mean) / (a * sigma**2 + 1 - a)
        epsilon, sample = (1 - a).sqrt() * residual, mean + a.sqrt() * sigma**2 * residual
        v = a.sqrt() * epsilon - (1 - a).sqrt() * sample
        return {"epsilon": epsilon, "sample": sample, "v": v}[kind]

    def flow(x, u):
        slope = (u * sigma**2 - (1 - u)) / (u**2 * sigma**2 + (1 - u) ** 2)
        return mean + slope * (x - u * mean)

    return flow if kind == "flow" else diffusion


def moments(out):
    low, high = out[:2, 0, 0].tolist()
    return low, (high - low) ** 2


def ends(horizon=6):
    return torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None].expand(2, horizon, 2)


def affine(level_terms, log_snrs):
    """Moments after DDIM for ε̂ = A x − B, given (A, B) per level."""
    mean, std = 0.0, 1.0
    for here, ahead in itertools.pairwise([*log_snrs, math.inf]):
        (s, n), (s1, n1) = signal_noise(here), signal_noise(ahead)
        a, b = level_terms(here)
        slope, constant = s1 * (1 - n * a) / s + n1 * a, s1 * n * b / s - n1 * b
        mean, std = slope * mean + constant, slope * std
    return mean, std**2


def one(log_snr, mean, sigma):
    s, n = signal_noise(log_snr)
    k = n / (s**2 * sigma**2 + n**2)
    return np.array([k, k * s * mean])
