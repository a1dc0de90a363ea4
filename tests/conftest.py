"""Shared fixtures."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent / "support"))

import pytest
from point import PointDriver, RealPointDriver


@pytest.fixture
def point_driver() -> PointDriver:
    return PointDriver()


@pytest.fixture
def real_point_driver() -> RealPointDriver:
    return RealPointDriver()
