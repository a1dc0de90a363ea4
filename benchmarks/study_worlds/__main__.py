"""World models beside a diffusion policy of the same transformer, in equal processor time.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.study_worlds --jobs 2       # three hours

Parts (contenders.py says who takes part, on which tasks):

  policies   UWM and UVA as policies beside diffusion; UWM whose decisions have no tokens for what
             is seen next
  future     with what is seen later, and without: UWM with the present shown in its place, or with
             nothing shown; UVA in its policy mode alone
  labels     labels in a tenth of the episodes, the others without actions, or left out
  tracking   predictions beside the guess that nothing changes; inverse mode beside policy mode,
             in error and executed
  ranking    which of a diffusion policy's proposals is executed: the first, a world model's or the
             simulator's choice

A score is the greatest coverage of an episode of PushT, or success. Start states are the same for
all; trainings take --minutes of processor time on one thread. What is there is not done again, so
that pieces can be run with --parts, --tasks and --seeds, and trainings go on where they stopped.
"""

import argparse
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.cloning import keep_fixed
from benchmarks.study_worlds import table
from benchmarks.study_worlds.cells import Cell, Study, recorded, work_on
from benchmarks.study_worlds.contenders import PARTS, TASKS, WORLDS
from benchmarks.study_worlds.ranking import rank
from benchmarks.study_worlds.tracking import Tracked, track

SCORED = ("policies", "future", "labels")


def main() -> None:
    """Do what is missing of the wanted parts, then print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--seeds", default="1", help="of weights and batches")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each training")
    parser.add_argument("--episodes", type=int, default=50, help="start states")
    parser.add_argument("--proposals", type=int, default=16, help="of the part ranking")
    parser.add_argument("--data", default="../shared/data", help="folder of the PushT files")
    parser.add_argument("--root", type=Path, default=Path("runs/study_worlds"))
    parser.add_argument("--quick", action="store_true", help="a smoke test of minutes")
    options = parser.parse_args()
    parts, tasks = options.parts.split(","), options.tasks.split(",")
    if unknown := {*parts} - {*PARTS} | {*tasks} - {*TASKS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    fixed = {"data": options.data, "proposals": options.proposals}
    study = Study(str(options.root), options.minutes, options.episodes, **fixed)
    if options.quick:
        root = f"{options.root}_quick"
        shutil.rmtree(root, ignore_errors=True)
        small = {"horizon": 16, "limit": 12, "held": 2, "proposals": 4}
        study, seeds = Study(root, 0.02, 2, **(fixed | small)), seeds[:1]
    keep_fixed(Path(study.root) / "settings.json", study)
    work(study, parts, tasks, seeds, options.jobs)
    for line in report(study, parts, tasks, seeds):
        print(line, flush=True)


def cells(study: Study, part: str, task: str, seeds: Sequence[int]) -> list[Cell]:
    """What a part needs of a task."""
    if task not in PARTS[part].tasks:
        return []
    return [Cell(study, task, name, seed) for name in PARTS[part].contenders for seed in seeds]


def work(
    study: Study, parts: Sequence[str], tasks: Sequence[str], seeds: Sequence[int], jobs: int
) -> None:
    """Train and judge all that the parts need."""
    wanted = [cell for part in parts for task in tasks for cell in cells(study, part, task, seeds)]
    for task in dict.fromkeys(cell.task for cell in wanted):  # scripted ones are collected once
        if TASKS[task].file is None:
            recorded(study, task, Cell(study, task, "diffusion", 0).config())
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(work_on, cell) for cell in dict.fromkeys(wanted)]):
            print(done.result(), flush=True)


def report(
    study: Study, parts: Sequence[str], tasks: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    """The wanted parts' tables; of trained world models, first what is asked of them."""
    torch.set_num_threads(1)
    lines = [f"{study.episodes} start states; seeds {', '.join(map(str, seeds))}."]
    for part in parts:
        wanted = [cell for task in tasks for cell in cells(study, part, task, seeds)]
        grouped: dict[tuple[str, str], list[Cell]] = {}
        for cell in wanted:
            grouped.setdefault((cell.task, cell.contender), []).append(cell)
        if not grouped:
            continue
        if part in SCORED:
            found = {key: [cell.scores() for cell in group] for key, group in grouped.items()}
            steps = {
                key: [cell.run.read("metrics", "trained")[-1]["steps"] for cell in group]
                for key, group in grouped.items()
            }
            lines += table.scores(part, found, steps, PARTS[part].compared)
        elif part == "tracking":
            tracked: dict[tuple[str, str], list[Tracked]] = {
                key: [track(cell) for cell in group] for key, group in grouped.items()
            }
            lines += table.tracking(tracked)
        else:
            ranked: dict[str, table.BySeed] = {}
            for seed in seeds:
                proposer, *worlds = (
                    Cell(study, "pusht", name, seed) for name in ("diffusion", *WORLDS)
                )
                chosen = rank(proposer, dict(zip(WORLDS, worlds, strict=True)))
                for chooser, scores in chosen.items():
                    ranked.setdefault(chooser, []).append(scores)
            lines += table.ranking(ranked)
    return lines


if __name__ == "__main__":
    main()
