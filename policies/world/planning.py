"""A policy that acts on what a world model says of its proposals.

Shapes: B batch, n proposals, H chunk, h of it that the world model reads, D action, S predicted
observations, N = B·n.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
import torch
from torch import nn

from embodied.core.config import component
from embodied.core.errors import ConfigError, CorruptDataError, EmbodiedError
from embodied.core.protocols import Policy, WorldModel
from embodied.core.seeds import derive_seed
from embodied.core.specs import PolicySpec
from policies import noise
from policies.arrays import put_prefix, with_prefix
from policies.checkpoint import construct, policy_state
from policies.compose.members import check_actions, own_part
from policies.critics.ensemble import EnsembleCritic
from policies.folder import spec_data
from policies.guidance import check_delay
from policies.specs import union_spec
from policies.world.scorers import Scorer


class PlannedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of a planning policy.

    policy, world: configurations as in checkpoints of their own; world null: the policy is the
    world model. scorer: a registered scorer and its options. proposals: drawn for a decision.
    """

    policy: dict[str, Any]
    world: dict[str, Any] | None
    scorer: dict[str, Any]
    proposals: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 16


class Planner:
    """Draws chunks from any policy, has a world model say what each leads to, and ranks them.

    All proposals of a row are imagined with the same noise: what tells them apart is the actions.
    spec: what is read in all; the chunks are the policy's.
    """

    def __init__(
        self, policy: Policy, world: WorldModel, scorer: Mapping[str, Any], proposals: int
    ) -> None:
        """scorer: a registered name and its options. ConfigError for parts that do not fit."""
        if not isinstance(world, WorldModel):
            raise ConfigError(
                f"{type(world).__name__} is no world model; one that predicts next observations, "
                "such as policy=uwm, is right"
            )
        labels, specs = ("policy", "world model"), (policy.spec, world.spec)
        check_actions(labels, specs)
        if world.spec.horizon > policy.spec.horizon:
            raise ConfigError(
                f"the world model reads chunks of {world.spec.horizon} steps, and the policy's "
                f"have {policy.spec.horizon}; it must read no more"
            )
        cls, options = component("scorers", scorer, "scorer")
        self.policy, self.world, self.proposals = policy, world, proposals
        self.scorer: Scorer = cls(options, policy, world)
        union = union_spec(labels, specs, horizon=policy.spec.horizon)
        self.spec = msgspec.structs.replace(
            union,
            observation={**union.observation, **self.scorer.reads},
            n_action_steps=policy.spec.n_action_steps,
        )

    def draw(self, obs: Mapping[str, Any], n: int, *, seed: int) -> torch.Tensor:
        """n proposals of the policy for each row [B, n, H, D]."""
        own = own_part("policy", self.policy.spec, self.spec, obs)
        return self.policy.sample(own, n, seed=derive_seed(seed, "proposals"))

    def scores(
        self, obs: Mapping[str, Any], pool_BnHD: torch.Tensor, seeds: list[int]
    ) -> torch.Tensor:
        """How good each proposal's predicted outcome is [B, n]; EmbodiedError if not finite.

        obs [B, T, …] and proposals in device units; a row depends on its own seed alone.
        """
        batch, n = pool_BnHD.shape[:2]
        wide = {key: torch.as_tensor(x).repeat_interleave(n, dim=0) for key, x in obs.items()}
        chunks_NhD = pool_BnHD.flatten(0, 1)[:, : self.world.spec.horizon]
        imagined = np.array([derive_seed(s, "imagined") for s in seeds], np.uint64)
        found = self.world.infer(
            own_part("world model", self.world.spec, self.spec, wide),
            actions=chunks_NhD,
            want={"next_obs"},
            seed=np.repeat(imagined, n),
        )
        each = [seed for seed in seeds for _ in range(n)]
        score_N = self.scorer.score(wide, found["next_obs"], each)
        if not torch.isfinite(score_N).all():
            raise EmbodiedError(
                "scores of predicted outcomes are not finite; the world model's weights, or the "
                "critic's, have diverged: go back to an earlier version"
            )
        return score_N.view(batch, n)

    def best(
        self, obs: Mapping[str, Any], pool_BnHD: torch.Tensor, seeds: list[int]
    ) -> torch.Tensor:
        """The proposal of each row whose outcome is best [B, H, D]."""
        chosen_B = self.scores(obs, pool_BnHD, seeds).argmax(dim=1).to(pool_BnHD.device)
        return pool_BnHD.take_along_dim(chosen_B[:, None, None, None], dim=1)[:, 0]


class PlannedPolicy(noise.LearnsAsItsPolicy, nn.Module):
    """Acts on the best of a policy's proposals by what a world model predicts of them.

    The policy needs no more than `sample` and `loss`. Learning is the policy's alone.
    """

    name: ClassVar[str] = "planned"
    Config = PlannedConfig

    def __init__(
        self,
        spec: PolicySpec,
        config: PlannedConfig,
        policy: Any = None,
        world: Any = None,
    ) -> None:
        """policy, world: if they are at hand; else they get weights from a checkpoint."""
        super().__init__()
        self.config = config
        self.policy: Any = construct(config.policy) if policy is None else policy
        self.world: Any = None
        if config.world is not None:
            self.world = construct(config.world) if world is None else world
            self.world.requires_grad_(False)
        model = self.policy if self.world is None else self.world
        self.planner = Planner(self.policy, model, config.scorer, config.proposals)
        self.scorer = self.planner.scorer
        self.spec = self.planner.spec
        if spec != self.spec:
            raise CorruptDataError("the planning policy's spec is not the one of its parts")

    def parts(self) -> dict[str, Any]:
        """The policy that proposes, and the world model if it is another."""
        alone = {"policy": self.policy}
        return alone if self.world is None else alone | {"world": self.world}

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
        """Chunks [B, H, D] float32, as of Policy; proposals are imagined with the prefix in
        place. A row depends on its own seed alone."""
        count = len(next(iter(obs.values())))
        seeds, drawn = noise.check_seeds(seed, count), []
        for row, row_seed in enumerate(seeds):
            one = {key: value[row : row + 1] for key, value in obs.items()}
            drawn.append(self.planner.draw(one, self.config.proposals, seed=row_seed))
        pool_BnHD = torch.cat(drawn)
        if prefix is not None:
            pool_BnHD = with_prefix(pool_BnHD, prefix)
            check_delay(self.spec.horizon, self.spec.n_action_steps, prefix.shape[1])
        actions_BHD = self.planner.best(obs, pool_BnHD, seeds).cpu().numpy()
        if prefix is not None:
            put_prefix(actions_BHD, prefix)
        return None, actions_BHD

    @torch.no_grad()
    def sample(self, obs: Mapping[str, Any], n: int, *, seed: int) -> torch.Tensor:
        """n decisions for each row, each from proposals of its own: [B, n, H, D] float32."""
        count = self.config.proposals
        drawn = self.planner.draw(obs, n * count, seed=seed)
        pools = drawn.unflatten(1, (n, count)).flatten(0, 1)
        wide = {key: torch.as_tensor(x).repeat_interleave(n, dim=0) for key, x in obs.items()}
        seeds = [derive_seed(seed, "row", row) for row in range(len(pools))]
        return self.planner.best(wide, pools, seeds).unflatten(0, (-1, n))


def planned(
    policy: Any,
    scorer: Mapping[str, Any],
    *,
    world: Any = None,
    proposals: int = 16,
    critic: EnsembleCritic | None = None,
) -> PlannedPolicy:
    """A trained policy that plans; what it is given becomes its parts, not copies.

    world: the world model, None if the policy is one. scorer: a registered name and its options;
    critic: the one of scorer "critic", whose options it brings. ConfigError for what does not fit.
    """
    options = dict(scorer)
    if critic is not None:
        known = msgspec.to_builtins(critic.config)
        options |= {"spec": spec_data(critic.spec), "options": known}
    config = PlannedConfig(
        policy=policy_state(policy)[0],
        world=None if world is None else policy_state(world)[0],
        scorer=options,
        proposals=proposals,
    )
    with torch.random.fork_rng(devices=[]):  # a critic draws weights, which its own then replace
        spec = Planner(policy, policy if world is None else world, options, proposals).spec
        made = PlannedPolicy(spec, config, policy, world)
    if critic is not None:
        made.scorer.load_state_dict({f"critic.{k}": v for k, v in critic.state_dict().items()})
    return made
