"""Options of world models and of their parts; reading them does not load torch."""

from collections.abc import Collection, Iterable
from typing import Annotated, Any, Literal

import msgspec

from embodied.core.errors import ConfigError
from embodied.core.instructions import GOAL, TASK
from embodied.core.registry import unknown
from policies.configs import ChunkConfig, Count, Depth, DiffusionSolverConfig, Spacing, check_heads
from policies.critics.configs import CriticConfig


class WorldConfig(ChunkConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of every world model.

    form: "diffusion" predicts noise on a squared-cosine schedule of num_train_steps, sampled by
    `sampler`, DDIM or the ancestral DDPM; "flow" is a rectified flow, sampled by Euler's method.
    num_steps, timestep_spacing (of the diffusion), clip_sample: see DiffusionSolverConfig.
    temperature: of DDPM; the noise that is added in its steps is multiplied by it, the noise that
    it begins with is not.

    predicts: observation keys that are predicted, all that the policy reads if none is named.
    next_weight: of their loss, beside the action's 1. latents: what pictures among them are
    predicted as, a registered name and its options.
    """

    form: Literal["diffusion", "flow"] = "diffusion"
    sampler: Literal["ddim", "ddpm"] = "ddim"
    temperature: Annotated[float, msgspec.Meta(ge=0, le=10)] = 1.0
    num_train_steps: Annotated[int, msgspec.Meta(ge=2, le=10_000)] = 100
    num_steps: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10
    timestep_spacing: Spacing = "trailing"
    clip_sample: bool = True
    predicts: tuple[str, ...] = ()
    next_weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    latents: dict[str, Any] = msgspec.field(default_factory=lambda: {"name": "patches"})

    def __post_init__(self) -> None:
        """Raise ConfigError for options that contradict each other, or have no effect."""
        if self.form == "diffusion":
            self.solver_config()
        elif (self.num_train_steps, self.timestep_spacing) != (100, "trailing"):
            raise ConfigError(
                "num_train_steps and timestep_spacing are of the diffusion; form: flow has none: "
                "leave them out"
            )
        gaussian = "gaussian" in (self.action_normalization, self.observation_normalization)
        if self.clip_sample and gaussian:
            raise ConfigError(
                "clip_sample keeps actions and predicted observations within ±1, which gaussian "
                "normalisation exceeds; set clip_sample: false, or normalise both by limits"
            )
        if self.sampler == "ddpm" and self.form == "flow":
            raise ConfigError("sampler: ddpm samples a diffusion; form: flow is none")
        if self.temperature != 1 and self.sampler != "ddpm":
            raise ConfigError(
                f"temperature is {self.temperature}, but only sampler: ddpm adds noise in its "
                "steps; choose that, or leave temperature at 1"
            )

    @property
    def learns_without_actions(self) -> bool:
        """See ChunkConfig: what is seen next, unless that has no weight."""
        return self.next_weight > 0

    def untaught(self, known: Collection[str], want: Collection[str]) -> str:
        """Why training does not teach to sample what is wanted, given what is known (of "actions"
        and "next_obs"); empty if it does."""
        if "next_obs" in want and not self.next_weight:
            return "with policy.next_weight=0 nothing of what will be seen is learned"
        return ""

    def future_keys(self, observation_keys: Iterable[str]) -> tuple[str, ...]:
        """See ChunkConfig; ConfigError if `predicts` names one that the policy does not read."""
        keys = [key for key in observation_keys if key != TASK and not key.startswith(GOAL)]
        for key in self.predicts:
            if key not in keys:
                raise unknown("key in policy.predicts", key, keys)
        return self.predicts or tuple(keys)

    def parts(self) -> list[tuple[str, Any, str]]:
        """See ChunkConfig."""
        return [*super().parts(), ("latents", self.latents, "policy.latents")]

    def solver_config(self) -> DiffusionSolverConfig:
        """The diffusion's solver."""
        return DiffusionSolverConfig(
            num_steps=self.num_steps,
            num_train_steps=self.num_train_steps,
            timestep_spacing=self.timestep_spacing,
            clip_sample=self.clip_sample,
        )


class UWMConfig(WorldConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the unified world model, beside those of every world model.

    next_after: whether the first predicted observation follows the whole chunk, or the
    n_action_steps of it that are executed; next_obs_steps: how many successive ones there are.

    marginal_step: the diffusion's training step that a modality is taken to be at which is not
    known and not wanted, its value being pure noise; null is the last, where that is exact. The
    published code has 90 of 100, where the network expects a signal of √ᾱ = .14. action_free: what
    the action loss of rows without actions is, whose actions are pure noise at the last step:
    "masked" leaves it out, "unmasked" learns to give the noise back, as published.

    left_out: share of the training rows with actions whose next observation has no tokens at all.
    Above 0 a decision has none either, nor have rows that lack one: it costs little more than that
    of a policy which predicts nothing; 0, as published, has noise there.

    width, depth, heads, qk_norm: of the transformer. registers: tokens that stand for nothing.
    """

    next_after: Literal["chunk", "executed"] = "chunk"
    next_obs_steps: Count = 1
    marginal_step: Annotated[int, msgspec.Meta(ge=0)] | None = None
    action_free: Literal["masked", "unmasked"] = "masked"
    left_out: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    width: Annotated[int, msgspec.Meta(ge=8, le=4096)] = 128
    depth: Depth = 4
    heads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    registers: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 8
    time_dim: Annotated[int, msgspec.Meta(ge=4, le=1024, multiple_of=2)] = 128
    qk_norm: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError for options that contradict each other."""
        super().__post_init__()
        check_heads(self.width, self.heads)
        if self.action_free == "unmasked" and self.form == "flow":
            raise ConfigError(
                "action_free: unmasked learns the noise, which form: flow does not predict; leave "
                "it masked"
            )
        if self.marginal_step is not None:
            if self.form == "flow":
                raise ConfigError("marginal_step is a step of the diffusion; form: flow has none")
            if self.marginal_step >= self.num_train_steps:
                raise ConfigError(
                    f"marginal_step is {self.marginal_step}; it must be less than "
                    f"num_train_steps={self.num_train_steps}"
                )

    @property
    def future(self) -> tuple[int, ...]:
        """See ChunkConfig."""
        first = self.horizon if self.next_after == "chunk" else self.n_action_steps
        return tuple(range(first, first + self.next_obs_steps))


Mode = Literal["video", "forward", "policy", "inverse", "joint"]


class UVAConfig(WorldConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of unified video and action, beside those of every world model.

    frames: how many later observations are predicted, evenly spread over the chunk; the last one
    follows it. token_size: into tokens of how many numbers a state vector is split.

    modes: what is trained, one of them drawn for each batch as published, or for each row
    (`drawn`). inverse_history: whether the inverse mode is told what was observed; the published
    code does not tell it. action_head: "steps" denoises each action by itself, so that actions are
    independent of one another given what the transformer says (published); "joint" the whole chunk.
    iterations: in how many passes the tokens of later observations are sampled.

    width, heads, encoder_depth, decoder_depth: of the transformer. head_width, head_depth,
    time_dim: of the two denoising heads.
    """

    frames: Count = 4
    token_size: Count = 2
    modes: Annotated[tuple[Mode, ...], msgspec.Meta(min_length=1)] = (
        "video",
        "forward",
        "policy",
        "inverse",
        "joint",
    )
    drawn: Literal["batch", "row"] = "batch"
    inverse_history: bool = False
    action_head: Literal["steps", "joint"] = "steps"
    iterations: Count = 1
    width: Annotated[int, msgspec.Meta(ge=8, le=4096)] = 128
    heads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    encoder_depth: Depth = 2
    decoder_depth: Depth = 2
    head_width: Annotated[int, msgspec.Meta(ge=8, le=4096)] = 256
    head_depth: Depth = 3
    time_dim: Annotated[int, msgspec.Meta(ge=4, le=1024, multiple_of=2)] = 128

    def __post_init__(self) -> None:
        """Raise ConfigError for options that contradict each other."""
        super().__post_init__()
        check_heads(self.width, self.heads)
        if self.horizon % self.frames:
            raise ConfigError(
                f"horizon is {self.horizon} and frames {self.frames}; each frame follows equally "
                "many actions, so horizon must be a multiple of frames"
            )
        if len(set(self.modes)) < len(self.modes):
            raise ConfigError(f"modes {list(self.modes)} name one twice")
        if self.inverse_history and "inverse" not in self.modes:
            raise ConfigError(
                f"inverse_history is about the mode inverse, which modes {list(self.modes)} lack"
            )

    @property
    def learns_without_actions(self) -> bool:
        """See WorldConfig; by the mode that knows no actions and learns none."""
        return super().learns_without_actions and "video" in self.modes

    def untaught(self, known: Collection[str], want: Collection[str]) -> str:
        """See WorldConfig. Actions alone are not asked about: a policy always decides."""
        needed: tuple[str, ...] = ()
        if "next_obs" in want:
            alone = ("video", "joint") if "actions" not in want else ("joint",)
            needed = ("forward",) if "actions" in known else alone
        elif "next_obs" in known:
            needed = ("inverse",)
        if needed and not set(needed) & set(self.modes):
            return f"policy.modes={list(self.modes)} has no {' or '.join(needed)}"
        return super().untaught(known, want)

    @property
    def future(self) -> tuple[int, ...]:
        """See ChunkConfig."""
        stride = self.horizon // self.frames
        return tuple(range(stride, self.horizon + 1, stride))


class PatchesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of pixel patches.

    patch: side in pixels; its 3 · patch² numbers must not be more than the network is wide.
    shrink: by how much pictures are made smaller before, averaging.
    """

    patch: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    shrink: Annotated[int, msgspec.Meta(ge=1, le=64)] = 3


class GoalScorerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What shall be seen.

    targets: by predicted key, the numbers wanted (flattened), or the observation key whose newest
    value is wanted, such as goal.observation.state. weights: by key, of the squared distance; 1
    where none is given.
    """

    targets: dict[str, str | tuple[float, ...]]
    weights: dict[str, Annotated[float, msgspec.Meta(ge=0)]] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ConfigError for no target, or a weight of none."""
        if not self.targets:
            raise ConfigError("a goal scorer needs targets: {observation.state: [0.1, 0.2]}")
        for key in self.weights:
            if key not in self.targets:
                raise unknown("key of weights", key, self.targets)


class CriticScorerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A critic that values what will be seen. spec: what it reads, as in a checkpoint. options: its
    own. draws: of the policy, in each situation, over which the value is averaged."""

    spec: dict[str, Any]
    options: CriticConfig
    draws: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
