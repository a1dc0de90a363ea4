"""HG-DAgger with a scripted supervisor that helps when the policy takes too long."""

import numpy as np

from embodied.learn.bc import BC, EpisodePlan
from embodied.learn.config import HGDAggerConfig


class HGDAgger(BC):
    """Human-gated DAgger (Kelly et al. 2019): the supervisor acts only where the policy fails.

    Each episode is the policy's until it is done, or has taken `patience` times as long as the
    longest demonstration: then the supervisor takes over to the end, and only that is added to the
    labels. The better the policy, the fewer interventions.
    """

    Config = HGDAggerConfig
    collects = True
    asks_expert = True

    def __init__(self, config: HGDAggerConfig) -> None:
        super().__init__(config)
        self._patience = config.patience

    def plan(self, demonstration_ticks: int, rng: np.random.Generator) -> EpisodePlan:
        """The policy acts as long as the supervisor's patience lasts."""
        return EpisodePlan(max(1, round(self._patience * demonstration_ticks)))
