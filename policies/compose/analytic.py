"""Mixing weights from demonstrations, without a rollout (methods.md C1.6, Proposition 4.1).

Shapes: B batch, H chunk, D action, n members.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from embodied.core.errors import ConfigError
from policies.arrays import without_padding
from policies.compose.policy import ComposedPolicy
from policies.conversions import signal_noise

MAX_MEMBERS = 12


@torch.no_grad()
def error_products(
    composed: ComposedPolicy,
    batches: Iterable[Mapping[str, Any]],
    *,
    seed: int,
    log_snrs: Sequence[float] | None = None,
) -> np.ndarray:
    """E⟨e_i, e_j⟩ [n, n] per element, e_i = ε̂_i − ε, over demonstrations and noise levels.

    batches: as `loss` takes them; padded steps do not count. log_snrs: all weigh the same; by
    default those that the composition's solver visits and that have some signal. In the place of
    the unknown ideal ε* = E[ε | x_t] stands ε itself, which adds E‖ε − ε*‖² to every entry and so
    moves no minimum over weights that sum to 1. Every member must be in use.
    """
    levels = log_snrs or [level for level in composed.solver.log_snrs if level > -12]
    rng = torch.Generator("cpu").manual_seed(seed % 2**63)
    n, head = len(composed.labels), min(composed.lengths)
    total_nn, count = np.zeros((n, n)), 0
    for batch in batches:
        cond = composed.encode({key: batch[key] for key in composed.spec.observation})
        pad_BH = torch.as_tensor(batch["action_is_pad"]).to(composed.device)
        action_BHD = torch.as_tensor(batch["action"]).to(composed.device)
        clean_BHD = composed.action_normalizer.normalize(without_padding(action_BHD, pad_BH))
        valid_BH1 = (~pad_BH[:, :head, None]).double()
        for log_snr in levels:
            noise_BHD = torch.randn(clean_BHD.shape, generator=rng).to(clean_BHD)
            signal, noise = signal_noise(log_snr)
            level = composed.level(signal * clean_BHD + noise * noise_BHD, log_snr, cond)
            errors = [(e - noise_BHD[:, : e.shape[1]])[:, :head] for e in level.epsilons().values()]
            error_nK = torch.stack([(e.double() * valid_BH1).flatten() for e in errors])
            total_nn += (error_nK @ error_nK.T).cpu().numpy()
            count += int(valid_BH1.sum()) * clean_BHD.shape[-1]
    if not count:
        raise ConfigError("no demonstrations to work weights out from")
    return total_nn / count


def simplex_weights(products_nn: np.ndarray) -> np.ndarray:
    """The w ≥ 0, Σw = 1 that minimises wᵀ G w, exactly: [n].

    For two members this is clip₀¹[(G₂₂ − G₁₂) / (G₁₁ − 2 G₁₂ + G₂₂)]. Every set of members with a
    weight is tried, at most 12 members; of equal minima the one with the fewest members is taken.
    """
    n = len(products_nn)
    if n > MAX_MEMBERS:
        raise ConfigError(f"weights of {n} members; at most {MAX_MEMBERS} can be worked out")
    best_n, least = np.eye(n)[0], np.inf
    for size in range(1, n + 1):
        for chosen in itertools.combinations(range(n), size):
            w_n = _interior(products_nn, chosen)
            value = w_n @ products_nn @ w_n
            if (w_n >= 0).all() and value < least - 1e-12 * abs(least if least < np.inf else 0.0):
                best_n, least = w_n, value
    return best_n


def _interior(products_nn: np.ndarray, chosen: tuple[int, ...]) -> np.ndarray:
    """Where the quadratic over the chosen members' plane Σw = 1 is stationary, [n]."""
    m = len(chosen)
    system = np.ones((m + 1, m + 1))
    system[:m, :m] = products_nn[np.ix_(chosen, chosen)]
    system[m, m] = 0.0
    solution = np.linalg.lstsq(system, np.eye(m + 1)[m], rcond=None)[0][:m]
    w_n = np.zeros(len(products_nn))
    w_n[list(chosen)] = solution / solution.sum() if solution.sum() else 1.0 / m
    return w_n
