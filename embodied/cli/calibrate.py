"""embodied calibrate."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from hal.drivers.calibration import Calibrator
    from hal.teleop.keyboard import Keyboard

_ANSWER_MS = 20.0
_PERIOD_S = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("port", help="serial port of the arm, such as /dev/ttyACM0")
    parser.add_argument("file", type=Path, help="calibration file to write (LeRobot's format)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(options: argparse.Namespace) -> int:
    """Calibrate an arm that a person moves through its joints' travel."""
    from embodied.core.errors import ConfigError
    from hal.drivers.calibration import Calibrator
    from hal.drivers.feetech import FeetechBus
    from hal.drivers.so101_arm import SERVO_IDS
    from hal.teleop.asking import PersonStopped
    from hal.teleop.keyboard import Keyboard, KeyboardConfig

    file: Path = options.file
    if file.exists() and not options.overwrite:
        raise ConfigError(f"{file} exists; --overwrite replaces it")
    console = Console(highlight=False, markup=False)
    names = {servo: joint for joint, servo in SERVO_IDS.items()}
    bus = FeetechBus(options.port, answer_ms=_ANSWER_MS, names=names)
    keyboard = Keyboard(KeyboardConfig())
    keyboard.say = console.print
    begun = done = False
    try:
        bus.open()
        keyboard.open()
        calibrator = Calibrator(bus)
        keyboard.ask("Hold the arm: it goes limp. Then press Enter (Esc: stop).")
        calibrator.release()
        keyboard.ask("Move every joint to the middle of its travel, then press Enter.")
        begun = True
        calibrator.center()
        console.print(
            "Move every joint to both its ends (wrist_roll need not be), then press Enter."
        )
        _sample(console, keyboard, calibrator)
        calibrator.finish(file)
        done = True
    except PersonStopped:
        console.print("stopped, nothing written", style="bold")
        return 1
    finally:
        keyboard.close()
        bus.close()
        if begun and not done:
            console.print("The servos' own calibration is changed: calibrate the arm again.")
    console.print(f"calibration written to {file}; the arm is limp")
    return 0


def _sample(console: Console, keyboard: "Keyboard", calibrator: "Calibrator") -> None:
    """Show where the joints are and have been, until all have moved enough and Enter comes."""
    from hal.teleop.asking import PersonStopped

    with Live(console=console, auto_refresh=False) as live:
        while True:
            rows = calibrator.sample()
            table = Table("joint", "least", "now", "greatest", "")
            for row in rows:
                numbers = map(str, (row.low, row.present, row.high))
                table.add_row(row.joint, *numbers, "" if row.enough else "move it further")
            live.update(table, refresh=True)
            for event in keyboard.events():
                if event in ("stop", "estop"):
                    raise PersonStopped(event)
                if event == "success" and all(row.enough for row in rows):
                    return
            time.sleep(_PERIOD_S)
