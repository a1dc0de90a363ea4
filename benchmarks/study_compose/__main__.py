"""Does a composition of two imperfect policies beat the better of them, on fresh start states?

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.study_compose

benchmarks/study_compose/pairs.py fixes pairs, recipes and the search's budget in advance. For each
pair: both parents are trained, w is chosen on search seeds (operator "mix"), and composition,
parents and controls act from the same fresh evaluation start states. Controls: the parent that was
better on the search seeds trained twice as long, and a parent drawn at random for each chunk. The
command goes on where an earlier one ended; two of them share the work with --only. --parents trains
the parents of all pairs and prints their fingerprints, to be written down before
any composition acts.
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.cloning import keep_fixed
from benchmarks.study_compose.pairs import PAIRS, table
from benchmarks.study_compose.work import LABELS, TimeUp, Work
from embodied.core.intervals import bootstrap_mean, paired_bootstrap

CONTENDERS = (*LABELS, "composed", "double", "random")


def main() -> None:
    """Do what is missing, then print the tables in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"pairs, comma-separated, of {', '.join(PAIRS)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="../shared/data/pusht_cchi_v7_lowdim.npz")
    parser.add_argument("--root", type=Path, default=Path("runs/study_compose"))
    parser.add_argument("--piece", type=float, default=240.0, help="seconds between checkpoints")
    parser.add_argument("--stop-after", type=float, help="minutes")
    parser.add_argument("--parents", action="store_true", help="train the parents and stop")
    parser.add_argument("--quick", action="store_true", help="a smoke test of a minute")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fixed, root = table(quick=options.quick), options.root
    if options.quick:
        root = Path(f"{root}_quick")
        shutil.rmtree(root, ignore_errors=True)
    keep_fixed(root / "table.json", fixed)
    wanted = options.only.split(",") if options.only else list(fixed.pairs)
    if unknown := set(wanted) - set(fixed.pairs):
        parser.error(f"unknown pairs {sorted(unknown)}; known: {', '.join(fixed.pairs)}")
    end_s = time.monotonic() + 60 * (options.stop_after or float("inf"))
    work = Work(root, fixed, options.data, options.piece, lambda: time.monotonic() < end_s)
    try:
        for name in wanted:
            work.parents(name)
            if options.parents:
                print(*work.fingerprints(name), sep="\n", flush=True)
            else:
                work.compositions(name)
    except TimeUp:
        print("not finished; the same command goes on", flush=True)
        return
    if options.parents:
        return
    report(work, list(fixed.pairs))


def report(work: Work, names: list[str]) -> None:
    """Results of the finished pairs, the mean gain, and the sweeps."""
    finished = {name: scores for name in names if (scores := work.scores(name))}
    print("\n| pair | w |" + "".join(f" {c} |" for c in CONTENDERS) + " gain (95 %) |")
    print("|---|---|" + "---|" * (len(CONTENDERS) + 1))
    gains: list[float] = []
    against: dict[str, list[float]] = {"double": [], "random": []}
    for name, scores in finished.items():
        better = max(LABELS, key=lambda label: float(np.mean(scores[label])))
        gain = paired_bootstrap(scores["composed"], scores[better])
        gains += list(np.subtract(scores["composed"], scores[better]))
        for control, found in against.items():
            found += list(np.subtract(scores["composed"], scores[control]))
        cells = [f"{np.mean(scores[c]):.3f} {_interval(scores[c])}" for c in CONTENDERS]
        w = work.results(name)["weights"][0]
        print(
            f"| {name} | {w:.1f} | "
            + " | ".join(cells)
            + " | {:+.3f} ({:+.3f} to {:+.3f}) |".format(*gain)
        )
    if finished:
        n = len(next(iter(finished.values()))["a"])
        print(
            f"\n{len(finished)} pairs, {n} fresh start states each, one training run of each "
            "parent; success, or the score on pusht. Gain: over the parent that is better on these "
            "start states."
        )
        print(f"Mean gain over all pairs: {_signed(gains)}")
        for control, found in against.items():
            print(f"Composed − {control}, mean over all pairs: {_signed(found)}")
    for name in finished:
        sweep = sorted(work.results(name)["tried"], key=lambda row: row["weights"][0])
        points = [f"{t['weights'][0]:.1f}: {t['mean']:.2f} ({t['episodes']})" for t in sweep]
        print(f"Sweep of {name}, w: mean on search seeds (episodes): {', '.join(points)}")


def _interval(values: list[float]) -> str:
    low, high = bootstrap_mean(values)
    return f"({low:.3f}–{high:.3f})"


def _signed(differences: list[float]) -> str:
    low, high = bootstrap_mean(differences)
    mean = float(np.mean(differences))
    return f"{mean:+.3f} (95 % paired bootstrap {low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    main()
