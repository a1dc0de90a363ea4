"""Which noise of the demonstrations leaves a clone between 30 and 50 %: on seeds of its own.

OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.study_improvement.screening --output runs/screening
"""

import argparse
import itertools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.study_improvement.cells import CONTENDERS, Cell, Setting

SEED = 900
STATES = range(100_000, 100_040)


def screen(cell: Cell) -> str:
    """Clone, and say how it does."""
    setting = cell.setting
    tried = f"| {cell.task} | {setting.episodes} | {setting.noise} | {setting.horizon} |"
    try:
        cell.train()
    except SystemExit as error:  # demonstrations that are not to be had, above all
        return f"{tried} {error} |"
    judged = cell.judged(STATES)
    return (
        f"{tried} {100 * np.mean(judged.success):.0f} % | {np.mean(judged.ticks):.0f} | "
        f"{judged.demonstrated:.0f} |"
    )


def main() -> None:
    """A line for each task, noise and horizon, in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", required=True, help="comma-separated")
    parser.add_argument("--episodes", default="20", help="comma-separated")
    parser.add_argument("--noises", required=True, help="comma-separated")
    parser.add_argument("--horizons", required=True, help="comma-separated, in ticks")
    clones = [name for name, contender in CONTENDERS.items() if not contender.acts]
    parser.add_argument("--clone", choices=clones, default=clones[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    tried = itertools.product(
        options.tasks.split(","),
        map(int, options.episodes.split(",")),
        map(float, options.noises.split(",")),
        map(int, options.horizons.split(",")),
    )
    cells = [
        Cell(
            options.output / f"{episodes}-{noise}-{horizon}",
            task,
            Setting(episodes, noise, horizon, 0),
            options.clone,
            SEED,
        )
        for task, episodes, noise, horizon in tried
    ]
    print("| task | demonstrations | noise | horizon | clone | its ticks | demonstrations' ticks |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for line in pool.map(screen, cells):
            print(line, flush=True)


if __name__ == "__main__":
    main()
