"""A lease that is kept in the background."""

import time

import pytest
from pooling import arm

from embodied.core.errors import LeaseError
from hal.pool.holding import Holding
from hal.pool.pool import Pool


def until(true, timeout_s=10.0):
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_holding_renews_and_gives_back(tmp_path):
    with Pool(tmp_path / "pool.sqlite") as pool:
        pool.register(arm("a"))
        with Holding(pool, "h", "arm", ttl_s=2.0) as held:
            first = held.allocation.expires_ns
            until(lambda: held.allocation.expires_ns > first)
            assert held.lost == ""
            assert [device.id for device in held.devices] == ["a"]
            assert pool.devices()[0].holder == "h"
        assert held.lost == "it was given back" and not pool.devices()[0].holder
        with pytest.raises(ValueError, match="mine"), Holding(pool, "h", "arm"):
            raise ValueError("mine")
        assert not pool.devices()[0].holder


def test_holding_notices_a_loss(tmp_path):
    reasons = []
    with Pool(tmp_path / "pool.sqlite") as pool:
        pool.register(arm("a"))
        with Holding(pool, "h", "arm", ttl_s=1.5, on_lost=reasons.append) as held:
            pool.remove("a")
            until(lambda: reasons)
            assert "taken out of the pool" in held.lost and reasons == [held.lost]


def test_holding_knows_that_time_is_up_even_if_its_thread_slept(pool, clock):
    pool.register(arm("a"))
    with pytest.raises(LeaseError, match="holds nothing yet"):
        _ = Holding(pool, "h", "arm").devices
    with Holding(pool, "h", "arm", ttl_s=10) as held:
        assert held.lost == ""
        clock.tick(10.5)
        assert held.lost == "the lease ended 0.5 s ago and could not be renewed in time"


def test_holding_tries_again_while_the_pool_is_busy(tmp_path):
    path = tmp_path / "pool.sqlite"
    with Pool(path, busy_s=0.02) as pool, Pool(path) as other:
        pool.register(arm("a"))
        with Holding(pool, "h", "arm", ttl_s=1.5) as held:
            first = held.allocation.expires_ns
            with other._file.transaction():
                time.sleep(0.7)
            assert held.lost == ""
            until(lambda: held.allocation.expires_ns > first)
            assert held.lost == ""
            with other._file.transaction():
                time.sleep(1.6)
            assert held.lost and not pool.devices()[0].holder
