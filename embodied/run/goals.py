"""Goals of simulated episodes, shown by the task's scripted expert."""

from embodied.core.episodes import Step
from embodied.core.errors import ConfigError, EmbodiedError
from embodied.core.frames import Observation
from embodied.run.rollout import Rollout, Start
from hal.group import DeviceGroup, make_group
from sim import family
from sim.family import SimConfig

_KEPT = 1024


class ExpertGoals:
    """The last observation of the expert's episode from a start state.

    It acts on a robot of its own, which is made when the first goal is asked for.
    """

    def __init__(self, task: str, sim: SimConfig) -> None:
        self._name, self._sim = task, sim
        self._group: DeviceGroup | None = None
        self._goals: dict[int, Observation] = {}

    def __call__(self, seed: int) -> Observation:
        """The goal of an episode from this start state; ConfigError if the task has no expert."""
        if seed not in self._goals:
            if len(self._goals) == _KEPT:
                del self._goals[next(iter(self._goals))]
            self._goals[seed] = self._show(seed)
        return self._goals[seed]

    def _show(self, seed: int) -> Observation:
        if self._group is None:
            self._group = make_group(
                lambda row: family.make_device(self._name, self._sim, row=row), 1
            )
        found, name = family.find(self._name)
        expert = found.make_expert(name, self._group.spec)
        if expert is None:
            raise ConfigError(
                f"the policy wants a goal, and '{self._name}' has no scripted expert to show one"
            )
        starts = [Start(seed, takeover_tick=0)]
        ends: list[Observation] = []

        def on_step(row: int, step: Step) -> None:
            if step.final:
                ends.append(step.observation)

        task = found.make_task(name, self._sim)
        rollout = Rollout(
            self._group,
            task,
            next_start=lambda row: starts.pop() if starts else None,
            experts=[expert],
            on_step=on_step,
        )
        for _ in range(2 * task.horizon):
            rollout.tick()
            if ends:
                return ends[0]
        raise EmbodiedError(f"the expert for '{self._name}' does not end its episode")

    def close(self) -> None:
        """Close the robot; safe to call twice."""
        if self._group is not None:
            self._group.close()
            self._group = None
