"""The asynchronous engine where the learner is: its crew of processes, and its GPU."""

from collections.abc import Callable
from typing import Any

from embodied.core.errors import LeaseError
from embodied.core.rundir import RunDir
from embodied.run import build
from embodied.run.algorithm import make_algorithm
from embodied.run.config import TrainConfig
from embodied.run.robots import printable
from embodied.run.supervisor import Crew, Supervisor
from hal.gpus import LeasedGpu
from hal.teleop.asking import PersonStopped


def learner_gpu(run: RunDir, config: TrainConfig) -> LeasedGpu | None:
    """The GPU that the run's learner needs, leased; None for one that computes on the CPU."""
    learner = config.learner
    if learner.device != "cuda":
        return None
    holder = printable(f"{run.path.name}/learner")
    gpu = LeasedGpu(holder, learner.gpu, learner.gpu_wait_s).open()
    run.event("gpu leased", gpu=gpu.id)
    return gpu


def run_local(
    run: RunDir, config: TrainConfig, notify: Callable[[dict[str, dict[str, Any]]], None]
) -> None:
    """Run to the end of the learner's budget and the last evaluation; see Supervisor. Raises
    PersonStopped if the person at a robot wants no more."""
    gpu = learner_gpu(run, config)

    def watch(values: dict[str, dict[str, Any]]) -> None:
        if gpu is not None and (lost := gpu.lost):
            raise LeaseError(
                f"the learner's {gpu.id} is lost: {lost}. Continue with run.resume=true"
            )
        notify(values)

    try:
        with build.make_local_buffer(run, config) as sink:
            build.import_demonstrations(sink, config.demonstrations, config.tasks)
        supervisor = Supervisor(run, training_crew(config, gpu), watch)
        supervisor.run()
        if supervisor.stopped:
            raise PersonStopped("stop")
    finally:
        if gpu is not None:
            gpu.close()


def training_crew(config: TrainConfig, gpu: LeasedGpu | None) -> Crew:
    """The roles of a run; no actors for one that neither demonstrates nor collects."""
    needed = make_algorithm(config.algorithm).collects or config.demonstrations.source == "expert"
    actors = [f"actor{i}" for i in range(config.actors.count if needed else 0)]
    gateway = [] if config.gateway.listen is None else ["gateway"]
    policy = ["policy"] if config.gateway.serve else []

    def threads(role: str) -> int:
        return (config.learner if role == "learner" else config.inference).threads

    return Crew(
        roles=("buffer", *policy, *gateway, "learner", "evaluator", *actors),
        last=("learner", "evaluator"),
        threads=threads,
        environment={} if gpu is None else {"learner": gpu.environment},
        terminal=config.actors.terminal,
    )
