"""Episodes of PushT in which whoever decides may look at the simulator, several at a time.

B rows, To history, H chunk, h executed actions, D action.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from embodied.core.specs import PolicySpec
from sim.family import SimConfig
from sim.pusht import PushTDriver, block_features

STATE, ENVIRONMENT = "observation.state", "observation.environment_state"
GOAL = tuple(map(float, block_features(256.0, 256.0, np.pi / 4)))
"""Where the block belongs, as `observation.environment_state`."""

Decide = Callable[[int, dict[str, np.ndarray], Sequence[PushTDriver]], np.ndarray]
"""From tick, observations [B, To, …] and the rows' drivers to chunks [B, H, D]."""


class Rows:
    """As many simulators. Open until `close`."""

    def __init__(self, count: int, sim: SimConfig) -> None:
        self.drivers = [PushTDriver(sim) for _ in range(count)]
        for driver in self.drivers:
            driver.open()

    def play(self, decide: Decide, spec: PolicySpec, ticks: Sequence[int]) -> list[float]:
        """Greatest coverage of each row within its ticks, from where the drivers are; a row that
        succeeded is left alone. spec: what is read, and how many actions are executed."""
        seen = [deque([d.sense()] * spec.n_obs_steps, spec.n_obs_steps) for d in self.drivers]
        peaks = [driver.signals()["coverage"] for driver in self.drivers]
        running = [True] * len(self.drivers)
        for tick in range(0, max(ticks), spec.n_action_steps):
            obs = {
                key: np.stack([np.stack([step[key] for step in row]) for row in seen])
                for key in spec.observation
            }
            chunks_BHD = decide(tick, obs, self.drivers)
            for row, driver in enumerate(self.drivers):
                for action_D in chunks_BHD[row][: spec.n_action_steps][: max(0, ticks[row] - tick)]:
                    if not running[row]:
                        break
                    driver.drive(action_D)
                    driver.step_time()
                    seen[row].append(driver.sense())
                    peaks[row] = max(peaks[row], driver.signals()["coverage"])
                    running[row] = not driver.signals()["success"]
            if not any(running):
                break
        return peaks

    def close(self) -> None:
        """Close them."""
        for driver in self.drivers:
            driver.close()


def outcome(driver: PushTDriver, chunk_HD: np.ndarray) -> np.ndarray:
    """Where the block would be after a chunk, as `observation.environment_state`."""
    made = driver.twin()
    for action_D in chunk_HD:
        made.drive(action_D)
        made.step_time()
    return made.sense()[ENVIRONMENT]
