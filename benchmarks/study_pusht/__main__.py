"""PushT, state, from the demonstrations by people: our policies beside LeRobot's DiffusionPolicy.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.study_pusht

Every contender sees the same observations of the same 206 demonstrations, in memory, trains for the
same processor time per thread, and acts from the same 100 evaluation start states for 300 ticks at
most. The command goes on where an earlier one ended; two of them share the work with --only.
Training is kept every --piece seconds, episodes 20 at a time; --stop-after ends it in between.
Contenders: flow-mlp, flow-unet, diffusion-unet (ours, as configs/experiment/pusht.yaml has them),
lerobot-small, lerobot-small-fast (ten times its learning rate, as ours), lerobot-default.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cloning import Demonstrations, Trainee, keep_fixed, latency_ms, play_pieces
from benchmarks.study_pusht.contenders import CONTENDERS, Plan, load_demonstrations, make_trainee
from benchmarks.study_pusht.lerobot import LeRobotTrainee, check_adapter
from benchmarks.study_pusht.table import entry, markdown
from embodied.core.rundir import RunDir
from embodied.run.evaluate import Evaluator
from sim.family import EVALUATION_SEEDS, SimConfig

CHECK_SEED = EVALUATION_SEEDS + 4242
ROWS = 20
QUICK_HORIZON = 40


def main() -> None:
    """Do what is missing, then print the table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="contenders, comma-separated")
    parser.add_argument("--minutes", type=float, default=20.0, help="training budget of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=0, help="2000000 while developing")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--override", action="append", default=[], help="of our contenders")
    parser.add_argument("--data", default="../shared/data/pusht_cchi_v7_lowdim.npz")
    parser.add_argument("--root", type=Path, default=Path("runs/study_pusht"))
    parser.add_argument("--piece", type=float, default=240.0, help="seconds between checkpoints")
    parser.add_argument("--stop-after", type=float, help="minutes")
    parser.add_argument("--quick", action="store_true", help="a smoke test of a minute")
    options = parser.parse_args()
    if options.quick:
        options.minutes, options.episodes, options.root = 0.05, 2, Path(f"{options.root}_quick")
        options.first_seed = options.first_seed or EVALUATION_SEEDS
        shutil.rmtree(options.root, ignore_errors=True)
    # The default network alone would take minutes.
    small = [name for name in CONTENDERS if name != "lerobot-default" or not options.quick]
    wanted = options.only.split(",") if options.only else small
    if unknown := set(wanted) - set(CONTENDERS):
        parser.error(f"unknown contenders {sorted(unknown)}; known: {', '.join(CONTENDERS)}")
    seeds = range(options.first_seed, options.first_seed + options.episodes)
    if work(wanted, seeds, options):
        report(wanted, seeds, options.root)
    else:
        print("not finished; the same command goes on", flush=True)


def work(wanted: list[str], seeds: range, options: argparse.Namespace) -> bool:
    """What is missing of training and episodes; False if the time was up before."""
    end_s = time.monotonic() + 60 * (options.stop_after or float("inf"))
    plan = Plan(
        options.root,
        options.data,
        60 * options.minutes,
        options.threads,
        options.seed,
        tuple(options.override),
    )
    torch.set_num_threads(options.threads)
    demonstrations = load_demonstrations(plan)
    sim = SimConfig(horizon=QUICK_HORIZON if options.quick else None)
    evaluator = Evaluator("pusht", sim, rows=min(ROWS, len(seeds)))

    def going() -> bool:
        return time.monotonic() < end_s

    try:
        for name in wanted:
            run = RunDir(options.root / name)
            run.acquire()
            settings = (plan.budget_s, plan.threads, plan.seed, plan.overrides, CONTENDERS[name])
            keep_fixed(run.path / "settings.json", settings)
            trainee = make_trainee(name, plan, demonstrations)
            while not trainee.done:
                if not going():
                    return False
                trainee.learn(options.piece)
                print(f"{name}: {trainee.step} steps in {trainee.seconds:.0f} s", flush=True)
            for sampler in CONTENDERS[name].samplers:
                if not _act(run, trainee, sampler, evaluator, seeds, demonstrations, going):
                    return False
            run.release()
    finally:
        evaluator.close()
    return True


def _act(
    run: RunDir,
    trainee: Trainee,
    sampler: str,
    evaluator: Evaluator,
    seeds: range,
    demonstrations: Demonstrations,
    going: Callable[[], bool],
) -> bool:
    """Latency and episodes of a trained contender under one of its samplers."""
    if not any(row["sampler"] == sampler for row in run.read("metrics", "trained")):
        policy = trainee.actor(sampler)
        if isinstance(trainee, LeRobotTrainee):
            difference = check_adapter(policy, seed=CHECK_SEED)
            print(f"{run.path.name} {sampler}: adapter within {difference:.2g} px of select_action")
        row = {
            "sampler": sampler,
            "parameters": trainee.parameters,
            "steps": trainee.step,
            "seconds": trainee.seconds,
            "threads": torch.get_num_threads(),
            "latency_ms": latency_ms(policy, demonstrations),
        }
        run.metrics("trained", row)
    whole = play_pieces(
        run,
        sampler,
        evaluator,
        lambda: trainee.actor(sampler),
        seeds,
        going,
        fresh=seeds[-1] < EVALUATION_SEEDS,
    )
    print(f"{run.path.name} {sampler}: episodes {'done' if whole else 'begun'}", flush=True)
    return whole


def report(wanted: list[str], seeds: range, root: Path) -> None:
    """The table of what is there."""
    cells = [(name, sampler) for name in wanted for sampler in CONTENDERS[name].samplers]
    entries = [entry(RunDir(root / name), name, sampler, seeds) for name, sampler in cells]
    print(f"\n{len(seeds)} start states, seeds {seeds[0]} to {seeds[-1]}; one training run each.\n")
    print(markdown([e for e in entries if e is not None]))


if __name__ == "__main__":
    main()
