"""embodied eval."""

import argparse
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def run(options: argparse.Namespace) -> int:
    """Evaluate a checkpoint; prints success with its interval."""
    from embodied.core import config as core_config
    from embodied.core.errors import ConfigError
    from embodied.core.files import write_atomic
    from embodied.run.build import films_of
    from embodied.run.config import EvalConfig
    from embodied.run.evaluate import Evaluators, summarise_tasks
    from embodied.run.tasks import label_of, names_of
    from sim.family import EVALUATION_SEEDS

    config = core_config.convert(core_config.compose("eval", options.overrides), EvalConfig)
    last = config.first_seed + config.episodes
    if not 0 <= config.first_seed < last <= EVALUATION_SEEDS:
        raise ConfigError(
            f"seeds {config.first_seed} to {last - 1}: evaluation seeds lie in "
            f"0..{EVALUATION_SEEDS - 1}, and episodes must be at least 1"
        )
    policy, version, task, sim = _load(config)
    seeds = range(config.first_seed, last)
    output = Path(config.output) if config.output else None
    if config.videos and output is None:
        raise ConfigError("videos need a folder: set output=...")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    tasks = names_of(task)
    films = films_of(tasks, seeds[: config.videos], output or Path())
    console = Console(stderr=True, highlight=False)
    evaluator = Evaluators(tasks, sim, rows=min(config.rows, config.episodes))
    try:
        if config.videos:
            evaluator.of(tasks[0]).group.devices[0].render(16, 16)  # says if OpenGL is missing
        with Progress(console=console) as progress:
            bar = progress.add_task(label_of(task), total=config.episodes * len(tasks))
            results = evaluator.run(
                policy, version, seeds, films=films, on_result=lambda _: progress.advance(bar)
            )
    finally:
        evaluator.close()
    summary: dict[str, Any] = {"task": task, "version": version, **summarise_tasks(results)}
    if output is not None:
        rows = [msgspec.to_builtins(result) for result in results]
        write_atomic(
            output / "evaluation.json", msgspec.json.encode({**summary, "episodes_list": rows})
        )
    _print(summary, as_json=options.json)
    return 0


def _print(summary: dict[str, Any], *, as_json: bool) -> None:
    console = Console(highlight=False)
    if as_json:
        console.print(msgspec.json.encode(summary).decode(), markup=False, soft_wrap=True)
        return
    from embodied.run.tasks import label_of

    several = summary.get("tasks", {})
    total = "all tasks" if several else label_of(summary["task"])
    for name, part in [*several.items(), (total, summary)]:
        low, high = part["success_interval"]
        console.print(
            f"{name}: success {part['successes']}/{part['episodes']} = "
            f"{100 * part['success_rate']:.1f} % "
            f"(95 % interval {100 * low:.1f} to {100 * high:.1f})"
        )
    for signal in ("reward", "coverage"):
        if f"max_{signal}" in summary:
            low, high = summary[f"max_{signal}_interval"]
            mean = summary[f"max_{signal}"]
            console.print(f"mean greatest {signal} {mean:.3f} ({low:.3f} to {high:.3f})")


def _load(config: Any) -> tuple[Any, int, Any, Any]:
    """Policy, version, tasks and simulation settings of a checkpoint folder or a run directory."""
    from embodied.core.errors import ConfigError
    from embodied.run.build import deciding_policy
    from sim.family import SimConfig

    if config.inference.fallback:
        raise ConfigError("an evaluation is of one policy: leave inference.fallback=false")
    checkpoint = config.checkpoint and Path(config.checkpoint)
    rows = min(config.rows, config.episodes)
    policy, version, stored = deciding_policy(
        checkpoint, config.inference, rows=rows, version=config.version
    )
    task = config.task or (stored and stored.task)
    if task is None:
        named = config.checkpoint or config.inference.remote
        raise ConfigError(f"{named} is a policy without a run: say task=...")
    return policy, version, task, config.sim or (stored.sim if stored else SimConfig())
