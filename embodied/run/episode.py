"""How an episode begins, and how it ended."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Start:
    """How a row begins its next episode. takeover_tick: see EpisodePlan; noise: on the expert."""

    seed: int
    takeover_tick: int | None = None
    noise: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """One finished episode. task: its name. peaks: greatest value of each signal; interventions:
    expert's ticks. policy_version: of the last decision; mixed: others decided before."""

    row: int
    task: str
    seed: int
    success: bool
    ticks: int
    total_reward: float
    peaks: dict[str, float]
    interventions: int
    policy_version: int
    mixed: bool
    demonstration: bool
