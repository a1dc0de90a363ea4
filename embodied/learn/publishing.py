"""Weights on their way out of a learner: when, on which thread, and what that costs it."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from embodied.learn.config import LearnerConfig
from embodied.learn.learner import Learner
from embodied.learn.snapshot import Snapshot, publishes
from embodied.weights.governor import PublishGovernor
from embodied.weights.store import WeightStore

_QUIET_WEIGHT = 0.1


class Publisher:
    """Publishes a learner's weights, every publish_every steps or as seldom as the governor says.

    governor: None to go by steps alone, which is repeatable. A learner on a GPU does not wait for
    a publication; what it costs is then the time of the call, and how much longer than otherwise
    steps take until the weights are written. An error of one in the background is raised by the
    next step or publication, or by close.
    """

    def __init__(
        self,
        weights: WeightStore,
        config: LearnerConfig,
        *,
        sitting: int,
        governor: PublishGovernor | None,
    ) -> None:
        self._weights = weights
        self._config = config
        self._sitting = sitting
        self._governor = governor
        self._step = 0
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._writing: Future[None] | None = None
        self._quiet_s: float | None = None
        self._cost_s = self._last_cost_s = 0.0
        self._learned_s = self._spent_s = 0.0
        self._published = 0

    def due(self, step: int, *, waiting: bool = False) -> bool:
        """Whether publish_every steps have passed since the last weights went out, and the
        governor allows new ones. waiting: for data, which those who act may only bring once they
        have weights; the first ones are due then."""
        if waiting and self._weights.latest_version() is None:
            return self._writing is None
        if step - self._step < self._config.publish_every:
            return False
        return self._governor is None or (self._writing is None and self._governor.due)

    def stepped(self, step_s: float) -> None:
        """A gradient step took so long."""
        if self._writing is not None and self._writing.done():
            self.finish()
        self._learned_s += step_s
        if self._writing is not None:
            self._cost_s += 0.0 if self._quiet_s is None else step_s - self._quiet_s
        elif self._quiet_s is None:
            self._quiet_s = step_s
        else:
            self._quiet_s += _QUIET_WEIGHT * (step_s - self._quiet_s)
        if self._governor is not None:
            self._governor.stepped(step_s)

    def publish(self, learner: Learner, *, final: bool) -> None:
        """Publish the averaged weights, if this process is the one of its group that does.

        On a GPU it skips while earlier ones are still being written, unless these are the final
        weights: those are there when it returns.
        """
        if not publishes():
            self._step = learner.step
            return
        background = self._config.device == "cuda" and not final
        if background and self._writing is not None and not self._writing.done():
            return
        self.finish()
        started_s = time.perf_counter()
        config, snapshot = learner.snapshot()
        metadata = {
            "step": learner.step,
            "seconds": round(learner.seconds, 3),
            "final": final,
            "sitting": self._sitting,
            "published_ns": time.monotonic_ns(),
        }
        self._step = learner.step
        if background:
            self._writing = self._writer.submit(self._write, config, snapshot, metadata)
        else:
            self._write(config, snapshot, metadata)
        self._cost_s = time.perf_counter() - started_s
        if not background:
            self._account()

    def finish(self) -> None:
        """Wait for weights that are being written; raises what went wrong with them."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
            self._account()

    def decisions(self) -> dict[str, float]:
        """For timings: the governor's interval, what the last publication cost, the share of the
        learner's time that all took, and how many there were; empty without a governor."""
        if self._governor is None:
            return {}
        total_s = self._learned_s + self._spent_s
        return {
            "publish_interval_s": self._governor.interval_s,
            "publish_cost_s": self._last_cost_s,
            "publish_share": self._spent_s / total_s if total_s else 0.0,
            "published": self._published,
        }

    def _write(self, config: dict[str, Any], snapshot: Snapshot, metadata: dict[str, Any]) -> None:
        self._weights.publish(snapshot.arrays(), config, metadata)
        self._weights.prune(self._config.weights_kept)

    def _account(self) -> None:
        self._last_cost_s = max(0.0, self._cost_s)
        self._spent_s += self._last_cost_s
        self._published += 1
        if self._governor is not None:
            self._governor.published(self._last_cost_s)
