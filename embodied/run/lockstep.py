"""The deterministic engine: every role takes its turn in one process."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from embodied.buffer.serve.sink import StepSink
from embodied.core.rundir import RunDir
from embodied.run import build
from embodied.run.actor import Actor
from embodied.run.config import TrainConfig
from embodied.run.episode import Result
from embodied.run.evaluate import Evaluators
from embodied.weights.store import WeightStore

_DEMONSTRATION_TICKS = 1_000_000


def run_lockstep(
    run: RunDir, config: TrainConfig, notify: Callable[[str, dict[str, Any]], None]
) -> None:
    """Train to the end of the budget.

    Which weights act at a tick depends on the tick alone: a round is ticks_per_round ticks of
    every actor, then steps_per_round gradient steps, then the weights go out. Metrics carry no
    times, so that two runs with one seed write the same bytes.
    notify(role, values) is told of progress.
    """
    import torch

    torch.set_num_threads(config.learner.threads)
    torch.set_deterministic_debug_mode("error")
    with _interrupts_held() as interrupted:
        Lockstep(run, config, notify, interrupted).run()


@contextmanager
def _interrupts_held() -> Generator[Callable[[], bool]]:
    """Hold Ctrl-C back until the engine asks for it, so that no update is torn."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, previous)


class Lockstep:
    """One run's actors, buffer, trainer and evaluator, in turns."""

    def __init__(
        self,
        run: RunDir,
        config: TrainConfig,
        notify: Callable[[str, dict[str, Any]], None],
        interrupted: Callable[[], bool],
    ) -> None:
        self._interrupted = interrupted
        self._run = run
        self._config = config
        self._notify = notify
        self._weights = WeightStore(run.weights)
        rows = run.read("metrics", "evaluation")
        self._evaluated_step = max((row["step"] for row in rows), default=0)

    def run(self) -> None:
        """All rounds, then the last evaluation; everything is closed at the end."""
        config, run = self._config, self._run
        sink = build.make_local_buffer(run, config)
        actors: list[Actor] = []
        evaluator = Evaluators(config.tasks, config.sim, rows=config.evaluation.rows)
        try:
            build.import_demonstrations(sink, config.demonstrations, config.tasks)
            for index in range(config.actors.count):
                actor = Actor(
                    config,
                    index,
                    sink,
                    self._weights,
                    self._recorder(index),
                    sitting=run.sitting(),
                    speed=0.0,
                    holder=f"{run.path.name}/actor{index}",
                )
                actor.recall(build.make_reader(run, config))
                actors.append(actor)
            self._demonstrate(actors)
            sink.flush()
            self._learn(actors, sink, evaluator)
        finally:
            for actor in actors:
                actor.close()
            evaluator.close()
            sink.close()

    def _demonstrate(self, actors: list[Actor]) -> None:
        for actor in actors:
            for _ in range(_DEMONSTRATION_TICKS):
                if not actor.demonstrating:
                    break
                self._check()
                actor.tick()

    def _learn(self, actors: list[Actor], sink: StepSink, evaluator: Evaluators) -> None:
        config = self._config

        def on_metrics(row: dict[str, Any]) -> None:
            self._run.metrics("learner", row)
            self._notify("learner", {"step": row["step"], "loss": row["loss"]})

        trainer = build.make_trainer(self._run, config, on_metrics)
        self._notify("learner", {"demonstrations": trainer.demonstrations()})
        trainer.start()
        try:
            while not trainer.done:
                for actor in actors:
                    actor.poll_weights()
                    for _ in range(config.actors.ticks_per_round):
                        self._check()
                        actor.tick()
                sink.flush()
                for _ in range(config.learner.steps_per_round):
                    self._check()
                    if trainer.done or not trainer.update():
                        break
                if trainer.publish_due() or trainer.done:
                    trainer.publish(final=trainer.done)
                if trainer.checkpoint_due():
                    trainer.save()
                seconds = trainer.learner.seconds if trainer.learner else 0.0
                self._run.timings("learner", {"step": trainer.step, "seconds": seconds})
                due = trainer.step - self._evaluated_step >= config.evaluation.every_steps
                if due and not trainer.done:
                    self._evaluate(evaluator, trainer.step, final=False)
        finally:
            trainer.save()
        self._evaluate(evaluator, trainer.step, final=True)

    def _evaluate(self, evaluator: Evaluators, step: int, *, final: bool) -> None:
        from policies.checkpoint import policy_from_state
        from policies.inference.policy import ActingPolicy

        evaluation = self._config.evaluation
        episodes = evaluation.final_episodes if final else evaluation.episodes
        version = self._weights.latest_version()
        if version is None or not episodes:
            return
        arrays, manifest = self._weights.load(version)
        policy = ActingPolicy(
            policy_from_state(manifest.config, arrays),
            self._config.inference,
            rows=evaluation.rows,
        )
        films = build.film_paths(self._run, self._config, f"step{step:07d}")
        results = evaluator.run(
            policy, version, range(episodes), films=films, keep_going=self._go_on
        )
        known = {"step": manifest.metadata["step"]}
        row = build.evaluation_row(version, known, final, results)
        self._run.metrics("evaluation", row)
        self._evaluated_step = step
        self._notify("evaluation", row)

    def _check(self) -> None:
        if self._interrupted():
            raise KeyboardInterrupt

    def _go_on(self) -> bool:
        self._check()
        return True

    def _recorder(self, index: int) -> Callable[[Result], None]:
        def record(result: Result) -> None:
            self._run.metrics(f"actor{index}", result_row(result))

        return record


def result_row(result: Result) -> dict[str, Any]:
    """One training episode as a row of metrics."""
    return {
        "task": result.task,
        "seed": result.seed,
        "success": result.success,
        "ticks": result.ticks,
        "return": result.total_reward,
        "interventions": result.interventions,
        "version": result.policy_version,
        "mixed": result.mixed,
        "demonstration": result.demonstration,
    }
