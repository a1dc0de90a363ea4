"""Evaluation on fixed, fresh start states, always the same for every contender."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embodied.core.frames import Frame
from embodied.core.intervals import bootstrap_mean, wilson
from embodied.core.protocols import Policy
from embodied.run.goals import ExpertGoals
from embodied.run.observing import check_robot
from embodied.run.rollout import Result, Rollout, Start
from embodied.run.video import Film
from hal.group import DeviceGroup, make_group
from sim import family
from sim.family import EVALUATION_SEEDS, SimConfig


class Evaluator:
    """A task on its own simulated robots, in virtual time without a speed limit.

    film_fault: why the last film could not be made, if so.
    """

    def __init__(self, task: str, sim: SimConfig, *, rows: int, with_expert: bool = False) -> None:
        found, name = family.find(task)
        self.task = found.make_task(name, sim)
        self.film_fault: str | None = None
        self._goals = ExpertGoals(task, sim)
        self._group = make_group(lambda row: family.make_device(task, sim, row=row), rows)
        self._experts = (
            [found.make_expert(name, self._group.spec) for _ in range(rows)]
            if with_expert
            else None
        )

    @property
    def group(self) -> DeviceGroup:
        """The simulated robots."""
        return self._group

    def run(
        self,
        policy: Policy | None,
        version: int,
        seeds: Sequence[int],
        *,
        films: dict[int, Path] | None = None,
        on_result: Callable[[Result], None] | None = None,
        keep_going: Callable[[], bool] | None = None,
        fresh: bool = True,
    ) -> list[Result]:
        """One episode from each start state; results in the order of `seeds`.

        policy None lets the scripted expert act. films: seed → mp4 file. keep_going is asked
        after every tick; once it says no, what is finished is returned. fresh: seeds must be
        evaluation seeds; a search for what is to be evaluated uses others.
        """
        if fresh and any(not 0 <= seed < EVALUATION_SEEDS for seed in seeds):
            raise ValueError(f"evaluation seeds must lie in 0..{EVALUATION_SEEDS - 1}")
        waiting = list(reversed(seeds))
        filming: dict[int, tuple[Film, Path]] = {}
        films = dict(films or {})

        def next_start(row: int) -> Start | None:
            if not waiting:
                return None
            seed = waiting.pop()
            if seed in films:
                filming[row] = (Film(self._group.devices[row]), films.pop(seed))
            return Start(seed, takeover_tick=0 if policy is None else None)

        def on_frame(row: int, frame: Frame) -> None:
            if row in filming:
                filming[row][0].picture()

        rollout = Rollout(
            self._group,
            self.task,
            next_start=next_start,
            experts=self._experts,
            on_frame=on_frame,
            goals=lambda row, seed: self._goals(seed),
        )
        if policy is not None:
            check_robot("policy", policy, self._group.spec, self.task, goals=True)
            rollout.set_policy(policy, version)
        finished: dict[int, Result] = {}
        while keep_going is None or keep_going():
            for result in rollout.tick():
                finished[result.seed] = result
                if result.row in filming:
                    film, path = filming.pop(result.row)
                    film.save(path)
                    self.film_fault = film.fault
                if on_result is not None:
                    on_result(result)
            if rollout.idle and not waiting:
                break
        return [finished[seed] for seed in seeds if seed in finished]

    def close(self) -> None:
        """Close the simulated robots."""
        self._group.close()
        self._goals.close()


class Evaluators:
    """An evaluator for each of a run's tasks; they take their turns. The first is made at once, so
    that a simulator that does not work is found out, the others when they are needed."""

    def __init__(self, tasks: Sequence[str], sim: SimConfig, *, rows: int) -> None:
        """rows: simulated robots of each task."""
        self._tasks = tasks
        self._sim = sim
        self._rows = rows
        self._made: dict[str, Evaluator] = {}
        self.of(tasks[0])

    def of(self, task: str) -> Evaluator:
        """The evaluator of one of the tasks."""
        if task not in self._made:
            self._made[task] = Evaluator(task, self._sim, rows=self._rows)
        return self._made[task]

    def run(
        self,
        policy: Policy,
        version: int,
        seeds: Sequence[int],
        *,
        films: Mapping[str, dict[int, Path]],
        on_result: Callable[[Result], None] | None = None,
        keep_going: Callable[[], bool] | None = None,
    ) -> list[Result]:
        """One episode of each task from each start state; films by task. See Evaluator."""
        results: list[Result] = []
        for task in self._tasks:
            results += self.of(task).run(
                policy,
                version,
                seeds,
                films=films[task],
                on_result=on_result,
                keep_going=keep_going,
            )
        return results

    @property
    def film_fault(self) -> str | None:
        """Why a film could not be made, if so."""
        return next((e.film_fault for e in self._made.values() if e.film_fault), None)

    def close(self) -> None:
        """Close the simulated robots."""
        for evaluator in self._made.values():
            evaluator.close()


def summarise_tasks(results: Sequence[Result]) -> dict[str, Any]:
    """As `summarise`; of several tasks also each by its name, under "tasks"."""
    by_task: dict[str, list[Result]] = {}
    for result in results:
        by_task.setdefault(result.task, []).append(result)
    summary: dict[str, Any] = summarise(results)
    if len(by_task) > 1:
        summary["tasks"] = {task: summarise(own) for task, own in by_task.items()}
    return summary


def summarise(results: Sequence[Result]) -> dict[str, float | int | list[float]]:
    """Success rate with its Wilson interval, mean length and greatest signals (bootstrap)."""
    successes = sum(result.success for result in results)
    summary: dict[str, float | int | list[float]] = {
        "episodes": len(results),
        "successes": successes,
        "success_rate": successes / max(1, len(results)),
        "success_interval": list(wilson(successes, len(results))),
        "mean_ticks": sum(result.ticks for result in results) / max(1, len(results)),
    }
    for signal in ("reward", "coverage"):
        values = [r.peaks[signal] for r in results if signal in r.peaks]
        if values:
            summary[f"max_{signal}"] = sum(values) / len(values)
            summary[f"max_{signal}_interval"] = list(bootstrap_mean(values))
    return summary
