"""An actor: robots that first demonstrate, then act with the newest weights."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.serve.sink import StepSink
from embodied.buffer.spool.names import stream_name
from embodied.core.episodes import Step
from embodied.core.errors import DeviceLostError, EmbodiedError, LeaseError, LinkError
from embodied.core.frames import Observation
from embodied.core.protocols import Policy
from embodied.core.seeds import make_rng
from embodied.run.algorithm import make_algorithm
from embodied.run.config import TrainConfig
from embodied.run.demonstrating import demonstrations_of, recall
from embodied.run.fitting import fit_to
from embodied.run.goals import ExpertGoals
from embodied.run.handover import obey, shared_rollout
from embodied.run.record import Recorder
from embodied.run.remote.policy import RemotePolicy, connect
from embodied.run.renewal import Renewal
from embodied.run.robots import LeasedRobots, Robots, SimulatedRobots
from embodied.run.rollout import Result, Rollout, Start
from embodied.run.tasks import device_of, robot_task
from embodied.weights.store import WeightManifest, WeightStore, WeightWatcher
from embodied.weights.trial import Trial
from hal.group import DeviceGroup
from hal.rewards import make_rewards, prepare_reward
from hal.teleop.asking import PersonStopped
from hal.teleop.session import Session, make_session
from sim import family

_CONNECT_EVERY_S = 1.0
_CONNECT_S = 5.0


def streams_of(config: TrainConfig, actor: int, host: str) -> list[str]:
    """Names of an actor's recording streams, one a robot. host: where it acts, "" for the learner's
    own."""
    names = [f"actor{actor}.robot{row}" for row in range(config.actors.rows)]
    return [stream_name(host, name) for name in names] if host else names


class Actor:
    """A group of robots, their experts, a share of the demonstrations, a copy of the weights.

    Robots of its own process are there from the start. Leased ones come and go: rollout is None
    while there are none, and an episode in which one was lost stays open and teaches nothing.
    waiting: why no episode begins, "" if any may.
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
        host: str = "",
        background: bool = False,
        refusal: Callable[[int], str] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """host: where it acts, "" for the learner's own. background: whether newer weights are made
        ready by a thread beside those that act; else poll_weights does it, so that what acts in a
        tick does not depend on the machine. refusal: why no episode may begin while a version
        acts, "" if one may. meanwhile: called again and again while a person's answer is waited
        for."""
        rows = config.actors.rows
        self._config = config
        self._tasks = [robot_task(config.tasks, index, row, rows) for row in range(rows)]
        self._streams = streams_of(config, index, host)
        prepare_reward(config.reward)
        self._algorithm = make_algorithm(config.algorithm)
        self._on_result = on_result
        self._sitting = sitting
        self._meanwhile = meanwhile
        self._session: Session | None = None
        self._asked = ""
        self.stopped = False
        """Whether the person wants the run to stop; no robot is held then."""
        self.robots: Robots
        if config.actors.devices is None:
            self.robots = SimulatedRobots(config, index, speed, holder)
        else:
            spec = device_of(self._tasks, config.sim)
            leased = self.robots = LeasedRobots(config.actors.devices, holder, spec)
            self._session = self._person(leased.halt)
        self._recorders = [Recorder(sink, stream) for stream in self._streams]
        self._begun = [sink.next_episode(stream) for stream in self._streams]
        self._demonstrations = demonstrations_of(config, index)
        offered = partial(Trial(weights).offered, f"actor{index}")
        self._watcher = WeightWatcher(weights, choose=offered)
        self._published_ns = 0
        self._goals = {task: ExpertGoals(task, config.sim) for task in self._tasks}
        self._policy: Any = None
        self._renewal: Renewal | None = None
        if background and (config.inference.remote is None or config.inference.fallback):
            self._renewal = Renewal(self._watcher, self._make_policy)
        self._remote: RemotePolicy | None = None
        self._tried_s = -_CONNECT_EVERY_S
        self._connecting = ThreadPoolExecutor(1, thread_name_prefix="policy server")
        self._reached: Future[RemotePolicy] | None = None
        self.rollout: Rollout | None = None
        self.latencies_s: list[float] = []
        self.version = self._own_version = -1
        self.ticks = self.losses = self.rejected = 0
        self._refusal = refusal
        self.fault = self.plan = self.waiting = ""
        if config.actors.devices is None:
            self._ready()  # a leased one would miss its heartbeat while a policy is imported

    @property
    def demonstrating(self) -> bool:
        """Whether this actor still owes demonstrations."""
        return any(shared.owed for shared in self._demonstrations)

    def recall(self, reader: ReplayReader) -> None:
        """Count its demonstrations that are recorded already, and see how long others' are."""
        reader.refresh()
        recall(dict(zip(self._streams, self._demonstrations, strict=True)), reader.episodes)

    def poll_weights(self) -> bool:
        """Take the newest published weights, if there are newer ones, and connect to the policy
        server if one is to decide; between chunks only. Whether another policy acts now."""
        inference = self._config.inference
        taken = (inference.remote is None or inference.fallback) and self._take_weights()
        connected = inference.remote is not None and self._connect(inference.remote)
        if not taken and not connected:
            return False
        if self._remote is not None and self._policy is not None:
            self._remote.local_version = self._own_version
        self.version = self._own_version if self._remote is None else self._remote.version
        if self.rollout is not None and self._decides is not None:
            self._act(self.rollout, self._decides)
        return True

    def _take_weights(self) -> bool:
        if self._renewal is not None:
            manifest = self._renewal.take()
            self._policy = self._renewal.policy
        else:
            manifest = self._read_weights()
        if manifest is None:
            return False
        if manifest.metadata["sitting"] == self._sitting:
            self._published_ns = int(manifest.metadata["published_ns"])
        self._own_version = manifest.version
        return True

    def _read_weights(self) -> WeightManifest | None:
        newest = self._watcher.poll()
        if newest is None:
            return None
        from policies.checkpoint import load_arrays

        arrays, manifest = newest
        if self._policy is None:
            self._policy = self._make_policy(manifest, arrays)
        else:
            load_arrays(self._policy.source, arrays)
            self._policy.refresh()
        return manifest

    def _make_policy(self, manifest: WeightManifest, arrays: Mapping[str, np.ndarray]) -> Any:
        from policies.checkpoint import policy_from_state
        from policies.inference.policy import ActingPolicy

        policy = policy_from_state(manifest.config, arrays)
        rows = self._config.actors.rows
        return ActingPolicy(policy, self._config.inference, rows=rows)

    def _connect(self, address: str) -> bool:
        """Whether the server has now been reached, by a thread: it may be far away. Its fallback
        must be there before it."""
        inference = self._config.inference
        if self._remote is not None or (inference.fallback and self._policy is None):
            return False
        if self._reached is None:
            if time.monotonic() - self._tried_s >= _CONNECT_EVERY_S:
                self._tried_s = time.monotonic()
                self._reached = self._connecting.submit(
                    connect, address, patience_s=inference.patience_s, connect_s=_CONNECT_S
                )
            return False
        if not self._reached.done():
            return False
        reached, self._reached = self._reached, None
        try:
            self._remote = reached.result()
        except LinkError as error:
            self.fault = str(error)
            return False
        if inference.fallback:
            self._remote.fall_back_to(self._policy, self._own_version)
        return True

    @property
    def published_ns(self) -> int:
        """When the acting weights were published (monotonic); 0 before any of this sitting, and
        where a policy server decides."""
        return 0 if self._remote is not None else self._published_ns

    def tick(self) -> list[Result]:
        """One tick of every robot; returns the episodes that ended."""
        self.robots.report()
        try:
            if self._session is not None and obey(self._session, self.rollout):
                self._leave()
            rollout = self._ready()
            results = [] if rollout is None else rollout.tick()
        except PersonStopped as stopped:
            self.stopped |= stopped.event == "stop"
            self._lose(stopped)
            return []
        except (LeaseError, DeviceLostError) as error:
            self._lose(error)
            return []
        if rollout is None:
            return []
        self._asked = ""
        if self._remote is not None:
            self.version = self._remote.version
        self.latencies_s.extend(rollout.latencies_s)
        rollout.latencies_s.clear()
        self.ticks += rollout.ticks
        rollout.ticks = 0
        self.rejected += rollout.rejected
        self.fault = f"chunks refused: {rollout.refusal}" if rollout.rejected else ""
        rollout.rejected = 0
        for result in results:
            shared = self._demonstrations[result.row]
            shared.left(result.row)
            if result.demonstration:
                shared.note(success=result.success, ticks=result.ticks)
            self._on_result(result)
        return results

    @property
    def person(self) -> str:
        """What the person does, or is asked to do; "" where there is nobody, or no robot."""
        if self._session is None or self.rollout is None:
            return ""
        return self._asked or self._session.state

    @property
    def idle(self) -> bool:
        """Whether no robot runs an episode."""
        return self.rollout is None or self.rollout.idle

    def _ready(self) -> Rollout | None:
        """The rollout on the robots, begun when they could be had."""
        if self.stopped:
            return None
        if self.rollout is None and self._acts:
            if (group := self.robots.acquire()) is not None:
                self.rollout = self._begin(group)
                self.fault = ""
            elif reason := self.robots.waiting_for:
                self.fault = f"waits for {self._config.actors.devices}: {reason}"
        return self.rollout

    def _begin(self, group: DeviceGroup) -> Rollout:
        experts = [family.expert_for(task, group.spec) for task in self._tasks]
        sim = self._config.sim
        if self._session is not None:
            rollout = shared_rollout(
                group,
                self._session,
                make_task=partial(family.task_for, self._tasks[0], sim),
                next_start=self._next_start,
                experts=experts,
                on_step=self._record,
                reward=self._config.reward,
                meanwhile=self._meanwhile,
            )
        else:
            rollout = Rollout(
                group,
                [family.task_for(task, sim, None) for task in self._tasks],
                next_start=self._next_start,
                experts=experts,
                on_step=self._record,
                goals=self._goal if self._config.actors.devices is None else None,
                rewards=make_rewards(self._config.reward, group.spec, len(group)),
            )
        if self._decides is not None:
            self._act(rollout, self._decides)
        return rollout

    def _goal(self, row: int, seed: int) -> Observation:
        return self._goals[self._tasks[row]](seed)

    def _record(self, row: int, step: Step) -> None:
        self._recorders[row].add(step)

    def _person(self, halt: Callable[[], None]) -> Session | None:
        """An open session with the person who may take over; None for nobody."""
        actors = self._config.actors
        if actors.teleoperator is None:
            return None
        session = make_session(actors.teleoperator, speed=actors.align_speed, on_estop=halt)
        session.say = self._ask
        session.open()
        return session

    def _ask(self, text: str) -> None:
        self._asked = text

    @property
    def _acts(self) -> bool:
        """Whether there is anything to do with robots: nobody else's are leased before."""
        return self.demonstrating or self._decides is not None

    @property
    def _decides(self) -> Policy | None:
        """The policy server once it has been reached, else the own policy once there is one."""
        return self._remote or self._policy

    def _act(self, rollout: Rollout, policy: Policy) -> None:
        """Let the policy act, in as many solver steps as the robot's time allows."""
        if not self.plan:
            self.plan = fit_to(policy, rollout.devices[0])
        rollout.set_policy(policy, self.version)

    def _lose(self, error: EmbodiedError) -> None:
        if not self.robots.lost(error):
            raise error
        self.rollout = None
        self.losses += not self.stopped
        self.fault = str(error)
        self._leave()

    def _leave(self) -> None:
        """No robot's episode goes on."""
        for row, shared in enumerate(self._demonstrations):
            shared.left(row)

    def _next_start(self, row: int) -> Start | None:
        config, stream = self._config, self._streams[row]
        number = self._begun[row]
        seed = family.training_seed(config.seed, stream, number)
        demonstrations = self._demonstrations[row]
        if demonstrations.begin(row):
            self._begun[row] += 1
            return Start(seed, takeover_tick=0, noise=config.demonstrations.noise)
        if self._decides is None:
            return None
        self.waiting = "" if self._refusal is None else self._refusal(self.version)
        if self.waiting:
            return None
        rng: np.random.Generator = make_rng(config.seed, stream, number, "plan")
        plan = self._algorithm.plan(demonstrations.longest_ticks or config.sim.horizon or 100, rng)
        if plan is None:
            return None
        self._begun[row] += 1
        # A person who is there takes over in the script's place.
        takeover_tick = plan.takeover_tick if self._session is None else None
        return Start(seed, takeover_tick=takeover_tick)

    def close(self) -> None:
        """Close the robots."""
        if self._renewal is not None:
            self._renewal.close()
        self._connecting.shutdown()
        if self._reached is not None and self._reached.exception() is None:
            self._remote = self._reached.result()
        if self._remote is not None:
            self._remote.close()
        if self._session is not None:
            self._session.close()
        self.robots.close()
        for goals in self._goals.values():
            goals.close()
