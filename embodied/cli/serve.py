"""embodied serve."""

import argparse
import time
from typing import Any

_LOOK_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def run(options: argparse.Namespace) -> int:
    """Serve a policy until interrupted; print when it is ready, new weights, and its load."""
    from rich.console import Console

    from deploy.agent import stop_signals
    from embodied.core import config as core_config
    from embodied.run.remote.messages import Health
    from embodied.run.serving.process import ServeConfig, serve
    from embodied.run.serving.server import PolicyServer

    config = core_config.convert(core_config.compose("serve", options.overrides), ServeConfig)
    console = Console(highlight=False, markup=False)
    keep_going = stop_signals()
    shown: Health | None = None
    shown_s = looked_s = 0.0

    def show(server: PolicyServer) -> None:
        nonlocal shown, shown_s, looked_s
        if time.monotonic() - looked_s < _LOOK_S:
            return
        looked_s = time.monotonic()
        health = server.health()
        changed = shown is None or (shown.version, shown.fault) != (health.version, health.fault)
        due = time.monotonic() - shown_s >= config.report_s
        if not changed and not (due and shown is not None and shown.decided != health.decided):
            return
        if shown is None:
            console.print(f"ready at {config.address}", soft_wrap=True)
        console.print(_line(health, since=shown), soft_wrap=True)
        shown, shown_s = health, time.monotonic()

    console.print(
        f"{config.checkpoint}: warming up for batches of {config.batching.rows}", soft_wrap=True
    )
    serve(config, keep_going, show)
    return 0


def _line(health: Any, since: Any) -> str:
    """The server's Health in words; decisions are counted since an earlier one."""
    batches = sum(health.batch_rows)
    rows = sum(rows * count for rows, count in enumerate(health.batch_rows, 1))
    parts = [
        f"version {health.version}",
        f"{health.decided - (since.decided if since else 0)} decisions",
        f"{rows / max(1, batches):.1f} rows a batch",
        f"p50 {health.p50_ms:.1f} ms, p99 {health.p99_ms:.1f} ms",
        f"{health.queued} waiting",
    ]
    for name, count in (("too late or too many", health.dropped), ("wrong", health.refused)):
        parts += [f"{count} {name}"] if count else []
    parts += [health.fault] if health.fault else []
    return " · ".join(parts)
