"""Tables of `embodied buffer info`."""

from rich.console import Console
from rich.table import Table

from embodied.buffer.upkeep.summary import Summary, Totals

_SHOWN = 40


def show_summary(console: Console, summary: Summary) -> None:
    """Print what a buffer holds."""
    total = summary.total
    console.print(
        f"{summary.path}: {_size(summary.nbytes)}, {summary.segments} segments "
        f"({summary.open_segments} open)",
        markup=False,
    )
    console.print(
        f"{total.steps} steps, {total.closed} complete episodes ({total.successes} successful), "
        f"{summary.unfinished} unfinished, {summary.deleted} deleted"
    )
    for name, groups in (("stream", summary.streams), ("task", summary.tasks)):
        console.print(_totals(name, groups))
    for schema in summary.schemas:
        console.print(f"streams {_listed(schema.streams)} record", markup=False)
        table = Table("array", "type", "shape", "codec", box=None, padding=(0, 2))
        for name, feature in schema.features.items():
            shape = "×".join(map(str, feature.shape)) or "scalar"
            table.add_row(name, feature.dtype, shape, feature.codec)
        console.print(table)
    if summary.policy_versions:
        shown = [f"{v}: {n}" for v, n in list(summary.policy_versions.items())[-_SHOWN:]]
        more = "… " if len(summary.policy_versions) > _SHOWN else ""
        console.print(f"steps by policy version (-1: none): {more}{', '.join(shown)}")
    for place in summary.damaged:
        console.print(f"damaged: {place.file} at byte {place.offset}", style="bold red")
    if summary.damaged:
        console.print("embodied buffer verify names the episodes that lost steps")


def _totals(name: str, groups: dict[str, Totals]) -> Table:
    table = Table(name, box=None, padding=(0, 1))
    for header in ("episodes", "complete", "success", "steps", "expert", "versions"):
        table.add_column(header, justify="right")
    for key, totals in list(groups.items())[:_SHOWN]:
        numbers = (totals.episodes, totals.closed, totals.successes, totals.steps)
        versions = totals.policy_versions
        acted = "–" if versions in (None, (-1, -1)) else "{}–{}".format(*versions or ())
        table.add_row(key or "–", *map(str, numbers), str(totals.interventions), acted)
    if len(groups) > _SHOWN:
        table.add_row(f"and {len(groups) - _SHOWN} more (see --json)")
    return table


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
