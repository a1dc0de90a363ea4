"""When a policy decides and where its chunk begins: real-time chunking's schedule.

Inference runs while the committed actions play (Black, Galliker and Levine, 2025,
arXiv:2506.07339): a chunk computed from the observation of tick t takes over at tick t + d, where
d covers the longest recent delay, and d ≤ H − s keeps the robot supplied (H horizon, s executed).
"""

from collections import deque

import numpy as np

_WINDOW = 10


class ChunkSchedule:
    """The schedule of one device. Virtual time waits for the policy: there d is 0.

    delays: measured ones in ticks, newest last. starved: decisions whose delay exceeded H − s.
    """

    def __init__(self, tick_hz: float, *, realtime: bool) -> None:
        self._tick_hz = tick_hz
        self._realtime = realtime
        self._start_tick = 0
        self._actions_HD: np.ndarray | None = None
        self.delays: deque[int] = deque(maxlen=_WINDOW)
        self._spare = 1
        self.starved = 0
        self.next_tick = 0

    @property
    def delay(self) -> int:
        """d: ticks from an observation to the first action that it can still decide, at most what
        a chunk covers beyond the actions between two decisions."""
        if not self._realtime:
            return 0
        return max(1, min(max(self.delays, default=1), self._spare))

    def begin(self, tick: int) -> None:
        """A new episode: decide at its first tick; nothing is committed."""
        self.next_tick = tick
        self._actions_HD = None

    def due(self, tick: int) -> bool:
        """Whether it is time to decide."""
        return tick >= self.next_tick

    def prefix(self, tick: int) -> np.ndarray | None:
        """Committed actions [d, D] for the ticks that pass during inference, if all are known."""
        if self.delay == 0 or self._actions_HD is None:
            return None
        first = tick - self._start_tick
        committed = self._actions_HD[max(0, first) : first + self.delay]
        return committed if first >= 0 and len(committed) == self.delay else None

    def time_left_s(self, tick: int, horizon: int, n_action_steps: int) -> tuple[float, float]:
        """For a decision at `tick`: how long committed actions still play, and after how long its
        chunk would be of no use: while it leaves half of it, or n_action_steps, it is."""
        known = 0 if self._actions_HD is None else len(self._actions_HD)
        committed = max(0, self._start_tick + known - tick)
        useful = max(horizon - n_action_steps, horizon // 2, 1)
        return committed / self._tick_hz, useful / self._tick_hz

    def accepted(self, first_tick: int, actions_HD: np.ndarray) -> None:
        """What the device took of the last chunk: this is what will play."""
        self._start_tick, self._actions_HD = first_tick, actions_HD

    def decided(
        self, obs_tick: int, actions_HD: np.ndarray, n_action_steps: int, elapsed_s: float
    ) -> tuple[int, np.ndarray]:
        """Take a decision for the ticks from obs_tick on, made elapsed_s after its observation.

        Returns the first tick to submit and the actions from there on; notes the delay.
        """
        self._spare = len(actions_HD) - n_action_steps
        start = min(self.delay, len(actions_HD) - 1)
        if self._realtime:
            needed = int(np.ceil(elapsed_s * self._tick_hz))
            self.delays.append(max(1, needed))
            start = min(max(start, needed), len(actions_HD) - 1)
            self.starved += needed > len(actions_HD) - n_action_steps
        self._start_tick, self._actions_HD = obs_tick + start, actions_HD[start:]
        self.next_tick = obs_tick + max(n_action_steps, start)
        return self._start_tick, self._actions_HD
