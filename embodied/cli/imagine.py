"""embodied imagine."""

import argparse
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print the errors as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def run(options: argparse.Namespace) -> int:
    """Predict recorded episodes; keeps errors, pictures, films and a page, prints the errors."""
    from embodied.cli.imagine_page import keep
    from embodied.core import config as core_config
    from embodied.run.imagination.config import ImagineConfig
    from embodied.run.imagination.imagine import load

    config = core_config.convert(core_config.compose("imagine", options.overrides), ImagineConfig)
    with Progress(console=Console(stderr=True, highlight=False), transient=True) as progress:
        bar = progress.add_task("imagining", total=None)
        imagination = load(config)
        episodes = imagination.execute(lambda: progress.advance(bar))
    summary, page = keep(imagination, episodes)
    if options.json:
        Console(highlight=False).print(
            msgspec.json.encode(summary).decode(), markup=False, soft_wrap=True
        )
    else:
        _print(summary, page)
    return 0


def _print(summary: dict[str, Any], page: Path) -> None:
    console = Console(highlight=False)
    rolled = summary["open_loop"]
    for title, rows in (
        ("one chunk ahead", summary["one_chunk"]),
        ("predictions of predictions", rolled.get("errors", [])),
    ):
        if not rows:
            continue
        table = Table("key", "ticks", "error (rms)", "if nothing changed", "windows", title=title)
        for row in rows:
            unit = summary["units"][row["key"]]
            errors = (f"{row[f'{name}_rmse']:.4g} {unit}" for name in ("forward", "unchanged"))
            table.add_row(row["key"], str(row["ticks"]), *errors, str(row["windows"]))
        console.print(table)
    if rolled["obstacle"] is not None:
        console.print(f"not rolled on: {rolled['obstacle']}", markup=False, soft_wrap=True)
    if (row := summary["inverse"]) is not None:
        between = ""
        if row["interval"] is not None:
            low, high = row["interval"]
            between = f" (95 % paired bootstrap over episodes {low:+.4g} to {high:+.4g})"
        console.print(
            f"actions (rms over {row['steps']} steps): {row['inverse_rmse']:.4g} given what was "
            f"seen next, {row['policy_rmse']:.4g} by the policy; difference of the squares "
            f"{row['difference']:+.4g}{between}",
            markup=False,
            soft_wrap=True,
        )
    if summary["without_actions"]:
        console.print(
            f"without recorded actions: {', '.join(summary['without_actions'])}; what was inferred "
            "is in …-actions.npz",
            markup=False,
            soft_wrap=True,
        )
    if summary["too_short"]:
        console.print(f"episodes passed over, too short: {summary['too_short']}")
    console.print(f"page: {page}", markup=False, soft_wrap=True)
