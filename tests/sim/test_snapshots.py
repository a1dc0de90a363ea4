"""A picture that is drawn later shows what was to be seen when it was asked for."""

import numpy as np
import pytest

from embodied.core.errors import DeviceLostError
from embodied.core.protocols import Renders, Snapshots
from sim import family
from sim.driver import Simulated
from sim.family import SimConfig

TASKS = [
    "so101/reach",
    "metaworld/reach",
    pytest.param("robosuite/Lift", marks=pytest.mark.slow),
    "pointmass",
]


@pytest.mark.parametrize("task", TASKS)
def test_a_snapshot_is_the_picture_of_its_moment(task):
    if task not in family.task_names():
        pytest.skip(f"the simulator of {task} is not installed")
    driver = Simulated(Simulated.Config(task, SimConfig()))
    assert isinstance(driver, Renders) and isinstance(driver, Snapshots)
    driver.open()
    driver.reset(3)
    before = driver.render(120, 90)
    draw = driver.snapshot(120, 90)
    _, high = driver.spec.action.bounds()
    for _ in range(20):
        driver.drive(high.astype(np.float32))
        driver.step_time()
    after = driver.render(120, 90)
    assert (after != before).any()
    assert np.mean(draw() != before) < 0.01
    late = driver.snapshot(120, 90)
    driver.close()
    if task != "pointmass":
        with pytest.raises(DeviceLostError, match="closed"):
            late()
