"""What every policy that samples chunks from a conditional density shares.

Shapes: B batch, T history, H chunk, D action, C conditioning, n samples per row.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import msgspec
import numpy as np
import torch
from torch import nn

from embodied.core.config import component
from embodied.core.errors import ConfigError, CorruptDataError, SpecError
from embodied.core.protocols import Prediction
from embodied.core.registry import unknown
from embodied.core.specs import PolicySpec
from policies import noise
from policies.arrays import float32_bounds, without_padding
from policies.normalizer import FeatureStats, LinearNormalizer, is_image

Count = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Array = np.ndarray | torch.Tensor
Generators = torch.Generator | list[torch.Generator] | None


class PolicyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options that every generative policy has.

    network: a registered network's name and its options. n_obs_steps: To. horizon: H.
    n_action_steps: how many of those are executed. action_normalization: "spec" maps the device's
    limits to [−1, 1], the others use the data.
    """

    network: dict[str, Any] = msgspec.field(default_factory=lambda: {"name": "mlp"})
    n_obs_steps: Count = 2
    horizon: Count = 16
    n_action_steps: Count = 8
    observation_normalization: Literal["limits", "gaussian"] = "limits"
    action_normalization: Literal["spec", "limits", "gaussian"] = "spec"


C = TypeVar("C", bound=PolicyConfig)


class GenerativePolicy(nn.Module, ABC, Generic[C]):
    """Observation histories → conditioning → chunks, by a network that denoises.

    A subclass says how chunks are sampled (`integrate`), what the network is trained on
    (`objective`) and how its output is named (`denoise`).
    """

    name: ClassVar[str]
    """The name under which the class is registered; checkpoints carry it."""

    stochastic = False
    """Whether `integrate` draws noise after the start."""

    low_D: torch.Tensor
    high_D: torch.Tensor

    def __init__(self, spec: PolicySpec, config: C) -> None:
        """Identity observation normalisers until `set_statistics` or a checkpoint sets them."""
        super().__init__()
        if len(spec.action.shape) != 1:
            raise ConfigError(f"action has shape {spec.action.shape}; policies need one axis")
        if not spec.observation:
            raise ConfigError("a policy needs at least one observation key")
        for key, array in spec.observation.items():
            if is_image(key, array):
                raise ConfigError(
                    f"'{key}' is an image; image observations come with the image encoders, "
                    "until then choose keys such as observation.state"
                )
        self.spec = spec
        self.config = config
        # Module names may hold no dots, keys do: normalisers are kept in the spec's order.
        self._observation = nn.ModuleList(
            LinearNormalizer(array.shape) for array in spec.observation.values()
        )
        self._action = LinearNormalizer(spec.action.shape)
        if config.action_normalization == "spec":
            self._action.set_bounds(spec.action, "action")
        for name, bound in zip(("low_D", "high_D"), float32_bounds(spec.action), strict=True):
            self.register_buffer(name, torch.as_tensor(bound), persistent=False)
        cond_dim = spec.n_obs_steps * sum(array.size for array in spec.observation.values())
        network, options = component("networks", config.network, "policy.network")
        self.network: nn.Module = network(options, spec.action.size, spec.horizon, cond_dim)
        self._training_rng = torch.Generator("cpu")

    @abstractmethod
    def integrate(
        self, x_BHD: torch.Tensor, cond_BC: torch.Tensor, generators: Generators
    ) -> torch.Tensor:
        """Carry standard normal noise to normalised actions, both [B, H, D]."""

    @abstractmethod
    def objective(
        self, action_BHD: torch.Tensor, cond_BC: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """Squared error [B, H, D] of the network's prediction, for normalised actions."""

    @abstractmethod
    def denoise(self, x_t: torch.Tensor, log_snr: torch.Tensor, cond: torch.Tensor) -> Prediction:
        """Prediction at normalised x_t [B, H, D] = √ᾱ x₀ + √(1−ᾱ) ε, log_snr [B], cond [B, C]."""

    def set_statistics(self, stats: Mapping[str, FeatureStats]) -> None:
        """Fit the normalisers to a data set's statistics; ConfigError if a key lacks them."""
        wanted: list[tuple[str, Any, Any]] = [
            (key, module, self.config.observation_normalization)
            for key, module in zip(self.spec.observation, self._observation, strict=True)
        ]
        if self.config.action_normalization != "spec":
            wanted.append(("action", self._action, self.config.action_normalization))
        for key, normalizer, mode in wanted:
            if key not in stats:
                raise unknown("statistics key", key, stats)
            normalizer.set_statistics(stats[key], mode, key)

    def init(self, batch: int) -> None:
        """These policies carry no state between decisions."""
        return None

    @torch.no_grad()
    def act(
        self,
        carry: None,
        obs: Mapping[str, np.ndarray],
        *,
        prefix: np.ndarray | None = None,
        seed: np.ndarray,
    ) -> tuple[None, np.ndarray]:
        """Chunks [B, H, D] float32 in device units and within the action's bounds.

        obs: [B, To, …] in device units, exactly the spec's keys. seed: integers [B]; a row's noise
        depends on its own seed alone. prefix [B, d, D]: actions that are committed already and
        stand at the head of the chunk; the rest is not yet guided by them. Raises SpecError for
        one that is longer than the chunk or of another shape.
        """
        cond_BC = self.encode(obs)
        seeds = noise.check_seeds(seed, cond_BC.shape[0])
        start_BHD = noise.start_noise(seeds, self.spec.horizon, self.spec.action.size)
        generators = noise.step_generators(seeds) if self.stochastic else None
        actions_BHD = self._decide(start_BHD, cond_BC, generators).cpu().numpy()
        if prefix is not None:
            wanted = (len(actions_BHD), f"1..{self.spec.horizon}", *self.spec.action.shape)
            shape = actions_BHD[:, : prefix.shape[1]].shape if prefix.ndim == 3 else ()
            if prefix.shape != shape or not prefix.size:
                raise SpecError(f"prefix has shape {prefix.shape}; {wanted} is right")
            actions_BHD[:, : prefix.shape[1]] = prefix
        return None, actions_BHD

    @torch.no_grad()
    def sample(self, obs: Mapping[str, Array], n: int, *, seed: int) -> torch.Tensor:
        """Draw n chunks for each row: [B, n, H, D] float32 in device units, within bounds."""
        cond_BC = self.encode(obs).repeat_interleave(n, dim=0)
        rng = torch.Generator("cpu").manual_seed(seed % 2**63)
        shape = (self.spec.horizon, self.spec.action.size)
        start_BHD = torch.randn((cond_BC.shape[0], *shape), generator=rng)
        return self._decide(start_BHD, cond_BC, rng).unflatten(0, (-1, n))

    def encode(self, obs: Mapping[str, Array]) -> torch.Tensor:
        """Conditioning [B, C] from observations [B, To, …] in device units.

        Raises SpecError for a missing or unknown key, a wrong shape, or a value that is not finite.
        """
        for key in obs:
            if key not in self.spec.observation:
                raise SpecError(str(unknown("observation key", key, self.spec.observation)))
        return self._condition(obs)

    def loss(self, batch: Mapping[str, Array]) -> tuple[torch.Tensor, dict[str, float]]:
        """Cloning loss: the mean of the objective over all steps that are not padding.

        batch: the spec's observation keys [B, To, …], action [B, H, D] in device units and
        action_is_pad [B, H] bool; other keys are left alone. Values at padded steps have no
        influence. Noise comes from the generator that `seed_training` seeds.
        """
        cond_BC = self._condition(batch)
        shape = (cond_BC.shape[0], self.spec.horizon, self.spec.action.size)
        action_BHD = self._read(batch, "action", shape)
        pad_BH = self._read(batch, "action_is_pad", shape[:2]).bool()
        clean_BHD = self._action.normalize(without_padding(action_BHD, pad_BH))
        error_BHD = self.objective(clean_BHD, cond_BC, self._training_rng)
        valid_BH1 = (~pad_BH)[..., None]
        n_valid = valid_BH1.sum().clamp(min=1) * self.spec.action.size
        loss = torch.where(valid_BH1, error_BHD, 0.0).sum() / n_valid
        return loss, {"loss": loss.item()}

    def seed_training(self, seed: int) -> None:
        """Start the stream of noise that `loss` draws from."""
        self._training_rng.manual_seed(seed % 2**63)

    def training_rng_state(self) -> torch.Tensor:
        """State of that stream, uint8 [n]."""
        return self._training_rng.get_state()

    def set_training_rng_state(self, state: torch.Tensor) -> None:
        """Continue from `training_rng_state`; CorruptDataError if it is no such state."""
        try:
            self._training_rng.set_state(state)
        except (RuntimeError, TypeError) as error:
            raise CorruptDataError(f"not a state of the training noise: {error}") from error

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return self.low_D.device

    def _decide(
        self, start_BHD: torch.Tensor, cond_BC: torch.Tensor, generators: Generators
    ) -> torch.Tensor:
        x_BHD = self.integrate(start_BHD.to(cond_BC), cond_BC, generators)
        action_BHD = self._action.unnormalize(x_BHD).float()
        return action_BHD.clamp(self.low_D.float(), self.high_D.float())

    def _condition(self, source: Mapping[str, Array]) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        batch = -1
        for (key, array), normalizer in zip(
            self.spec.observation.items(), self._observation.children(), strict=True
        ):
            value = self._read(source, key, (batch, self.spec.n_obs_steps, *array.shape))
            if not torch.isfinite(value).all():
                raise SpecError(f"{key} holds values that are not finite")
            batch = value.shape[0]
            assert isinstance(normalizer, LinearNormalizer)
            parts.append(normalizer.normalize(value).flatten(1))
        return torch.cat(parts, dim=1)

    def _read(self, source: Mapping[str, Array], key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor at `key`; a batch size of −1 in `shape` stands for any."""
        if key not in source:
            raise SpecError(f"'{key}' is missing; got keys {sorted(source)}")
        value = source[key]
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value if value.flags.writeable else value.copy())
        expected = (value.shape[0] if value.ndim and shape[0] < 0 else shape[0], *shape[1:])
        if tuple(value.shape) != expected:
            wanted = ", ".join("B" if n < 0 else str(n) for n in shape)
            raise SpecError(f"{key} has shape {tuple(value.shape)}; this policy needs [{wanted}]")
        return value.to(self.device, non_blocking=True)
