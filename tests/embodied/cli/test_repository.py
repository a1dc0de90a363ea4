"""Promises about the tree itself."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGES = ("embodied", "hal", "sim", "policies", "deploy", "benchmarks")


def sources():
    for package in PACKAGES:
        yield from (ROOT / package).rglob("*.py")


def test_files_stay_short():
    long = {str(p): n for p in sources() if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_the_lock_pins_every_package_by_hash_and_names_no_registry():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and "index" not in re.sub(r"[\w-]*index[\w-]*==", "", text)
    entries = re.split(r"\n(?=\S)", text.strip())
    for entry in entries:
        assert re.match(r"^[a-zA-Z0-9._-]+(\[[a-z0-9,-]+\])?==\S+", entry), entry[:80]
        assert "--hash=sha256:" in entry, entry[:80]
    for name in ("torch==2.10.0", "mujoco==3.3.0", "robosuite==1.5.1", "lerobot==0.4.4"):
        assert f"\n{name}" in text


def test_every_command_in_the_readme_exists():
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "data.md").read_text()
    commands = set(re.findall(r"^    embodied (\w+)", text, re.MULTILINE))
    from embodied.cli.main import _COMMANDS

    assert commands and commands <= set(_COMMANDS)
    targets = set(re.findall(r"`?make ([a-z-]+)`?", text))
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
