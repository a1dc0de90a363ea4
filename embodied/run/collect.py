"""Demonstrations by a task's scripted expert, outside of a training run."""

from collections.abc import Callable

from embodied.buffer.serve.sink import StepSink
from embodied.core.errors import ConfigError, EmbodiedError
from embodied.run.config import CollectConfig
from embodied.run.record import Recorder
from embodied.run.rollout import Result, Rollout, Start
from hal.group import make_group
from hal.rewards import make_rewards
from sim import family

_ATTEMPTS_PER_EPISODE = 5


def collect(
    config: CollectConfig, sink: StepSink, *, on_success: Callable[[], None] | None = None
) -> list[Result]:
    """Run the expert until the wanted number of episodes succeeded; all attempts are recorded."""
    found, task = family.find(config.task)
    wanted = config.demonstrations.episodes or 0
    if wanted < 1 or config.rows < 1:
        raise ConfigError(
            f"demonstrations.episodes is {wanted} and rows {config.rows}; use 1 or more"
        )
    group = make_group(
        lambda row: family.make_device(config.task, config.sim, row=row), config.rows
    )
    experts = [found.make_expert(task, group.spec) for _ in range(config.rows)]
    if experts[0] is None:
        group.close()
        raise ConfigError(f"task '{config.task}' has no scripted expert to demonstrate it")
    streams = [f"{config.task}.expert{row}" for row in range(config.rows)]
    recorders = [Recorder(sink, stream) for stream in streams]
    numbers = [sink.next_episode(stream) for stream in streams]
    results: list[Result] = []
    successes = running = 0

    def next_start(row: int) -> Start | None:
        nonlocal running
        if successes + running >= wanted:
            return None
        running += 1
        seed = family.training_seed(config.seed, streams[row], numbers[row])
        numbers[row] += 1
        return Start(seed, takeover_tick=0, noise=config.demonstrations.noise)

    rollout = Rollout(
        group,
        found.make_task(task, config.sim),
        next_start=next_start,
        experts=experts,
        on_step=lambda row, step: recorders[row].add(step),
        rewards=make_rewards(config.reward, group.spec, len(group)),
    )
    try:
        while successes < wanted:
            for result in rollout.tick():
                running -= 1
                results.append(result)
                successes += result.success
                if result.success and on_success is not None:
                    on_success()
            if len(results) > _ATTEMPTS_PER_EPISODE * wanted + 10:
                raise EmbodiedError(
                    f"the expert for '{config.task}' succeeded in {successes} of {len(results)} "
                    "attempts; lower demonstrations.noise or raise sim.horizon"
                )
        sink.flush()
    finally:
        group.close()
    return results
