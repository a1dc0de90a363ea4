"""Gradient steps of PA-RL a second, without and with a process that proposes beside the learner.

    .venv/bin/python -m benchmarks.proposals [--rounds 5] [--steps 200] [--processes 0 1]

A flow of 16 steps on the point mass, whose 8 proposals serve for 50 gradient steps, batches of 16
of 500 random windows, each of which is drawn 1.6 times in so many steps. Numbers of processes take
turns within every round, each with a learner of its own that has seen the windows before it is
timed; medians of the rounds, and ranges.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from embodied.buffer.sample.statistics import FeatureStats
from embodied.core.rundir import RunDir
from embodied.core.specs import PolicySpec
from embodied.run import build
from embodied.run.config import TrainConfig, load_train

WINDOWS, AGE, WARM_UP = 500, 50, 100
OPTIONS = [
    *("task=pointmass", "algorithm=parl", "policy.num_steps=16", "policy.n_obs_steps=1"),
    *("+policy.network.width=256", "learner.batch_size=16", f"algorithm.proposals_age={AGE}"),
    *("algorithm.cloning_steps=0", "algorithm.offline_steps=0"),
]

Batch = dict[str, np.ndarray]


def statistics_of(size: int) -> FeatureStats:
    """Of numbers between −1 and 1."""
    low, zero, one = [-1.0] * size, [0.0] * size, [1.0] * size
    return FeatureStats(mean=zero, std=one, min=low, max=one, q01=low, q99=one, count=WINDOWS)


def batches(spec: PolicySpec, size: int) -> Iterator[Batch]:
    """Random ones of WINDOWS random windows."""
    rng = np.random.default_rng(0)
    windows: Batch = {
        prefix + key: rng.uniform(-1, 1, (WINDOWS, spec.n_obs_steps, *array.shape))
        for key, array in spec.observation.items()
        for prefix in ("", "next.")
    }
    windows["action"] = rng.uniform(-1, 1, (WINDOWS, spec.horizon, spec.action.size))
    windows["return"] = rng.uniform(-4, 0, WINDOWS)
    windows["discount"] = np.full(WINDOWS, 0.9)
    while True:
        rows = rng.integers(WINDOWS, size=size)
        batch = {key: array[rows].astype(np.float32) for key, array in windows.items()}
        yield {**batch, "action_is_pad": np.zeros((size, spec.horizon), bool)}


def measure(config: TrainConfig, folder: Path, steps: int) -> dict[str, float]:
    """Steps a second, and metrics of the last one."""
    import torch

    from embodied.learn.learner import Learner
    from embodied.run.proposer import start_proposers

    torch.set_num_threads(config.learner.threads)
    with ExitStack() as started:
        proposers = None
        if config.algorithm["proposers"]:
            proposers = started.enter_context(closing(start_proposers(RunDir(folder), config)))
        form, spec = build.policy_format(config, proposers), build.policy_spec(config)
        sizes = {**{k: a.size for k, a in spec.observation.items()}, "action": spec.action.size}
        policy = form.make({key: statistics_of(sizes[key]) for key in form.statistics})
        learner = Learner(policy, form, config.learner, seed=1)
        drawn = batches(spec, config.learner.batch_size)
        for _ in range(WARM_UP):
            learner.update(next(drawn))
        metrics: dict[str, float] = {}
        started_s = time.perf_counter()
        for _ in range(steps):
            metrics = learner.update(next(drawn))
        return {**metrics, "steps_per_s": steps / (time.perf_counter() - started_s)}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {count: [] for count in options.processes}
    for _ in range(options.rounds):
        for count in options.processes:
            config = load_train([*OPTIONS, f"algorithm.proposers={count}"])
            with tempfile.TemporaryDirectory() as folder:
                found[count].append(measure(config, Path(folder), options.steps))
    print("| processes | gradient steps a second | age of the proposals, steps |\n|---|---|---|")
    for count, rows in found.items():
        rates = [row["steps_per_s"] for row in rows]
        ages = [row["proposals_age"] for row in rows if "proposals_age" in row]
        said = f"{statistics.median(ages):.0f}" if ages else f"at most {AGE - 1}"
        spread = f"{min(rates):.1f} to {max(rates):.1f}"
        print(f"| {count} | {statistics.median(rates):.1f} ({spread}) | {said} |")


if __name__ == "__main__":
    main()
