"""Behaviour cloning: learn the expert's actions from the expert's states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from embodied.buffer.read.replay import EpisodeInfo
from embodied.buffer.sample.samplers import StepFlags
from embodied.buffer.sample.sampling import OWN, OwnSource
from embodied.buffer.sample.windows import WindowSpec
from embodied.learn.config import BCConfig, LearnerConfig

if TYPE_CHECKING:  # it loads torch, which actors do not need for this
    from embodied.learn.updates.base import Updates


@dataclass(frozen=True, slots=True)
class EpisodePlan:
    """Who acts in an episode: the policy first, the expert from takeover_tick on.

    takeover_tick: ticks after the start; 0 for a whole demonstration, None for never.
    """

    takeover_tick: int | None


class BC:
    """Behaviour cloning (Pomerleau 1989): nothing is collected after the demonstrations."""

    Config = BCConfig

    collects = False
    """Whether actors go on after the demonstrations."""

    asks_expert = False
    """Whether an expert acts in what they collect then."""

    critic: Mapping[str, Any] | None = None
    improvement: Mapping[str, Any] = {}
    """Options of the critic that the policy is improved by, None for none, and how."""

    critic_observations: tuple[str, ...] | None = None
    """What it reads of the robots, None for what the policy does."""

    acts = True
    """Whether what it trains commands a robot."""

    proposers = 0
    """How many processes beside the learner draw chunks that a critic is asked about."""

    needs_density = False
    """Whether the policy must be one that has a density."""

    def __init__(self, config: BCConfig) -> None:
        self.config = config

    def plan(self, demonstration_ticks: int, rng: np.random.Generator) -> EpisodePlan | None:
        """The next episode once the demonstrations are there; None collects nothing more.

        demonstration_ticks: length of the longest demonstration so far.
        """
        return None

    def select(self, episode: EpisodeInfo, flags: StepFlags) -> np.ndarray:
        """Which of an episode's actions are labels: those the expert chose."""
        usable = episode.success or not self.config.only_successful
        return flags.intervention & usable

    def check_value_range(self, low: float, high: float) -> None:
        """Raise ConfigError if values of what is rewarded can lie outside these."""

    def sources(self) -> dict[str, OwnSource]:
        """What is learned from, of what the run records."""
        return {OWN: OwnSource(self.select)}

    def windows(self, spec: WindowSpec, n_action_steps: int) -> WindowSpec:
        """The policy's windows, with what else the updates need."""
        return spec

    def updates(self, policy: Any, options: LearnerConfig, seed: int) -> Updates:
        """What a learner does with a batch."""
        from embodied.learn.updates.base import Cloning

        return Cloning(policy, options, seed)
