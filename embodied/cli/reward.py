"""embodied reward."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    train = actions.add_parser("train", help="learn a success classifier from labelled episodes")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="of reward_train.yaml")
    test = actions.add_parser("test", help="confusion table of a classifier on recorded episodes")
    test.add_argument("directory", help="output of embodied reward train")
    source = test.add_mutually_exclusive_group(required=True)
    source.add_argument("--buffer", help="a buffer's folder")
    source.add_argument("--run", help="a run's directory", dest="run_directory")
    test.add_argument("--task", help="only this task's episodes")
    test.add_argument("--labels", help="file of labels by hand")


def run(options: argparse.Namespace) -> int:
    """Train or test a success classifier."""
    from embodied.core import config as core_config
    from embodied.run.success import training

    console = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
    if options.action == "test":
        recorded = options.buffer or options.run_directory
        directory = Path(options.directory)
        report = training.evaluate(directory, recorded, options.task, options.labels)
        console.print(f"{directory} on {recorded}: {_counted(report.episodes)}")
        _show(console, report)
        return 0
    composed = core_config.compose("reward_train", options.overrides)
    config = core_config.convert(composed, training.RewardTrainConfig)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("learning", total=config.steps)
        report = training.train(config, on_step=lambda: progress.advance(task))
    learned = report.trained_on or (0, 0)
    console.print(f"learned from {_counted(learned)}, cross-entropy {report.loss:.3f}")
    if not learned[1]:
        console.print(
            "no failed episode was among them: it has seen no state that only fails reach"
        )
    console.print(
        f"threshold {report.threshold:.4f}: calls at most {config.false_positives:.2%} of "
        f"{report.negatives} negative observations success"
    )
    console.print(f"held out: {_counted(report.episodes)}")
    _show(console, report)
    console.print(f"→ {config.output}")
    return 0


def _counted(episodes: tuple[int, int]) -> str:
    return f"{sum(episodes)} episodes ({episodes[0]} successful, {episodes[1]} failed)"


def _show(console: Console, report: Any) -> None:
    """Confusion tables of observations and episodes."""
    from embodied.core.intervals import wilson

    counts, ends = report.confusion, report.verdicts
    table = Table("observations", "called success", "called no success")
    table.add_row("success", str(counts.true_positive), str(counts.false_negative))
    table.add_row("no success", str(counts.false_positive), str(counts.true_negative))
    console.print(table)
    console.print(f"precision {counts.precision:.3f}  recall {counts.recall:.3f}")
    table = Table(f"episodes (patience {report.patience})", "in time", "early", "never")
    table.add_row("successful", str(ends.in_time), str(ends.early), str(ends.missed))
    table.add_row("failed", "", str(ends.accepted), str(ends.refused))
    console.print(table)
    if ends.early:
        console.print(f"early ones by {ends.early_by:.1f} observations on average")
    failed = report.episodes[1]
    if failed:
        low, high = wilson(ends.accepted, failed)
        console.print(
            f"failed episodes judged successful: {ends.accepted} of {failed} "
            f"(95 % interval {low:.0%} to {high:.0%})"
        )
