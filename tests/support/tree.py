"""The product's tracked files, and the calls in them by full name."""

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("embodied", "hal", "sim", "policies", "deploy", "benchmarks", "configs")


@cache
def tracked() -> tuple[str, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *PACKAGES], cwd=ROOT, capture_output=True, check=True, text=True
    )
    return tuple(sorted(filter(None, listed.stdout.split("\0"))))


@cache
def trees() -> tuple[tuple[str, ast.Module], ...]:
    names = [name for name in tracked() if name.endswith(".py")]
    return tuple((name, ast.parse((ROOT / name).read_text())) for name in names)


def name_of(node: ast.expr) -> str:
    """'a.b.c' of a name with attributes; what is not one becomes '?'."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def imported(tree: ast.Module) -> dict[str, str]:
    """What names mean: alias → full name, of all imports in a file."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


@cache
def calls(tree: ast.Module) -> tuple[tuple[ast.Call, str], ...]:
    """Every call with the full name of what is called."""
    meaning = imported(tree)
    found: list[tuple[ast.Call, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = name_of(node.func).partition(".")
            found.append((node, meaning.get(first, first) + dot + rest))
    return tuple(found)
