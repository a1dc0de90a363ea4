"""Success of the scripted experts on fresh start states, through devices and tasks.

.venv/bin/python benchmarks/study_experts.py --episodes 20 robosuite/Lift robosuite/Stack
"""

import argparse

from embodied.core.intervals import wilson
from embodied.run.evaluate import Evaluator
from sim.family import SimConfig


def main() -> None:
    """Print one line a task, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("tasks", nargs="+")
    options = parser.parse_args()
    print("| task | success | 95 % interval | median ticks to success |\n|---|---|---|---|")
    for task in options.tasks:
        evaluator = Evaluator(task, SimConfig(), rows=1, with_expert=True)
        results = evaluator.run(None, -1, range(options.episodes))
        evaluator.close()
        won = sorted(result.ticks for result in results if result.success)
        low, high = wilson(len(won), len(results))
        middle = won[len(won) // 2] if won else "–"
        interval = f"{100 * low:.0f}–{100 * high:.0f} %"
        print(f"| {task} | {len(won)}/{len(results)} | {interval} | {middle} |", flush=True)


if __name__ == "__main__":
    main()
