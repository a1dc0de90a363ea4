"""Control-loop figures of a finished run, and its learner's speed beside the learner alone.

    .venv/bin/python benchmarks/control_loop.py runs/<a run of make demo>

The solo learner trains on the same recorded data, with the same settings, in this process and
with nothing else running; both speeds come from this machine.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from embodied.cli.report import control_figures
from embodied.core.config import convert
from embodied.core.rundir import RunDir
from embodied.run.build import make_trainer
from embodied.run.config import TrainConfig


@dataclass
class Elsewhere(RunDir):
    """A run's data with checkpoints and weights somewhere else."""

    source: RunDir
    scratch: Path

    def __post_init__(self) -> None:
        super().__init__(self.source.path)

    @property
    def weights(self) -> Path:
        """A fresh weight store."""
        return self.scratch / "weights"

    @property
    def checkpoints(self) -> Path:
        """A folder without checkpoints."""
        return self.scratch


def solo_rates(run: RunDir, config: TrainConfig, repetitions: int, seconds: float) -> list[float]:
    """Gradient steps per second of the learner alone, publishing included, per repetition."""
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(Elsewhere(run, Path(scratch)), config, lambda row: None)
        trainer.start()
        for _ in range(repetitions):
            started_s, first = time.monotonic(), trainer.step
            while time.monotonic() - started_s < seconds:
                trainer.update()
                if trainer.publish_due():
                    trainer.publish(final=False)
            rates.append((trainer.step - first) / (time.monotonic() - started_s))
    return rates


def main() -> None:
    """Print the figures as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    run = RunDir(options.run_dir)
    config = convert(run.read_config(), TrainConfig)
    torch.set_num_threads(config.learner.threads)
    print("| figure | value |\n|---|---|")
    for name, value in control_figures(run):
        print(f"| {name} | {value} |")
    rates = solo_rates(run, config, options.repetitions, options.seconds)
    solo = statistics.median(rates)
    beside = [row["steps_per_s"] for row in run.read("timings", "learner")]
    share = 100 * statistics.median(beside) / solo
    print(f"| learner alone, steps per second | {solo:.1f} ({min(rates):.1f}–{max(rates):.1f}) |")
    print(f"| learner in the run, share of its speed alone | {share:.0f} % |")


if __name__ == "__main__":
    main()
