"""Options of the policies that are trained and of their parts; reading them does not load torch.

The registry says which class of options belongs to which name (`embodied.core.registry.OPTIONS`).
"""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from embodied.core.errors import ConfigError

Count = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Depth = Annotated[int, msgspec.Meta(ge=1, le=48)]
Channels = Annotated[int, msgspec.Meta(ge=8, le=4096)]
Spacing = Literal["leading", "trailing", "linspace"]

CHANNELS_PER_GROUP = 16
"""Of the group normalisation in ResNet-18."""


class ImagesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a policy reads pictures; without cameras nothing of it is used.

    encoder: a registered image encoder and its options. shared: one encoder for all cameras, else
    each has its own. crop: side of the window that is seen as a share of the picture's, at random
    places in training and in the centre otherwise; 1 for all of it. brightness, contrast,
    saturation, hue: see ColourJitter, in training alone. standard: see encoders/images.py.
    """

    encoder: dict[str, Any] = msgspec.field(default_factory=lambda: {"name": "resnet18"})
    shared: bool = False
    crop: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.875
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.0
    standard: Literal["imagenet", "unit"] = "imagenet"


class ChunkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options that every policy has.

    n_obs_steps: To. horizon: H. n_action_steps: how many of those are executed.
    action_normalization: "spec" maps the device's limits to [−1, 1], the others use the data.
    images: how pictures are read. language: a registered text encoder and its options, by which
    the task's instruction becomes an observation; None for a policy that is not told it. goals:
    observation keys, of those it reads, of which it is also given what shall be seen at the end.
    """

    n_obs_steps: Count = 2
    horizon: Count = 16
    n_action_steps: Count = 8
    observation_normalization: Literal["limits", "gaussian"] = "limits"
    action_normalization: Literal["spec", "limits", "gaussian"] = "spec"
    images: ImagesConfig = msgspec.field(default_factory=ImagesConfig)
    language: dict[str, Any] | None = None
    goals: tuple[str, ...] = ()

    has_density: ClassVar[bool] = False
    """Whether the policy knows the density of what it draws, and has gradients of both (as
    `rsample` of the Gaussian policy)."""

    acts: ClassVar[bool] = True
    """Whether it commands robots."""

    @property
    def learns_without_actions(self) -> bool:
        """Whether windows without any label teach it something."""
        return False

    @property
    def future(self) -> tuple[int, ...]:
        """How many steps after the newest observation those are that the policy learns to predict;
        none, unless it is a world model."""
        return ()

    def future_keys(self, observation_keys: Iterable[str]) -> tuple[str, ...]:
        """Which of the observations it learns to predict."""
        return ()

    def parts(self) -> list[tuple[str, Any, str]]:
        """The components that the options name: registry kind, name with options, and where."""
        found: list[tuple[str, Any, str]] = [
            ("encoders", self.images.encoder, "policy.images.encoder")
        ]
        if self.language is not None:
            found.append(("text_encoders", self.language, "policy.language"))
        return found


class FlowOptions(ChunkConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of every policy that learns a flow.

    num_steps: solver steps. solver: "heun" evaluates the network twice a step. time_sampling:
    density of u in training; "logit_normal" prefers the middle (Esser et al. 2024, section 3.1),
    "beta" the noisy end (π0, Black et al. 2024, appendix B).
    """

    num_steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 10
    solver: Literal["euler", "heun"] = "euler"
    time_sampling: Literal["uniform", "logit_normal", "beta"] = "uniform"


class FlowConfig(FlowOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the flow policy. network: a registered network and its options."""

    network: dict[str, Any] = msgspec.field(default_factory=lambda: {"name": "mlp"})

    def parts(self) -> list[tuple[str, Any, str]]:
        """See ChunkConfig."""
        return [*super().parts(), ("networks", self.network, "policy.network")]


class MeanFlowConfig(FlowConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the mean-flow policy, beside those of the flow.

    share: part of a batch that learns l > 0; the rest learns v. power: p of the rows' weights
    (m / e)ᵖ with e the row's mean squared error + 0.001 and m that of the batch, so that the loss
    keeps its scale (the paper's section 4.3 has m = 1). teacher: a run or policy folder
    whose velocity is learned in the place of x₁ − n (distillation): any denoiser with the same
    observations, chunks and action normaliser. Only training needs it.
    """

    num_steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    solver: Literal["euler"] = "euler"
    share: Share = 0.25
    power: Annotated[float, msgspec.Meta(ge=0, le=2)] = 1.0
    teacher: str | None = None


class DiffusionSolverConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of a diffusion's solver.

    num_steps: None means 10, or N for ddpm. num_train_steps: N of the squared-cosine schedule
    (Nichol and Dhariwal 2021, equation 17) whose levels are visited. timestep_spacing: "trailing"
    starts where x is pure noise (Lin et al. 2023, table 2); "leading" starts up to a stride
    earlier, at a signal-to-noise ratio that the starting noise does not have, which biases the
    mean (for N(.8, .05²) in 10 steps: .7963 instead of .8). clip_sample: keep the estimate of the
    clean chunk within ±1; "epsilon" denoisers rely on it with trailing, where errors at the first
    step are divided by √ᾱ = 5e-4.
    """

    num_steps: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None
    num_train_steps: Annotated[int, msgspec.Meta(ge=2, le=10_000)] = 100
    timestep_spacing: Spacing = "trailing"
    clip_sample: bool = True

    def __post_init__(self) -> None:
        """Raise ConfigError for options that contradict each other."""
        if self.num_steps is not None and self.num_steps > self.num_train_steps:
            raise ConfigError(
                f"num_steps is {self.num_steps}; it must not exceed "
                f"num_train_steps={self.num_train_steps}"
            )


class DiffusionConfig(ChunkConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the diffusion policy.

    network: a registered network and its options. num_train_steps: N of the squared-cosine
    schedule that it is trained on. scheduler: the solver that samples; num_steps,
    timestep_spacing and clip_sample are its (see DiffusionSolverConfig).
    """

    network: dict[str, Any] = msgspec.field(default_factory=lambda: {"name": "mlp"})
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    scheduler: Literal["ddim", "ddpm", "dpmsolver++"] = "ddim"
    num_train_steps: Annotated[int, msgspec.Meta(ge=2, le=10_000)] = 100
    num_steps: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None
    timestep_spacing: Spacing = "trailing"
    clip_sample: bool = True

    def __post_init__(self) -> None:
        """Raise ConfigError for options that contradict each other."""
        self.solver_config()
        if self.clip_sample and self.action_normalization == "gaussian":
            raise ConfigError(
                "clip_sample keeps actions within ±1, which gaussian normalisation exceeds; "
                "set clip_sample: false, or action_normalization: spec or limits"
            )

    def parts(self) -> list[tuple[str, Any, str]]:
        """See ChunkConfig."""
        return [*super().parts(), ("networks", self.network, "policy.network")]

    def solver_config(self) -> DiffusionSolverConfig:
        """The solver's part."""
        return DiffusionSolverConfig(
            num_steps=self.num_steps,
            num_train_steps=self.num_train_steps,
            timestep_spacing=self.timestep_spacing,
            clip_sample=self.clip_sample,
        )


class ACTConfig(ChunkConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of ACT: sizes, and kl_weight, the β of its loss L1 + β KL."""

    width: Annotated[int, msgspec.Meta(ge=8, le=4096)] = 256
    heads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    encoder_depth: Depth = 4
    decoder_depth: Depth = 1
    latent_dim: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 32
    kl_weight: Annotated[float, msgspec.Meta(ge=0)] = 10.0

    def __post_init__(self) -> None:
        """Raise ConfigError for a width that the heads cannot share."""
        check_heads(self.width, self.heads)


class GaussianConfig(ChunkConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the Gaussian policy: width and depth, the units and number of hidden layers."""

    width: Annotated[int, msgspec.Meta(ge=8, le=8192)] = 256
    depth: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2

    has_density: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise ConfigError for actions that a tanh does not bound."""
        if self.action_normalization != "spec":
            raise ConfigError(
                f"action_normalization is {self.action_normalization}; a Gaussian under a tanh "
                "reaches the device's bounds and no further: set action_normalization: spec"
            )


class MLPConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the residual MLP.

    hidden: units inside a block, 0 means width. depth: residual blocks.
    """

    width: Annotated[int, msgspec.Meta(ge=8, le=8192)] = 512
    hidden: Annotated[int, msgspec.Meta(ge=0, le=32768)] = 0
    depth: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    time_dim: Annotated[int, msgspec.Meta(ge=4, le=1024, multiple_of=2)] = 64


class Unet1DConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the U-Net.

    channels: one entry per level, each level halves the length of the one before.
    """

    channels: Annotated[tuple[Channels, ...], msgspec.Meta(min_length=1, max_length=6)] = (
        32,
        64,
        128,
    )
    kernel_size: Annotated[int, msgspec.Meta(ge=1, le=15)] = 5
    n_groups: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8
    time_dim: Annotated[int, msgspec.Meta(ge=4, le=1024, multiple_of=2)] = 64

    def __post_init__(self) -> None:
        """Raise ConfigError for combinations that no layer can have."""
        if self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size is {self.kernel_size}; it must be odd")
        odd = [n for n in self.channels if n % self.n_groups]
        if odd:
            raise ConfigError(
                f"channels {odd} are no multiples of n_groups={self.n_groups}; "
                "change channels or n_groups"
            )


class DiTConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the diffusion transformer.

    positions: of the steps, learned or sinusoidal. qk_norm: see Attention.
    """

    width: Annotated[int, msgspec.Meta(ge=8, le=4096, multiple_of=2)] = 256
    depth: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    heads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    time_dim: Annotated[int, msgspec.Meta(ge=4, le=1024, multiple_of=2)] = 64
    positions: Literal["learned", "sinusoidal"] = "learned"
    qk_norm: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError for a width that the heads cannot share."""
        check_heads(self.width, self.heads)


class ResNet18Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the ResNet.

    width: channels of the first stage, doubled in each of the three others; 64 is ResNet-18.
    pooling: how the last map becomes a vector. keypoints: K, of spatial_softmax. features: size of
    a picture's vector.
    """

    width: Annotated[int, msgspec.Meta(ge=16, le=256, multiple_of=CHANNELS_PER_GROUP)] = 64
    pooling: Literal["average", "spatial_softmax"] = "spatial_softmax"
    keypoints: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 32
    features: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64


class ViTConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the vision transformer.

    patch: side in pixels; what is left over at the right and below is cut off. features: size of a
    picture's vector.
    """

    patch: Annotated[int, msgspec.Meta(ge=1, le=64)] = 12
    width: Annotated[int, msgspec.Meta(ge=8, le=2048)] = 128
    depth: Depth = 4
    heads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    features: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64

    def __post_init__(self) -> None:
        """Raise ConfigError for a width that the heads cannot share."""
        check_heads(self.width, self.heads)


class NgramsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the hashed n-grams.

    max_bytes: longest instruction, as UTF-8. buckets: rows of the table. features: size of an
    instruction's vector.
    """

    max_bytes: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 128
    buckets: Annotated[int, msgspec.Meta(ge=16, le=1 << 20)] = 4096
    width: Annotated[int, msgspec.Meta(ge=8, le=1024)] = 64
    features: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64


class WordsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the hashed words.

    max_bytes: longest instruction, as UTF-8. max_words: places for words. buckets: rows of the
    table. features: size of a word's vector, and of an instruction's.
    """

    max_bytes: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 128
    max_words: Annotated[int, msgspec.Meta(ge=1, le=512)] = 16
    buckets: Annotated[int, msgspec.Meta(ge=16, le=1 << 20)] = 4096
    width: Annotated[int, msgspec.Meta(ge=8, le=1024)] = 64
    features: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64


def check_heads(width: int, heads: int) -> None:
    """Raise ConfigError unless the width can be divided among the heads."""
    if width % heads:
        raise ConfigError(f"width is {width} and heads {heads}; width must be a multiple of heads")
