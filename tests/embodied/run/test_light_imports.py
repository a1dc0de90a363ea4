"""What only reads a run's configuration does not load torch, which takes seconds."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers")

SHOW = """
from embodied.cli.main import main
assert main(["train", "--show", "task=pointmass"]) == 0
"""
SPECS = """
import embodied.run.loader, embodied.run.local
from embodied.run import build
from embodied.run.config import load_train
config = load_train(["task=pointmass", "policy=diffusion", "policy/network=unet1d"])
assert build.window_spec(config).horizon == build.policy_spec(config).horizon
build.make_algorithm(config.algorithm)
"""
OPTIONS = """
from embodied.core.registry import OPTIONS, config_type
for kind, rows in OPTIONS.items():
    for name in rows:
        config_type(kind, name)
"""
TASKS = """
from embodied.run.config import load_train
for task in ("metaworld/reach", "robosuite/Lift", "so101/reach"):
    load_train([f"task={task}"])
"""


@pytest.mark.parametrize(
    "code", [SHOW, SPECS, OPTIONS, TASKS], ids=["show", "specs", "options", "tasks"]
)
def test_what_reads_a_configuration_does_not_load_torch(code):
    code += f"import sys; assert not {set(HEAVY)} & sys.modules.keys()"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.returncode == 0, child.stderr
