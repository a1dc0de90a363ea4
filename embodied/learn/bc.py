"""Behaviour cloning: learn the expert's actions from the expert's states."""

from dataclasses import dataclass

import msgspec
import numpy as np

from embodied.buffer.read.replay import EpisodeInfo
from embodied.buffer.sample.samplers import StepFlags


@dataclass(frozen=True, slots=True)
class EpisodePlan:
    """Who acts in an episode: the policy first, the expert from takeover_tick on.

    takeover_tick: ticks after the start; 0 for a whole demonstration, None for never.
    """

    takeover_tick: int | None


class BC:
    """Behaviour cloning (Pomerleau 1989): nothing is collected after the demonstrations."""

    collects = False
    """Whether actors go on after the demonstrations."""

    class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """only_successful: learn from successful episodes alone."""

        only_successful: bool = True

    def __init__(self, config: Config) -> None:
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
