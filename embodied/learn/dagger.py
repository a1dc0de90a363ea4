"""DAgger with a scripted supervisor that takes over in the middle of the policy's episodes."""

import numpy as np

from embodied.learn.bc import BC, EpisodePlan
from embodied.learn.config import DAggerConfig


class DAgger(BC):
    """Dataset aggregation (Ross et al. 2011) for chunks of actions.

    A label for a chunk must be a stretch of behaviour, not a set of separate answers. So
    each episode begins with the policy and at a random tick the expert takes over until the end
    (roll in with the learner, roll out with the expert: Ross & Bagnell 2014; with a person in
    the expert's place: HG-DAgger, Kelly et al. 2019). The expert's part, which starts
    from states that the policy visits, is added to the labels.
    """

    Config = DAggerConfig
    collects = True
    asks_expert = True

    def __init__(self, config: DAggerConfig) -> None:
        super().__init__(config)
        self._roll_in = config.roll_in

    def plan(self, demonstration_ticks: int, rng: np.random.Generator) -> EpisodePlan:
        """The policy acts until a tick drawn uniformly, then the expert."""
        latest = max(1, round(self._roll_in * demonstration_ticks))
        return EpisodePlan(int(rng.integers(0, latest)))
