"""Options of the learner and of algorithms; apart, so that reading them does not load torch."""

import math
from typing import Annotated, Any, Literal

import msgspec

from embodied.core.errors import ConfigError
from embodied.weights.governor import GovernorConfig


class LearnerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Supervised training.

    steps: gradient steps of the whole run. minutes: training time of the whole run; null for no
    limit; whichever comes first ends the run (lockstep takes steps only). The learning rate
    follows a cosine over that budget. publish_every: at least so many steps between two
    publications; governor: how much of the learner's time and of links they may take beyond that
    (lockstep goes by steps alone). weights_kept: how many of the newest publications stay, beside
    those that are pinned. checkpoint_every: steps.
    samples_per_insert: upper bound on sampled windows per recorded step; null for none.
    device: where it computes. On "cuda" the run leases one GPU of this host for itself: gpu says
    which, as a selector, gpu_wait_s how long to wait for it.
    """

    batch_size: int
    steps: int
    minutes: float | None
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    max_grad_norm: float
    precision: Literal["float32", "bfloat16"]
    ema_decay: float
    threads: int
    publish_every: int
    checkpoint_every: int
    steps_per_round: int
    samples_per_insert: float | None
    weights_kept: Annotated[int, msgspec.Meta(ge=1)] = 20
    device: Literal["cpu", "cuda"] = "cpu"
    gpu: str = "gpu"
    gpu_wait_s: float = 60.0
    governor: GovernorConfig = msgspec.field(default_factory=GovernorConfig)


Rate = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class BCConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """only_successful: learn from successful episodes alone."""

    only_successful: bool = True


class FilteredBCConfig(BCConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """online: whether the policy acts once the demonstrations are there, and learns from that too;
    else from what was recorded before alone."""

    online: bool = True


class DAggerConfig(BCConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """roll_in: greatest takeover tick as a multiple of the longest demonstration."""

    roll_in: float = 1.5


class HGDAggerConfig(BCConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """patience: how long the supervisor watches, as a multiple of the longest demonstration."""

    patience: Annotated[float, msgspec.Meta(gt=0)] = 1.5


class ReconstructionConfig(BCConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """held_out: nothing is learned from the second episode of each stream, and from every
    so-manieth after it; 0 holds out none."""

    only_successful: bool = False
    held_out: Annotated[int, msgspec.Meta(ge=2)] | Literal[0] = 10


class ActorCriticConfig(BCConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of algorithms that learn a critic beside the policy.

    only_successful: learn from successful demonstrations alone, in all phases; of what a policy
    did, clone what led to success, and learn the critic from everything. cloning_steps,
    offline_steps: gradient steps of the first two phases; then the policy acts. demonstrations:
    share of them in every batch from what the run records. critic: options of CriticConfig but
    for its horizon, which is how many actions are executed.
    critic_observations: what the critic reads of the robots, as TrainConfig.observations; None for
    what the policy does. With the simulator's own state a policy of pictures is judged by what no
    camera shows (Pinto et al. 2017, arXiv:1710.06542); inference.critic=false then acts on robots
    that do not have it.
    rewards, discount: see WindowSpec; the discount is per step.
    critic_learning_rate; target_rate: τ by which the target critic follows; backup_members: of how
    many random members of it the least value is taken. critic_steps: critic steps to one of the
    policy.
    """

    cloning_steps: Count = 2000
    offline_steps: Count = 3000
    demonstrations: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5
    critic: dict[str, Any] = msgspec.field(default_factory=lambda: {})
    critic_observations: tuple[str, ...] | None = None
    rewards: Literal["recorded", "sparse", "cost"] = "cost"
    discount: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.99
    critic_learning_rate: Rate = 3e-4
    target_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.02
    backup_members: Annotated[int, msgspec.Meta(ge=1)] = 2
    critic_steps: Annotated[int, msgspec.Meta(ge=1)] = 1

    def value_range(self) -> tuple[float, float]:
        """Between what the values lie; of recorded rewards nothing is known."""
        if self.rewards == "recorded":
            return (-math.inf, math.inf)
        return (0.0, 1.0) if self.rewards == "sparse" else (-1 / (1 - self.discount), 0.0)

    def check_value_range(self, low: float, high: float) -> None:
        """Raise ConfigError if a value head from low to high cannot hold the values."""
        least, most = self.value_range()
        if math.isfinite(least) and not (low <= least and most <= high):
            raise ConfigError(
                f"algorithm.critic.head goes from {low:g} to {high:g}; with rewards={self.rewards} "
                f"and discount={self.discount:g} values lie between {least:g} and {most:g}: widen "
                "it, and a little beyond"
            )


class PARLConfig(ActorCriticConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of policy-agnostic reinforcement learning.

    improvement: options of ImprovementConfig. proposals_age: for how many gradient steps what the
    policy proposed for an observation is used again in backups and distillation; 0 draws each time.
    proposers: processes beside the learner that draw again what is older; 0: the learner does.
    distil_learning_rate; distil_temperature: see ImprovementConfig. distil_data: whether the
    recorded action is among the candidates. distil_successes: distil only situations out of
    episodes that succeeded. conservatism:
    weight α of the regulariser of Cal-QL in the critic's loss, 0 for none: by how much other
    actions are held below the recorded ones; conservatism_actions: how many random ones, and how
    many copies of each of the policy's two.
    """

    proposals_age: Count = 1000
    proposers: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    improvement: dict[str, Any] = msgspec.field(default_factory=lambda: {})
    distil_learning_rate: Rate = 3e-4
    distil_temperature: Rate | None = 0.5
    distil_data: bool = True
    distil_successes: bool = False
    conservatism: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    conservatism_actions: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 10

    def __post_init__(self) -> None:
        """Raise ConfigError for processes that would have nothing to do, and for candidates none of
        which the policy proposed."""
        if self.proposers and not self.proposals_age:
            raise ConfigError(
                f"algorithm.proposers={self.proposers} draw anew what is older than "
                "algorithm.proposals_age, and 0 keeps nothing: raise it, or set proposers=0"
            )
        if self.distil_data and self.improvement.get("kept") == 1:
            raise ConfigError(
                "algorithm.improvement.kept=1 with distil_data=true distils the recorded action "
                "alone, which takes the place of the worst that is kept: set distil_data=false, or "
                "keep 2"
            )


class IDQLConfig(ActorCriticConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of implicit Q-learning beside a cloned policy.

    proposals: of how many chunks that the policy draws the critic's best acts. expectile: τ of the
    recorded actions' values by which a situation is valued; .5 is their mean, towards 1 the best.
    actor_learning_rate: of the policy, once it acts.
    """

    proposals: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 32
    expectile: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.7
    actor_learning_rate: Rate = 1e-4


class RLPDConfig(ActorCriticConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of reinforcement learning with prior data, soft actor-critic.

    actor_learning_rate: of the policy, once its critic teaches it. temperature_learning_rate: 0
    keeps the temperature α where it begins, at initial_temperature. target_entropy: in nats for
    each number of the executed actions, where their bounds are ±1; log 2 would be the uniform
    density's. entropy_backup: whether target values include the entropy to come, −α log π;
    the critic's head must then hold it on top of what is rewarded.
    """

    actor_learning_rate: Rate = 3e-4
    temperature_learning_rate: Annotated[float, msgspec.Meta(ge=0)] = 3e-4
    initial_temperature: Rate = 1.0
    target_entropy: Annotated[float, msgspec.Meta(lt=0.69)] = -0.5
    entropy_backup: bool = False
