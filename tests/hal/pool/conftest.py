"""A pool in a file of its own, on a clock that the test moves."""

import pytest
from pooling import FakeClock

from hal.pool.pool import Pool


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def pool(tmp_path, clock):
    with Pool(tmp_path / "pool.sqlite", clock=clock) as opened:
        yield opened
