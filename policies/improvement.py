"""The optimiser of actions of policy-agnostic RL: proposals of any policy, made better by a critic.

Mark et al. 2024 (arXiv:2412.06685): the best of the proposals are kept (global), each
is moved up the critic's slope (local), and one of them is chosen.

Shapes: B batch, n proposals, m of them kept, H chunk, D action.
"""

from collections.abc import Callable

import torch

from embodied.core.errors import ConfigError, EmbodiedError, SpecError
from policies.critics.configs import ImprovementConfig
from policies.noise import Generators

Values = Callable[[torch.Tensor], torch.Tensor]
"""From actions [B, n, H, D], for any n, to their values [B, n]."""


def improve(
    q_of: Values,
    actions_BnHD: torch.Tensor,
    low_D: torch.Tensor,
    high_D: torch.Tensor,
    config: ImprovementConfig,
    data_BHD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept proposals after the ascent [B, m, H, D], and their values [B, m]; no gradients.

    No proposal is ever worse than it was. Actions are in device units and stay within the bounds.
    data_BHD: recorded chunks, which take the worst kept one's place before the ascent. SpecError
    for fewer than m proposals, ConfigError for bounds that are not finite, EmbodiedError for values
    that are not.
    """
    drawn = actions_BnHD.shape[1]
    if drawn < config.kept:
        raise SpecError(
            f"there are {drawn} proposals, of which improvement.kept={config.kept} shall be kept; "
            "draw at least as many"
        )
    with torch.no_grad():
        if config.mean:
            actions_BnHD = torch.cat([actions_BnHD, actions_BnHD.mean(dim=1, keepdim=True)], dim=1)
        if actions_BnHD.shape[1] == config.kept and data_BHD is None:
            return ascend(q_of, actions_BnHD, low_D, high_D, config.steps, config.step_size)
        kept_BmHD, q_Bm = _keep(q_of, actions_BnHD, config.kept, data_BHD)
        if not config.steps:
            return kept_BmHD, q_Bm
        return ascend(q_of, kept_BmHD, low_D, high_D, config.steps, config.step_size)


def _keep(
    q_of: Values, actions_BnHD: torch.Tensor, kept: int, data_BHD: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `kept` best, best first, but recorded ones last if there are any; and their values."""
    n = actions_BnHD.shape[1]
    if data_BHD is not None:
        actions_BnHD = torch.cat([actions_BnHD, data_BHD[:, None]], dim=1)
    q_Bn = _finite(q_of(actions_BnHD))
    chosen_Bm = q_Bn[:, :n].topk(kept, dim=1).indices
    if data_BHD is not None:
        chosen_Bm[:, -1] = n
    kept_BmHD = actions_BnHD.take_along_dim(chosen_Bm[:, :, None, None], dim=1)
    return kept_BmHD, q_Bn.take_along_dim(chosen_Bm, dim=1)


def ascend(
    q_of: Values,
    actions_BmHD: torch.Tensor,
    low_D: torch.Tensor,
    high_D: torch.Tensor,
    steps: int,
    step_size: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient ascent on each chunk; the best of where it was, its start included, and the value.

    A step is a + α ∂q/∂a, cut off at the bounds, in coordinates where these are −1 and 1. In
    device units that is α times the squared half range: an element that cannot vary stays.
    """
    half_D = (high_D - low_D) / 2
    if not torch.isfinite(half_D).all():
        raise ConfigError("actions can be improved only within finite bounds; bound them all")
    rate_D = step_size * half_D.square()
    a_BmHD = best_BmHD = actions_BmHD.detach()
    best_q_Bm = torch.full_like(a_BmHD[:, :, 0, 0], -torch.inf)
    for _ in range(steps):
        q_Bm, slope_BmHD = _value_and_slope(q_of, a_BmHD)
        best_BmHD, best_q_Bm = _better(a_BmHD, q_Bm, best_BmHD, best_q_Bm)
        a_BmHD = (a_BmHD + rate_D * slope_BmHD).clamp(low_D, high_D)
    with torch.no_grad():
        q_Bm = _finite(q_of(a_BmHD))
    best_BmHD, best_q_Bm = _better(a_BmHD, q_Bm, best_BmHD, best_q_Bm)
    return best_BmHD, _finite(best_q_Bm)


def choose(
    actions_BmHD: torch.Tensor,
    q_Bm: torch.Tensor,
    temperature: float | None,
    rng: Generators,
) -> torch.Tensor:
    """One chunk for each row [B, H, D]: the best, or one drawn from softmax(q / temperature).

    rng: unused without a temperature.
    """
    if temperature is None:
        chosen_B = q_Bm.argmax(dim=1)
    else:
        bounds_Bm = torch.softmax(q_Bm.double() / temperature, dim=1).cumsum(dim=1)
        draw_B1 = _uniform(len(q_Bm), rng).to(q_Bm.device)[:, None]
        chosen_B = (bounds_Bm <= draw_B1 * bounds_Bm[:, -1:]).sum(dim=1)
    return actions_BmHD.take_along_dim(chosen_B[:, None, None, None], dim=1)[:, 0]


def _value_and_slope(q_of: Values, actions_BmHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, m] and ∂q/∂a [B, m, H, D]; whatever else q depends on gets no gradient."""
    with torch.enable_grad():
        leaf_BmHD = actions_BmHD.detach().requires_grad_()
        q_Bm = q_of(leaf_BmHD)
        (slope_BmHD,) = torch.autograd.grad(q_Bm.sum(), leaf_BmHD)
    return q_Bm.detach(), slope_BmHD


def _better(
    a_BmHD: torch.Tensor, q_Bm: torch.Tensor, best_BmHD: torch.Tensor, best_q_Bm: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The one of two of each row's chunks whose value is greater, and the value."""
    better_Bm = q_Bm > best_q_Bm
    chosen_BmHD = torch.where(better_Bm[:, :, None, None], a_BmHD, best_BmHD)
    return chosen_BmHD, torch.where(better_Bm, q_Bm, best_q_Bm)


def _uniform(batch: int, rng: Generators) -> torch.Tensor:
    """Float64 [B] in [0, 1)."""
    if isinstance(rng, list):
        return torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in rng])
    return torch.rand(batch, generator=rng, dtype=torch.float64)


def _finite(q_Bn: torch.Tensor) -> torch.Tensor:
    """The values; EmbodiedError unless they are finite."""
    if not torch.isfinite(q_Bn).all():
        raise EmbodiedError(
            "the critic's values of proposed actions are not finite; its weights have diverged, or "
            "the policy's have: lower the learning rates, or go back to an earlier version"
        )
    return q_Bn
