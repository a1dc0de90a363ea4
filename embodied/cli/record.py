"""embodied record."""

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_REFRESH_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def run(options: argparse.Namespace) -> int:
    """Record episodes on a leased device until there are enough or the person stops."""
    from embodied.buffer.serve.sink import LocalBuffer
    from embodied.core import config as core_config
    from embodied.run.episode import Result
    from embodied.run.leased import LeasedRobot
    from embodied.run.record_session import RecordConfig, RecordSession
    from hal.rewards import prepare_reward
    from hal.teleop.keyboard import EVENT_HELP, Keyboard
    from hal.teleop.session import make_session

    config = core_config.convert(core_config.compose("record", options.overrides), RecordConfig)
    policy, version = _policy(config)
    prepare_reward(config.judged_by)
    console = Console(highlight=False, markup=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}", markup=False),
    )
    with (
        LocalBuffer(Path(config.output)) as sink,
        LeasedRobot(config.device, "record") as robot,
        make_session(config.teleoperator, speed=config.align_speed, on_estop=robot.halt) as session,
    ):
        device = robot.acquire(config.wait_s)
        session.begin(device.spec)
        if isinstance(session.hands, Keyboard):
            console.print(session.hands.help)
        if session.keyboard is not None:
            console.print(EVENT_HELP)
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            session.say = console.print
            shown_s = 0.0

            def show() -> None:
                nonlocal shown_s
                if time.monotonic() - shown_s < _REFRESH_S:
                    return
                shown_s = time.monotonic()
                seconds = f"{recording.steps / device.spec.tick_hz:.1f} s"
                counted = {
                    "once more": recording.rerecorded,
                    "device lost": recording.losses,
                    "rejected": recording.rejected,
                }
                parts = [seconds, *(f"{name}: {n}" for name, n in counted.items() if n)]
                state = " · ".join([recording.state, *parts])
                progress.update(bar, completed=recording.done, state=state, refresh=True)

            def report(result: Result) -> None:
                verdict = "success" if result.success else "no success"
                seconds = result.ticks / device.spec.tick_hz
                console.print(f"episode of {seconds:.1f} s, {result.ticks} steps: {verdict}")

            recording = RecordSession(
                config,
                sink,
                robot,
                session,
                on_result=report,
                show=show,
                policy=policy,
                version=version,
            )
            bar = progress.add_task(
                config.task_name, total=config.episodes, completed=recording.done, state=""
            )
            recording.run(device)
            progress.update(bar, completed=recording.done, state="", refresh=True)
    console.print(
        f"{recording.done} of {config.episodes} {config.count} episodes of {config.task_name} "
        f"→ {config.output}"
    )
    return 0


def _policy(config: Any) -> tuple[Any, int]:
    """The policy that acts while no person does, and its version; (None, -1) without one."""
    from embodied.core.errors import ConfigError

    if config.checkpoint is None and config.inference.remote is None:
        if config.teleoperator.get("name") == "nobody":
            raise ConfigError("teleoperator=nobody needs a checkpoint: somebody has to act")
        return None, -1
    from embodied.run.build import deciding_policy

    checkpoint = config.checkpoint and Path(config.checkpoint)
    policy, version, _ = deciding_policy(checkpoint, config.inference, rows=1)
    return policy, version
