"""embodied teleop."""

import argparse
import time

from rich.console import Console
from rich.live import Live

_REFRESH_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def run(options: argparse.Namespace) -> int:
    """Lease a device and move it by hand until Esc; give it back."""
    from embodied.core import config as core_config
    from embodied.run.leased import LeasedRobot
    from embodied.run.teleop import TeleopConfig, Teleoperation
    from hal.teleop.keyboard import EVENT_HELP, Keyboard
    from hal.teleop.session import make_session

    config = core_config.convert(core_config.compose("teleop", options.overrides), TeleopConfig)
    console = Console(highlight=False, markup=False)
    with (
        LeasedRobot(config.device, "teleop") as robot,
        make_session(config.teleoperator, speed=config.align_speed, on_estop=robot.halt) as session,
    ):
        device = robot.acquire(config.wait_s)
        session.begin(device.spec)
        console.print(f"{robot.id} is leased.")
        if isinstance(session.hands, Keyboard):
            console.print(session.hands.help)
        if session.keyboard is not None:
            console.print(EVENT_HELP)
        shown_s = 0.0
        with Live(console=console, auto_refresh=False) as live:
            session.say = console.print

            def show() -> None:
                nonlocal shown_s
                if time.monotonic() - shown_s > _REFRESH_S:
                    shown_s = time.monotonic()
                    live.update(driving.line(), refresh=True)

            driving = Teleoperation(robot, session, show)
            driving.run(device)
    console.print(f"{robot.id} is given back; it holds its place")
    return 0
