"""What publishing costs a learner: blocks of gradient steps with and without it, in turns."""

import time
from pathlib import Path
from typing import Any

from embodied.core.config import compose, convert
from embodied.core.rundir import RunDir
from embodied.run import build
from embodied.run.collect import collect
from embodied.run.config import CollectConfig, load_train

EPISODES = 8


class Learning:
    """A trainer of the product on demonstrations of its own, in this process."""

    def __init__(self, folder: Path, overrides: list[str], batch_size: int) -> None:
        import torch

        torch.set_num_threads(1)
        options = [*overrides, "learner.steps=1000000000", f"learner.batch_size={batch_size}"]
        config = load_train([*options, f"run.dir={folder}"])
        self._run = RunDir(folder)
        self._run.acquire()
        self._run.write_config(config)
        self._run.event("run started")
        output = f"output={folder}/demonstrations"
        episodes = [f"task={config.tasks[0]}", f"demonstrations.episodes={EPISODES}", output]
        with build.make_local_buffer(self._run, config) as sink:
            collect(convert(compose("collect", episodes), CollectConfig), sink)
        self.interval = config.learner.publish_every
        self._trainer = build.make_trainer(self._run, config, lambda row: None)
        self._trainer.start()
        self.steps(20)

    def steps(self, count: int) -> float:
        """Seconds of so many gradient steps."""
        began_s, wanted = time.perf_counter(), self._trainer.step + count
        while self._trainer.step < wanted:
            self._trainer.update()
        return time.perf_counter() - began_s

    def publish(self) -> float:
        """Seconds in which the learner takes no steps because weights go out."""
        began_s = time.perf_counter()
        self._trainer.publish(final=False)
        return time.perf_counter() - began_s

    def close(self) -> None:
        """End the trainer."""
        self._trainer.close()
        self._run.release()


def step_time(
    folder: Path, overrides: list[str], batch_size: int, rounds: int, interval: int | None
) -> dict[str, Any]:
    """Blocks of one interval of steps each: on, off, off, on, …; the block with publishing ends
    after the steps that follow its publication, so that what it does to them counts.

    interval: steps between publications, None for the default.
    """
    learning = Learning(folder, overrides, batch_size)
    count = interval or learning.interval
    learning.publish()
    ratios: list[float] = []
    shares: list[float] = []
    steps_ms: list[float] = []
    publish_ms: list[float] = []
    try:
        for number in range(rounds):
            took_s = {True: 0.0, False: 0.0}
            for on in (True, False) if number % 2 else (False, True):
                cost_s = learning.publish() if on else 0.0
                took_s[on] = cost_s + learning.steps(count)
                if on:
                    publish_ms.append(1e3 * cost_s)
                    shares.append(100 * cost_s / (took_s[on] - cost_s))
            ratios.append(100 * (took_s[True] / took_s[False] - 1))
            steps_ms.append(1e3 * took_s[False] / count)
    finally:
        learning.close()
    return {
        "interval_steps": count,
        "batch_size": batch_size,
        "step_ms": steps_ms,
        "publish_ms": publish_ms,
        "share_percent": shares,
        "slower_percent": ratios,
    }
