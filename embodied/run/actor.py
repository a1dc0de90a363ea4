"""An actor: robots that first demonstrate, then act with the newest weights."""

from collections.abc import Callable
from typing import Any

import numpy as np

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.serve.sink import StepSink
from embodied.core.config import component
from embodied.core.errors import DeviceLostError, EmbodiedError, LeaseError
from embodied.core.seeds import make_rng
from embodied.learn.bc import BC
from embodied.run.config import TrainConfig
from embodied.run.record import Recorder
from embodied.run.robots import LeasedRobots, Robots, SimulatedRobots
from embodied.run.rollout import Result, Rollout, Start
from embodied.weights.store import WeightStore, WeightWatcher
from hal.group import DeviceGroup
from sim import family

_ATTEMPTS_PER_DEMONSTRATION = 5


def make_algorithm(config: TrainConfig) -> BC:
    """The run's algorithm object."""
    cls, options = component("algorithms", config.algorithm, "algorithm")
    return cls(options)


def streams_of(config: TrainConfig, actor: int) -> list[str]:
    """Names of an actor's recording streams, one a robot."""
    return [f"actor{actor}.robot{row}" for row in range(config.actors.rows)]


class Actor:
    """A group of robots, their experts, a share of the demonstrations, a copy of the weights.

    Robots of its own process are there from the start. Leased ones come and go: rollout is None
    while there are none, and an episode in which one was lost stays open and teaches nothing.
    """

    def __init__(
        self,
        config: TrainConfig,
        index: int,
        sink: StepSink,
        weights: WeightStore,
        on_result: Callable[[Result], None],
        *,
        sitting: int,
        speed: float,
        holder: str,
    ) -> None:
        self._family, self._task = family.find(config.task)
        rows = config.actors.rows
        self._config = config
        self._streams = streams_of(config, index)
        self._algorithm = make_algorithm(config)
        self._on_result = on_result
        self._sitting = sitting
        self.robots: Robots
        if config.actors.devices is None:
            self.robots = SimulatedRobots(config, index, speed, holder)
        else:
            spec = self._family.make_driver(self._task, config.sim).spec
            self.robots = LeasedRobots(config.actors.devices, holder, spec)
        self._recorders = [Recorder(sink, stream) for stream in self._streams]
        self._begun = [sink.next_episode(stream) for stream in self._streams]
        self._wanted = self._share(index)
        self._demonstrated = 0
        self._attempts = 0
        self._longest_ticks = 0
        self._in_hand = [False] * rows
        self._watcher = WeightWatcher(weights)
        self._published_ns = 0
        self._policy: Any = None
        self.rollout: Rollout | None = None
        self.latencies_s: list[float] = []
        self.version = -1
        self.ticks = self.losses = self.rejected = 0
        self.fault = ""
        self._ready()

    @property
    def demonstrating(self) -> bool:
        """Whether this actor still owes demonstrations."""
        return self._demonstrated < self._wanted

    def recall(self, reader: ReplayReader) -> None:
        """After a restart: count the demonstrations that are recorded already."""
        reader.refresh()
        for episode in reader.episodes:
            if episode.stream in self._streams and episode.closed:
                ticks = len(episode.rows)
                self._note(episode.interventions == ticks, episode.success, ticks)

    def poll_weights(self) -> bool:
        """Take the newest published weights, if there are newer ones; between chunks only."""
        newest = self._watcher.poll()
        if newest is None:
            return False
        from policies.checkpoint import load_arrays, policy_from_state

        arrays, manifest = newest
        if self._policy is None:
            self._policy = policy_from_state(manifest.config, arrays)
        else:
            load_arrays(self._policy, arrays)
        if manifest.metadata["sitting"] == self._sitting:
            self._published_ns = int(manifest.metadata["published_ns"])
        self.version = manifest.version
        if self.rollout is not None:
            self.rollout.set_policy(self._policy, self.version)
        return True

    @property
    def published_ns(self) -> int:
        """When the acting weights were published (monotonic); 0 before any of this sitting."""
        return self._published_ns

    def tick(self) -> list[Result]:
        """One tick of every robot; returns the episodes that ended."""
        self.robots.report()
        rollout = self._ready()
        if rollout is None:
            return []
        try:
            results = rollout.tick()
        except (LeaseError, DeviceLostError) as error:
            self._lose(error)
            return []
        self.latencies_s.extend(rollout.latencies_s)
        rollout.latencies_s.clear()
        self.ticks += rollout.ticks
        rollout.ticks = 0
        self.rejected += rollout.rejected
        self.fault = f"chunks refused: {rollout.refusal}" if rollout.rejected else ""
        rollout.rejected = 0
        for result in results:
            self._in_hand[result.row] = False
            self._note(result.demonstration, result.success, result.ticks)
            self._on_result(result)
        return results

    @property
    def idle(self) -> bool:
        """Whether no robot runs an episode."""
        return self.rollout is None or self.rollout.idle

    def _ready(self) -> Rollout | None:
        """The rollout on the robots, begun when they could be had."""
        if self.rollout is None and (group := self.robots.acquire()) is not None:
            self.rollout = self._begin(group)
            self.fault = ""
        return self.rollout

    def _begin(self, group: DeviceGroup) -> Rollout:
        rollout = Rollout(
            group,
            self._family.make_task(self._task, self._config.sim),
            next_start=self._next_start,
            experts=[self._family.make_expert(self._task, group.spec) for _ in group.devices],
            on_step=lambda row, step: self._recorders[row].add(step),
        )
        if self._policy is not None:
            rollout.set_policy(self._policy, self.version)
        return rollout

    def _lose(self, error: EmbodiedError) -> None:
        if not self.robots.lost(error):
            raise error
        self.rollout = None
        self.losses += 1
        self.fault = str(error)
        self._in_hand = [False] * len(self._in_hand)

    def _share(self, index: int) -> int:
        demonstrations = self._config.demonstrations
        if demonstrations.source != "expert":
            return 0
        total, actors = demonstrations.episodes or 0, self._config.actors.count
        return total // actors + (index < total % actors)

    def _note(self, demonstration: bool, success: bool, ticks: int) -> None:
        if not demonstration:
            return
        self._attempts += 1
        if success:
            self._demonstrated += 1
            self._longest_ticks = max(self._longest_ticks, ticks)
        limit = _ATTEMPTS_PER_DEMONSTRATION * max(2, self._wanted)
        if self.demonstrating and self._attempts >= limit:
            raise EmbodiedError(
                f"the expert for '{self._config.task}' succeeded in {self._demonstrated} of "
                f"{self._attempts} attempts; {self._wanted} demonstrations are not to be had. "
                "Lower demonstrations.noise or raise sim.horizon"
            )

    def _next_start(self, row: int) -> Start | None:
        config, stream = self._config, self._streams[row]
        number = self._begun[row]
        seed = family.training_seed(config.seed, stream, number)
        if self._demonstrated + sum(self._in_hand) < self._wanted:
            self._in_hand[row] = True
            self._begun[row] += 1
            return Start(seed, takeover_tick=0, noise=config.demonstrations.noise)
        if self._policy is None:
            return None
        rng: np.random.Generator = make_rng(config.seed, stream, number, "plan")
        plan = self._algorithm.plan(self._longest_ticks or config.sim.horizon or 100, rng)
        if plan is None:
            return None
        self._begun[row] += 1
        return Start(seed, takeover_tick=plan.takeover_tick)

    def close(self) -> None:
        """Close the robots."""
        self.robots.close()
