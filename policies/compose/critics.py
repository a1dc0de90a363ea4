"""Critics in a composition: they weigh members or push the chunk. Shapes as in operators.py."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import msgspec
import torch

from embodied.core.config import component
from embodied.core.errors import ConfigError
from embodied.core.protocols import Critic, Prediction
from policies.compose.operators import Level, Operator, weighted_sum
from policies.conversions import epsilon_at, sample_at, signal_noise


class Medoid:
    """Prefers the proposal that is nearest to the others: no learning, no outliers.

    q = −mean distance to all proposals of the row, over the chunk flattened.
    """

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """No options."""

    def __init__(self, config: Config) -> None:
        pass

    def q(self, obs: Any, actions: torch.Tensor) -> torch.Tensor:
        """See Critic."""
        flat_BnK = actions.flatten(2)
        return -torch.cdist(flat_BnK, flat_BnK).mean(-1)


def make_critic(data: Mapping[str, Any], where: str) -> Critic:
    """The critic that a configuration names."""
    cls, options = component("critics", data, where)
    return cls(options)


def values(critic: Critic, obs: Any, actions_BnHD: torch.Tensor) -> torch.Tensor:
    """q [B, n]; ConfigError for another shape or values that are not finite."""
    q_Bn = critic.q(obs, actions_BnHD)
    if tuple(q_Bn.shape) != tuple(actions_BnHD.shape[:2]):
        raise ConfigError(
            f"critic {type(critic).__name__} gives {tuple(q_Bn.shape)}; "
            f"{tuple(actions_BnHD.shape[:2])} is right"
        )
    if not torch.isfinite(q_Bn).all():
        raise ConfigError(f"critic {type(critic).__name__} gives values that are not finite")
    return q_Bn


class CriticWeightsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """critic: name and options. temperature: of the softmax over the members' values."""

    critic: dict[str, Any]
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0


class CriticWeights(Operator):
    """Convex weights w = softmax(Q(obs, x̂₀_i) / temperature), of each row and level anew.

    Values are asked for the members' own estimates of the clean chunk, in device units, on the
    part of the chunk that all members have.
    """

    Config = CriticWeightsConfig
    unnormalize: Callable[[torch.Tensor], torch.Tensor]
    """From normalised actions to device units; the composition sets it."""

    def __init__(
        self, config: CriticWeightsConfig, labels: tuple[str, ...], action_dim: int
    ) -> None:
        """Also makes the critic."""
        super().__init__(labels, action_dim)
        self.config = config
        self.critic = make_critic(config.critic, "operator.critic")

    def combine(self, level: Level) -> Prediction:
        """See the class."""
        signal, noise = signal_noise(level.log_snr)
        epsilons = level.epsilons()
        head = min(value.shape[1] for value in epsilons.values())
        clean_BnHD = torch.stack(
            [
                self.unnormalize((level.x_BHD[:, :head] - noise * e[:, :head]) / signal)
                for e in epsilons.values()
            ],
            dim=1,
        )
        q_Bn = values(self.critic, level.obs, clean_BnHD)
        weight_Bn = torch.softmax(q_Bn.double() / self.config.temperature, dim=1)
        weights = {i: weight_Bn[:, i, None, None].to(epsilons[i]) for i in epsilons}
        return Prediction(weighted_sum(epsilons, weights, equal_tail=True), "epsilon")


class Guidance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A critic's gradient on the composed score: s += scale · ∇_x Q(obs, x̂₀(x)).

    jacobian: ∂x̂₀/∂x through the members' networks ("network"), or √ᾱ, which is exact for data of
    unit variance and costs no backward pass ("unit").
    """

    critic: dict[str, Any]
    scale: float
    jacobian: Literal["network", "unit"] = "network"


def guided(
    guidance: Guidance,
    critic: Critic,
    unnormalize: Callable[[torch.Tensor], torch.Tensor],
    combine: Callable[[torch.Tensor], Prediction],
    level: Level,
) -> Prediction:
    """The guided ε̂ − scale·√(1−ᾱ)·∇_x Q (Dhariwal and Nichol 2021, algorithm 2, with Q at x̂₀).

    Q sees x̂₀ as if it were certain: at high noise that is not the score of q(x₀) exp(scale·Q).
    """
    signal, noise = signal_noise(level.log_snr)
    through = guidance.jacobian == "network"
    with torch.enable_grad():
        x_BHD = level.x_BHD.detach().requires_grad_(through)
        with torch.set_grad_enabled(through):
            p = combine(x_BHD)
            clean_BHD = sample_at(p, x_BHD, signal, noise)
        if not through:
            clean_BHD = clean_BHD.detach().requires_grad_()
        q = values(critic, level.obs, unnormalize(clean_BHD)[:, None]).sum()
        (slope_BHD,) = torch.autograd.grad(q, x_BHD if through else clean_BHD)
    if not through:
        slope_BHD = signal * slope_BHD
    with torch.no_grad():
        epsilon_BHD = epsilon_at(p, x_BHD, signal, noise)
        return Prediction(epsilon_BHD - guidance.scale * noise * slope_BHD, "epsilon")
