"""How much of its speed alone a learner keeps beside actors, and where the rest goes.

The run of `make demo` (two robots at real time), without evaluator. Windows of gradient steps
alone, the actors stopped, and beside them take turns. A step's time is on a core, ready while no
core is free, or asleep (waiting for batches, for the disk): what is more of each, beside actors,
says where time goes. Then, in this process, the same gradient step on one batch, beside a process
that steps MuJoCo for as much of the time as the actors took, and beside one that never sleeps: what
the machine takes of any two processes, whoever wrote them.
"""

import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.asynchrony.session import LOG_STEPS, Session, Spent, spent
from benchmarks.buffer.measure import Row, rate_of, ratio, spread, take_turns
from embodied.core.config import convert
from embodied.core.errors import EmbodiedError
from embodied.core.rundir import RunDir
from embodied.core.seeds import make_rng
from embodied.run import build
from embodied.run.config import TrainConfig

LEAST = 0.95


@dataclass(frozen=True, slots=True)
class Window:
    """Of a gradient step, in seconds: all, on a core, ready for one. others: share of a core that
    the run's other roles had."""

    step_s: float
    cpu_s: float
    ready_s: float
    others: float

    @property
    def asleep_s(self) -> float:
        """Neither on a core nor ready for one."""
        return self.step_s - self.cpu_s - self.ready_s


def window(session: Session, rows: int, *beside: str) -> Window:
    """So many rows' gradient steps, alone or with "actor" beside."""
    learner = [session.pids["learner"]]
    others = [pid for name, pid in session.pids.items() if name != "learner"]
    before, theirs = spent(learner), spent(others)
    taken_s = session.learn(rows, *beside)
    own: Spent = spent(learner) - before
    steps = rows * LOG_STEPS
    shared = (spent(others) - theirs).cpu_s / taken_s
    return Window(taken_s / steps, own.cpu_s / steps, own.ready_s / steps, shared)


def in_the_run(
    folder: Path, overrides: tuple[str, ...], repetitions: int, seconds: float
) -> tuple[list[Row], RunDir, float]:
    """Rows of the learner in the run, the run, and the share of a core that its actors took."""
    alone: list[Window] = []
    beside: list[Window] = []
    with Session(folder, overrides) as session:
        step_s = session.learn(1) / LOG_STEPS
        rows = max(1, round(seconds / step_s / LOG_STEPS))
        for number in range(repetitions):
            for acts in (True, False) if number % 2 else (False, True):
                kinds = ("actor",) if acts else ()
                (beside if acts else alone).append(window(session, rows, *kinds))
    actors = statistics.median(b.others - a.others for a, b in zip(alone, beside, strict=True))
    return table(alone, beside, session.run), session.run, max(0.0, actors)


def table(alone: list[Window], beside: list[Window], run: RunDir) -> list[Row]:
    """What the windows say, in rows; a window alone and the one beside it are of one repetition."""

    def rate(windows: list[Window]) -> float:
        return statistics.median(1 / w.step_s for w in windows)

    def more(part: Callable[[Window], float]) -> float:
        return statistics.median(
            100 * (part(b) - part(a)) / a.step_s for a, b in zip(alone, beside, strict=True)
        )

    kept = statistics.median(a.step_s / b.step_s for a, b in zip(alone, beside, strict=True))
    other = 100 * statistics.median(b.others for b in beside)
    timings = run.read("timings", "learner")
    data = statistics.median(row["data_share"] for row in timings)
    said = (
        f"other roles {other:.0f} % of a core; waits for data {100 * data:.1f} %, "
        f"publishes {100 * timings[-1]['publish_share']:.1f} %"
    )
    slow = "of a step's time alone"
    return [
        Row(
            "learner in the run",
            "alone",
            rate(alone),
            "steps/s",
            note=spread([1 / w.step_s for w in alone]),
        ),
        Row(
            "learner in the run",
            "beside actors",
            rate(beside),
            "steps/s",
            kept,
            LEAST,
            note=f"ratio to alone; {spread([1 / w.step_s for w in beside])}; {said}",
        ),
        Row("a step is longer", "on a core", more(lambda w: w.cpu_s), f"% {slow}"),
        Row("a step is longer", "ready, no core free", more(lambda w: w.ready_s), f"% {slow}"),
        Row("a step is longer", "asleep", more(lambda w: w.asleep_s), f"% {slow}"),
    ]


def bare_step(run: RunDir) -> Callable[[], int]:
    """The run's gradient step, on one batch of its data, in this process."""
    import torch

    from embodied.learn.learner import Learner

    config = convert(run.read_config(), TrainConfig)
    torch.set_num_threads(config.learner.threads)
    with build.make_reader(run, config) as reader:
        reader.refresh()
        sampler: Any = build.make_sampling(config, reader).sampler
        sampler.refresh()
        made = build.policy_format(config)
        batch = sampler.sample(config.learner.batch_size, make_rng(0, "bare step"))
        batch = {key: array.copy() for key, array in batch.items()}
        policy = made.make(sampler.statistics(made.statistics))
    learner = Learner(policy, made, config.learner, seed=0)

    def step() -> int:
        learner.update(batch)
        return 1

    return step


def bare(run: RunDir, share: float, rounds: int, seconds: float) -> list[Row]:
    """Rows of the bare step, beside nothing and beside MuJoCo."""
    step = bare_step(run)
    task = run.read_config()["task"]
    part, whole = f"beside MuJoCo, {100 * share:.0f} % of the time", "beside MuJoCo, all the time"
    neighbours: dict[str, subprocess.Popen[bytes]] = {}

    def measured(name: str | None) -> Callable[[], float]:
        def measure() -> float:
            if name is not None:
                neighbours[name].send_signal(signal.SIGCONT)
            rate = rate_of(step, seconds)
            if name is not None:
                neighbours[name].send_signal(signal.SIGSTOP)
                if (status := neighbours[name].poll()) is not None:
                    raise EmbodiedError(f"the process {name} ended with {status}")
            return rate

        return measure

    try:
        for name, busy in ((part, share), (whole, 1.0)):
            words = ("-m", "benchmarks.asynchrony.neighbour", str(busy), task)
            neighbours[name] = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE)
            stdout = neighbours[name].stdout
            assert stdout is not None
            stdout.readline()
            neighbours[name].send_signal(signal.SIGSTOP)
        rates = take_turns(
            {"alone": measured(None), part: measured(part), whole: measured(whole)}, rounds
        )
    finally:
        for process in neighbours.values():
            process.kill()
            process.wait()
    return [
        Row(
            "bare step",
            name,
            statistics.median(rates[name]),
            "steps/s",
            None if name == "alone" else ratio(rates, name, "alone"),
            note=("" if name == "alone" else "ratio to alone; ") + spread(rates[name]),
        )
        for name in rates
    ]
