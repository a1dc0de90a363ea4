"""A policy whose proposals a critic improves.

Shapes: B batch, n proposals, m of them kept, H chunk, d of it committed, D action, C conditioning.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import numpy as np
import torch
from torch import nn

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.seeds import derive_seed
from embodied.core.specs import PolicySpec
from policies import noise
from policies.arrays import float32_bounds, put_prefix, with_prefix
from policies.checkpoint import construct, policy_state
from policies.compose.members import check_actions, own_part
from policies.critics.configs import CriticConfig, ImprovementConfig
from policies.critics.ensemble import EnsembleCritic
from policies.folder import spec_data, spec_from_data
from policies.guidance import check_delay
from policies.improvement import choose, improve
from policies.noise import Generators
from policies.specs import union_spec


class StoredCritic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The critic of an improved policy. spec: what it reads, as in a checkpoint."""

    spec: dict[str, Any]
    options: CriticConfig


class ImprovedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of an improved policy. policy: its configuration as in a checkpoint of its own."""

    policy: dict[str, Any]
    critic: StoredCritic
    improvement: ImprovementConfig = msgspec.field(default_factory=ImprovementConfig)


class ImprovedPolicy(noise.LearnsAsItsPolicy, nn.Module):
    """Draws proposals from a policy, which needs no more than `sample` and `loss`, and acts on what
    the optimiser of actions makes of them (policies/improvement.py). It reads what its policy
    reads, and what its critic does beside that.

    Learning is the policy's alone: no gradient of `loss` reaches the critic.
    """

    name: ClassVar[str] = "improved"
    Config = ImprovedConfig

    low_D: torch.Tensor
    high_D: torch.Tensor

    def __init__(
        self,
        spec: PolicySpec,
        config: ImprovedConfig,
        policy: nn.Module | None = None,
        critic: EnsembleCritic | None = None,
    ) -> None:
        """policy, critic: if they are at hand; else they get weights from a checkpoint."""
        super().__init__()
        self.config = config
        self.spec = spec
        self.policy: Any = construct(config.policy) if policy is None else policy
        if critic is None:
            judged = spec_from_data(config.critic.spec, "critic")
            critic = EnsembleCritic(judged, config.critic.options)
        self.critic = critic
        if spec != improved_spec(self.policy.spec, self.critic):
            raise CorruptDataError(
                "the improved policy's spec is not that of its policy and critic"
            )
        for name, bound in zip(("low_D", "high_D"), float32_bounds(spec.action), strict=True):
            self.register_buffer(name, torch.as_tensor(bound), persistent=False)

    def parts(self) -> dict[str, Any]:
        """The policy that proposes."""
        return {"policy": self.policy}

    def init(self, batch: int) -> None:
        """Nothing is carried between decisions."""
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
        """Chunks [B, H, D] float32, as of Policy. A row depends on its own seed alone.

        Proposals are judged, and moved, with the prefix [B, d, D] in place.
        """
        cond_BC = self._encode(obs)
        seeds = noise.check_seeds(seed, len(cond_BC))
        count = self.config.improvement.proposals
        drawn: list[torch.Tensor] = []
        for row, row_seed in enumerate(seeds):
            obs_1 = {key: value[row : row + 1] for key, value in obs.items()}
            drawn.append(self.propose(obs_1, count, seed=derive_seed(row_seed, "proposals")))
        generators = [_generator(row_seed) for row_seed in seeds]
        actions_BHD = self._decide(cond_BC, torch.cat(drawn), generators, prefix).cpu().numpy()
        if prefix is not None:
            put_prefix(actions_BHD, prefix)
        return None, actions_BHD

    @torch.no_grad()
    def sample(self, obs: Mapping[str, Any], n: int, *, seed: int) -> torch.Tensor:
        """n decisions for each row, each from proposals of its own: [B, n, H, D] float32."""
        count = self.config.improvement.proposals
        drawn = self.propose(obs, n * count, seed=derive_seed(seed, "proposals"))
        cond_BC = self._encode(obs).repeat_interleave(n, dim=0)
        pools = drawn.unflatten(1, (n, count)).flatten(0, 1)
        return self._decide(cond_BC, pools, _generator(seed), None).unflatten(0, (-1, n))

    def propose(self, obs: Mapping[str, Any], n: int, *, seed: int) -> torch.Tensor:
        """n chunks of the policy for each row: [B, n, H, D]."""
        own = own_part("policy", self.policy.spec, self.spec, obs)
        return self.policy.sample(own, n, seed=seed)

    @torch.no_grad()
    def optimised(
        self,
        obs: Mapping[str, Any],
        pool_BnHD: torch.Tensor,
        *,
        seed: int,
        temperature: float | None,
        data_BHD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Chunks [B, H, D] float32 to learn from, or to judge, out of proposals of the policy:
        chosen at this temperature, and among them recorded ones (see `improve`)."""
        options = msgspec.structs.replace(self.config.improvement, temperature=temperature)
        cond_BC = self._encode(obs)
        return self._chosen(cond_BC, pool_BnHD, 0, _generator(seed), options, data_BHD)

    def _encode(self, obs: Mapping[str, Any]) -> torch.Tensor:
        return self.critic.encode(own_part("critic", self.critic.spec, self.spec, obs))

    def _decide(
        self,
        cond_BC: torch.Tensor,
        pool_BnHD: torch.Tensor,
        rng: Generators,
        prefix: np.ndarray | None,
    ) -> torch.Tensor:
        """Chunks [B, H, D]; committed actions have no slope, so that they stay."""
        committed = 0
        if prefix is not None:
            pool_BnHD = with_prefix(pool_BnHD, prefix)
            committed = prefix.shape[1]
            check_delay(self.spec.horizon, self.spec.n_action_steps, committed)
        return self._chosen(cond_BC, pool_BnHD, committed, rng, self.config.improvement)

    def _chosen(
        self,
        cond_BC: torch.Tensor,
        pool_BnHD: torch.Tensor,
        committed: int,
        rng: Generators,
        options: ImprovementConfig,
        data_BHD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with torch.inference_mode(False):  # tensors made in it can have no slope, their copies can
            cond_BC, pool_BnHD = cond_BC.clone(), pool_BnHD.clone()

            def q_of(actions_BnHD: torch.Tensor) -> torch.Tensor:
                head_BndD = actions_BnHD[:, :, :committed].detach()
                whole_BnHD = torch.cat([head_BndD, actions_BnHD[:, :, committed:]], dim=2)
                return self.critic.values(cond_BC, whole_BnHD).mean(dim=0)

            low_D, high_D = self.low_D, self.high_D
            kept_BmHD, q_Bm = improve(q_of, pool_BnHD, low_D, high_D, options, data_BHD)
            return choose(kept_BmHD, q_Bm, options.temperature, rng)


def improved(policy: Any, critic: EnsembleCritic, improvement: ImprovementConfig) -> ImprovedPolicy:
    """A trained policy, acting with a critic; both become its parts, not copies.

    ConfigError if the critic judges other chunks than the policy's, or reads what it reads
    otherwise.
    """
    config = ImprovedConfig(
        policy=policy_state(policy)[0],
        critic=StoredCritic(spec=spec_data(critic.spec), options=critic.config),
        improvement=improvement,
    )
    return ImprovedPolicy(improved_spec(policy.spec, critic), config, policy, critic)


def improved_spec(spec: PolicySpec, critic: EnsembleCritic) -> PolicySpec:
    """What a policy and its critic read; ConfigError unless it can be asked wherever they act."""
    check_actions(("policy", "critic"), (spec, critic.spec))
    if critic.spec.n_obs_steps > spec.n_obs_steps:
        raise ConfigError(
            f"the critic reads {critic.spec.n_obs_steps} observations, the policy only "
            f"{spec.n_obs_steps}; a critic that acts must read no more of them"
        )
    if critic.config.horizon > spec.horizon:
        raise ConfigError(
            f"critic.horizon is {critic.config.horizon}, and the policy's chunks have "
            f"{spec.horizon} steps; the critic must judge no more"
        )
    judged = msgspec.structs.replace(critic.spec, n_action_steps=spec.n_action_steps)
    return union_spec(("policy", "critic"), (spec, judged), horizon=spec.horizon)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(derive_seed(seed, "choice"))
