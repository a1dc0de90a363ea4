"""Simulated cameras that are slower than their robots."""

import numpy as np
import pytest

from embodied.core.errors import ConfigError
from sim import family
from sim.family import SimConfig

TOP = "observation.images.top"


def seen(ticks, picture_ticks):
    """The observations of a point that goes right, from a reset on, and its picture's spec."""
    found, task = family.find("pointmass")
    driver = found.make_driver(
        task, SimConfig(cameras=("top",), image_size=64, picture_ticks=picture_ticks)
    )
    driver.open()
    driver.step_time()
    driver.reset(1)
    observations = [driver.sense()]
    for _ in range(ticks):
        driver.drive(np.array([1.0, 0.0], np.float32))
        driver.step_time()
        observations.append(driver.sense())
    return observations, driver.spec


def test_between_two_pictures_the_last_one_stays_and_the_state_goes_on():
    every, spec = seen(7, 1)
    slow, slower = seen(7, 3)
    for tick, (fresh, kept) in enumerate(zip(every, slow, strict=True)):
        assert np.array_equal(kept[TOP], every[tick - tick % 3][TOP])
        assert np.array_equal(kept["observation.state"], fresh["observation.state"])
    assert not np.array_equal(every[2][TOP], every[0][TOP])
    assert spec.observation[TOP].rate_hz is None
    assert slower.observation[TOP].rate_hz == pytest.approx(slower.tick_hz / 3)


def test_a_camera_without_pictures_is_refused():
    with pytest.raises(ConfigError, match=r"sim.picture_ticks is 0"):
        SimConfig(picture_ticks=0)
