"""embodied estop."""

import argparse
import time
from typing import Any

_CONFIRM_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("device", nargs="?", help="one device's id; default: every one of the host")
    parser.add_argument("--clear", action="store_true", help="release the halt: look first")
    parser.add_argument("--reason", default="emergency stop", help="what is written down")


def run(options: argparse.Namespace) -> int:
    """Set or clear a latched halt; works without the agent, which may hang."""
    from rich.console import Console

    from hal.pool.state import state_dir
    from hal.safety.latch import HOST_STOP, latch_file, latch_reason, latched, set_latch

    console = Console(highlight=False, markup=False)
    folder = state_dir() / "latches"
    folder.mkdir(exist_ok=True)
    name = options.device or HOST_STOP
    file = latch_file(folder, name)
    what = options.device or "every device of this host"
    if name != HOST_STOP and name not in latched(folder):
        _check_known(name)
    if not options.clear:
        set_latch(file, options.reason)
        console.print(f"halted: {what} ({latch_reason(file)})", style="bold red")
        return _confirm(console, options.device)
    reason = latch_reason(file)
    file.unlink(missing_ok=True)
    console.print(f"cleared: {what} ({reason})" if reason else f"{what} was not halted by this")
    if others := latched(folder):
        console.print(f"still halted: {', '.join(others)}; clear with: embodied estop --clear ID")
    return 0


def _robots() -> dict[str, str] | None:
    """Health of each robot in the pool; None if the pool cannot be read now."""
    from embodied.core.errors import EmbodiedError
    from hal.pool.pool import Pool
    from hal.pool.state import pool_path

    try:
        with Pool(pool_path(), busy_s=0.5) as pool:
            return {row.id: row.health for row in pool.devices() if row.address}
    except EmbodiedError:
        return None


def _check_known(name: str) -> None:
    from embodied.core.registry import unknown

    robots = _robots()
    if robots is not None and name not in robots:
        raise unknown("device of this host", name, robots)


def _confirm(console: Any, device: str | None) -> int:
    """Wait until the robots say that they are halted; 1 if one does not."""
    deadline_s = time.monotonic() + _CONFIRM_S
    while True:
        robots = {k: v for k, v in (_robots() or {}).items() if device in (None, k)}
        moving = sorted(k for k, v in robots.items() if v in ("ready", "leased", "degraded"))
        if not moving:
            if robots:
                console.print(f"confirmed by {', '.join(sorted(robots))}")
            return 0
        if time.monotonic() > deadline_s:
            console.print(f"NOT CONFIRMED by {', '.join(moving)}", style="bold red")
            return 1
        time.sleep(0.1)
