"""embodied pki."""

import argparse
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from embodied.comms.identity.authority import Authority, Issued


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")

    def _action(name: str, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("folder", type=Path, help="the authority's folder")
        return action

    init = _action("init", "make an authority; keep its folder on one host, readable by you only")
    init.add_argument("--name", default="embodied", help="what it is called (default: embodied)")

    issue = _action(
        "issue", "make the folder of keys and certificates that a host needs, or renew it"
    )
    issue.add_argument("role", choices=("gateway", "robot"), help="what the host is")
    issue.add_argument("name", help="the host's name: a-z, 0-9 and -")
    issue.add_argument("--output", type=Path, required=True, help="the folder to write")
    issue.add_argument(
        "--dns", nargs="+", default=[], help="names under which a gateway is dialled"
    )
    issue.add_argument("--ip", nargs="+", default=[], help="addresses under which it is dialled")
    issue.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="runs that a robot may take part in: a name, the beginning of one and '*', or '*'",
    )
    issue.add_argument(
        "--days", type=float, default=30.0, help="valid for so long (default 30; 0.5 is 12 hours)"
    )

    revoke = _action("revoke", "refuse a host's certificates from now on")
    revoke.add_argument("which", help="the host's name, for all of its, or one serial number")

    _action("list", "list what was issued")


def run(options: argparse.Namespace) -> int:
    """Make an authority, issue, revoke or list certificates."""
    from embodied.comms.identity.authority import Authority

    console = Console(highlight=False, soft_wrap=True, markup=False)
    if options.action == "init":
        Authority.create(options.folder, options.name)
        console.print(f"made the authority '{options.name}' in {options.folder}; who can read it")
        console.print("can issue certificates for anyone, so keep it, and a copy, in a safe place")
        return 0
    authority = Authority.open(options.folder)
    return {"issue": _issue, "revoke": _revoke, "list": _list}[options.action](
        authority, options, console
    )


def _issue(authority: "Authority", options: argparse.Namespace, console: Console) -> int:
    from embodied.comms.identity.peer import Peer
    from embodied.core.errors import ConfigError

    if not 0 < options.days <= 3650:
        raise ConfigError(f"--days {options.days:g}: more than 0 and at most 3650 are right")
    issued = authority.issue(
        Peer(options.role, options.name, tuple(options.runs)),
        options.output,
        dns=options.dns,
        ip=options.ip,
        lifetime=timedelta(days=options.days),
    )
    console.print(
        f"issued {issued.serial} for {issued.role} '{issued.name}', until "
        f"{issued.expires:%Y-%m-%d %H:%M} UTC, in {options.output}"
    )
    console.print("copy that folder to its host, over a connection that you trust (scp -rp)")
    return 0


def _revoke(authority: "Authority", options: argparse.Namespace, console: Console) -> int:
    from embodied.comms.identity.keyfiles import REVOKED

    revoked = authority.revoke(options.which)
    for issued in revoked:
        console.print(f"revoked {issued.serial} of {issued.role} '{issued.name}'")
    if not revoked:
        console.print("all of these were revoked before")
    console.print(
        f"copy {authority.folder / REVOKED} into each gateway's folder: a running gateway reads "
        "it before it admits another session"
    )
    return 0


def _list(authority: "Authority", options: argparse.Namespace, console: Console) -> int:
    serial = Column("serial", overflow="fold")
    shown = Table("name", "role", serial, "expires (UTC)", "runs", "state", box=None)
    now = datetime.now(UTC)
    for issued in authority.issued():
        state, colour = _state(issued, now)
        shown.add_row(
            issued.name,
            issued.role,
            issued.serial,
            f"{issued.expires:%Y-%m-%d %H:%M}",
            " ".join(issued.runs),
            state,
            style=colour,
        )
    console.print(f"authority '{authority.name}', {authority.folder}")
    console.print(shown)
    return 0


def _state(issued: "Issued", now: datetime) -> tuple[str, str]:
    """In words, and the row's colour."""
    if issued.revoked is not None:
        return f"revoked {issued.revoked:%Y-%m-%d}", "red"
    if issued.expires <= now:
        return "expired", "dim"
    return "valid", ""
