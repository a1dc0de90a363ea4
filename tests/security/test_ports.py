"""Every port under attack: it says no, keeps its memory, lives, and serves the honest after it."""

import tempfile
from pathlib import Path

import hostile
import pytest
import striking
from footprint import Footprint
from ports import PORTS, Opened

MOST_GROWTH_MIB = 96
"""Of a process's memory at its height, above what it had before: some messages and their copies,
and far less than any of the bombs or lies would take."""


@pytest.fixture(scope="module")
def groups():
    with tempfile.TemporaryDirectory(prefix="p") as place:
        opened: dict[str, Opened] = {}

        def group(name):
            if name not in opened:
                folder = Path(place) / name
                folder.mkdir()
                opened[name] = Opened(name, folder)
            return opened[name]

        yield group
        for each in opened.values():
            each.close()


def names():
    """Of all ports; a policy takes long to load."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if port.group == "policy" else [])
        for name, port in PORTS.items()
    ]


@pytest.mark.parametrize("name", names())
def test_a_port_refuses_what_is_hostile_and_goes_on(groups, name, tmp_path):
    port = PORTS[name]
    process = groups(port.group)
    address = process.address(name)
    canary = tmp_path / "canary"
    assert striking.serves(port, address, process.folder, 1)
    memory = Footprint(process.process.pid)
    striking.raw(address, hostile.streams(canary))
    header = port.honest or PORTS["buffer"].honest
    answers = striking.strike(port, address, hostile.messages(header, canary))
    for what, answer in answers.items():
        if answer is not None:
            assert len(answer) > 40 and "Error: " in answer, (what, answer)
    assert port.wire not in ("requests", "link") or None not in answers.values()
    assert striking.serves(port, address, process.folder, 2), process.log.read_text()
    assert not canary.exists()
    assert process.alive, process.log.read_text()
    assert memory.growth_mib < MOST_GROWTH_MIB
