"""Behaviour cloning against DAgger, flow against diffusion, from few scripted demonstrations.

Every contender learns in lockstep for the same number of gradient steps and is judged on the same
start states; differences get paired bootstrap intervals. Finished runs are kept: the study can
be stopped and started again. Run from the repository root:

    .venv/bin/python benchmarks/study_imitation.py --jobs 2
    .venv/bin/python benchmarks/study_imitation.py --suite robosuite --jobs 2
"""

import argparse
import itertools
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from embodied.core.intervals import paired_bootstrap, wilson
from embodied.core.rundir import RunDir

SUITES = {
    "metaworld": (
        [
            "metaworld/peg-insert-side",
            "metaworld/assembly",
            "metaworld/basketball",
            "metaworld/box-close",
            "metaworld/pick-place-wall",
            "metaworld/stick-pull",
        ],
        ["actors.ticks_per_round=200", "evaluation.final_episodes=50"],
    ),
    "robosuite": (
        ["robosuite/Lift", "robosuite/PickPlaceCan"],
        ["actors.ticks_per_round=100", "evaluation.final_episodes=20"],
    ),
}
POLICIES = ["flow", "diffusion"]
ALGORITHMS = ["bc", "dagger"]


def train(root: Path, task: str, policy: str, algorithm: str, steps: int, extra: list[str]) -> dict:
    """One run, or the result of an earlier one; returns the last evaluation's row."""
    run = RunDir(root / f"{task.replace('/', '-')}-{policy}-{algorithm}")
    final = [row for row in run.read("metrics", "evaluation") if row["final"]]
    if final and run.read_config()["learner"]["steps"] != steps:
        raise SystemExit(f"{run.path} was trained for another number of steps; use another --root")
    if not final:
        overrides = [
            f"task={task}",
            f"policy={policy}",
            f"algorithm={algorithm}",
            f"run.dir={run.path}",
            f"run.resume={str(run.exists()).lower()}",
            "run.mode=lockstep",
            "actors.speed=0",
            f"learner.steps={steps}",
            "evaluation.episodes=0",
            "evaluation.videos=0",
            "learner.precision=bfloat16",
            *extra,
        ]
        started_s = time.monotonic()
        command = [sys.executable, "-m", "embodied.cli.main", "train", *overrides]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}\n{result.stdout}\n{result.stderr}")
        final = [row for row in run.read("metrics", "evaluation") if row["final"]]
        print(
            f"{run.path.name}: {final[-1]['successes']}/{final[-1]['episodes']} "
            f"in {time.monotonic() - started_s:.0f} s",
            flush=True,
        )
    seconds = [row["seconds"] for row in run.read("timings", "learner") if "seconds" in row]
    return {**final[-1], "train_seconds": seconds[-1] if seconds else float("nan")}


def main() -> None:
    """Run what is missing, then print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="metaworld")
    parser.add_argument("--root", type=Path, default=Path("runs/study_imitation"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    tasks, extra = SUITES[options.suite]
    cells = list(itertools.product(tasks, POLICIES, ALGORITHMS))
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = pool.map(lambda cell: train(options.root, *cell, options.steps, extra), cells)
        results = dict(zip(cells, rows, strict=True))
    contenders = list(itertools.product(POLICIES, ALGORITHMS))
    print("| task |" + "".join(f" {p} {a} |" for p, a in contenders))
    print("|---|" + "---|" * len(contenders))
    for task in tasks:
        line = f"| {task} |"
        for contender in contenders:
            row = results[task, *contender]
            low, high = wilson(row["successes"], row["episodes"])
            line += f" {row['successes']}/{row['episodes']} ({100 * low:.0f}–{100 * high:.0f} %) |"
        print(line)
    for task in tasks:
        assert len({tuple(results[task, *c]["seeds"]) for c in contenders}) == 1, task
    outcomes = {
        contender: np.concatenate([results[task, *contender]["success"] for task in tasks])
        for contender in contenders
    }
    print("| mean |" + "".join(f" {100 * outcomes[c].mean():.1f} % |" for c in contenders))
    seconds = [row["train_seconds"] for row in results.values()]
    print(
        f"\nEach cell is one training run; intervals are over start states. "
        f"Training: {options.steps} steps, {np.nanmin(seconds):.0f}–{np.nanmax(seconds):.0f} s."
    )
    pairs = [((p, "dagger"), (p, "bc")) for p in POLICIES]
    pairs += [(("flow", a), ("diffusion", a)) for a in ALGORITHMS]
    for a, b in pairs:
        mean, low, high = paired_bootstrap(list(outcomes[a]), list(outcomes[b]))
        print(
            f"{' '.join(a)} − {' '.join(b)}: {100 * mean:+.1f} points "
            f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
        )


if __name__ == "__main__":
    main()
