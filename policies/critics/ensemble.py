"""An ensemble of critics of action chunks, computed as one; and of values without actions.

Shapes: B batch, T history, n chunks per row, H chunk, h of it judged, D action, C conditioning,
E members, W width, K outputs, N rows of any kind.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from embodied.core.config import component
from embodied.core.errors import ConfigError, SpecError
from embodied.core.specs import PolicySpec
from policies.critics.configs import CriticConfig
from policies.critics.heads import ValueHead
from policies.encoders.observations import ObservationEncoder
from policies.normalizer import FeatureStats, LinearNormalizer
from policies.reading import Array, read_observations

FINAL_SCALE = 1e-2
"""Of the last layer's initial weights: all values begin at about the head's start."""


class StackedLinear(nn.Module):
    """E linear layers side by side; initialised as torch's own, times `scale`."""

    def __init__(self, members: int, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight_EIO = nn.Parameter(torch.empty(members, inputs, outputs))
        self.bias_E1O = nn.Parameter(torch.empty(members, 1, outputs))
        bound = scale / inputs**0.5
        for parameter in (self.weight_EIO, self.bias_E1O):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x_ENI: torch.Tensor) -> torch.Tensor:
        """[E, N, I] → [E, N, O]."""
        return torch.baddbmm(self.bias_E1O, x_ENI, self.weight_EIO)


class StackedNorm(nn.Module):
    """E layer normalisations side by side."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.scale_E1W = nn.Parameter(torch.ones(members, 1, width))
        self.shift_E1W = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x_ENW: torch.Tensor) -> torch.Tensor:
        """[E, N, W], each row normalised."""
        return torch.addcmul(self.shift_E1W, F.layer_norm(x_ENW, x_ENW.shape[-1:]), self.scale_E1W)


class StackedMLP(nn.Module):
    """E times: linear, layer normalisation and SiLU in each hidden layer, then linear."""

    def __init__(self, config: CriticConfig, cond_dim: int, chunk_dim: int, outputs: int) -> None:
        """cond_dim: C. chunk_dim: h·D. outputs: K."""
        super().__init__()
        members, width = config.members, config.width
        self.cond_dim = cond_dim
        self.inlet = StackedLinear(members, cond_dim + chunk_dim, width)
        self.layers = nn.ModuleList(
            StackedLinear(members, width, width) for _ in range(config.depth - 1)
        )
        self.norms = nn.ModuleList(StackedNorm(members, width) for _ in range(config.depth))
        self.outlet = StackedLinear(members, width, outputs, FINAL_SCALE)

    def forward(self, cond_BC: torch.Tensor, chunk_BnA: torch.Tensor) -> torch.Tensor:
        """[E, B, n, K] of the conditioning and the chunk, one after the other, as inputs.

        The conditioning's share of the first layer is computed once for all n. The last layer is
        computed in float32 under any precision: what is ranked differs little.
        """
        cond_EIW, chunk_EIW = self.inlet.weight_EIO.split(
            [self.cond_dim, chunk_BnA.shape[-1]], dim=1
        )
        context_EBW = cond_BC @ cond_EIW + self.inlet.bias_E1O
        x_ENW = chunk_BnA.flatten(0, 1).expand(len(chunk_EIW), -1, -1).bmm(chunk_EIW)
        x_EBnW = x_ENW.unflatten(1, chunk_BnA.shape[:2]) + context_EBW[:, :, None]
        x_ENW = F.silu(self.norms[0](x_EBnW.flatten(1, 2)))
        for layer, norm in zip(self.layers, self.norms[1:], strict=True):
            x_ENW = F.silu(norm(layer(x_ENW)))
        with torch.autocast(x_ENW.device.type, enabled=False):
            out_ENK = self.outlet(x_ENW.to(self.outlet.weight_EIO.dtype))
        return out_ENK.unflatten(1, chunk_BnA.shape[:2])


class EnsembleCritic(nn.Module):
    """Values of chunks in an observed situation, from E networks behind one encoder.

    Ball et al. 2023 (RLPD): layer normalisation and large ensembles. Of a chunk the first
    `horizon` steps count (Q-chunking, Li et al. 2025). Actions are in device units everywhere.
    """

    def __init__(self, spec: PolicySpec, config: CriticConfig) -> None:
        """spec: what it reads, and the chunks it judges; ConfigError if it cannot judge them."""
        super().__init__()
        if config.horizon > spec.horizon:
            raise ConfigError(
                f"critic.horizon is {config.horizon}; the policy's chunks have {spec.horizon} "
                "steps, of which at most all can be judged"
            )
        if len(spec.action.shape) != 1:
            raise ConfigError(f"action has shape {spec.action.shape}; critics need one axis")
        if not spec.action.bounded:
            raise ConfigError(
                f"action has bounds {spec.action.low} and {spec.action.high}; a critic needs a "
                "finite pair for every element: bound them in the device's spec"
            )
        if not spec.observation:
            raise ConfigError("a critic needs at least one observation key")
        self.spec = spec
        self.config = config
        self.encoder = ObservationEncoder(spec, config.images, config.language, "critic")
        self.action_normalizer = LinearNormalizer(spec.action.shape)
        self.action_normalizer.set_bounds(spec.action, "action")
        head, options = component("value_heads", config.head, "critic.head")
        self.head: ValueHead = head(options)
        chunk_dim = config.horizon * spec.action.size
        self.network = StackedMLP(config, self.encoder.dim, chunk_dim, self.head.outputs)
        with torch.no_grad():
            self.network.outlet.bias_E1O.add_(self.head.start())

    @property
    def device(self) -> torch.device:
        """Where the critic computes."""
        return self.action_normalizer.offset.device

    @property
    def normalized_keys(self) -> tuple[str, ...]:
        """Keys of which `set_statistics` needs the statistics; never pictures or text."""
        return self.encoder.states

    def set_statistics(self, stats: Mapping[str, FeatureStats]) -> None:
        """Fit the observation normalisers to a data set's; ConfigError if a key lacks them."""
        self.encoder.set_statistics(stats, self.config.observation_normalization)

    def encode(self, obs: Mapping[str, Array], rng: torch.Generator | None = None) -> torch.Tensor:
        """Conditioning [B, C] from observations [B, T, …] in device units; other keys are left.

        rng: draws what pictures undergo in training; None for inference. SpecError for a missing
        key, a wrong shape, or a value that is not finite.
        """
        return self.encoder(read_observations(obs, self.spec, self.device), rng)

    def logits(self, cond_BC: torch.Tensor, actions_BnHD: torch.Tensor) -> torch.Tensor:
        """Outputs of every member, [E, B, n, K]; steps beyond the critic's horizon have no effect.

        SpecError for chunks that are too short or of another robot.
        """
        horizon, dim = self.config.horizon, self.spec.action.size
        shape = tuple(actions_BnHD.shape)
        batch = len(cond_BC)
        if len(shape) != 4 or (shape[0], shape[3]) != (batch, dim) or shape[2] < horizon:
            raise SpecError(
                f"actions have shape {shape}; [{batch}, n, {horizon} or more, {dim}] is right"
            )
        judged_BnhD = self.action_normalizer.normalize(actions_BnHD[:, :, :horizon])
        return self.network(cond_BC, judged_BnhD.flatten(2))

    def values(self, cond_BC: torch.Tensor, actions_BnHD: torch.Tensor) -> torch.Tensor:
        """Every member's values [E, B, n]."""
        return self.head.value(self.logits(cond_BC, actions_BnHD))

    def q(self, obs: Mapping[str, Array], actions: torch.Tensor) -> torch.Tensor:
        """Mean of the members' values [B, n], for actions [B, n, H, D] (see Critic)."""
        return self.values(self.encode(obs), actions).mean(dim=0)

    def make_value(self, *, seed: int) -> "EnsembleValue":
        """Fresh values of what this critic reads, with its options and its encoder's present
        weights; the networks' initial weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return EnsembleValue(self)


class EnsembleValue(nn.Module):
    """Values of situations, whatever is done in them: a critic's networks, but without actions,
    behind an encoder of their own."""

    def __init__(self, critic: EnsembleCritic) -> None:
        """critic: see EnsembleCritic.make_value; they are where it is."""
        super().__init__()
        self.spec = critic.spec
        self.encoder = copy.deepcopy(critic.encoder)
        self.head = copy.deepcopy(critic.head)
        self.network = StackedMLP(critic.config, self.encoder.dim, 0, self.head.outputs)
        with torch.no_grad():
            self.network.outlet.bias_E1O.add_(self.head.start())
        self.to(critic.device)

    def logits(self, obs: Mapping[str, Array], rng: torch.Generator | None = None) -> torch.Tensor:
        """Outputs of every member [E, B, K]; obs, rng: see EnsembleCritic.encode."""
        device = self.network.outlet.bias_E1O.device
        cond_BC = self.encoder(read_observations(obs, self.spec, device), rng)
        return self.network(cond_BC, cond_BC.new_zeros(len(cond_BC), 1, 0))[:, :, 0]

    def values(self, obs: Mapping[str, Array]) -> torch.Tensor:
        """Every member's values [E, B]."""
        return self.head.value(self.logits(obs))
