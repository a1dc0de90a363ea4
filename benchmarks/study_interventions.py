"""How often a supervisor still has to step in while the policy learns from it (HG-DAgger).

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.study_interventions

From few demonstrations, in lockstep, with the scripted supervisor of algorithm=hg_dagger. An
intervention after which the task is still not done is in vain: it teaches nothing. The command goes
on where an earlier one ended.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study_improvement.cells import FLOW, SIMILAR, STEPS_PER_ROUND, call
from embodied.core.rundir import RunDir

SETTINGS = [
    "algorithm=hg_dagger",
    "demonstrations.episodes=5",
    "sim.horizon=500",  # time for the supervisor's whole script after its patience
    "learner.batch_size=128",
    "learner.publish_every=200",
]
BLOCK = 25


def main() -> None:
    """Train, then print the table, in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="metaworld/peg-insert-side")
    parser.add_argument("--steps", type=int, default=45_000, help="of the robot and of gradients")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--root", type=Path, default=Path("runs/study_interventions"))
    options = parser.parse_args()
    run = RunDir(options.root / f"{options.task.replace('/', '-')}-{options.seed}")
    call(
        "train",
        f"task={options.task}",
        f"seed={options.seed}",
        *SIMILAR,
        f"actors.ticks_per_round={STEPS_PER_ROUND}",
        *FLOW,
        *SETTINGS,
        f"learner.steps={options.steps}",
        f"run.dir={run.path}",
        f"run.resume={str(run.exists()).lower()}",
    )
    report([row for row in run.read("metrics", "actor0") if not row["demonstration"]])


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each whole block of episodes that a policy began, given their metrics."""
    print(
        "| episodes | robot steps until then | interventions per 100 episodes | of these in vain | "
        "alone successful |"
    )
    print("|---|---|---|---|---|")
    steps = np.cumsum([row["ticks"] for row in rows])
    for start in range(0, len(rows) - BLOCK + 1, BLOCK):
        block = rows[start : start + BLOCK]
        helped = np.mean([row["interventions"] > 0 for row in block])
        vain = np.mean([row["interventions"] > 0 and not row["success"] for row in block])
        alone = np.mean([row["success"] and not row["interventions"] for row in block])
        print(
            f"| {start + 1}–{start + BLOCK} | {steps[start + BLOCK - 1]} | "
            f"{100 * helped:.0f} | {100 * vain:.0f} | {100 * alone:.0f} % |"
        )


if __name__ == "__main__":
    main()
