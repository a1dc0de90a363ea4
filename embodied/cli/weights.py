"""embodied weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from embodied.cli.trials import trial_lines
from embodied.core.errors import ConfigError, CorruptDataError
from embodied.core.registry import unknown

if TYPE_CHECKING:
    from embodied.core.rundir import RunDir
    from embodied.weights.store import WeightStore
    from embodied.weights.trial import Trial, TrialRule, TrialState

_ACTIONS = ("list", "pin", "unpin", "rollback", "show", "trial", "stop")
_COLOURS = {"acting": "green", "on trial": "cyan", "held": "bold yellow", "damaged": "bold red"}
_EPILOG = """\
list        all versions (the default)
show        how the trial stands, if there is one
show V      what version V is: configuration, tensors, where it came from
rollback V  publish version V's weights again, as the newest: robots go on with them
pin V       the same, unless V is the newest, and nothing newer is given to robots until unpin V
unpin V     give robots the newest weights again
trial V --hosts A,B
            try version V on these hosts while all others stay with what acts, or go back to
            --against: it is for all once it is shown to be no worse, else it is taken back;
            newer versions are tried in the same way from then on
trial --hosts A,B
            try only versions that are newer than what acts now
stop        end that undecided: give robots the newest weights again
"""
_ALONE = ("list", "stop")
_EITHER = ("show", "trial")


_RULE = (
    ("margin", "margin", float, "difference of success rates that is still no worse (0.15)"),
    ("error", "error", float, "probability that weights worse by the margin are accepted (0.1)"),
    ("episodes", "max_episodes", int, "of the new weights, at most (100)"),
    ("looks", "looks", int, "how often they are judged until then (4)"),
    ("baseline", "baseline_episodes", int, "that the others must have (50)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run_dir", help="directory of the run")
    parser.add_argument("action", nargs="?", default="list", choices=_ACTIONS)
    parser.add_argument("version", nargs="?", type=int, help="of the weights")
    trial = parser.add_argument_group("of a trial")
    trial.add_argument("--hosts", help="that try new weights, with commas between them")
    trial.add_argument("--against", type=int, metavar="V", help="what all others get meanwhile")
    for name, field, kind, words in _RULE:
        trial.add_argument(f"--{name}", dest=field, type=kind, help=words)
    parser.epilog = _EPILOG


def run(options: argparse.Namespace) -> int:
    """Do one of _ACTIONS."""
    from embodied.core.rundir import RunDir
    from embodied.weights.progress import progress
    from embodied.weights.store import WeightStore
    from embodied.weights.trial import Trial

    found, action, version = RunDir(Path(options.run_dir)), options.action, options.version
    if not found.weights.is_dir():
        raise ConfigError(f"{found.path} holds no weights: no run was started there")
    if version is not None and action in _ALONE:
        raise ConfigError(f"{action} takes no version")
    if version is None and action not in (*_ALONE, *_EITHER):
        raise ConfigError(f"{action} which version? Add it")
    fields = {"hosts": "hosts", "against": "against"} | {name: field for name, field, *_ in _RULE}
    for name, field in fields.items():
        if action != "trial" and getattr(options, field) is not None:
            raise ConfigError(f"--{name} belongs to trial, not to {action}")
    if options.against is not None and version is None:
        raise ConfigError("--against V is what a version is compared with: trial which version?")
    store = WeightStore(found.weights)
    trial = Trial(store)
    console = Console(highlight=False)
    if action == "list":
        console.print(_table(store, trial.state()))
    elif action == "show" and version is not None:
        _show(store, version, console)
    elif action == "show":
        stands = progress(trial.state())
        lines = ["no trial goes on"] if stands is None else trial_lines(stands)
        console.print("\n".join(lines), soft_wrap=True)
    elif action == "stop":
        trial.stop()
        console.print("Robots get the newest weights again.")
    elif action == "trial":
        console.print(_tried(found, trial, options), soft_wrap=True)
    elif version is not None:
        console.print(_changed(trial, action, version), soft_wrap=True)
    return 0


def _tried(run: RunDir, trial: Trial, options: argparse.Namespace) -> str:
    """Start a trial on hosts that the run's gateway knows."""
    from embodied.run.site.status import read_status

    hosts = tuple(filter(None, (options.hosts or "").split(",")))
    if not hosts:
        raise ConfigError("a trial needs hosts that try the new weights: --hosts NAME,NAME")
    known = [host.name for host in read_status(run.path).hosts]
    for host in hosts:
        if host not in known:
            raise unknown("host of this run", host, known)
    if set(hosts) == set(known):
        raise ConfigError(
            f"{', '.join(hosts)}: these are all hosts of the run; leave at least one out, whose "
            "episodes with other weights are what the new ones are compared with"
        )
    started = trial.start(_rule(hosts, options), options.version, options.against)
    names = ", ".join(hosts)
    if started is None:
        return f"Newer weights are tried on {names} first."
    copy = "" if started == options.version else f", as version {started}"
    return f"Version {options.version} is on trial{copy}, on {names}."


def _rule(hosts: tuple[str, ...], options: argparse.Namespace) -> TrialRule:
    from embodied.core.config import convert
    from embodied.weights.trial import TrialRule

    given = {field: getattr(options, field) for _, field, _, _ in _RULE}
    chosen = {field: value for field, value in given.items() if value is not None}
    return convert({"canaries": hosts, **chosen}, TrialRule)


def _changed(trial: Trial, action: str, version: int) -> str:
    if action == "pin":
        held = trial.pin(version)
        copy = "" if held == version else f" They get it as version {held}."
        return f"Robots stay with version {version} until it is unpinned.{copy}"
    if action == "rollback":
        return f"Version {version} is published again as version {trial.rollback(version).version}."
    trial.unpin(version)
    return "Robots get the newest weights again."


def _table(store: WeightStore, state: TrialState) -> Table:
    numbers = ("version", "step", "size", "base")
    columns = [Column(name, justify="right", no_wrap=True) for name in numbers]
    table = Table(*columns, Column("sha256", no_wrap=True), "pinned", "state", box=None)
    pinned, newest = store.pinned(), store.latest_version()
    acting = state.held or state.champion or newest
    for version in store.versions():
        try:
            manifest = store.manifest(version)
        except CorruptDataError:
            table.add_row(str(version), "", "", "", "", "", _coloured("damaged"))
            continue
        step = manifest.metadata.get("step", "–")
        words = _state(version, state, acting)
        rolled = manifest.metadata.get("rollback_of")
        if rolled is not None:
            words = f"{words}, {rolled} again" if words else f"{rolled} again"
        table.add_row(
            str(version),
            str(step),
            f"{manifest.num_bytes / 1e6:.1f} MB",
            "–" if manifest.base is None else str(manifest.base),
            manifest.sha256[:12],
            "yes" if version in pinned else "",
            words,
        )
    return table


def _state(version: int, state: TrialState, acting: int | None) -> str:
    if version == state.held:
        return _coloured("held")
    if version == acting:
        return _coloured("acting")
    if version == state.challenger:
        count = state.challenger_count
        return f"{_coloured('on trial')}: {count.successes} of {count.episodes} succeeded"
    return "rejected" if version in state.rejected else ""


def _coloured(word: str) -> str:
    return f"[{_COLOURS[word]}]{word}[/]"


def _show(store: WeightStore, version: int, console: Console) -> None:
    arrays, manifest = store.load(version)
    console.print_json(msgspec.json.encode(manifest).decode())
    table = Table("tensor", "type", "shape", Column("bytes", justify="right"), box=None)
    for name, array in arrays.items():
        shape = "×".join(map(str, array.shape)) or "scalar"
        table.add_row(escape(name), str(array.dtype), shape, str(array.nbytes))
    console.print(table)
