"""The table of what checks of a host found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from deploy.findings import Finding

_SHOWN = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "failure": "[bold red]failure[/]"}


def table(findings: list[Finding]) -> Table:
    """One line each, with the remedy below what is not as it should be."""
    shown = Table(Column("", no_wrap=True), "", Column("", overflow="fold"), box=None)
    for finding in findings:
        text = escape(finding.text)
        if finding.fix:
            text += f"\n[dim]→ {escape(finding.fix)}[/]"
        shown.add_row(_SHOWN[finding.state], escape(finding.name), text)
    shown.show_header = False
    return shown
