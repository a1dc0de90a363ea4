"""Demonstrations by a person, or a script in one's place, on a leased robot into a buffer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.serve.sink import StepSink
from embodied.core.episodes import Step
from embodied.core.errors import ConfigError
from embodied.core.protocols import Operator, Policy
from embodied.core.specs import DeviceSpec
from embodied.core.tasks import Task
from embodied.run.fitting import fit_to
from embodied.run.handover import obey, shared_rollout
from embodied.run.leased import LeasedRobot
from embodied.run.record import Recorder
from embodied.run.robots import check_spec
from embodied.run.rollout import Result, Rollout, Start
from hal.group import DeviceGroup
from hal.remote import RemoteDevice
from hal.tasks import TaskConfig
from hal.tasks import make_task as make_robot_task
from hal.teleop.session import Session
from policies.acting import InferenceConfig
from sim import family
from sim.family import SimConfig


class RecordConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """device: selector of one device of the pool. task: a registered one, or robot_task: one that
    is configured. reward: a registered one and its options, which judges in the task's place; null
    for the task's own. teleoperator: a registered one and its options.

    checkpoint: a policy folder or a run directory whose policy acts while no person takes part;
    null for nobody. What the person does then is marked as an intervention.
    episodes: how many there shall be in output, those already there included. count: which ones
    count, the "finished" or only the "successful". align_speed, wait_s: see TeleopConfig.
    """

    device: str
    checkpoint: str | None
    task: str | None
    robot_task: TaskConfig | None = None
    reward: dict[str, Any] | None = None
    sim: SimConfig
    teleoperator: dict[str, Any]
    episodes: int
    count: Literal["finished", "successful"]
    seed: int
    align_speed: float
    wait_s: float
    output: str
    inference: InferenceConfig = msgspec.field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        if (self.task is None) == (self.robot_task is None):
            raise ConfigError(
                "name one task: task=so101/reach (a registered one), or robot_task=pick_place "
                "(one of configs/robot_task)"
            )
        if self.episodes < 1:
            raise ConfigError(f"episodes is {self.episodes}; it must be at least 1")

    @property
    def task_name(self) -> str:
        """Name of the task as it is recorded."""
        return self.robot_task.name if self.robot_task is not None else self.task or ""

    @property
    def judged_by(self) -> dict[str, Any] | None:
        """The configured reward; None where a registered task judges by itself."""
        if self.reward is not None or self.robot_task is None:
            return self.reward
        return self.robot_task.reward


def finished(path: Path, task: str) -> list[bool]:
    """Success of each finished episode of a task in a buffer folder; reads the whole log."""
    with ReplayReader(path) as reader:
        reader.refresh()
        return [episode.success for episode in reader.finished() if episode.task == task]


def make_task(config: RecordConfig, name: str, spec: DeviceSpec, operator: Operator | None) -> Task:
    """The task on the device of this name and spec; ConfigError if that does not fit it."""
    if config.robot_task is not None:
        return make_robot_task(config.robot_task, spec, operator)
    found, task = family.find(config.task_name)
    wanted = found.make_driver(task, config.sim).spec
    check_spec(spec, wanted, name)
    if missing := sorted(set(wanted.signals) - set(spec.signals)):
        raise ConfigError(
            f"task '{config.task_name}' is judged by {', '.join(missing)}, which only its "
            "simulator knows; use robot_task with a reward of its own"
        )
    return family.task_for(config.task_name, config.sim, operator)


class RecordSession:
    """Records episodes until there are enough or the person stops.

    A lost device leaves its episode open and is waited for. on_result: called with each finished
    episode once it is durable. show: called after every tick and while waiting. policy, version:
    who acts while the person does not.
    """

    def __init__(
        self,
        config: RecordConfig,
        sink: StepSink,
        robot: LeasedRobot,
        session: Session,
        *,
        on_result: Callable[[Result], None],
        show: Callable[[], None],
        policy: Policy | None = None,
        version: int = -1,
    ) -> None:
        self._policy, self._version = policy, version
        self._config = config
        self._sink = sink
        self._robot = robot
        self._session = session
        self._on_result = on_result
        self._show = show
        self._recorders: dict[str, Recorder] = {}
        self._rollout: Rollout | None = None
        there = finished(Path(config.output), config.task_name)
        self.done = sum(there) if config.count == "successful" else len(there)
        self.steps = 0
        """Steps of the running episode."""
        self.rejected = self.rerecorded = self.losses = 0
        self.plan = ""
        """Why the policy takes the solver steps that it takes; "" if it takes its own."""

    @property
    def complete(self) -> bool:
        """Whether there are as many episodes as wanted."""
        return self.done >= self._config.episodes

    @property
    def state(self) -> str:
        """What goes on, in a few words."""
        if self._rollout is None:
            return f"waiting for {self._robot.id}: {self._robot.waiting_for}"
        if self._rollout.idle:
            return "getting ready"
        return self._session.state

    def run(self, device: RemoteDevice) -> None:
        """Return when there are enough episodes or the person stops; device: as leased."""
        if not self.complete:
            self._robot.keep(device, self._record, waiting=self._wait, lost=self._forget)

    def _record(self, device: RemoteDevice) -> None:
        """Episode after episode on one lease."""
        session = self._session
        stream = f"{self._config.task_name}.{self._robot.id}"
        recorder = self._recorders.setdefault(stream, Recorder(self._sink, stream))

        def next_start(row: int) -> Start:
            self.steps = 0
            self._show()
            number = self._sink.next_episode(stream)
            return Start(family.training_seed(self._config.seed, stream, number))

        def on_step(row: int, step: Step) -> None:
            recorder.add(step)
            self.steps = step.index + 1

        rollout = self._rollout = shared_rollout(
            DeviceGroup([device]),
            session,
            make_task=partial(make_task, self._config, self._robot.id, device.spec),
            next_start=next_start,
            on_step=on_step,
            reward=self._config.reward,
            meanwhile=self._show,
        )
        if self._policy is not None:
            self.plan = fit_to(self._policy, device)
            rollout.set_policy(self._policy, self._version)
        rejected = self.rejected
        while not self.complete:
            self.rerecorded += obey(session, rollout)
            for result in rollout.tick():
                self._sink.flush()
                self.done += result.success or self._config.count == "finished"
                self._on_result(result)
            self.rejected = rejected + rollout.rejected
            self._show()

    def _wait(self) -> None:
        obey(self._session, None)
        self._show()

    def _forget(self) -> None:
        if self._rollout is not None:
            self.losses += 1
        self._rollout = None
