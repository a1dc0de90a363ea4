"""Rewards of steps as a WindowSpec wants them, and what they sum to until the episode's end."""

from collections.abc import Mapping
from itertools import accumulate

import numpy as np

from embodied.buffer.sample.windows import WindowSpec


def reward_column(spec: WindowSpec) -> str:
    """Name of the column that the rewards are made of."""
    return "reward" if spec.rewards == "recorded" else "success"


def rewards_of(spec: WindowSpec, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Rewards, float64 [...], of the values [...] of `reward_column`."""
    values = columns[reward_column(spec)].astype(np.float64)
    return values - 1 if spec.rewards == "cost" else values


def returns_to_go(
    spec: WindowSpec, columns: Mapping[str, np.ndarray], lengths: np.ndarray
) -> np.ndarray:
    """Returns to go (see WindowSpec) of complete episodes' steps, float32 [sum of lengths].

    columns: `reward_column` of the steps, one episode after the other. lengths: int64 [E].
    """
    rewards = rewards_of(spec, columns)
    returns = np.empty(len(rewards), np.float32)
    start = 0
    for length in lengths.tolist():
        part = slice(start, start + length)
        if spec.rewards == "cost" and not columns["success"][part].any():
            returns[part] = -1 / (1 - spec.discount)
        else:
            backwards = accumulate(
                rewards[part][::-1].tolist(), lambda later, reward: reward + spec.discount * later
            )
            returns[part] = list(backwards)[::-1]
        start = part.stop
    return returns
