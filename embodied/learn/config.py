"""Options of the learner; apart from it, so that reading them does not load torch."""

from typing import Literal

import msgspec

from embodied.weights.governor import GovernorConfig


class LearnerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Supervised training.

    steps: gradient steps of the whole run. minutes: training time of the whole run; null for no
    limit; whichever comes first ends the run (lockstep takes steps only). The learning rate
    follows a cosine over that budget. publish_every: at least so many steps between two
    publications; governor: how much of the learner's time and of links they may take beyond that
    (lockstep goes by steps alone). checkpoint_every: steps.
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
    device: Literal["cpu", "cuda"] = "cpu"
    gpu: str = "gpu"
    gpu_wait_s: float = 60.0
    governor: GovernorConfig = msgspec.field(default_factory=GovernorConfig)
