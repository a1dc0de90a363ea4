"""embodied buffer."""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from embodied.cli.buffer_options import (
    ACTIONS,
    Compact,
    Export,
    Import,
    Info,
    Merge,
    Names,
    Split,
    Verify,
    convert,
    parse,
)

_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="key=value", help="its options, see below"
    )
    parser.add_argument("--json", action="store_true", help="info, verify: print JSON")
    lines = ["actions and their keys:"]
    for name, (kind, text) in ACTIONS.items():
        lines += [f"  {name:8} {text}", f"           {' '.join(kind.__struct_fields__)}"]
    lines += ["", "  embodied buffer export path=runs/demos to=demos-lerobot fps=10"]
    lines += ["  embodied buffer import format=lerobot path=demos-lerobot to=runs/imported"]
    parser.epilog = "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Do one of ACTIONS."""
    from embodied.core.errors import ConfigError

    if {"-h", "--help"}.intersection(options.options):
        kind, text = ACTIONS[options.action]
        print(f"embodied buffer {options.action}: {text}\n\n{kind.__doc__}")  # noqa: T201
        return 0
    words = [word for word in options.options if word != "--json"]
    as_json = options.json or len(words) < len(options.options)
    if as_json and options.action not in ("info", "verify"):
        raise ConfigError("--json goes with info and verify")
    given = parse(words)
    kind = ACTIONS[options.action][0]
    rest = {}
    if kind is Import:  # all keys that are not its own are the data set's
        rest = {key: given.pop(key) for key in list(given) if key not in kind.__struct_fields__}
    typed = convert(given, kind, options.action)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if isinstance(typed, Import):
        return _import(typed, rest, console)
    run_one = {
        Info: _info,
        Verify: _verify,
        Merge: _merge,
        Split: _split,
        Compact: _compact,
        Export: _export,
    }[kind]
    return run_one(typed, console, as_json)


@contextmanager
def _progress(console: Console, text: str, total: int | None) -> Iterator[Any]:
    """A bar; yields a function that advances it by some units (1 without an argument)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(text, total=total)
        yield lambda units=1: progress.advance(task, units)


def _info(options: Info, console: Console, as_json: bool) -> int:
    from embodied.buffer.upkeep.summary import summarise
    from embodied.cli.buffer_tables import show_summary

    summary = summarise(Path(options.path))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(summary)).decode())  # noqa: T201
    else:
        show_summary(console, summary)
    return 0


def _verify(options: Verify, console: Console, as_json: bool) -> int:
    from embodied.buffer.upkeep.contents import Contents
    from embodied.buffer.upkeep.maintenance import verify

    path = Path(options.path)
    with _progress(Console(stderr=True), "reading", Contents(path).nbytes or None) as advance:
        report = verify(path, on_bytes=advance)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())  # noqa: T201
        return int(not report.ok)
    for finding in report.findings:
        console.print(str(finding), style="bold red" if finding.is_damage else "", markup=False)
    verdict = "nothing is lost" if report.ok else "data are lost"
    console.print(
        f"{report.segments} segments, {report.closed} complete episodes of {report.episodes}, "
        f"{report.steps} steps: {verdict}"
    )
    return int(not report.ok)


def _steps(paths: Sequence[Path]) -> int:
    """Records to be copied, for a bar."""
    from embodied.buffer.upkeep.contents import Contents

    contents = (Contents(path) for path in paths if path.is_dir())
    return sum(len(episode.index) for found in contents for episode in found.episodes.values())


def _merge(options: Merge, console: Console, _: bool) -> int:
    from embodied.buffer.upkeep.maintenance import merge

    sources = [Path(source) for source in _many(options.sources)]
    with _progress(console, "copying", _steps(sources)) as advance:
        copied = merge(
            sources,
            Path(options.to),
            drop_damaged=options.drop_damaged,
            segment_bytes=options.segment_mib * _MIB,
            on_step=advance,
        )
    return _report(console, copied, options.to)


def _split(options: Split, console: Console, _: bool) -> int:
    from embodied.buffer.upkeep.maintenance import split

    with _progress(console, "copying", _steps([Path(options.path)])) as advance:
        chosen, rest = split(
            Path(options.path),
            Path(options.to),
            _selection(options),
            rest=None if options.rest is None else Path(options.rest),
            drop_damaged=options.drop_damaged,
            segment_bytes=options.segment_mib * _MIB,
            on_step=advance,
        )
    _report(console, chosen, options.to)
    return 0 if rest is None else _report(console, rest, options.rest or "")


def _compact(options: Compact, console: Console, _: bool) -> int:
    from embodied.buffer.upkeep.contents import Contents
    from embodied.buffer.upkeep.maintenance import compact

    path = Path(options.path)
    before = Contents(path).nbytes
    with _progress(console, "copying", _steps([path])) as advance:
        copied = compact(
            path,
            drop_damaged=options.drop_damaged,
            segment_bytes=options.segment_mib * _MIB,
            on_step=advance,
        )
    console.print(f"{before / 1e6:.1f} MB → {copied.nbytes / 1e6:.1f} MB")
    return _report(console, copied, options.path)


def _report(console: Console, copied: Any, target: str) -> int:
    for name in copied.dropped:
        console.print(f"left out, as it is damaged: {name}", style="bold red", markup=False)
    again = f", {copied.duplicates} were there already" if copied.duplicates else ""
    console.print(f"{copied.episodes} episodes, {copied.steps} steps{again} → {target}")
    return 0


def _export(options: Export, console: Console, _: bool) -> int:
    from embodied.buffer.interchange.lerobot_export import export
    from embodied.buffer.interchange.recording import closed_episodes
    from embodied.buffer.upkeep.contents import Contents

    contents = Contents(Path(options.path))
    chosen = closed_episodes(
        contents, _selection(options), successful=options.successful, limit=options.limit
    )
    total = sum(episode.steps + options.final for episode in chosen)
    with _progress(console, "exporting", total) as advance:
        episodes, frames = export(
            contents,
            chosen,
            Path(options.to),
            fps=options.fps,
            images=options.images,
            final=options.final,
            on_step=advance,
        )
    console.print(f"{episodes} episodes, {frames} frames → {options.to}")
    return 0


def _import(options: Import, rest: dict[str, Any], console: Console) -> int:
    from embodied.buffer.serve.sink import LocalBuffer
    from embodied.core import config
    from embodied.run.record import import_dataset

    made, typed = config.component("datasets", {"name": options.format, **rest}, options.format)
    dataset = made(typed)
    episodes = dataset.episodes(options.limit)
    first = list(itertools.islice(episodes, 1))  # before a folder is made for it
    sizes = [
        n for n in (options.limit, getattr(dataset, "__len__", lambda: None)()) if n is not None
    ]
    target = Path(options.to)
    with (
        LocalBuffer(
            target, codecs=options.codecs, segment_bytes=options.segment_mib * _MIB
        ) as sink,
        _progress(console, "importing", min(sizes, default=None)) as advance,
    ):
        before = sink.counts()
        count, steps = import_dataset(sink, _counted(itertools.chain(first, episodes), advance))
        after = sink.counts()
    new = after.episodes - before.episodes
    known = "" if new == count else f" ({count - new} episodes were there already)"
    console.print(f"imported {count} episodes, {steps} steps{known} → {options.to}")
    return 0


def _counted(episodes: Iterator[Any], advance: Any) -> Iterator[Any]:
    for episode in episodes:
        yield episode
        advance()


def _selection(options: Split | Export) -> Any:
    from embodied.buffer.upkeep.maintenance import Selection

    numbers = options.episodes
    return Selection(
        streams=_many(options.streams),
        tasks=_many(options.tasks),
        episodes=(numbers,) if isinstance(numbers, int) else numbers,
    )


def _many(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names
