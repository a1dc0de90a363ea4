"""embodied train."""

import argparse
import datetime
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from embodied.cli.dashboard import Dashboard
from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from hal.teleop.asking import PersonStopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--show", action="store_true", help="print the configuration and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def run(options: argparse.Namespace) -> int:
    """Train; write the report also if the run is interrupted."""
    from embodied.core import config as core_config
    from embodied.run import config as run_config

    console = Console(highlight=False)
    config = run_config.load_train(options.overrides)
    if options.show:
        console.print(msgspec.yaml.encode(msgspec.to_builtins(config)).decode(), markup=False)
        return 0
    run = RunDir(_directory(config))
    resuming = config.run.resume
    if run.exists() and not resuming:
        if run.in_use():
            run.acquire()
        raise ConfigError(
            f"{run.path} already holds a run. Continue it with run.resume=true, "
            "or choose another run.dir"
        )
    if resuming:
        stored = core_config.convert(run.read_config(), run_config.TrainConfig)
        run_config.same_experiment(config, stored)
    run.acquire()
    try:
        run.write_config(config)
        run.event("run resumed" if resuming else "run started", overrides=options.overrides)
        return _run(run, config, console)
    finally:
        run.release()


def _run(run: RunDir, config: Any, console: Console) -> int:
    from embodied.run.tasks import label_of

    started_s = time.monotonic()
    console.print(
        f"[bold]{label_of(config.task)}[/]  {config.algorithm['name']}  "
        f"{_policy_name(config.policy)}  →  {_short(run.path)}"
    )
    _explain_keys(config, console)
    interrupted = False
    with Dashboard(console, config) as dashboard:
        try:
            if config.run.mode == "lockstep":
                from embodied.run.lockstep import run_lockstep

                run_lockstep(run, config, dashboard.lockstep)
            else:
                from embodied.run.local import run_local

                run_local(run, config, dashboard.update)
        except (KeyboardInterrupt, PersonStopped):
            interrupted = True
    if not interrupted:
        console.print(f"policy: {_short(_export(run))}")
        _show_pictures(run, config)
        _show_imagined(run, config, console)
    seconds = time.monotonic() - started_s
    run.event("run interrupted" if interrupted else "run finished", seconds=round(seconds, 1))
    if run.read("metrics", "learner") or run.read("metrics", "evaluation"):
        from embodied.cli.report import write_report

        write_report(run)
        console.print(f"report: {_short(run.report)}")
    if interrupted:
        console.print(
            "Interrupted. Everything recorded is kept; continue with the same command and "
            f"run.dir={_short(run.path)} run.resume=true"
        )
        return 130
    console.print(f"done in {seconds / 60:.1f} min")
    return 0


def _explain_keys(config: Any, console: Console) -> None:
    """What the keys of the terminal do, if a person takes part by them."""
    from embodied.core.config import options_of
    from embodied.run.build import device_spec
    from hal.teleop.keyboard import EVENT_HELP, KeyboardConfig, foreground_terminal

    if config.actors.teleoperator is None or foreground_terminal(0):
        return
    options = options_of("teleoperators", config.actors.teleoperator, "actors.teleoperator")
    if isinstance(options, KeyboardConfig):
        console.print(options.help(device_spec(config)), markup=False)
    console.print(EVENT_HELP, markup=False)


def _export(run: RunDir) -> Path:
    """Write the last weights as a policy folder, which needs nothing else of the run."""
    from embodied.weights.store import WeightStore
    from policies.checkpoint import policy_from_state, save_policy

    store = WeightStore(run.weights)
    arrays, manifest = store.load(store.latest_version() or 0)
    save_policy(run.path / "policy", policy_from_state(manifest.config, arrays))
    return run.path / "policy"


def _show_pictures(run: RunDir, config: Any) -> None:
    """Keep held-out pictures as an autoencoder gives them back, if that is what was trained: true
    above reconstructed."""
    from embodied.core.config import options_of

    if options_of("policies", config.policy, "policy").acts:
        return
    from embodied.cli.pictures import column, strip
    from embodied.core.files import write_atomic
    from embodied.run.reconstruction import reconstruct

    for found in reconstruct(run, config):
        columns = [column(pair) for pair in zip(found.true, found.back, strict=True)]
        path = run.path / "pictures" / f"{found.key}.png"
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, strip(columns))
        count = len(found.true)
        run.metrics(
            "reconstruction", {"key": found.key, "psnr_db": found.psnr_db, "pictures": count}
        )


def _show_imagined(run: RunDir, config: Any, console: Console) -> None:
    """Keep what a world model, if that is what was trained, predicts of the newest episodes."""
    from embodied.core.config import compose, convert, options_of
    from embodied.core.errors import EmbodiedError

    options = options_of("policies", config.policy, "policy")
    if not options.future or not config.evaluation.imagined:
        return
    from embodied.cli.imagine_page import keep
    from embodied.run.imagination.config import ImagineConfig
    from embodied.run.imagination.imagine import load

    overrides = [f"checkpoint={run.path}", f"output={run.path / 'imagined'}", "stride=4"]
    overrides += [f"episodes={config.evaluation.imagined}", f"threads={config.learner.threads}"]
    try:
        imagination = load(convert(compose("imagine", overrides), ImagineConfig))
        keep(imagination, imagination.execute())
    except EmbodiedError as error:  # the run is done all the same
        console.print(f"nothing is imagined: {error}", markup=False)


def _directory(config: Any) -> Path:
    if config.run.dir is not None:
        return Path(config.run.dir)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    first, *others = (task.replace("/", "-") for task in config.tasks)
    name = f"{first}-and-{len(others)}-more" if others else first
    return Path(config.run.root) / f"{name}-{stamp}"


def _policy_name(policy: dict[str, Any]) -> str:
    network = policy.get("network")
    return f"{policy['name']}/{network['name']}" if network else policy["name"]


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
