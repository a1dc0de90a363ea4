"""embodied estop."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("device", nargs="?", help="one device's id; default: every one of the host")
    parser.add_argument("--clear", action="store_true", help="release the halt: look first")
    parser.add_argument("--reason", default="emergency stop", help="what is written down")


def run(options: argparse.Namespace) -> int:
    """Set or clear a latched halt; works without the agent, which may hang."""
    from rich.console import Console

    from hal.pool.state import state_dir
    from hal.safety.latch import HOST_STOP, latch_file, latch_reason, set_latch

    console = Console(highlight=False, markup=False)
    folder = state_dir() / "latches"
    folder.mkdir(exist_ok=True)
    file = latch_file(folder, options.device or HOST_STOP)
    what = options.device or "every device of this host"
    if not options.clear:
        set_latch(file, options.reason)
        console.print(f"halted: {what} ({latch_reason(file)})", style="bold red")
        return 0
    reason = latch_reason(file)
    file.unlink(missing_ok=True)
    console.print(f"cleared: {what} ({reason})" if reason else f"{what} was not halted by this")
    others = sorted(path.stem for path in folder.glob("*.halt"))
    if others:
        console.print(f"still halted: {', '.join(others)}; clear with: embodied estop --clear ID")
    return 0
