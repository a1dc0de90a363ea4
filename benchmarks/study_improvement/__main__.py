"""From noisy demonstrations to success by acting: PA-RL beside what could do it without.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.study_improvement --jobs 2

Sparse reward, one robot, one critic step for each of its steps. Noise and horizon of
the demonstrations were fixed by benchmarks/study_improvement/screening.py on other seeds; start
states are the same for every contender, fresh, and seen by no search. The command goes on where an
earlier one ended, and prints the tables of what is there; --tasks, --contenders and --seeds choose.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.study_improvement.cells import CONTENDERS, SETTINGS, Cell, setting, work
from benchmarks.study_improvement.judging import Judged
from embodied.core.intervals import paired_bootstrap, wilson

STATES = range(100)
BASIS = "PA-RL"


def main() -> None:
    """Do what is missing, then print the tables in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default=",".join(SETTINGS), help="comma-separated")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated")
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--root", type=Path, default=Path("runs/study_improvement"))
    options = parser.parse_args()
    tasks, contenders = options.tasks.split(","), options.contenders.split(",")
    if unknown := {*tasks} - {*SETTINGS} | {*contenders} - {*CONTENDERS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    cells = [
        Cell(options.root, task, setting(task, contender), contender, int(seed))
        for seed in options.seeds.split(",")
        for task in tasks
        for contender in contenders
    ]
    outcomes: dict[Cell, Judged] = {}
    trained = [cell for cell in cells if not CONTENDERS[cell.contender].averaged]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for cell, done in chain(_done(pool, trained), _done(pool, [*{*cells} - {*trained}])):
            named = f"{cell.task}, {cell.contender}, seed {cell.seed}"
            try:
                judged, seconds = done.result()
            except SystemExit as error:  # the others go on; what failed is left out of the table
                print(f"{named}: {error}", flush=True)
                continue
            outcomes[cell] = judged
            print(
                f"{named}: {sum(judged.success)} of {len(judged.success)}, "
                f"{np.mean(judged.ticks):.0f} ticks, after {judged.steps} steps; {seconds:.0f} s",
                flush=True,
            )
    found = {
        (task, contender): [
            outcomes[cell]
            for cell in cells
            if (cell.task, cell.contender) == (task, contender) and cell in outcomes
        ]
        for task in tasks
        for contender in contenders
    }
    report(found, tasks, contenders)
    if len(outcomes) < len(cells):
        raise SystemExit(f"{len(cells) - len(outcomes)} of {len(cells)} are missing; see above")


def _done(
    pool: ProcessPoolExecutor, cells: Sequence[Cell]
) -> Iterator[tuple[Cell, "Future[tuple[Judged, float]]"]]:
    """As they are ready."""
    begun = {pool.submit(work, cell, STATES): cell for cell in cells}
    for done in as_completed(begun):
        yield begun[done], done


def report(
    found: dict[tuple[str, str], list[Judged]], tasks: Sequence[str], contenders: Sequence[str]
) -> None:
    """Success, length of episodes, and PA-RL's lead."""
    print("\n| task | demonstrations' ticks |" + "".join(f" {c} |" for c in contenders))
    print("|" + "---|" * (len(contenders) + 2))
    for task in tasks:
        shown = [found[task, contender] for contender in contenders]
        length = np.mean([judged.demonstrated for group in shown for judged in group] or [np.nan])
        print(f"| {task} | {length:.0f} | " + " | ".join(map(said, shown)) + " |")
    print("\nSuccess with its 95 % interval, mean ticks of all episodes, and success by seed.")
    for contender in contenders:
        if BASIS not in contenders or contender == BASIS:
            continue
        pairs = [(found[task, BASIS], found[task, contender]) for task in tasks]
        if any(len(basis) != len(other) for basis, other in pairs):
            continue
        leads = [
            np.concatenate([one.success for pair in pairs for one in pair[side]]) for side in (0, 1)
        ]
        mean, low, high = paired_bootstrap(list(leads[0]), list(leads[1]))
        print(
            f"{BASIS} − {contender}: {100 * mean:+.1f} points "
            f"(95 % {100 * low:+.1f} to {100 * high:+.1f})"
        )


def said(group: Sequence[Judged]) -> str:
    """A cell of the table: all seeds together, then each."""
    if not group:
        return "–"
    outcomes = np.concatenate([judged.success for judged in group])
    low, high = wilson(int(outcomes.sum()), len(outcomes))
    each = ", ".join(str(sum(judged.success)) for judged in group)
    ticks = np.mean([judged.ticks for judged in group])
    return (
        f"{100 * outcomes.mean():.1f} % ({100 * low:.0f}–{100 * high:.0f}), {ticks:.0f}; [{each}]"
    )


if __name__ == "__main__":
    main()
