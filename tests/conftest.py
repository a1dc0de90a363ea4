"""Shared fixtures."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["EMBODIED_STATE"] = tempfile.mkdtemp(prefix="embodied-test-")
sys.path.insert(0, str(Path(__file__).parent / "support"))

import pytest
from point import PointDriver, RealPointDriver

atexit.register(shutil.rmtree, os.environ["EMBODIED_STATE"], ignore_errors=True)


@pytest.fixture
def point_driver() -> PointDriver:
    return PointDriver()


@pytest.fixture
def real_point_driver() -> RealPointDriver:
    return RealPointDriver()
