"""Values that a command cannot do without: the error names them, and one that would be right."""

import pytest

from embodied.cli.main import main
from embodied.core.config import compose
from embodied.core.errors import ConfigError


@pytest.fixture
def said(monkeypatch, tmp_path, capsys):
    """Runs a command that must fail; what it said, on one line."""
    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path))

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        return " ".join(capsys.readouterr().err.split())

    return run


def test_a_scripted_teleoperator_without_a_task_is_told_what_to_add(said):
    error = said("teleop", "device=left", "teleoperator=scripted")
    assert "no task is named: add teleoperator.task=so101/reach" in error
    assert "Interpolation" not in error


def test_a_task_that_the_command_names_is_the_scripts(monkeypatch):
    composed = compose("record", ["device=left", "teleoperator=scripted", "task=so101/reach"])
    assert composed["teleoperator"]["task"] == "so101/reach"
    composed = compose("record", ["device=left", "teleoperator=scripted", "robot_task=pick_place"])
    assert composed["teleoperator"]["task"] is None


@pytest.mark.parametrize(
    ("primary", "overrides", "key"),
    [
        ("teleop", [], "device"),
        ("teleop", ["device=left", "teleoperator=so101_leader"], "teleoperator.port"),
        ("agent", ["+robot@robots.left=so101"], "robots.left.driver.port"),
    ],
)
def test_a_mandatory_value_is_named_in_full(primary, overrides, key):
    with pytest.raises(ConfigError, match=f"{key} is missing: add {key}="):
        compose(primary, overrides)
