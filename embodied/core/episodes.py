"""What the buffer stores: steps of episodes, addressed by (stream, episode, index)."""

from dataclasses import dataclass

import numpy as np

from embodied.core.frames import Observation


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an episode.

    stream: who recorded it (one robot). episode: number unique in the stream. index: 0, 1, ….
    reward, terminated, truncated, success: outcome of this step's action. intervention: an
    expert or a person chose the action. held: the device executed no command in this tick, so the
    action is no label. policy_version: weights that acted. final: the last observation of
    the episode, stored once after its last action; its other fields mean nothing. t_ns: when the
    observation was taken, on the stream's own monotonic clock; it never falls within an episode.
    """

    stream: str
    episode: int
    index: int
    observation: Observation
    action: np.ndarray
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    success: bool = False
    intervention: bool = False
    held: bool = False
    policy_version: int = -1
    task: str = ""
    seed: int = -1
    final: bool = False
    t_ns: int = 0

    @property
    def key(self) -> tuple[str, int, int]:
        """What makes the step unique; a second one with the same key is a duplicate."""
        return self.stream, self.episode, self.index
