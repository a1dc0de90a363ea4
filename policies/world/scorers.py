"""How good is what a world model predicts. N rows, T history, S predicted observations."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from embodied.core.errors import ConfigError, SpecError
from embodied.core.instructions import GOAL
from embodied.core.protocols import Policy, WorldModel
from embodied.core.registry import unknown
from embodied.core.seeds import derive_seed
from embodied.core.specs import ArraySpec, PolicySpec
from policies.compose.members import check_actions, own_part
from policies.critics.ensemble import EnsembleCritic
from policies.folder import spec_from_data
from policies.world.configs import CriticScorerConfig, GoalScorerConfig
from policies.world.history import succession


class Scorer(nn.Module):
    """Made of its options and of the policy and the world model that it serves; those are not its
    parts. Its parameters are not trained.

    reads: observations that it needs beside those of the two.
    """

    reads: Mapping[str, ArraySpec]

    @abstractmethod
    def score(
        self,
        obs: Mapping[str, torch.Tensor],
        predicted: Mapping[str, torch.Tensor],
        seeds: list[int],
    ) -> torch.Tensor:
        """How good each is [N], the greater the better.

        obs: what is observed now [N, T, …], as the planning policy is given it. predicted: of each
        predicted key [N, S, …], in device units. seeds: what is drawn for a row depends on its own.
        """


class GoalScorer(Scorer):
    """Minus the distance to what shall be seen: −√Σ_k w_k ‖predicted_k − target_k‖², of the last
    predicted observation; of pictures in units of the full range."""

    Config = GoalScorerConfig

    def __init__(self, config: GoalScorerConfig, policy: Policy, world: WorldModel) -> None:
        """ConfigError for keys that are not predicted, or targets that do not fit them."""
        super().__init__()
        self.config = config
        specs = {**policy.spec.observation, **world.spec.observation}
        reads: dict[str, ArraySpec] = {}
        for key, target in config.targets.items():
            if key not in world.predicted_keys:
                raise unknown("predicted key in targets", key, world.predicted_keys)
            array = specs[key]
            if not isinstance(target, str):
                if len(target) != array.size or not all(map(math.isfinite, target)):
                    raise ConfigError(
                        f"targets: '{key}' has {array.size} elements, its target is {target}; give "
                        "a finite number for each"
                    )
                continue
            wanted = array if target == GOAL + key else specs.get(target)
            if wanted is None:
                raise unknown("observation key in targets", target, [*specs, GOAL + key])
            if wanted.shape != array.shape:
                raise ConfigError(
                    f"targets: '{key}' has shape {array.shape} and '{target}' {wanted.shape}; they "
                    "must agree"
                )
            reads[target] = wanted
        self.reads = reads

    def score(
        self,
        obs: Mapping[str, torch.Tensor],
        predicted: Mapping[str, torch.Tensor],
        seeds: list[int],
    ) -> torch.Tensor:
        """See Scorer. SpecError for pictures that are seen smaller than their target."""
        total_N = torch.zeros(len(seeds))
        for key, target in self.config.targets.items():
            found = predicted[key][:, -1]
            x_NK = found.float().flatten(1).cpu()
            if isinstance(target, str):
                wanted_NK = obs[target][:, -1].float().flatten(1).cpu()
            else:
                wanted_NK = torch.tensor(target).expand(len(x_NK), -1)
            if wanted_NK.shape != x_NK.shape:
                raise SpecError(
                    f"{key} is predicted as {tuple(found.shape[1:])}, which its target is not: "
                    "train with policy.images.crop=1"
                )
            scale = 255.0 if found.dtype == torch.uint8 else 1.0
            weight = self.config.weights.get(key, 1.0)
            total_N += weight * ((x_NK - wanted_NK) / scale).square().sum(dim=1)
        return -total_N.sqrt()


class CriticScorer(Scorer):
    """The critics' mean of what the policy would go on with where the prediction leads:
    V(o′) = mean over draws a′ of Q(o′, a′)."""

    Config = CriticScorerConfig

    def __init__(self, config: CriticScorerConfig, policy: Policy, world: WorldModel) -> None:
        """ConfigError if predictions do not make up what policy and critic read."""
        super().__init__()
        self.config = config
        self.critic = EnsembleCritic(spec_from_data(config.spec, "critic"), config.options)
        self.critic.requires_grad_(False)
        self.reads = {}
        self._policy, self._succession = (policy,), succession(world)
        self._world_spec: PolicySpec = world.spec
        check_actions(("policy", "critic"), (policy.spec, self.critic.spec))
        if self.critic.config.horizon > policy.spec.horizon:
            raise ConfigError(
                f"critic.horizon is {self.critic.config.horizon}, and the policy's chunks have "
                f"{policy.spec.horizon} steps; the critic must judge no more"
            )
        for what, spec in (("policy", policy.spec), ("critic", self.critic.spec)):
            for key, array in spec.observation.items():
                if world.spec.observation.get(key) != array:
                    raise ConfigError(
                        f"the {what} reads '{key}' as {array}; the world model, which is to say "
                        f"what it will read, has {world.spec.observation.get(key, 'no such key')}"
                    )
            if spec.n_obs_steps > world.spec.n_obs_steps:
                raise ConfigError(
                    f"the {what} reads {spec.n_obs_steps} observations and the world model "
                    f"{world.spec.n_obs_steps}; a critic can score only where that is no more"
                )

    def score(
        self,
        obs: Mapping[str, torch.Tensor],
        predicted: Mapping[str, torch.Tensor],
        seeds: list[int],
    ) -> torch.Tensor:
        """See Scorer."""
        spec, (policy,) = self._world_spec, self._policy
        seen = {key: obs[key][:, -spec.n_obs_steps :] for key in spec.observation}
        later = self._succession.history(seen, predicted)
        numpy = {key: x.cpu().numpy() for key, x in later.items()}
        own: Mapping[str, Any] = own_part("policy", policy.spec, spec, numpy)
        chunks: list[np.ndarray] = []
        for draw in range(self.config.draws):
            seed = np.array([derive_seed(s, "later", draw) for s in seeds], np.uint64)
            chunks.append(policy.act(policy.init(len(seeds)), own, seed=seed)[1])
        actions_NnHD = torch.from_numpy(np.stack(chunks, axis=1)).to(self.critic.device)
        judged = own_part("critic", self.critic.spec, spec, later)
        return self.critic.q(judged, actions_NnHD).mean(dim=1).cpu()
