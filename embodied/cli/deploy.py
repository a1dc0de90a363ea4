"""embodied deploy."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from deploy.findings import Finding
    from deploy.remote import Remote
    from deploy.rollout import Software, Step
    from deploy.wheel import Wheel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    text = "check a robot's host over ssh, install, copy its identity, start agent and site there"
    agent = actions.add_parser("agent", help=text, description=text)
    agent.add_argument("target", metavar="USER@HOST", help="as for ssh")
    agent.add_argument("--wheel", type=Path, help="to install (default: built from this source)")
    agent.add_argument("--lock", type=Path, help="requirements.lock of that wheel (default: this)")
    agent.add_argument(
        "--wheelhouse",
        type=Path,
        metavar="FOLDER",
        help="wheels of all packages, copied, in place of the host's package index",
    )
    agent.add_argument(
        "--extras", default="", help="such as policy, by commas: what the host needs besides"
    )
    agent.add_argument("--python", help="Python 3.11 or 3.12 on the host (default: looked for)")
    agent.add_argument(
        "--identity", type=Path, metavar="FOLDER", help="the host's, of `embodied pki issue`"
    )
    agent.add_argument(
        "--ssh-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as in ssh_config: Port=2222, IdentityFile=…; repeatable",
    )
    agent.add_argument("--ssh-config", type=Path, metavar="FILE", help="in place of ~/.ssh/config")
    agent.add_argument(
        "--dry-run", action="store_true", help="check, and print what would be done then"
    )
    text = "write the units of this host, start them, and see whether they work"
    units = actions.add_parser("units", help=text, description=text)
    units.add_argument("--json", action="store_true", help="machine-readable output")
    for action in (agent, units):
        action.add_argument(
            "--agent", required=True, metavar="OVERRIDES", help="of embodied agent, in one word"
        )
        action.add_argument(
            "--gateway", metavar="HOST:PORT", help="of a run elsewhere (default: agent only)"
        )
        action.add_argument(
            "--site", default="", metavar="OVERRIDES", help="of embodied site, in one word"
        )
        which = action.add_mutually_exclusive_group()
        which.add_argument(
            "--user-units", action="store_true", help="units of the user, no root (default)"
        )
        which.add_argument("--system", action="store_true", help="units of the system, by sudo")


def run(options: argparse.Namespace) -> int:
    """Deploy to a host, or write this host's units; status 1 if something does not work."""
    console = Console(highlight=False)
    return _units(options, console) if options.action == "units" else _agent(options, console)


def _units(options: argparse.Namespace, console: Console) -> int:
    import msgspec

    from deploy.findings import failed
    from deploy.services import Manager, deployment_root, start
    from deploy.units import Services
    from embodied.cli.findings import table

    services = Services(options.agent, options.site, options.gateway, options.system)
    findings = start(services, deployment_root(), Manager(options.system))
    if options.json:
        text = msgspec.json.encode(findings).decode()
        console.print(text, markup=False, soft_wrap=True)
    else:
        console.print(table(findings))
    return int(failed(findings))


def _agent(options: argparse.Namespace, console: Console) -> int:
    """Everything that can be seen to be wrong from here is said before the host is asked."""
    from deploy.hostcheck import Needs, check, probe
    from deploy.remote import Remote
    from deploy.rollout import deployed, doctor_command, plan, start_command
    from deploy.units import Services
    from deploy.wheel import build_wheel, read_wheel
    from embodied.comms.identity.credentials import load_bundle

    remote = Remote(options.target, options.ssh_option, options.ssh_config)
    extras = tuple(sorted(filter(None, options.extras.split(","))))
    services = Services(options.agent, options.site, options.gateway, options.system)
    services.check(has_identity=True)
    if options.identity is not None:
        load_bundle(options.identity).require("robot")
    needs = Needs(options.python, "/dev/" in options.agent, bool(extras), options.system)
    with tempfile.TemporaryDirectory() as folder:
        wheel = read_wheel(options.wheel) if options.wheel else build_wheel(Path(folder))
        wheel.check_extras(extras)
        facts = probe(remote, needs)
        findings = check(facts, needs)
        if _shown(console, f"{remote.target} before", findings):
            return 1
        has_identity = options.identity is not None or facts["identity"] == "yes"
        services.check(has_identity)
        software = _software(options, wheel, extras, facts["python"])
        steps = plan(facts.home, software, options.identity)
        root = deployed(facts.home)
        commands = [start_command(root, services), doctor_command(root, services, has_identity)]
        if options.dry_run:
            return _previewed(console, remote, steps, commands)
        return _roll_out(console, remote, steps, commands)


def _software(
    options: argparse.Namespace, wheel: Wheel, extras: tuple[str, ...], python: str
) -> Software:
    from deploy.rollout import Software
    from deploy.wheel import constraints
    from embodied.core.errors import ConfigError

    wheelhouse = options.wheelhouse
    if wheelhouse is not None and not wheelhouse.is_dir():
        raise ConfigError(f"--wheelhouse {wheelhouse} is not a folder")
    return Software(wheel, constraints(options.lock), extras, wheelhouse, python)


def _previewed(console: Console, remote: Remote, steps: list[Step], commands: list[str]) -> int:
    from deploy.rollout import preview

    for text in [*(preview(remote, step) for step in steps), *(f"run: {c}" for c in commands)]:
        console.print(text, markup=False, soft_wrap=True)
    return 0


def _roll_out(console: Console, remote: Remote, steps: list[Step], commands: list[str]) -> int:
    from deploy.rollout import apply, ask

    for step in steps:
        with console.status(step.name):
            finding = apply(remote, step)
        console.print(f"{finding.name}: {finding.text}", markup=False)
    with console.status("start"):
        findings = [finding for command in commands for finding in ask(remote, command)]
    return int(_shown(console, f"{remote.target} now", findings))


def _shown(console: Console, title: str, findings: list[Finding]) -> bool:
    from deploy.findings import failed
    from embodied.cli.findings import table

    console.print(f"{title}:", style="bold")
    console.print(table(findings))
    return failed(findings)
