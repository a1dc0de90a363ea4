"""What is asked of a device, and how it is judged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from embodied.core.frames import Frame


@dataclass(frozen=True, slots=True)
class Outcome:
    """Judgement of one step. terminated: the task ended. truncated: time ran out. Never merged."""

    reward: float
    terminated: bool
    truncated: bool
    success: bool

    @property
    def done(self) -> bool:
        """Whether the episode ends with this step."""
        return self.terminated or self.truncated


class Resettable(Protocol):
    """The part of a device that a task needs."""

    def reset(self, seed: int) -> int:
        """Bring the device to the start state of `seed`; return the tick of its first frame."""
        ...


class Task(Protocol):
    """An instruction, a horizon in ticks, a way to reset and a judge."""

    @property
    def name(self) -> str:
        """Registered name, such as "metaworld/assembly"."""
        ...

    @property
    def instruction(self) -> str:
        """What is asked, in words."""
        ...

    @property
    def horizon(self) -> int:
        """Ticks until an episode is truncated."""
        ...

    def reset(self, device: Resettable, seed: int) -> int:
        """Prepare an episode; return the tick of its first frame."""
        ...

    def judge(self, frame: Frame, elapsed_ticks: int) -> Outcome:
        """Judge the state in `frame`, reached `elapsed_ticks` after the first frame."""
        ...


class Reward(Protocol):
    """Judges the states of one robot, episode after episode."""

    def begin(self, frame: Frame) -> None:
        """An episode begins with this frame: forget the one before."""
        ...

    def __call__(self, frame: Frame) -> bool | None:
        """Whether the state is a success (True), a failure (False), or neither yet (None); called
        with each frame after the first, in order."""
        ...


def judged(verdict: bool | None, elapsed_ticks: int, horizon: int) -> Outcome:
    """What a reward's verdict means: 1 with success, else 0. It ends the episode; without one, the
    horizon truncates it."""
    truncated = verdict is None and elapsed_ticks >= horizon
    return Outcome(float(verdict is True), verdict is not None, truncated, verdict is True)


class Expert(Protocol):
    """A scripted supervisor: a feedback law of one device's observation."""

    def reset(self) -> None:
        """Forget the last episode; also called when it takes over in the middle of one."""
        ...

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Action [D] for this observation, within the device's bounds."""
        ...
