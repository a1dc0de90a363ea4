"""What an autoencoder learns from: pictures, whoever acted."""

import numpy as np

from embodied.buffer.read.replay import EpisodeInfo
from embodied.buffer.sample.samplers import StepFlags
from embodied.learn.bc import BC
from embodied.learn.config import ReconstructionConfig


class Reconstruction(BC):
    """Every step's observation is learned from, but for those of held-out episodes; nothing is
    collected after the demonstrations."""

    Config = ReconstructionConfig
    config: ReconstructionConfig

    acts = False

    def select(self, episode: EpisodeInfo, flags: StepFlags) -> np.ndarray:
        """All of an episode, or nothing."""
        usable = episode.success or not self.config.only_successful
        return np.full(len(episode.rows), usable and not self.holds_out(episode))

    def holds_out(self, episode: EpisodeInfo) -> bool:
        """Whether it is one of those that are kept to show what was learned."""
        every = self.config.held_out
        return every > 0 and episode.episode % every == 1
