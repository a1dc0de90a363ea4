"""embodied devices."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from hal.listing import DeviceRow

_COLOURS = {"ready": "green", "leased": "cyan", "degraded": "yellow", "halted": "bold red"}
_EVERY_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--watch", action="store_true", help="refresh every second until Ctrl-C")


def run(options: argparse.Namespace) -> int:
    """Print one table of what there is on this host and on those that share its pool."""
    from hal.discovery import devices

    console = Console(highlight=False)
    if options.json:
        while True:
            rows = msgspec.json.encode(devices()).decode()
            console.print(rows, markup=False, soft_wrap=True)
            if not options.watch:
                return 0
            time.sleep(_EVERY_S)
    if not options.watch:
        console.print(table())
        return 0
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            now = time.strftime("%H:%M:%S")
            live.update(Group(f"embodied devices, {now}", table()), refresh=True)
            time.sleep(_EVERY_S)


def table() -> Table:
    """The device table as it is now."""
    from hal.discovery import devices

    rows = devices()
    hosts = {row.host for row in rows}
    named = ("id", "kind", "health", "rate", *(("host",) if len(hosts) > 1 else ()))
    shown = Table(*(Column(name, no_wrap=True) for name in named), "load", "holder", "detail")
    for row in rows:
        colour = _COLOURS.get(row.health, "dim")
        shown.add_row(
            escape(row.id),
            row.kind,
            f"[{colour}]{row.health}[/]",
            f"{row.rate_hz:.0f} / {row.tick_hz:.0f} Hz" if row.tick_hz else "",
            *((row.host,) if len(hosts) > 1 else ()),
            "" if row.load is None else f"{100 * row.load:.0f} %",
            escape(row.holder),
            escape("; ".join(filter(None, (row.reason, hot(row), row.detail)))),
        )
    return shown


def hot(row: DeviceRow) -> str:
    """Its temperature, where known."""
    return "" if row.temperature_c is None else f"{row.temperature_c:.0f} °C"
