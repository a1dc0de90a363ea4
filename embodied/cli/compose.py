"""embodied compose."""

import argparse
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_SHOWN = 8
"""Best weights of the search that are printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def run(options: argparse.Namespace) -> int:
    """Search, report and save; ends with a table of the contenders on fresh seeds."""
    from embodied.cli.compose_plots import write_plot
    from embodied.core import config as core_config
    from embodied.run.compose import ComposeRun
    from embodied.run.compose_config import ComposeConfig

    composed = core_config.compose("compose", options.overrides)
    config = core_config.convert(composed, ComposeConfig)
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("loading", total=None)
        session = ComposeRun(config, lambda what: progress.update(bar, advance=1, description=what))
        try:
            progress.update(bar, total=session.episodes())
            results = session.execute()
        finally:
            session.close()
    plot = write_plot(Path(config.output), results)
    if options.json:
        Console(highlight=False).print(
            msgspec.json.encode(results).decode(), markup=False, soft_wrap=True
        )
    else:
        _print(results, plot)
    return 0


def _print(results: dict[str, Any], plot: Path | None) -> None:
    console = Console(highlight=False)
    tried = sorted(results["tried"], key=lambda row: (-row["episodes"], -row["mean"]))
    if tried:
        search = Table(
            *results["members"], results["metric"], "episodes", title="search seeds (most played)"
        )
        for row in tried[:_SHOWN]:
            cells = [f"{weight:.3f}" for weight in row["weights"]]
            search.add_row(*cells, f"{row['mean']:.3f}", str(row["episodes"]))
        console.print(search)
    table = Table("contender", results["metric"], "success", "95 %", title="fresh seeds")
    for name, row in results["contenders"].items():
        low, high = row["success_interval"]
        success = f"{row['successes']}/{row['episodes']}"
        table.add_row(name, f"{row['mean']:.3f}", success, f"{low:.2f} to {high:.2f}")
    console.print(table)
    shares = ", ".join(
        f"{name} {weight:.3f}"
        for name, weight in zip(results["members"], results["weights"], strict=False)
    )
    low, high = results["gain_interval"]
    console.print(
        f"operator {results['operator']['name']}{': ' + shares if shares else ''}; against the "
        f"better parent on these seeds, {results['better_parent']}: {results['gain']:+.3f} "
        f"(95 % paired bootstrap {low:+.3f} to {high:+.3f})",
        markup=False,
        soft_wrap=True,
    )
    console.print(f"policy: {results['policy']}", markup=False, soft_wrap=True)
    if plot is not None:
        console.print(f"plot: {plot}", markup=False, soft_wrap=True)
