"""Pictures of a device for people: bounded in size, drawn while the device goes on."""

from contextlib import AbstractContextManager

import numpy as np

from embodied.core.errors import ConfigError
from embodied.core.protocols import Driver, Renders, Snapshots

LONGEST_SIDE = 1024
"""Pixels that a picture may have at most, each way."""


def check_size(width: int, height: int) -> None:
    """Raise ConfigError for a picture that no device draws."""
    if not (1 <= width <= LONGEST_SIDE and 1 <= height <= LONGEST_SIDE):
        raise ConfigError(
            f"a picture of {width} x {height} pixels was asked for; each side must be 1 to "
            f"{LONGEST_SIDE}"
        )


def draw(
    driver: Driver,
    bus: AbstractContextManager[object],
    width: int,
    height: int,
    *,
    meanwhile: bool,
) -> np.ndarray | None:
    """Picture [height, width, 3], uint8; None if the driver cannot draw itself.

    bus: held while the driver is used. meanwhile: the device's time does not wait, so that the
    bus must not be held while a picture is drawn, where the driver can do that.
    """
    check_size(width, height)
    with bus:
        if not (meanwhile and isinstance(driver, Snapshots)):
            return driver.render(width, height) if isinstance(driver, Renders) else None
        picture = driver.snapshot(width, height)
    return picture()
