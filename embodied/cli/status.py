"""embodied status."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table

from embodied.cli.trials import trial_lines

if TYPE_CHECKING:
    from embodied.run.site.status import HostStatus, LinksStatus

_EVERY_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, of either end")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--watch", action="store_true", help="refresh every second until Ctrl-C")


def run(options: argparse.Namespace) -> int:
    """Print the hosts of a run, their links, weights and spools."""
    from embodied.run.site.status import read_status

    console = Console(highlight=False)
    if options.json:
        status = msgspec.json.encode(read_status(options.run)).decode()
        console.print(status, markup=False, soft_wrap=True)
        return 0
    if not options.watch:
        console.print(_shown(read_status(options.run)))
        return 0
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            live.update(_shown(read_status(options.run)), refresh=True)
            time.sleep(_EVERY_S)


def _shown(status: LinksStatus) -> Group:
    from embodied.run.site.status import STALE_S

    silent_s = time.time() - status.t_s
    newest = "no weights yet" if status.version is None else f"weights v{status.version}"
    head = f"{status.run} at {status.site}, gateway {status.address}, {newest}"
    if status.over:
        head += ", over"
    if silent_s > STALE_S:
        head += f"  [yellow](as of {silent_s:.0f} s ago: its process does not run)[/]"
    hosts = Table(*(Column(n, no_wrap=True) for n in ("host", "link", "RTT", "weights")), "spool")
    traffic = Table("host", "channel", "queue lives at", "out", "in", "waiting", "dropped")
    for host in status.hosts:
        hosts.add_row(escape(host.name), _link(host), _rtt(host), _version(host), _spool(host))
        for kind, counts in sorted(host.traffic.items()):
            traffic.add_row(
                escape(host.name),
                kind,
                escape(status.site),
                f"{counts.sent} ({_size(counts.sent_bytes)})",
                f"{counts.received} ({_size(counts.received_bytes)})",
                str(counts.depth),
                str(counts.dropped),
            )
    trial = [] if status.trial is None else trial_lines(status.trial)
    return Group(head, hosts, *trial, traffic)


def _link(host: HostStatus) -> str:
    ago = f"{max(0.0, time.time() - host.since_s):.0f} s" if host.since_s else ""
    if host.connected:
        lost = f", {host.reconnects} reconnects" if host.reconnects else ""
        return f"[green]up[/] {ago}{lost}"
    return f"[red]down[/] {ago} {escape(host.reason)}"


def _rtt(host: HostStatus) -> str:
    return "" if host.rtt_ms is None else f"{host.rtt_ms:.1f} ms"


def _version(host: HostStatus) -> str:
    if host.version is None:
        return "none"
    age_s = host.weights_age_s
    confirmed = f"v{host.version}" if age_s is None else f"v{host.version}, {age_s:.0f} s ago"
    return f"{confirmed} [yellow](episodes wait)[/]" if host.waits else confirmed


def _spool(host: HostStatus) -> str:
    if not host.spool_steps:
        return "empty"
    size = _size(host.spool_bytes)
    return f"{host.spool_steps} steps ({size}), the oldest waits {host.oldest_s:.0f} s"


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError
