"""A vision-language-action policy on six tasks at once: cloned, then improved by acting (PA-RL).

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.study_vla --heads flow

One policy reads one camera, the hand's place and the instruction; its critic reads the instruction
and the simulator's state. Demonstrations are noisy, the reward is sparse, one robot of each task.
Judged on start states that are the same for all, fresh, and seen by no search: the policy by
itself and with its critic, cloned and after each part of the acting.
--screen clones on another seed and other states, to choose the noise. The command goes on where an
earlier one ended.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.study_vla.cells import EPISODES, HEADS, NOISE, TASKS, Cell, Judged
from embodied.core.intervals import wilson

STATES = range(20)
SCREENING_SEED, SCREENING_STATES = 900, range(100_000, 100_010)


def main() -> None:
    """Do what is missing; print a line of the table as it is ready."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", default=",".join(HEADS), help="comma-separated")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--noise", type=float, help="of the demonstrations; else each head's own")
    parser.add_argument("--episodes", type=int, help="of each task; else each head's own")
    parser.add_argument("--online", type=int, default=24000, help="gradient steps while it acts")
    parser.add_argument("--every", type=int, default=6000, help="of them until it is judged")
    parser.add_argument("--screen", action="store_true")
    parser.add_argument("--root", type=Path, default=Path("runs/study_vla"))
    options = parser.parse_args()
    heads: list[str] = options.heads.split(",")
    if unknown := {*heads} - {*HEADS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    seed, states = (SCREENING_SEED, SCREENING_STATES) if options.screen else (options.seed, STATES)
    names = [task.removeprefix("metaworld/") for task in TASKS]
    print(f"| head | stage | robot steps | minutes | {' | '.join(names)} | all | ticks |")
    print("|" + "---|" * (len(names) + 6), flush=True)
    for head in heads:
        noise = NOISE[head] if options.noise is None else options.noise
        cell = Cell(options.root, head, seed, noise, options.episodes or EPISODES[head])
        cell.train(0)
        show(cell, "clone", cell.judged("clone", states, alone=True))
        if options.screen:
            continue
        show(cell, "clone, its critic chooses", cell.judged("offline", states))
        for online in range(options.every, options.online + 1, options.every):
            cell.train(online)
            show(cell, f"{online} steps online", cell.judged(f"alone{online}", states, alone=True))
            chosen = cell.judged(f"online{online}", states)
            show(cell, f"{online} steps online, its critic chooses", chosen)


def show(cell: Cell, stage: str, judged: Judged) -> None:
    """A line of the table."""
    tasks = [judged.success[task] for task in TASKS]
    shown = [*map(said, tasks), said(np.concatenate(tasks).tolist())]
    print(
        f"| {cell.head} | {stage} | {judged.acted} | {cell.minutes:.0f} | {' | '.join(shown)} | "
        f"{judged.ticks:.0f} |",
        flush=True,
    )


def said(success: Sequence[bool]) -> str:
    """Successes in per cent, with their 95 % interval."""
    low, high = wilson(sum(success), len(success))
    return f"{100 * np.mean(success):.0f} % ({100 * low:.0f}–{100 * high:.0f})"


if __name__ == "__main__":
    main()
