"""What a check of a host found."""

from typing import Literal

import msgspec

State = Literal["ok", "warning", "failure"]


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a table. fix: what to do about it, "" where nothing is to be done."""

    name: str
    state: State
    text: str
    fix: str = ""


def ok(name: str, text: str) -> Finding:
    """As it should be."""
    return Finding(name, "ok", text)


def warning(name: str, text: str, fix: str) -> Finding:
    """Something works less well, or not at all that may not be needed."""
    return Finding(name, "warning", text, fix)


def failure(name: str, text: str, fix: str) -> Finding:
    """Something that is needed does not work."""
    return Finding(name, "failure", text, fix)


def failed(findings: list[Finding]) -> bool:
    """Whether something that is needed does not work."""
    return any(finding.state == "failure" for finding in findings)
