"""Composition at score level. Shapes: B batch, To history, H chunk, D action, n members."""

import copy
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import nn

from embodied.core.config import component
from embodied.core.errors import ConfigError, CorruptDataError, SpecError
from embodied.core.protocols import Prediction
from embodied.core.registry import unknown
from embodied.core.seeds import derive_seed
from embodied.core.specs import PolicySpec
from policies.acting import RtcConfig
from policies.base import GenerativePolicy
from policies.compose.critics import CriticWeights, Guidance, guided, make_critic
from policies.compose.elsewhere import Elsewhere, together
from policies.compose.members import (
    Member,
    check_actions,
    construct_all,
    convert,
    later,
    own_part,
)
from policies.compose.operators import Level, Mix, Operator
from policies.compose.superposition import Superposition, ancestral
from policies.conversions import Scalar, epsilon_of
from policies.guidance import Goal
from policies.noise import Generators
from policies.normalizer import LinearNormalizer
from policies.reading import Array
from policies.solvers.base import Denoise, Solver
from policies.solvers.diffusion import MIN_LOG_ALPHA_OVER_SIGMA
from policies.solvers.flow import Euler, FlowSolverConfig
from policies.specs import union_spec

FIRST_U = 1 / (1 + math.exp(-MIN_LOG_ALPHA_OVER_SIGMA))
"""Where a flow's solver begins if a member's ε̂ says nothing of the data at pure noise."""


class ComposedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of a composed policy.

    members: made by `build.compose`. operator: a registered operator's name and its options.
    solver: one for the mix, name and options; None is that of the first member that has a weight.
    guidance: a critic's push, if wanted.
    """

    members: Annotated[tuple[Member, ...], msgspec.Meta(min_length=1, max_length=32)]
    operator: dict[str, Any]
    solver: dict[str, Any] | None = None
    guidance: Guidance | None = None


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the members' encoders made of one observation batch; None for members not in use."""

    members: tuple[Any, ...]
    obs: Mapping[str, Any]

    def __len__(self) -> int:
        return next(len(c) for c in self.members if c is not None)

    def __getitem__(self, rows: torch.Tensor) -> "Conditions":
        return Conditions(
            tuple(None if c is None else c[rows] for c in self.members),
            {key: torch.as_tensor(value)[rows.cpu()] for key, value in self.obs.items()},
        )

    def repeat_interleave(self, n: int, dim: int = 0) -> "Conditions":
        """Every row n times."""
        return Conditions(
            tuple(None if c is None else c.repeat_interleave(n, dim=dim) for c in self.members),
            {k: torch.as_tensor(v).repeat_interleave(n, dim=dim) for k, v in self.obs.items()},
        )


class ComposedPolicy(GenerativePolicy[Any]):
    """Any number of denoisers as one policy; itself a denoiser, so that compositions nest.

    Its normalised actions are those of the first member in use. A member with weight 0 is neither
    encoded nor evaluated; the only one of a mix acts bit for bit as by itself.
    """

    name: ClassVar[str] = "composed"
    Config = ComposedConfig

    elsewhere: Mapping[int, Elsewhere] = {}
    """Members that compute in processes of their own, at the same time as the others."""

    def __init__(
        self, spec: PolicySpec, config: ComposedConfig, policies: Sequence[nn.Module] = ()
    ) -> None:
        """policies: the members, if they are at hand; else they get weights from a checkpoint."""
        nn.Module.__init__(self)
        self.config = config
        self.labels = tuple(member.label for member in config.members)
        self.members = nn.ModuleList(policies or construct_all(config.members))
        for label, policy in zip(self.labels, self.members, strict=True):
            check_denoiser(label, policy)
        kind, options = component("operators", config.operator, "operator")
        self.operator: Operator = kind(options, self.labels, spec.action.size)
        self.active: tuple[int, ...] = self.operator.active()
        if not self.active:
            raise ConfigError(f"operator {config.operator['name']} gives no member a weight")
        if spec != composed_spec(self.labels, [m.spec for m in self._policies()], self.active):
            raise CorruptDataError("the composition's spec is not the one that its members make")
        self._bound(spec)
        self.lengths = tuple(m.spec.horizon for m in self._policies())
        self.solver = self.make_solver()
        if isinstance(self.operator, Superposition):
            ancestral(self.solver)
            self.rtc = RtcConfig(mode="copy")  # nothing else may bend the path
            if config.guidance is not None:
                raise ConfigError("guidance does not go with operators 'or' and 'and'")
        if isinstance(self.operator, CriticWeights):
            self.operator.unnormalize = self._unnormalize
        self._critic = config.guidance and make_critic(config.guidance.critic, "guidance.critic")

    @property
    def _action(self) -> LinearNormalizer:
        return self._member(self.active[0]).action_normalizer

    def parts(self) -> dict[str, GenerativePolicy[Any]]:
        """The members in use, by label."""
        return {self.labels[i]: self._member(i) for i in self.active}

    def encode(self, obs: Mapping[str, Array]) -> Any:
        """Conditions of all members in use, from the union of their keys [B, To, …].

        SpecError, which says the member, for a missing key; otherwise as a member's own.
        """
        for key in obs:
            if key not in self.spec.observation:
                raise SpecError(str(unknown("observation key", key, self.spec.observation)))
        own = {
            i: own_part(self.labels[i], self._member(i).spec, self.spec, obs) for i in self.active
        }
        found = together(
            self.active,
            self.elsewhere,
            lambda other, i: other.encode(own[i]),
            lambda i: self._member(i).encode(own[i]),
        )
        return Conditions(tuple(found.get(i) for i in range(len(self.labels))), obs)

    def drawn(self, cond: Any, source: list[int] | torch.Generator) -> Any:
        """See GenerativePolicy: every member's own."""
        found = [
            c if c is None else self._member(i).drawn(c, source) for i, c in enumerate(cond.members)
        ]
        return Conditions(tuple(found), cond.obs)

    def denoise(self, x_t: torch.Tensor, log_snr: Scalar, cond: Any) -> Prediction:
        """The operator's prediction; with "or" and "and", as where no path led to x_t."""
        level = self.level(x_t, log_snr, cond)
        if self.config.guidance is None or self._critic is None:
            return self.operator.combine(level)

        def combine(x_BHD: torch.Tensor) -> Prediction:
            return self.operator.combine(self.level(x_BHD, log_snr, cond))

        return guided(self.config.guidance, self._critic, self._unnormalize, combine, level)

    def prepare(self, cond_BC: Any, log_snrs: Sequence[float]) -> Any:
        """See GenerativePolicy: every member's share, at its own levels."""
        found: list[Any] = list(cond_BC.members)
        for i in sorted(self.active, key=lambda i: i not in self.elsewhere):  # they prepare first
            shift = 2 * math.log(self.config.members[i].ratio)
            member = self.elsewhere.get(i) or self._member(i)
            found[i] = member.prepare(found[i], [level - shift for level in log_snrs])
        return Conditions(tuple(found), cond_BC.obs)

    def stepping(self, cond_BC: Any, solver: Solver) -> Denoise:
        """See GenerativePolicy."""
        if self._alone and self.active[0] not in self.elsewhere:
            (only,) = self.active
            return self._member(only).stepping(cond_BC.members[only], solver)
        return super().stepping(cond_BC, solver)

    def integrate(
        self,
        x_BHD: torch.Tensor,
        cond_BC: Any,
        generators: Generators,
        *,
        start: int = 0,
        goal: Goal | None = None,
    ) -> torch.Tensor:
        """See GenerativePolicy; "or" and "and" follow a whole path that nothing else bends."""
        if not isinstance(self.operator, Superposition):
            return super().integrate(x_BHD, cond_BC, generators, start=start, goal=goal)
        if start or goal is not None:
            raise ConfigError(
                f"operator={self.config.operator['name']} needs its path from pure noise: set "
                "rtc.mode=copy and no warm_start"
            )
        return self.operator.integrate(
            self.solver, lambda x, log_snr: self.level(x, log_snr, cond_BC), x_BHD, generators
        )

    def objective(
        self, action_BHD: torch.Tensor, cond_BC: torch.Tensor, rng: torch.Generator
    ) -> torch.Tensor:
        """A composition is trained by its members' own objectives: see `loss`."""
        raise ConfigError("a composed policy has no objective of its own; use loss")

    def loss(self, batch: Mapping[str, Array]) -> tuple[torch.Tensor, dict[str, float]]:
        """Sum of the losses of the members in use, each on its share of keys, history and chunk."""
        total: Any = 0.0
        metrics: dict[str, float] = {}
        for i in self.active:
            member, label = self._member(i), self.labels[i]
            own = own_part(label, member.spec, self.spec, batch)
            for key in ("action", "action_is_pad"):
                own[key] = batch[key][:, : member.spec.horizon]
            own |= later(batch)
            loss, found = member.loss(own)
            total = total + loss
            metrics |= {f"{label}/{name}": value for name, value in found.items()}
        return total, {**metrics, "loss": total.item()}

    def set_statistics(self, stats: Any) -> None:
        """The members bring their normalisers with them."""
        raise ConfigError("a composed policy's members have their normalisers already")

    def seed_training(self, seed: int) -> None:
        """Start each member's stream of training noise."""
        for i, member in enumerate(self._policies()):
            member.seed_training(derive_seed(seed, "member", i))

    def training_rng_state(self) -> torch.Tensor:
        """The members' states, one after the other."""
        return torch.cat([member.training_rng_state() for member in self._policies()])

    def set_training_rng_state(self, state: torch.Tensor) -> None:
        """Continue from `training_rng_state`."""
        sizes = [len(member.training_rng_state()) for member in self._policies()]
        if len(state) != sum(sizes):
            raise CorruptDataError(f"training noise has {len(state)} bytes, not {sum(sizes)}")
        for member, piece in zip(self._policies(), state.split(sizes), strict=True):
            member.set_training_rng_state(piece.clone())  # torch crashes on a view

    def level(self, x_BHD: torch.Tensor, log_snr: Scalar, cond: Conditions) -> Level:
        """What the operator is given at x_BHD."""

        def predict(indices: Sequence[int]) -> dict[int, Prediction]:
            return self._predict(indices, x_BHD, log_snr, cond)

        return Level(x_BHD, log_snr, self._fraction, self.lengths, cond.obs, predict)

    def _fraction(self, log_snr: float) -> float:
        levels = self.solver.log_snrs
        return max(0, bisect_right(levels, log_snr) - 1) / len(levels)

    def _predict(
        self, indices: Sequence[int], x_BHD: torch.Tensor, log_snr: Scalar, cond: Conditions
    ) -> dict[int, Prediction]:
        own: dict[int, tuple[torch.Tensor, Scalar, Any]] = {}
        for i in indices:
            assert cond.members[i] is not None, self.labels[i]
            member, x_i = self.config.members[i], x_BHD[:, : self.lengths[i]]
            point = convert(member, x_i, log_snr) if member.converted else (x_i, log_snr)
            own[i] = (*point, cond.members[i])
        found = together(
            indices,
            self.elsewhere,
            lambda other, i: other.denoise(*own[i]),
            lambda i: self._member(i).denoise(*own[i]),
        )
        for i, p in found.items():
            if self.config.members[i].converted:
                found[i] = Prediction(epsilon_of(p, *own[i][:2]), "epsilon")
        return found

    def make_solver(self, num_steps: int | None = None) -> Solver:
        """See GenerativePolicy."""
        if self.config.solver is not None:
            kind, options = component("solvers", self.config.solver, "solver")
            if num_steps is not None:
                options = msgspec.structs.replace(options, num_steps=num_steps)
            return self._reaching(kind(options))
        first = self._member(self.active[0])
        solver = first.solver if self._alone else first.score_solver
        if num_steps is not None:
            solver = first.make_solver(num_steps)
        if not isinstance(solver, Euler) or solver.grid[0] > 0:
            return self._reaching(solver)
        same = all(isinstance(self._member(i).solver, Euler) for i in self.active)
        if same and self.operator.affine and not self._converted() and not self.config.guidance:
            return solver
        n, clip = len(solver.grid), all(_bounded(self._member(i)) for i in self.active)
        from_u = FlowSolverConfig(num_steps=n, first_u=FIRST_U, clip_sample=clip)
        return self._reaching(type(solver)(from_u))

    def _reaching(self, solver: Solver) -> Solver:
        """The solver; if it clips, at the farthest that a member can reach, x₀ = (±1 − δ) / r."""
        if solver.clip and self._converted():
            used = [self.config.members[i] for i in self.active]
            solver = copy.copy(solver)
            solver.clip = max((1 + max(map(abs, m.shift or (0.0,)))) / m.ratio for m in used)
        return solver

    @property
    def _alone(self) -> bool:
        """Whether it is one member and nothing else."""
        mixed = isinstance(self.operator, Mix) and self.config.guidance is None
        return mixed and len(self.active) == 1 and not self._converted()

    def _converted(self) -> bool:
        return any(self.config.members[i].converted for i in self.active)

    def _unnormalize(self, x_BHD: torch.Tensor) -> torch.Tensor:
        return self._action.unnormalize(x_BHD)

    def _member(self, index: int) -> GenerativePolicy[Any]:
        member = self.members[index]
        assert isinstance(member, GenerativePolicy)
        return member

    def _policies(self) -> list[GenerativePolicy[Any]]:
        return [self._member(i) for i in range(len(self.members))]


def composed_spec(
    labels: Sequence[str], specs: Sequence[PolicySpec], active: Sequence[int]
) -> PolicySpec:
    """Longest chunk of the members in use; ConfigError unless all act on the same robot."""
    check_actions(labels, specs)
    used = [specs[i] for i in active]
    return union_spec([labels[i] for i in active], used, horizon=max(spec.horizon for spec in used))


def check_denoiser(label: str, policy: Any) -> None:
    """ConfigError for a policy that has no score."""
    if not isinstance(policy, GenerativePolicy):
        raise ConfigError(
            f"policy '{label}' ({type(policy).__name__}) is no denoiser, so that its scores cannot "
            "be composed; operator=pooled composes anything that samples"
        )
    if isinstance(policy, ComposedPolicy) and isinstance(policy.operator, Superposition):
        raise ConfigError(
            f"policy '{label}' is superposed by '{policy.config.operator['name']}', which has no "
            "score of its own; compose its members, or use operator=pooled"
        )


def _bounded(policy: GenerativePolicy[Any]) -> bool:
    """Whether its normalised actions lie within ±1."""
    if isinstance(policy, ComposedPolicy):
        return all(_bounded(part) for part in policy.parts().values())
    return policy.config.action_normalization != "gaussian"
