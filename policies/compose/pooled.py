"""Composition at sample level. Shapes: B batch, N proposals, H chunk, D action."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
import torch
from torch import nn

from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.seeds import derive_seed
from embodied.core.specs import PolicySpec
from policies import noise
from policies.arrays import put_prefix
from policies.compose.critics import make_critic, values
from policies.compose.members import (
    Member,
    check_actions,
    construct_all,
    later,
    own_part,
)
from policies.guidance import check_delay
from policies.specs import union_spec


class PooledConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of a pooled policy.

    proposals: drawn from each member for a decision. critic: what ranks them, name and options.
    temperature: None takes the best, a number draws from softmax(q / temperature).
    """

    members: Annotated[tuple[Member, ...], msgspec.Meta(min_length=1, max_length=32)]
    proposals: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 8
    critic: dict[str, Any] = msgspec.field(default_factory=lambda: {"name": "medoid"})
    temperature: Annotated[float, msgspec.Meta(gt=0)] | None = None


class PooledPolicy(nn.Module):
    """Proposals of all members, ranked by a critic. Members need no more than `sample` and `loss`.

    Chunks are cut to the shortest member's.
    """

    name: ClassVar[str] = "pooled"
    Config = PooledConfig

    def __init__(
        self, spec: PolicySpec, config: PooledConfig, policies: Sequence[nn.Module] = ()
    ) -> None:
        """policies: the members, if they are at hand; else they get weights from a checkpoint."""
        super().__init__()
        self.config = config
        self.labels = tuple(member.label for member in config.members)
        self.members = nn.ModuleList(policies or construct_all(config.members))
        if spec != pooled_spec(self.labels, [member.spec for member in self._policies()]):
            raise CorruptDataError("the pool's spec is not the one that its members make")
        self.spec = spec
        self.critic = make_critic(config.critic, "critic")

    def parts(self) -> dict[str, Any]:
        """The members, by label."""
        return dict(zip(self.labels, self._policies(), strict=True))

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
        """Chunks [B, H, D] float32, as of Policy. Proposals are ranked with the prefix in place."""
        key = next(iter(self.spec.observation))
        self._own(0, obs)
        seeds = noise.check_seeds(seed, len(obs[key]))
        chosen: list[np.ndarray] = []
        for row, row_seed in enumerate(seeds):
            obs_1 = {key: value[row : row + 1] for key, value in obs.items()}
            before = None if prefix is None else prefix[row : row + 1]
            chosen.append(self._choose(obs_1, 1, row_seed, before)[0].cpu().numpy())
        return None, np.concatenate(chosen)

    @torch.no_grad()
    def sample(self, obs: Mapping[str, Any], n: int, *, seed: int) -> torch.Tensor:
        """Choose n chunks for each row, each from proposals of its own: [B, n, H, D]."""
        return self._choose(obs, n, seed, None)

    def loss(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        """Sum of the members' losses, each on its share of keys and history."""
        total: Any = 0.0
        metrics: dict[str, float] = {}
        for index, (label, member) in enumerate(zip(self.labels, self._policies(), strict=True)):
            if member.spec.horizon != self.spec.horizon:
                raise ConfigError(
                    f"policy '{label}' learns chunks of {member.spec.horizon} steps; the pool's "
                    f"batches have {self.spec.horizon}"
                )
            own = self._own(index, batch)
            own |= {key: batch[key] for key in ("action", "action_is_pad")}
            own |= later(batch)
            loss, found = member.loss(own)
            total = total + loss
            metrics |= {f"{label}/{name}": value for name, value in found.items()}
        return total, {**metrics, "loss": total.item()}

    def seed_training(self, seed: int) -> None:
        """Start each member's stream of training noise."""
        for i, member in enumerate(self._policies()):
            member.seed_training(derive_seed(seed, "member", i))

    def _choose(
        self, obs: Mapping[str, Any], n: int, seed: int, prefix: np.ndarray | None
    ) -> torch.Tensor:
        """Chunks [B, n, H, D]."""
        count, horizon = self.config.proposals, self.spec.horizon
        pools: list[torch.Tensor] = []
        for index, member in enumerate(self._policies()):
            own_seed = derive_seed(seed, "proposals", index)
            drawn = member.sample(self._own(index, obs), n * count, seed=own_seed)
            pools.append(drawn[:, :, :horizon].unflatten(1, (n, count)))
        pool_BnNHD = torch.cat(pools, dim=2)
        if prefix is not None:
            rows = pool_BnNHD.flatten(0, 2).cpu().numpy()
            put_prefix(rows, np.repeat(prefix, len(rows), axis=0))
            check_delay(horizon, self.spec.n_action_steps, prefix.shape[1])
            pool_BnNHD = torch.from_numpy(rows).view_as(pool_BnNHD).to(pool_BnNHD)
        q_BnN = torch.stack([values(self.critic, obs, pool_BnNHD[:, k]) for k in range(n)], dim=1)
        if self.config.temperature is None:
            best_Bn = q_BnN.argmax(-1)
        else:
            share_BnN = torch.softmax(q_BnN.double() / self.config.temperature, dim=-1).cpu()
            rng = torch.Generator("cpu").manual_seed(derive_seed(seed, "choice"))
            best_Bn = torch.multinomial(share_BnN.flatten(0, 1), 1, generator=rng)
            best_Bn = best_Bn.view(q_BnN.shape[:2]).to(q_BnN.device)
        return pool_BnNHD.take_along_dim(best_Bn[:, :, None, None, None], dim=2)[:, :, 0]

    def _own(self, index: int, source: Mapping[str, Any]) -> Any:
        spec = self._policies()[index].spec
        return own_part(self.labels[index], spec, self.spec, source)

    def _policies(self) -> list[Any]:
        return list(self.members)


def pooled_spec(labels: Sequence[str], specs: Sequence[PolicySpec]) -> PolicySpec:
    """Shortest chunk of the members; ConfigError unless all act on the same robot."""
    check_actions(labels, specs)
    horizon = min(spec.horizon for spec in specs)
    return union_spec(labels, specs, horizon=horizon)
