"""embodied devices."""

import argparse

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--root", default="runs", help="where running runs are looked for")


def run(options: argparse.Namespace) -> int:
    """Print one table of what is on this machine."""
    from hal.discovery import devices

    rows = devices(options.root)
    console = Console(highlight=False)
    if options.json:
        console.print(msgspec.json.encode(rows).decode(), markup=False, soft_wrap=True)
        return 0
    table = Table("id", "kind", "host", "health", "rate", "holder", "detail")
    for row in rows:
        rate = f"{row.rate_hz:.0f} / {row.tick_hz:.0f} Hz" if row.tick_hz else ""
        table.add_row(row.id, row.kind, row.host, row.health, rate, row.holder, escape(row.detail))
    console.print(table)
    return 0
