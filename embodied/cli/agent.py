"""embodied agent."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def run(options: argparse.Namespace) -> int:
    """Own this host's robots until interrupted; print every change of a device's state."""
    from rich.console import Console

    from deploy.agent import Agent, AgentConfig, stop_signals
    from embodied.core import config as core_config

    config = core_config.convert(core_config.compose("agent", options.overrides), AgentConfig)
    console = Console(highlight=False, markup=False)
    agent = Agent(config)
    console.print(f"agent of {agent.host}: {', '.join(agent.robots)}; logs in {agent.logs}")
    shown: dict[str, tuple[str, str]] = {}

    def show() -> None:
        for name, robot in agent.robots.items():
            if robot.status is None:
                continue
            now = robot.status.health, robot.status.reason
            if shown.get(name) != now:
                shown[name] = now
                console.print(f"{name}: {': '.join(filter(None, now))}")

    agent.run(stop_signals(), show)
    console.print("agent: stopped; every robot holds its place")
    return 0
