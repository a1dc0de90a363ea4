"""Filtered behaviour cloning: the policy learns from its own successes too."""

import numpy as np

from embodied.buffer.read.replay import EpisodeInfo
from embodied.buffer.sample.samplers import StepFlags
from embodied.learn.bc import BC, EpisodePlan
from embodied.learn.config import FilteredBCConfig


class FilteredBC(BC):
    """Everything that was done in successful episodes is cloned, whoever acted.

    The simplest way to learn from one's own experience, or from that of an earlier run: no critic,
    and nothing from failures.
    """

    Config = FilteredBCConfig

    def __init__(self, config: FilteredBCConfig) -> None:
        super().__init__(config)
        self.collects = config.online

    def plan(self, demonstration_ticks: int, rng: np.random.Generator) -> EpisodePlan | None:
        """The policy acts to the end, if it acts."""
        return EpisodePlan(None) if self.collects else None

    def select(self, episode: EpisodeInfo, flags: StepFlags) -> np.ndarray:
        """All of a successful episode; of demonstrations also the others, if so configured."""
        demonstrated = bool(flags.intervention.all()) and not self.config.only_successful
        return np.full(len(flags.intervention), episode.success or demonstrated)
