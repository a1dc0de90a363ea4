"""embodied doctor."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--identity", type=Path, metavar="FOLDER", help="also check this host's certificate"
    )
    parser.add_argument(
        "--gateway", metavar="HOST:PORT", help="also see whether the gateway can be reached"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(options: argparse.Namespace) -> int:
    """Print a line for each check of this host; status 1 if something that is needed fails."""
    import msgspec
    from rich.console import Console

    from deploy.doctor import examine
    from deploy.findings import failed
    from embodied.cli.findings import table

    console = Console(highlight=False)
    findings = examine(options.identity, options.gateway)
    if options.json:
        text = msgspec.json.encode(findings).decode()
        console.print(text, markup=False, soft_wrap=True)
    else:
        console.print(table(findings))
    return int(failed(findings))
