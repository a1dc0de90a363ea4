"""embodied site."""

import argparse
import time
from pathlib import Path
from typing import Any

_LINE_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def run(options: argparse.Namespace) -> int:
    """Join a run, act for it, deliver everything; print what changes."""
    from rich.console import Console

    from deploy.agent import stop_signals
    from embodied.core import config as core_config
    from embodied.run.site.config import SiteConfig
    from embodied.run.site.host import run_site
    from embodied.run.tasks import label_of

    composed = core_config.compose("site", options.overrides)
    config = core_config.convert(composed, SiteConfig)
    console = Console(highlight=False, markup=False)
    said = _Lines(console)

    def joined(run: Any, theirs: Any) -> None:
        console.print(f"acting for {run.path.name}: {label_of(theirs.task)}  →  {_short(run.path)}")

    found = run_site(config, stop_signals(), said.waiting, joined, said.roles)
    if found is None:
        console.print("stopped before a gateway was reached")
        return 130
    last = said.values.get("link", {})
    if last.get("over") and not last.get("spooled"):
        console.print("the run is over, and everything is delivered")
        return 0
    console.print(
        f"stopped; {last.get('spooled') or 0} steps are not delivered yet and lie in "
        f"{_short(found.path)}: the same command goes on"
    )
    return 130


class _Lines:
    """Prints a line when something changed, and one now and then."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._why = ""
        self._state: tuple[Any, ...] = ()
        self._line_s = 0.0
        self.values: dict[str, dict[str, Any]] = {}

    def waiting(self, why: str) -> None:
        """Say once why there is no answer yet."""
        if why != self._why:
            self._why = why
            self._console.print(f"waiting for {why}")

    def roles(self, values: dict[str, dict[str, Any]]) -> None:
        """Say how link and actors are."""
        self.values = values
        link = values.get("link", {})
        actors = [v for name, v in values.items() if name.startswith("actor")]
        faults = sorted({str(v["fault"]) for v in values.values() if v.get("fault")})
        state = (link.get("state"), link.get("over"), *faults)
        now_s = time.monotonic()
        if state == self._state and now_s - self._line_s < _LINE_S:
            return
        self._state, self._line_s = state, now_s
        episodes = sum(int(v.get("episodes") or 0) for v in actors)
        parts = [str(link.get("state") or "starting"), f"weights v{link.get('version') or 0}"]
        parts += [f"{episodes} episodes", f"{link.get('spooled') or 0} steps to deliver"]
        self._console.print("  ".join(parts + faults), soft_wrap=True)


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
