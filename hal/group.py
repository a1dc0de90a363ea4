"""Several devices as one, with a leading batch axis and a row mask."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from embodied.core.errors import SpecError
from embodied.core.frames import Chunk, Frame, Ticket
from hal.commander import Leasable


class Opens(Protocol):
    """A device that is not open yet."""

    def open(self) -> Leasable:
        """Open it."""
        ...


class DeviceGroup:
    """Rows of devices with equal specs: vectorised simulation, or several arms as one.

    mask [B]: rows that take part in a call; the others are left alone.
    """

    def __init__(self, devices: Sequence[Leasable]) -> None:
        if not devices:
            raise SpecError("a device group needs at least one device")
        for device in devices[1:]:
            if device.spec != devices[0].spec:
                raise SpecError(
                    f"{device.info.id} and {devices[0].info.id} have different specs; "
                    "a group needs equal ones"
                )
        self.devices = tuple(devices)
        self.spec = devices[0].spec

    def __len__(self) -> int:
        return len(self.devices)

    def submit(self, chunks: Sequence[Chunk | None]) -> list[Ticket | None]:
        """Submit one chunk a row; None leaves a row alone."""
        return [
            None if chunk is None else device.submit(chunk)
            for device, chunk in zip(self.devices, chunks, strict=True)
        ]

    def advance(self, until_ticks: Sequence[int], mask: np.ndarray) -> None:
        """Advance the masked rows, each to its own tick."""
        for device, tick, active in zip(self.devices, until_ticks, mask, strict=True):
            if active:
                device.advance(int(tick))

    def frames(self, since_ticks: Sequence[int], mask: np.ndarray) -> list[list[Frame]]:
        """Frames of the masked rows, each since its own tick; [] for the others."""
        return [
            device.frames(int(tick)) if active else []
            for device, tick, active in zip(self.devices, since_ticks, mask, strict=True)
        ]

    def close(self) -> None:
        """Close every device."""
        for device in self.devices:
            device.close()


def make_group(make_device: Callable[[int], Opens], rows: int) -> DeviceGroup:
    """Open `rows` devices; those already open are closed again if one fails."""
    devices: list[Leasable] = []
    try:
        for row in range(rows):
            devices.append(make_device(row).open())
        return DeviceGroup(devices)
    except BaseException:
        for device in devices:
            device.close()
        raise
