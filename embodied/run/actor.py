"""An actor: robots that first demonstrate, then act with the newest weights."""

from collections.abc import Callable
from typing import Any

import numpy as np

from embodied.buffer.replay import ReplayReader
from embodied.buffer.sink import StepSink
from embodied.core.clock import VirtualClock
from embodied.core.config import component
from embodied.core.errors import EmbodiedError
from embodied.core.seeds import make_rng
from embodied.learn.bc import BC
from embodied.run.config import TrainConfig
from embodied.run.record import Recorder
from embodied.run.rollout import Result, Rollout, Start
from embodied.weights.store import WeightStore, WeightWatcher
from hal.group import make_group
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
    """A group of robots, their experts, a share of the demonstrations, a copy of the weights."""

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
    ) -> None:
        found, task = family.find(config.task)
        rows = config.actors.rows
        self._config = config
        self._streams = streams_of(config, index)
        self._algorithm = make_algorithm(config)
        self._on_result = on_result
        self._sitting = sitting
        self.group = make_group(
            lambda row: family.make_device(
                config.task,
                config.sim,
                row=index * rows + row,
                clock=VirtualClock(speed),
            ),
            rows,
        )
        experts = [found.make_expert(task, self.group.spec) for _ in range(rows)]
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
        self.rollout = Rollout(
            self.group,
            found.make_task(task, config.sim),
            next_start=self._next_start,
            experts=experts,
            on_step=lambda row, step: self._recorders[row].add(step),
        )

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
        self.rollout.set_policy(self._policy, manifest.version)
        return True

    @property
    def published_ns(self) -> int:
        """When the acting weights were published (monotonic); 0 before any of this sitting."""
        return self._published_ns

    def tick(self) -> list[Result]:
        """One tick of every robot; returns the episodes that ended."""
        results = self.rollout.tick()
        for result in results:
            self._in_hand[result.row] = False
            self._note(result.demonstration, result.success, result.ticks)
            self._on_result(result)
        return results

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
        if not self.rollout.has_policy:
            return None
        rng: np.random.Generator = make_rng(config.seed, stream, number, "plan")
        plan = self._algorithm.plan(self._longest_ticks or config.sim.horizon or 100, rng)
        if plan is None:
            return None
        self._begun[row] += 1
        return Start(seed, takeover_tick=plan.takeover_tick)

    def status(self) -> list[dict[str, Any]]:
        """Device table rows for this actor's robots."""
        return [
            {
                "id": info.id,
                "kind": info.kind,
                "host": info.host,
                "health": info.health.value,
                "rate_hz": round(info.rate_hz, 1),
                "tick_hz": info.tick_hz,
                "stream": stream,
            }
            for info, stream in zip(
                (device.info for device in self.group.devices), self._streams, strict=True
            )
        ]

    def close(self) -> None:
        """Close the robots."""
        self.group.close()
