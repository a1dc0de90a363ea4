"""Shared fixtures."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["EMBODIED_STATE"] = tempfile.mkdtemp(prefix="embodied-test-")
sys.path.insert(0, str(Path(__file__).parent / "support"))

import pytest
from opengl import needs_opengl  # noqa: F401 - before a simulator sets MUJOCO_GL
from point import PointDriver, RealPointDriver

if TYPE_CHECKING:
    from host import Host

atexit.register(shutil.rmtree, os.environ["EMBODIED_STATE"], ignore_errors=True)


@pytest.fixture
def point_driver() -> PointDriver:
    return PointDriver()


@pytest.fixture
def real_point_driver() -> RealPointDriver:
    return RealPointDriver()


@pytest.fixture
def host(tmp_path, monkeypatch) -> Iterator["Host"]:
    """A robot host with a state directory of its own."""
    from host import Host

    monkeypatch.setenv("EMBODIED_STATE", str(tmp_path / "state"))
    (tmp_path / "state").mkdir()
    made = Host(tmp_path)
    yield made
    made.close()
