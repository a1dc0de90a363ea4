"""embodied collect."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def run(options: argparse.Namespace) -> int:
    """Record episodes of the task's expert, or import a data set, into a buffer folder."""
    from embodied.buffer.serve.sink import LocalBuffer
    from embodied.core import config as core_config
    from embodied.core.errors import ConfigError
    from embodied.run import build
    from embodied.run.collect import collect
    from embodied.run.config import CollectConfig

    config = core_config.convert(core_config.compose("collect", options.overrides), CollectConfig)
    console = Console(highlight=False)
    if config.demonstrations.source == "none":
        raise ConfigError("demonstrations.source is 'none': there is nothing to collect")
    with LocalBuffer(Path(config.output)) as sink, Progress(console=console) as progress:
        if config.demonstrations.source == "dataset":
            imported = build.import_demonstrations(sink, config.demonstrations, [config.task])
            episodes, steps = imported or (0, 0)
            console.print(f"imported {episodes} episodes, {steps} steps → {config.output}")
            return 0
        task = progress.add_task(config.task, total=config.demonstrations.episodes)
        results = collect(config, sink, on_success=lambda: progress.advance(task))
    ticks = sum(result.ticks for result in results)
    successes = sum(result.success for result in results)
    console.print(
        f"{len(results)} episodes, {successes} successful, {ticks} steps → {config.output}"
    )
    return 0
